"""`similarity_filter` on every backend that runs on a CPU."""

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors, scratch_of

import itm_fast
from itm_fast.nn import SimilarityFilter
from itm_fast.ops import _recompute
from itm_fast.testing import op_checks

BACKENDS = op_checks.backends("similarity_filter")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "I2-T1-M1-S2": (2, (1,), 2),  # with one feature z is 1 or -1 and every gradient rounding
    "I5-T5-M34-S64": (5, (14, 2, 5, 5, 8), 64),
    "I3-T3-M15-S17": (3, (6, 6, 3), 17),
}


def edges(counts):
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()


def case(I, counts, S, training=False):
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randn(I, sum(counts), S, generator=generator, dtype=torch.float64)
    weight = torch.randn(S, generator=generator, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)

    def call(nodes, weight, bias, norm_weight, norm_bias, backend):
        return itm_fast.similarity_filter(
            nodes, edges(counts).to(nodes.device), weight, bias, norm_weight, norm_bias, 0.3 * one.to(nodes),
            2 * one.to(nodes), training=training, backend=backend,
        )

    return call, (nodes, weight, 0.2 * one, 1.5 * one, -0.1 * one)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape, training):
    call, args = case(*shape, training)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend, training):
    call, args = case(2, (3, 2), 4, training)
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend, training):
    call, args = case(3, (4, 2, 4), 8, training)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    running = torch.zeros(1), torch.ones(1)
    torch.library.opcheck(
        torch.ops.itm_fast.similarity_filter.default, (*single, *running, edges((4, 2, 4)), training, 1e-5, backend)
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_it_is_batch_norm_over_one_caption_at_a_time(backend):
    counts = (4, 2, 3)
    call, args = case(5, counts, 8, training=True)
    nodes, weight, bias, norm_weight, norm_bias = args
    z, mean, var = call(*args, backend)
    norm = torch.nn.BatchNorm1d(1, dtype=torch.float64)
    norm.weight.data, norm.bias.data = norm_weight, norm_bias
    for t, X in enumerate(nodes.split(counts, dim=1)):
        a = X @ weight + bias
        g = norm(a[:, None, :])[:, 0].sigmoid()
        beta = g / (g.sum(1, keepdim=True) + 1e-8)
        want = (beta[:, :, None] * X).sum(1)
        torch.testing.assert_close(z[:, t], want / (want.norm(dim=1, keepdim=True) + 1e-8))
        torch.testing.assert_close(mean[t], a.mean())
        torch.testing.assert_close(var[t], a.var(unbiased=False))


@pytest.mark.parametrize("I,counts", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, counts):
    call, args = case(I, counts, 4)
    inputs = [a.requires_grad_() for a in args]
    z, mean, _ = call(*inputs, backend)
    assert z.shape == (I, len(counts), 4)
    assert mean.shape == (0,)
    z.sum().backward()
    assert all(x.grad.eq(0).all() for x in inputs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_does_not_depend_on_its_block(backend, training, monkeypatch):
    counts = (5, 3, 6, 5, 10, 5, 2)
    call, args = case(7, counts, 16, training)
    whole = call(*args, backend)
    for tile in (1, 1 << 12):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        for a, b in zip(call(*args, backend), whole):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("S", [8, 17], ids=["whole vectors of features", "a tail"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_pair(backend, S):
    call, args = case(3, (4, 2, 5), S)
    spoilt = [a.clone() for a in args]
    spoilt[0][1, 5] = torch.nan  # a node of image 1 and caption 1
    leaves = [[a.requires_grad_() for a in x] for x in (args, spoilt)]
    z, found = (call(*x, backend)[0] for x in leaves)
    z.sum().backward()
    found.sum().backward()
    others = torch.ones(3, 3, dtype=torch.bool)
    others[1, 1] = False
    assert found[1, 1].isnan().any()
    assert torch.equal(found[others], z[others])
    nodes = others.repeat_interleave(torch.tensor([4, 2, 5]), 1)
    torch.testing.assert_close(leaves[1][0].grad[nodes], leaves[0][0].grad[nodes], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_that_are_all_closed(backend):
    """What is added to the gates' sum decides then how long z is, and that it is 0 and not NaN."""
    call, args = case(3, (4, 2, 5), 17)
    args = [*args[:4], torch.full((1,), -40.0, dtype=torch.float64)]
    assert 0.1 < call(*args, "reference")[0].norm(dim=-1).min() < 0.9
    op_checks.check_forward(call, args, torch.float64, backend)
    op_checks.check_gradients(call, args, torch.float64, backend)
    args[4] -= 160  # a gate is 0 in float32
    z, single = call(*(a.float() for a in args), backend)[0], torch.float32
    assert all(x.abs().max() < 1e-15 for x in (z, *op_checks.gradients(call, args, single, backend, single)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nodes_of_zeros(backend, training):
    call, args = case(3, (4, 2, 5), 17, training)
    args[0][:, 4:6] = 0
    for dtype in (torch.float64, torch.float32):
        op_checks.check_forward(call, args, dtype, backend)
        found = op_checks.gradients(call, args, dtype, backend, dtype)
        for part, exact in zip(found, op_checks.gradients(call, args, dtype, "reference", dtype), strict=True):
            torch.testing.assert_close(part, exact)


CHUNKS = (9, 30, 1, 14, 100, 120, 260, 7, 12, 224)  # of all sizes a chunk of 224 nodes can be cut into


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_pair_has_the_same_bits_in_any_block_and_order(dtype, training):
    _, (nodes, *parameters) = case(3, CHUNKS, 20)
    nodes, parameters = nodes.to(dtype), [p.to(dtype) for p in (*parameters, 0.3 * parameters[1], parameters[2])]

    def filtered(nodes, counts):
        return itm_fast.similarity_filter(nodes, edges(counts), *parameters, training=training, backend="cpu")

    parts, (z, mean, var) = nodes.split(CHUNKS, dim=1), filtered(nodes, CHUNKS)
    images = slice(None) if training else slice(1, 2)  # statistics are over all images
    for t, X in enumerate(parts):
        one, one_mean, one_var = filtered(X[images], CHUNKS[t : t + 1])
        assert torch.equal(one[:, 0], z[images, t])
        assert torch.equal(torch.cat([one_mean, one_var]), torch.cat([mean[t : t + 1], var[t : t + 1]]))
    turned = filtered(torch.cat(parts[::-1], dim=1), CHUNKS[::-1])[0]
    assert torch.equal(turned.flip(1), z)


@needs_cpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_threads_change_no_bit(training):
    call, args = case(17, CHUNKS, 20, training)
    op_checks.check_threads(call, args, torch.float64)


@needs_cpu
@over_lesser_processors
def test_older_processors(level, monkeypatch):
    at_level(level, monkeypatch)
    for shape in SHAPES.values():
        for training in (False, True):
            call, args = case(*shape, training)
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                op_checks.check_forward(call, args, dtype, "cpu")
                op_checks.check_gradients(call, args, dtype, "cpu")


@needs_cpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_statistics_far_from_zero_keep_their_digits(training):
    call, (nodes, weight, *rest) = case(50, (14, 200), 20, training)
    op_checks.check_forward(call, [nodes + 100, weight.abs(), *rest], torch.float32, "cpu")


@pytest.mark.slow
@needs_cpu
def test_scratch_is_bounded_however_large_the_block():
    setup = [
        "S, counts, one = 64, torch.full((280,), 14), torch.ones(1)",
        "cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])",
        "nodes, grad = torch.rand(100, 280 * 14, S), torch.ones(100, 280, S)",  # 96 MiB
        "args = nodes, torch.ones(S), one, one, one, one, one, cu_seqlens",
    ]
    for training in (False, True):
        rest = f"*args, {training}, 1e-5, 'cpu')"
        assert scratch_of(setup, "torch.ops.itm_fast.similarity_filter(" + rest) < 64 << 20
        backward = "torch.ops.itm_fast.similarity_filter_backward(grad, [True] * 5, "
        assert scratch_of(setup, backward + rest) < 64 << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_feature(backend):
    call, args = case(3, (4, 1), 1)
    z, *_ = call(*args, backend)
    torch.testing.assert_close(z, call(*args, "reference")[0])


def test_training_needs_an_image():
    call, args = case(0, (3, 2), 8, training=True)
    with pytest.raises(ValueError, match="at least one image"):
        call(*args, "torch")


def test_one_node_has_no_variance():
    layer = SimilarityFilter(4)
    with pytest.raises(ValueError, match="more than one node"):
        layer(torch.rand(1, 3, 4), edges((1, 2)))
    assert layer.bn.running_var.item() == 1


def test_statistics_carry_no_gradient_and_are_not_narrowed():
    call, args = case(3, (3, 2), 8, training=True)
    single = [a.float().requires_grad_() for a in args]
    with torch.autocast("cpu", torch.bfloat16):
        _, mean, var = call(*single, "torch")
    rounded = [a.bfloat16().double() for a in args]
    _, exact_mean, exact_var = call(*rounded, "reference")
    assert not mean.requires_grad
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-6)


def test_autocast_takes_its_dtype():
    call, args = case(2, (3, 2), 8)
    op_checks.check_autocast(call, args)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"weight": torch.zeros(1, 4)}, ValueError, r"weight must be \[S\], got \[1, 4\]"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[1\], got \[2\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 5])}, ValueError, "caption 1 is empty"),
        ({"eps": 0.0}, ValueError, "eps must be more than 0"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    one = torch.ones(1)
    arguments = dict(
        nodes=torch.zeros(2, 5, 4), cu_seqlens=edges((3, 2)), weight=torch.zeros(4), bias=one, norm_weight=one,
        norm_bias=one, running_mean=one, running_var=one,
    )
    with pytest.raises(error, match=message):
        itm_fast.similarity_filter(**(arguments | change))
