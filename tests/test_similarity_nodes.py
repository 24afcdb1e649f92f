"""`similarity_nodes` on every backend that runs on a CPU."""

import pytest
import torch
from pair_score_cases import DTYPES, INPUTS, drawer, edges, inputs, lengths

import itm_fast
from itm_fast.ops import _recompute
from itm_fast.testing import op_checks

BACKENDS = op_checks.backends("similarity_nodes")
# images, words per caption, regions, D, S, regions of each image. With S 1 a vector is 1 or -1 whatever the inputs are,
# and its gradients are what rounding leaves of 1 - 1; so are, nearly, those of affinities over two words.
SHAPES = {
    "I1-T1-R1-W1-D1-S2": (1, (1,), 1, 1, 2, None),
    "I5-T5-R9-W13-D64-S32": (5, (13, 1, 4, 4, 7), 9, 64, 32, None),
    "I3-T3-R7-W5-D31-S11-ragged": (3, (5, 5, 4), 7, 31, 11, (7, 1, 4)),
    "I20-T20-R2-W1-D37-S7": (20, (1,) * 20, 2, 37, 7, None),  # more images and captions than are held at a time
}


def case(I, counts, R=6, D=16, S=8, regions=None):
    def call(*args, backend):
        edge, counted = op_checks.beside(args[0], edges(counts), lengths(regions))
        return itm_fast.similarity_nodes(*args[:4], edge, *args[4:], region_lengths=counted, backend=backend)

    return call, inputs(drawer(), I, counts, R, D, S)


def nodes_only(call):
    """The checks compare results of floats; the bounds have a test of their own."""
    return lambda *args, backend: call(*args, backend=backend)[0]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape):
    call, args = case(*shape)
    op_checks.check_forward(nodes_only(call), args, dtype, backend)
    op_checks.check_gradients(nodes_only(call), args, dtype, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend):
    call, args = case(2, (3, 1), 3, 4, 3, (3, 2))
    op_checks.check_gradcheck(nodes_only(call), args, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend):
    counts = (4, 2, 4)
    call, args = case(3, counts)
    call = nodes_only(call)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    rest = (edges(counts), torch.tensor([6, 2, 3]), 9.0)
    torch.library.opcheck(torch.ops.itm_fast.similarity_nodes.default, (*single, *rest, backend))
    op_checks.check_fake_backward("similarity_nodes", (*single, *rest), 8, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_each_captions_global_vector_comes_before_its_words(backend):
    counts, regions = (5, 3, 5), (6, 2, 5, 6)
    call, args = case(4, counts, regions=regions)
    image, v, words, t, *local, global_weight, global_bias = args
    similar = itm_fast.cross_attention_similarity(
        image, words, edges(counts), *local, region_lengths=lengths(regions), backend="reference"
    )
    y = (v[:, None] - t).square() @ global_weight.t() + global_bias
    overall = y / (y.norm(dim=-1, keepdim=True) + 1e-8)
    want = [torch.cat([overall[:, n : n + 1], part], 1) for n, part in enumerate(similar.split(counts, 1))]
    nodes, bounds = call(*args, backend=backend)
    torch.testing.assert_close(nodes, torch.cat(want, 1), rtol=1e-12, atol=1e-12)
    assert bounds.tolist() == [0, 6, 10, 16]
    assert bounds.dtype == torch.int32


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cpu", "torch")])
def test_backward_computes_no_node_again(backend):
    """It takes them, and 1 / (|y| + 1e-8) of each, from the forward pass: the bias has no other way to the gradient."""
    counts = (5, 3, 5)
    _, args = case(4, counts)
    image, v, words, t, *layers = args
    rest = edges(counts), None, 9.0
    results = torch.ops.itm_fast.similarity_nodes.default(*args, *rest, backend)
    y = (v[:, None] - t).square() @ layers[2].t() + layers[3]
    first = torch.tensor([0, 6, 10])
    torch.testing.assert_close(results[1][:, first], 1 / (y.norm(dim=-1) + 1e-8), rtol=1e-12, atol=0)
    grad = torch.rand_like(results[0])
    found = [
        torch.ops.itm_fast.similarity_nodes_backward.default(
            grad, [True] * 8, image, v, words, t, weight, bias, *layers[2:], *rest, list(results), backend
        )
        for weight, bias in (layers[:2], (layers[0], layers[1] + 1))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("I,counts", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, counts):
    call, args = case(I, counts)
    leaves = [a.requires_grad_() for a in args]
    nodes, bounds = call(*leaves, backend=backend)
    assert nodes.shape == (I, sum(counts) + len(counts), 8)
    assert len(bounds) == len(counts) + 1
    nodes.sum().backward()
    assert all(x.grad.eq(0).all() for x in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_does_not_depend_on_its_block(backend, monkeypatch):
    counts = (5, 3, 6, 5, 10, 5, 2)
    call, args = case(7, counts)
    whole, bounds = call(*args, backend=backend)
    image, image_global, words, caption_global, *parameters = args
    edge = edges(counts).tolist()
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        one, _ = itm_fast.similarity_nodes(
            image[2:3], image_global[2:3], words[start:stop], caption_global[t : t + 1],
            torch.tensor([0, stop - start]), *parameters, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(one[0], whole[2, bounds[t] : bounds[t + 1]], rtol=1e-12, atol=1e-12)
        if backend == "cpu":
            assert torch.equal(one[0], whole[2, bounds[t] : bounds[t + 1]])
    call = nodes_only(call)
    grads = op_checks.gradients(call, args, torch.float64, backend, torch.float64)
    for tile in (1, 1 << 15):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        for a, b in zip(op_checks.gradients(call, args, torch.float64, backend, torch.float64), grads):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read(backend):
    call, args = case(3, (4, 2), regions=(6, 1, 4))
    whole, _ = call(*args, backend=backend)
    args[0] = args[0].clone()
    args[0][1, 1:] = args[0][2, 4:] = torch.nan
    torch.testing.assert_close(call(*args, backend=backend)[0], whole)


def test_many_tiles_and_threads_give_the_same_bits():
    counts = tuple(1 + (7 * n) % 13 for n in range(90))
    call, args = case(5, counts, R=9, D=40, S=24)
    op_checks.check_threads(nodes_only(call), args, torch.float32)


@pytest.mark.parametrize("name", INPUTS)
def test_wrong_shapes_are_named(name):
    _, args = case(2, (3, 2))
    k = INPUTS.index(name)
    args[k] = args[k][..., None]
    with pytest.raises(ValueError, match=f"similarity_nodes: {name} must be"):
        itm_fast.similarity_nodes(*args[:4], edges((3, 2)), *args[4:])
