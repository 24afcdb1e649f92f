"""`similarity_context` on its Triton kernels: what test_triton_ops.py does not ask of every op."""

import pytest
import torch
from test_similarity_context import case, edges
from triton_cases import Scratch, check_blocks, unless

import itm_fast
from itm_fast.testing import op_checks

pytestmark = [pytest.mark.slow, unless("triton", "cpu")]
DTYPES = [torch.float32, torch.float16]
# Captions of more words than a program takes at a time, more contexts than 16, more columns than a step takes.
SHAPES = {
    "I2-T3-N104-S20-C18-5": (2, (2, 101, 1), 20, (18, 5)),
    "I1-T2-N40-S130-C3": (1, (33, 7), 130, (3,)),
    "I2-T1-N4-S5-C1-1-1": (2, (4,), 5, (1, 1, 1)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype, shape):
    call, args = case(*shape)
    op_checks.check_forward(call, args, dtype, "triton")
    op_checks.check_gradients(call, args, dtype, "triton")


def bits(overall, local, assignment, counts, sizes):
    """The rows of the result of each caption."""
    result = itm_fast.similarity_context(overall, local, edges(counts), assignment, sizes, backend="triton")
    return result.split([n + 1 + sum(sizes) for n in counts], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_has_the_same_bits_alone_and_in_any_order(dtype, as_matrix_units_add):
    counts, sizes = (13, 17, 5, 40, 16, 9, 33, 3, 1, 8), (4, 1)
    _, args = case(3, counts, 24, sizes)
    overall, local, assignment = (a.to(dtype) for a in args)
    whole, parts = bits(overall, local, assignment, counts, sizes), local.split(counts, 1)
    for t, n in enumerate(counts):
        (alone,) = bits(overall[1:2, t : t + 1].contiguous(), parts[t][1:2].contiguous(), assignment, (n,), sizes)
        assert torch.equal(alone[0], whole[t][1])
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(1)).tolist()
    turned = torch.cat([parts[t] for t in order], 1).flip(0)
    found = bits(overall[:, order].flip(0), turned, assignment, [counts[t] for t in order], sizes)
    for t, rows in zip(order, found):
        assert torch.equal(rows.flip(0), whole[t])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_depend_on_the_blocks_by_rounding_alone(dtype):
    call, args = case(3, (13, 17, 5, 40, 2), 16, (4, 2, 1))
    check_blocks(call, args, dtype, 2e-6, 4 * torch.finfo(dtype).eps, exact=2)


def test_what_is_beside_a_pair_never_leaks():
    call, args = case(2, (13, 17, 5), 16, (4, 1))
    args = [a.float() for a in args]
    outcomes = []
    for spoiled in (False, True):
        leaves = [a.clone() for a in args]
        if spoiled:
            leaves[1][0, 13:30] = float("nan")
        leaves = [a.requires_grad_() for a in leaves]
        nodes = call(*leaves, backend="triton")
        outcomes.append([nodes.detach(), torch.autograd.grad((nodes * op_checks.upstream(nodes)).sum(), leaves)[1]])
    for (clean, found), more in zip(zip(*outcomes), (6, 0)):
        begin, end = 13 + more, 30 + 2 * more  # the second pair's rows
        assert torch.equal(found[1], clean[1])
        assert torch.equal(found[0, :begin], clean[0, :begin])
        assert torch.equal(found[0, end:], clean[0, end:])
        assert found[0, begin + (more > 0) : end].isnan().all()


def test_scratch_of_the_backward_pass_is_bounded(monkeypatch):
    gib, counts, sizes = 2.0**-15, (13, 9, 12, 14) * 3, (4, 2, 1)
    _, args = case(8, counts, 32, sizes)
    args = [*(a.float() for a in args), edges(counts), list(sizes)]
    grad = torch.ones(8, sum(counts) + 8 * len(counts), 32)
    scratch = Scratch(monkeypatch)
    with itm_fast.workspace(gib):
        scratch.watch(torch, "empty_like", "bmm")
        scratch.watch(torch.Tensor, "new_empty")
        found = torch.ops.itm_fast.similarity_context_backward(grad, [True] * 3, *args, "triton")
    results = sum(d.nbytes for d in found[1:2])
    assert scratch.peak - results <= gib * 2**30
    assert scratch.peak - results > gib * 2**30 / 4
