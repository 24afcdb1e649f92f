import pytest
import torch
from pair_score_cases import DTYPES, INPUTS, SHAPES, drawer, edges, inputs, lengths

import itm_fast
from itm_fast.ops import _recompute
from itm_fast.testing import op_checks

BACKENDS = op_checks.backends("similarity_graph_score")
HEAD = ["query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "value_bias"]
NAMES = [*INPUTS, *HEAD, "score_weight", "score_bias"]


def case(I, counts, R=6, D=16, S=8, regions=None, K=2):
    draw = drawer()
    args = inputs(draw, I, counts, R, D, S)
    # Enlarged query and key weights: with small ones every node becomes the mean and no test sees the edges.
    for enlarged in (6, 6, 1):
        args += [enlarged * draw(K, S, S) / S**0.5, 0.3 * draw(K, S)]
    args += [4 * draw(S), draw(1)]

    def call(*args, backend):
        edge, counted = op_checks.beside(args[0], edges(counts), lengths(regions))
        return itm_fast.similarity_graph_score(*args[:4], edge, *args[4:], region_lengths=counted, backend=backend)

    return call, args


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape):
    call, args = case(*shape)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend):
    call, args = case(2, (3, 1), 3, 4, 3, (3, 2))
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend):
    counts = (4, 2, 4)
    call, args = case(3, counts)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    rest = (edges(counts), torch.tensor([6, 2, 3]), 9.0)
    torch.library.opcheck(torch.ops.itm_fast.similarity_graph_score.default, (*single, *rest, backend))
    op_checks.check_fake_backward("similarity_graph_score", (*single, *rest), 16, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_it_is_the_ops_one_after_the_other(backend):
    counts, regions = (5, 3, 5), (6, 2, 5, 6)
    call, args = case(4, counts, regions=regions)
    image, v, words, t, *local, global_weight, global_bias = args[:8]
    similar = itm_fast.cross_attention_similarity(
        image, words, edges(counts), *local, region_lengths=lengths(regions), backend="reference"
    )
    y = (v[:, None] - t).square() @ global_weight.t() + global_bias
    overall = y / (y.norm(dim=-1, keepdim=True) + 1e-8)
    want = []
    for n, part in enumerate(similar.split(counts, 1)):
        nodes = torch.cat([overall[:, n : n + 1], part], 1)
        z = itm_fast.similarity_graph(nodes, torch.tensor([0, nodes.shape[1]]), *args[8:14], backend="reference")
        want.append((z[:, 0] @ args[14] + args[15]).sigmoid())
    found = call(*args, backend=backend)
    assert found.std() > 0.01  # or the comparison would see little
    torch.testing.assert_close(found, torch.stack(want, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_key_bias_has_no_effect(backend):
    call, args = case(2, (5, 3))
    moved = list(args)
    moved[NAMES.index("key_bias")] = args[NAMES.index("key_bias")] + 1
    torch.testing.assert_close(call(*moved, backend=backend), call(*args, backend=backend))
    grads = op_checks.gradients(call, args, torch.float64, backend, torch.float64)
    assert grads[NAMES.index("key_bias")].abs().max() < 1e-12


@pytest.mark.parametrize("I,counts", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, counts):
    call, args = case(I, counts)
    leaves = [a.requires_grad_() for a in args]
    result = call(*leaves, backend=backend)
    assert result.shape == (I, len(counts))
    result.sum().backward()
    assert all(x.grad.eq(0).all() for x in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_does_not_depend_on_its_block(backend, monkeypatch):
    counts = (5, 3, 6, 5, 10, 5, 2)
    call, args = case(7, counts)
    whole = call(*args, backend=backend)
    image, image_global, words, caption_global, *parameters = args
    edge = edges(counts).tolist()
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        one = itm_fast.similarity_graph_score(
            image[2:3], image_global[2:3], words[start:stop], caption_global[t : t + 1],
            torch.tensor([0, stop - start]), *parameters, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(one[0, 0], whole[2, t], rtol=1e-12, atol=1e-12)
    grads = op_checks.gradients(call, args, torch.float64, backend, torch.float64)
    for tile in (1, 1 << 15):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        torch.testing.assert_close(call(*args, backend=backend), whole, rtol=1e-12, atol=1e-12)
        again = op_checks.gradients(call, args, torch.float64, backend, torch.float64)
        for a, b in zip(again, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_regions_never_leak(backend):
    regions = (6, 1, 4)
    call, args = case(3, (4, 2), regions=regions)
    want = call(*args, backend="reference")
    for i, n in enumerate(regions):
        args[0][i, n:] = float("nan")
    leaves = [a.requires_grad_() for a in args]
    score = call(*leaves, backend=backend)
    torch.testing.assert_close(score, want)
    score.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert not leaves[0].grad[1, 1:].any()


def test_autocast_takes_its_dtype():
    call, args = case(2, (3, 2))
    single = [a.float().requires_grad_() for a in args]
    with torch.autocast("cpu", torch.bfloat16):
        result = call(*single, backend="torch")
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert all(s.grad.dtype == torch.float32 for s in single)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"image_global": torch.zeros(2, 5)}, ValueError, r"image_global must be \[I, D\] with D = 16 as in image"),
        ({"caption_global": torch.zeros(3, 16)}, ValueError, r"cu_seqlens must be \[T\+1\] with T = 3 as in caption"),
        ({"global_weight": torch.zeros(7, 16)}, ValueError, r"global_weight must be \[S, D\] with S = 8"),
        ({"value_bias": torch.zeros(3, 8)}, ValueError, r"value_bias must be \[K, S\] with K = 2"),
        ({"score_weight": torch.zeros(1, 8)}, ValueError, r"score_weight must be \[S\], got \[1, 8\]"),
        ({"score_bias": torch.zeros(1).double()}, TypeError, "score_bias and image must have one dtype"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, r"end at the 5 packed rows, got 0\.\.4"),
        ({"region_lengths": torch.tensor([7, 1])}, ValueError, r"region_lengths must lie in 1\.\.6"),
        ({"scale": 0.0}, ValueError, "scale must be more than 0"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    _, args = case(2, (3, 2))
    arguments = dict(zip(NAMES, (a.float() for a in args), strict=True)) | {"cu_seqlens": edges((3, 2))} | change
    with pytest.raises(error, match=message) as refusal:
        itm_fast.similarity_graph_score(**arguments)
    assert str(refusal.value).startswith("similarity_graph_score")


def test_no_steps_are_refused():
    _, args = case(2, (3, 2))
    args[8:14] = (p[:0] for p in args[8:14])
    with pytest.raises(ValueError, match="number of steps K must be more than 0"):
        itm_fast.similarity_graph_score(*args[:4], edges((3, 2)), *args[4:])
