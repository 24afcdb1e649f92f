"""`similarity_filter` on its Triton kernels: what test_triton_ops.py does not ask of every op."""

import pytest
import torch
from test_triton_graph import DTYPES, edges
from triton_cases import unless

import itm_fast
from itm_fast.testing import op_checks

pytestmark = [pytest.mark.slow, unless("triton", "cpu")]
# images, nodes per caption, S
SHAPES = {
    "I1-T1-M1-S1": (1, (1,), 1),
    "I3-T2-M4-S11": (3, (3, 1), 11),
    "I2-T19-M134-S32": (2, (14, 5, 8, 9, 33, 17, 16, 2, 13, 1, 1, 2, 3, 1, 2, 1, 1, 2, 3), 32),
    "I67-T2-M21-S5": (67, (4, 17), 5),
    "I1-T2-M137-S130": (1, (133, 4), 130),
}


def case(I, counts, S, training=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    nodes = torch.nn.functional.normalize(draw(I, sum(counts), S) + 0.3, dim=-1)
    args = [nodes, 3 * draw(S), draw(1), 1 + 0.3 * draw(1), draw(1)]

    def call(*args, backend):
        fixed = (torch.tensor([x], dtype=args[0].dtype) for x in (0.3, 0.7))
        return itm_fast.similarity_filter(args[0], edges(counts), *args[1:], *fixed, training=training, backend=backend)

    return call, args


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype, shape, training):
    call, args = case(*shape, training=training)
    op_checks.check_forward(call, args, dtype, "triton")
    op_checks.check_gradients(call, args, dtype, "triton")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_pair_has_the_same_bits_in_any_block(training):
    counts = (13, 17, 5, 64, 33, 9, 8, 1, 1, 2)
    call, args = case(3, counts, 24, training)
    args = [a.float() for a in args]
    whole = call(*args, backend="triton")
    parts = args[0].split(counts, 1)
    for t, n in enumerate(counts):
        alone, _ = case(3, (n,), 24, training)
        images = slice(None) if training else slice(1, 2)
        found = alone(parts[t][images].contiguous(), *args[1:], backend="triton")
        assert torch.equal(found[0][:, 0], whole[0][images, t])
        if training:
            assert torch.equal(torch.cat(found[1:]), torch.stack(whole[1:])[:, t])
    gradients = op_checks.gradients(call, args, torch.float32, "triton", torch.float32)
    with itm_fast.workspace(1e-6):
        assert all(torch.equal(a, b) for a, b in zip(call(*args, backend="triton"), whole, strict=True))
        again = op_checks.gradients(call, args, torch.float32, "triton", torch.float32)
    assert torch.equal(again[0], gradients[0])
    torch.testing.assert_close(again[1:], gradients[1:])


def test_statistics_keep_their_digits_where_the_mean_is_large():
    call, args = case(5, (7, 3), 8, training=True)
    args[2] = args[2] + 100
    op_checks.check_forward(call, args, torch.float32, "triton")


def test_what_is_beside_a_pair_never_leaks():
    counts = (13, 17, 5)
    call, args = case(2, counts, 16)
    args = [a.float() for a in args]
    want, *_ = call(*args, backend="triton")
    args[0][0, 13:30] = float("nan")
    found, *_ = call(*args, backend="triton")
    assert torch.equal(found[:, ::2], want[:, ::2])
    assert torch.equal(found[1], want[1])
    assert found[0, 1].isnan().all()


def test_nodes_of_zeros_have_gradients_as_in_the_reference():
    call, args = case(2, (3, 2), 8)
    args[0][0, :3] = 0
    op_checks.check_forward(call, args, torch.float32, "triton")
    op_checks.check_gradients(call, args, torch.float32, "triton")
