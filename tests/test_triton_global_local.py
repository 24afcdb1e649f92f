"""`global_local_score` on its Triton kernels: what test_triton_ops.py does not ask of every op."""

import pytest
import torch
from test_global_local_score import case
from triton_cases import Scratch, check_blocks, unless

import itm_fast
from itm_fast.testing import op_checks

pytestmark = [pytest.mark.slow, unless("triton", "cpu")]
DTYPES = [torch.float32, torch.float16]
# Captions of more words than a tile holds, vectors in more than one tile.
SHAPES = {"I2-T3-N104-D20": (2, (2, 101, 1), 20), "I70-T3-N12-D17": (70, (5, 3, 4), 17)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype, shape):
    call, args = case(*shape, scale=7.0)
    op_checks.check_forward(call, args, dtype, "triton")
    op_checks.check_gradients(call, args, dtype, "triton")


def score(vector, captions):
    edge = torch.tensor([0, *(len(c) for c in captions)]).cumsum(0).int()
    return itm_fast.global_local_score(vector, torch.cat(captions), edge, scale=5.0, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_has_the_same_bits_alone_and_in_any_order(dtype, as_matrix_units_add):
    counts = (13, 17, 5, 40, 16, 9, 33, 3, 1)
    _, args = case(5, counts, 24)
    vector, words = (a.to(dtype) for a in args)
    parts = list(words.split(counts))
    whole = score(vector, parts)
    for t, caption in enumerate(parts):
        assert torch.equal(score(vector[3:4], [caption])[0, 0], whole[3, t])
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(score(vector.flip(0), [parts[t] for t in order]), whole[:, order].flip(0))
    with itm_fast.workspace(2.0**-17):
        assert torch.equal(score(vector, parts), whole)


def test_gradients_of_many_pieces_are_those_of_one():
    call, args = case(9, (13, 1, 40, 4, 7), 17, scale=3.0)
    check_blocks(call, args, torch.float32, 2.0**-16, 1e-6)


def test_nan_and_infinity_stay_in_their_pairs():
    call, (vector, words) = case(3, (13, 40, 4), 8)
    vector, words = vector.float(), words.float()
    want = call(vector, words, backend="triton")
    vector[1, 2], words[20] = torch.nan, torch.inf
    found = call(vector, words, backend="triton")
    spoiled = torch.tensor([[False, True, False], [True] * 3, [False, True, False]])
    assert torch.equal(found.isnan(), spoiled)
    assert torch.equal(found[~spoiled], want[~spoiled])


def test_vectors_and_words_of_zeros():
    call, (vector, words) = case(3, (3, 2), 6)
    vector, words = vector.float(), words.float()
    vector[1], words[3:] = 0, 0
    leaves = [vector.requires_grad_(), words.requires_grad_()]
    found = call(*leaves, backend="triton")
    assert not found[1].any()
    assert not found[:, 1].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), leaves))


@pytest.mark.parametrize("backward", [False, True])
def test_scratch_is_bounded(backward, monkeypatch):
    gib, counts = 2.0**-14, (13, 9, 12, 14) * 8
    _, args = case(40, counts, 16)
    vector, words = (a.float() for a in args)
    edge = torch.tensor([0, *counts]).cumsum(0)
    scratch = Scratch(monkeypatch, lambda tensor: tensor.shape in (vector.shape, words.shape))  # the gradients
    with itm_fast.workspace(gib):
        scratch.watch(torch, "empty", "zeros", "empty_like", "zeros_like")
        if backward:
            op = torch.ops.itm_fast.global_local_score_backward
            op(torch.ones(40, 32), [True, True], vector, words, edge, 1.0, "triton")
        else:
            itm_fast.global_local_score(vector, words, edge, backend="triton")
    assert scratch.peak <= gib * 2**30
    assert scratch.peak > gib * 2**30 / 4
