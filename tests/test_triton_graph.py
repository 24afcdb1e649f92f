"""`similarity_graph` on its Triton kernels: what test_triton_ops.py does not ask of every op."""

import pytest
import torch
from itm_fast.kernels import _graph
from test_similarity_score import over_scorers
from triton_cases import Scratch, check_blocks, unless

import itm_fast
from itm_fast.testing import op_checks

pytestmark = [pytest.mark.slow, unless("triton", "cpu")]
DTYPES = [torch.float32, torch.float16]
# images, nodes per caption, S, steps: one node alone, all widths of a caption in a tile, more than one window
SHAPES = {
    "I1-T1-M1-S1-K1": (1, (1,), 1, 1),
    "I2-T2-M4-S11-K2": (2, (3, 1), 11, 2),
    "I3-T11-M205-S32-K3": (3, (14, 5, 20, 9, 33, 17, 16, 2, 64, 13, 12), 32, 3),
    "I2-T4-M182-S20-K2-long": (2, (17, 64, 1, 100), 20, 2),
    "I1-T2-M7-S130-K2": (1, (4, 3), 130, 2),
}


def edges(counts):
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()


def case(I, counts, S, K, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    args = [torch.nn.functional.normalize(draw(I, sum(counts), S), dim=-1)]
    # Enlarged query and key weights: with small ones every node becomes the mean and no test sees the edges.
    for enlarged in (6, 6, 1):
        args += [enlarged * draw(K, S, S) / S**0.5, 0.3 * draw(K, S)]

    def call(*args, backend):
        return itm_fast.similarity_graph(args[0], edges(counts), *args[1:], backend=backend)

    return call, args


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype, shape):
    call, args = case(*shape)
    op_checks.check_forward(call, args, dtype, "triton")
    op_checks.check_gradients(call, args, dtype, "triton")


def bits(args, counts):
    return itm_fast.similarity_graph(args[0], edges(counts), *args[1:], backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_has_the_same_bits_alone_in_any_order_and_in_any_block(dtype, monkeypatch, as_matrix_units_add):
    counts = (13, 17, 5, 64, 33, 70, 16, 9, 40, 3)
    _, args = case(3, counts, 24, 3)
    args = [a.to(dtype) for a in args]
    whole = bits(args, counts)
    nodes, weights = args[0].split(counts, 1), args[1:]
    for t, n in enumerate(counts):
        assert torch.equal(bits([nodes[t][1:2].contiguous(), *weights], (n,))[0, 0], whole[1, t])
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(1)).tolist()
    turned = torch.cat([nodes[t] for t in order], 1).flip(0)
    assert torch.equal(bits([turned, *weights], [counts[t] for t in order]), whole[:, order].flip(0))
    monkeypatch.setattr(_graph, "WINDOW", 64)
    assert torch.equal(bits(args, counts), whole)
    with itm_fast.workspace(1e-5):
        assert torch.equal(bits(args, counts), whole)


def test_gradients_depend_on_the_blocks_by_rounding_alone():
    call, args = case(3, (13, 17, 5, 64, 33, 70), 16, 3)
    check_blocks(call, args, torch.float32, 2e-5, 1e-4)


@pytest.mark.parametrize("gib", [1e-3, 4e-5])
def test_scratch_is_bounded(gib, monkeypatch):
    counts = (14, 5, 20, 9, 13, 13) * 3
    call, args = case(4, counts, 16, 3)
    args = [a.float().requires_grad_() for a in args]
    taken = []
    real = torch.empty

    def spy(*shape, **options):
        taken.append(real(*shape, **options))
        return taken[-1]

    with itm_fast.workspace(gib):
        monkeypatch.setattr(torch, "empty", spy)
        call(*args, backend="triton")
    largest = max(x.nbytes for x in taken)
    assert largest <= gib * 2**30 / 2
    assert len(taken) > 6 or gib == 1e-3


def test_a_caption_that_fits_no_tile_is_refused():
    call, args = case(1, (3, 129), 4, 2)
    with pytest.raises(ValueError, match=r'caption 1 has 129 nodes, and .* at most 128; use backend="torch"'):
        call(*(a.float() for a in args), backend="triton")
    call, args = case(1, (3, 129), 4, 1)  # one step is the read-out alone, which takes all
    op_checks.check_forward(call, args, torch.float32, "triton")


def test_what_is_beside_a_pair_never_leaks():
    counts = (13, 17, 5)
    call, args = case(2, counts, 16, 3)
    args = [a.float() for a in args]
    want = call(*args, backend="triton")
    args[0][0, 13:30] = float("nan")
    found = call(*args, backend="triton")
    assert torch.equal(found[:, ::2], want[:, ::2])
    assert torch.equal(found[1], want[1])
    assert found[0, 1].isnan().all()


@over_scorers
def test_scratch_of_the_scorers_is_bounded(scorer, monkeypatch):
    gib = 2.0**-13
    call, args = scorer.case(8, (13, 9, 12, 14) * 2, 9, 16, 32)
    args = [a.float() for a in args]
    scratch = Scratch(monkeypatch)
    with itm_fast.workspace(gib):
        scratch.watch(torch, "empty")
        scratch.watch(torch.Tensor, "new_empty")
        call(*args, backend="triton")
    assert scratch.peak <= gib * 2**30 + 8 * 8 * 4  # and the scores
    assert scratch.peak > gib * 2**30 / 4
