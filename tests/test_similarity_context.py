"""`similarity_context` on every backend that runs on a CPU."""

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors, scratch_of

import itm_fast
from itm_fast.ops import _recompute
from itm_fast.testing import op_checks

BACKENDS = op_checks.backends("similarity_context")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "I1-T1-N1-S1": (1, (1,), 1, (1,)),
    "I5-T5-N34-S64": (5, (14, 2, 5, 5, 8), 64, (4, 1)),
    "I3-T3-N15-S17": (3, (6, 6, 3), 17, (3, 2, 1)),
    "I2-T3-N303-S20": (2, (2, 300, 1), 20, (5,)),
}


def edges(counts):
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()


def case(I, counts, S, sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def call(overall, local, assignment, backend):
        return itm_fast.similarity_context(overall, local, edges(counts), assignment, sizes, backend=backend)

    overall = torch.nn.functional.normalize(draw(I, len(counts), S), dim=-1)
    local = torch.nn.functional.normalize(draw(I, sum(counts), S), dim=-1)
    return call, (overall, local, 4 * draw(sum(sizes), S))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape):
    call, args = case(*shape)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_definition(backend):
    call, (overall, local, assignment) = case(2, (3, 5), 4, (2, 1))
    nodes = call(overall, local, assignment, backend=backend)
    X = local[1, 3:8]
    first = torch.softmax(X @ assignment[:2].T, 0).T @ X
    second = torch.softmax(first @ assignment[2:].T, 0).T @ first
    want = torch.cat([overall[1, 1:2], X, first, second])
    torch.testing.assert_close(nodes[1, 7:], want)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend):
    call, args = case(2, (3, 2), 4, (2, 1))
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend):
    call, args = case(3, (4, 2, 4), 8, (4, 1))
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    rest = edges((4, 2, 4)), [4, 1]
    torch.library.opcheck(torch.ops.itm_fast.similarity_context.default, (*single, *rest, backend))
    op_checks.check_fake_backward("similarity_context", (*single, *rest), 3, backend)


@pytest.mark.parametrize("I,counts", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, counts):
    call, args = case(I, counts, 4, (2, 1))
    inputs = [a.requires_grad_() for a in args]
    result = call(*inputs, backend=backend)
    assert result.shape == (I, sum(counts) + 4 * len(counts), 4)
    result.sum().backward()
    assert all(x.grad.eq(0).all() for x in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_does_not_depend_on_its_block(backend, monkeypatch):
    counts = (5, 3, 6, 5, 10, 5, 2)
    call, args = case(7, counts, 16, (4, 1))
    whole = call(*args, backend=backend)
    edge = edges(counts).tolist()
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        one = itm_fast.similarity_context(
            args[0][2:3, t : t + 1], args[1][2:3, start:stop], torch.tensor([0, stop - start]), args[2], (4, 1)
        )
        torch.testing.assert_close(one[0], whole[2, start + 6 * t : stop + 6 * t + 6], rtol=1e-12, atol=1e-12)
    for tile in (1, 1 << 14):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        torch.testing.assert_close(call(*args, backend=backend), whole, rtol=1e-12, atol=1e-12)
        op_checks.check_gradients(call, args, torch.float64, backend)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_threads_change_no_bit(dtype):
    call, args = case(5, (9, 30, 1, 14, 260, 7), 20, (5, 2))
    op_checks.check_threads(call, args, dtype)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_pair_has_the_same_bits_in_any_block_and_order(dtype):
    counts = (9, 30, 1, 14, 260, 7)
    call, args = case(3, counts, 20, (5, 2))
    overall, local, assignment = (a.to(dtype) for a in args)
    parts = call(overall, local, assignment, backend="cpu").split([n + 8 for n in counts], dim=1)
    for t, X in enumerate(local.split(counts, dim=1)):
        edge = torch.tensor([0, X.shape[1]])
        one = itm_fast.similarity_context(overall[1:2, t : t + 1], X[1:2], edge, assignment, (5, 2), backend="cpu")
        assert torch.equal(one[0], parts[t][1])


@needs_cpu
@over_lesser_processors
def test_older_processors(level, monkeypatch):
    at_level(level, monkeypatch)
    for shape in SHAPES.values():
        call, args = case(*shape)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            op_checks.check_forward(call, args, dtype, "cpu")
            op_checks.check_gradients(call, args, dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_pair(backend):
    call, args = case(2, (3, 4), 20, (2, 1))
    local = args[1].clone()
    local[0, :3] = float("nan")
    near = 0 if backend == "cpu" else 1e-12
    grads = []
    for x in (args[1], local):
        leaves = [a.clone().requires_grad_() for a in (args[0], x, args[2])]
        nodes = call(*leaves, backend=backend)
        grads.append((nodes.detach(), *torch.autograd.grad(nodes.sum(), leaves[:2])))
    for (a, b), own in zip(zip(*grads, strict=True), (7, 1, 3)):  # where the second pair begins
        torch.testing.assert_close(b[1], a[1], rtol=near, atol=near)
        torch.testing.assert_close(b[0, own:], a[0, own:], rtol=near, atol=near)
        assert b[0, :own].isnan().any() or own == 1


@pytest.mark.slow
@needs_cpu
def test_scratch_is_bounded_however_large_the_block():
    setup = [
        "S, counts = 64, torch.full((280,), 14)",
        "cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])",
        "args = torch.rand(100, 280, S), torch.rand(100, 280 * 14, S), torch.randn(5, S)",  # 96 MiB
        "grad = torch.ones(100, 280 * 20, S)",
    ]
    forward = "itm_fast.similarity_context(*args[:2], cu_seqlens, args[2], (4, 1), backend='cpu')"
    assert scratch_of(setup, forward) < 16 << 20
    op = "torch.ops.itm_fast.similarity_context_backward"
    assert scratch_of(setup, f"{op}(grad, [True] * 3, *args, cu_seqlens, [4, 1], 'cpu')") < 16 << 20


def test_autocast_takes_its_dtype():
    call, args = case(2, (3, 2), 8, (2,))
    op_checks.check_autocast(call, args)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"overall": torch.zeros(2, 4)}, ValueError, r"overall must be \[I, T, S\], got \[2, 4\]"),
        ({"local": torch.zeros(3, 5, 4)}, ValueError, r"local must be \[I, N, S\] with I = 2 as in overall"),
        ({"assignment": torch.zeros(3, 5)}, ValueError, r"assignment must be \[C, S\] with S = 4"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"\[T\+1\] with T = 2 as in overall, got \[2\]"),
        ({"cu_seqlens": edges((2, 2))}, ValueError, r"end at the 5 packed rows, got 0\.\.4"),
        ({"sizes": (2, 2)}, ValueError, r"add up to the 3 rows of assignment, got \[2, 2\]"),
        ({"sizes": (3, 0)}, ValueError, "sizes must be positive"),
        ({"assignment": torch.zeros(0, 4), "sizes": ()}, ValueError, "sizes must be positive"),
        ({"assignment": torch.zeros(3, 4).double()}, TypeError, "one dtype"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    _, args = case(2, (3, 2), 4, (2, 1))
    names = ["overall", "local", "assignment"]
    arguments = dict(zip(names, (a.float() for a in args))) | {"cu_seqlens": edges((3, 2)), "sizes": (2, 1)}
    with pytest.raises(error, match=message):
        itm_fast.similarity_context(**{**arguments, **change})
