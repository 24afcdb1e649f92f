"""`similarity_graph` on every backend that runs on a CPU."""

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors, scratch_of

import itm_fast
from itm_fast import _native
from itm_fast.ops import _recompute
from itm_fast.testing import assert_accurate, op_checks

BACKENDS = op_checks.backends("similarity_graph")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "I1-T1-M1-S1-K1": (1, (1,), 1, 1),
    "I5-T5-M34-S64-K3": (5, (14, 2, 5, 5, 8), 64, 3),
    "I3-T3-M15-S17-K2": (3, (6, 6, 3), 17, 2),
    "I2-T3-M12-S33-K1": (2, (5, 1, 6), 33, 1),
    "I2-T3-M303-S20-K3": (2, (2, 300, 1), 20, 3),
}


def edges(counts):
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()


def case(I, counts, S, K, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    nodes = torch.nn.functional.normalize(draw(I, sum(counts), S), dim=-1)
    # Enlarged query and key weights: with small ones every node becomes the mean and no test sees the edges.
    matrices = [6 * draw(K, S, S) / S**0.5, 0.3 * draw(K, S), 6 * draw(K, S, S) / S**0.5, 0.3 * draw(K, S)]
    values = [draw(K, S, S) / S**0.5, 0.3 * draw(K, S)]

    def call(nodes, *parameters, backend):
        return itm_fast.similarity_graph(nodes, edges(counts).to(nodes.device), *parameters, backend=backend)

    return call, (nodes, *matrices, *values)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape):
    call, args = case(*shape)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend):
    call, args = case(2, (3, 2), 4, 2)
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend):
    call, args = case(3, (4, 2, 4), 8, 2)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    torch.library.opcheck(torch.ops.itm_fast.similarity_graph.default, (*single, edges((4, 2, 4)), backend))
    op_checks.check_fake_backward("similarity_graph", (*single, edges((4, 2, 4))), 7, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_key_bias_has_no_effect(backend):
    call, args = case(2, (5, 3), 8, 3)
    moved = list(args)
    moved[4] = args[4] + 1
    torch.testing.assert_close(call(*moved, backend="reference"), call(*args, backend=backend))
    grads = op_checks.gradients(call, args, torch.float64, backend, torch.float64)
    assert grads[4].eq(0).all()


@pytest.mark.parametrize("I,counts", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, counts):
    call, args = case(I, counts, 4, 2)
    inputs = [a.requires_grad_() for a in args]
    result = call(*inputs, backend=backend)
    assert result.shape == (I, len(counts), 4)
    result.sum().backward()
    assert all(x.grad.eq(0).all() for x in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_does_not_depend_on_its_block(backend, monkeypatch):
    counts = (5, 3, 6, 5, 10, 5, 2)
    call, args = case(7, counts, 16, 3)
    whole = call(*args, backend=backend)
    edge = edges(counts).tolist()
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        one = itm_fast.similarity_graph(
            args[0][2:3, start:stop], torch.tensor([0, stop - start]), *args[1:], backend=backend
        )
        torch.testing.assert_close(one[0, 0], whole[2, t], rtol=1e-12, atol=1e-12)
    for tile in (1, 1 << 14):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        torch.testing.assert_close(call(*args, backend=backend), whole, rtol=1e-12, atol=1e-12)


CHUNKS = (9, 30, 1, 14, 100, 120, 260, 7, 12, 224)  # of all sizes a chunk of 224 nodes can be cut into


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_pair_has_the_same_bits_in_any_block_and_order(dtype):
    _, (nodes, *parameters) = case(3, CHUNKS, 20, 3)
    nodes, parameters = nodes.to(dtype), [p.to(dtype) for p in parameters]
    whole = itm_fast.similarity_graph(nodes, edges(CHUNKS), *parameters, backend="cpu")
    parts = nodes.split(CHUNKS, dim=1)
    for t, X in enumerate(parts):
        one = itm_fast.similarity_graph(X[1:2], edges(CHUNKS[t : t + 1]), *parameters, backend="cpu")
        assert torch.equal(one[0, 0], whole[1, t])
    turned = torch.cat(parts[::-1], dim=1).flip(0)
    turned = itm_fast.similarity_graph(turned, edges(CHUNKS[::-1]), *parameters, backend="cpu")
    assert torch.equal(turned.flip(0, 1), whole)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_threads_change_no_bit(dtype):
    call, args = case(5, CHUNKS, 20, 3)
    op_checks.check_threads(call, args, dtype)


@needs_cpu
def test_medium_precision_may_multiply_bfloat16_values():
    call, args = case(5, (14, 2, 5, 5, 8), 64, 3)
    args = [a.float() for a in args]
    before, torch_precision = call(*args, backend="cpu"), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        result = call(*args, backend="cpu")
        found = op_checks.gradients(call, args, torch.float32, "cpu", torch.float32)
    finally:
        torch.set_float32_matmul_precision(torch_precision)
    assert torch.equal(result, before) == (_native.level() not in _native.BFLOAT16_LEVELS)

    def reference(dtype):
        slopes = op_checks.gradients(call, args, dtype, "reference", torch.float32)
        return [call(*(a.to(dtype) for a in args), backend="reference"), *slopes]

    assert_accurate([result, *found], reference, torch.float32, products=torch.bfloat16)


@needs_cpu
@over_lesser_processors
def test_older_processors(level, monkeypatch):
    at_level(level, monkeypatch)
    for shape in SHAPES.values():
        call, args = case(*shape)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            op_checks.check_forward(call, args, dtype, "cpu")
            op_checks.check_gradients(call, args, dtype, "cpu")


@pytest.mark.slow
@needs_cpu
def test_scratch_is_bounded_however_large_the_block():
    setup = [
        "S, counts = 64, torch.full((280,), 14)",
        "cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])",
        "weights = [torch.randn(3, S, S) / 8, torch.zeros(3, S)] * 3",
        "nodes, grad = torch.rand(100, 280 * 14, S), torch.ones(100, 280, S)",  # 96 MiB
    ]
    forward = "itm_fast.similarity_graph(nodes, cu_seqlens, *weights, backend='cpu')"
    assert scratch_of(setup, forward) < 64 << 20
    backward = "torch.ops.itm_fast.similarity_graph_backward(grad, [True] * 7, nodes, *weights, cu_seqlens, 'cpu')"
    assert scratch_of(setup, backward) < 64 << 20


def test_autocast_takes_its_dtype():
    call, args = case(2, (3, 2), 8, 2)
    op_checks.check_autocast(call, args)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"nodes": torch.zeros(2, 5)}, ValueError, r"nodes must be \[I, M, S\], got \[2, 5\]"),
        ({"key_weight": torch.zeros(3, 4, 4)}, ValueError, r"key_weight must be \[K, S, S\] with K = 2"),
        ({"value_bias": torch.zeros(2, 3)}, ValueError, r"value_bias must be \[K, S\] with S = 4 as in nodes"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, r"end at the 5 packed rows, got 0\.\.4"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    call, args = case(2, (3, 2), 4, 2)
    names = ["nodes", "query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "value_bias"]
    arguments = dict(zip(names, (a.float() for a in args))) | {"cu_seqlens": edges((3, 2))} | change
    with pytest.raises(error, match=message):
        itm_fast.similarity_graph(**arguments)


def test_no_steps_are_refused():
    _, (nodes, *parameters) = case(2, (3, 2), 4, 2)
    with pytest.raises(ValueError, match="number of steps K must be more than 0"):
        itm_fast.similarity_graph(nodes, edges((3, 2)), *(p[:0] for p in parameters))
