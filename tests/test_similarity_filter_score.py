import pytest
import torch
from pair_score_cases import DTYPES, INPUTS, SHAPES, drawer, edges, inputs, lengths

import itm_fast
from itm_fast.ops import _recompute
from itm_fast.testing import op_checks

BACKENDS = op_checks.backends("similarity_filter_score")
NAMES = [
    *INPUTS, "filter_weight", "filter_bias", "norm_weight", "norm_bias", "score_weight", "score_bias",
]  # fmt: skip
RUNNING = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)


def case(I, counts, R=6, D=16, S=8, regions=None):
    draw = drawer()
    args = inputs(draw, I, counts, R, D, S)
    args += [3 * draw(S), 0.2 * draw(1), 1 + draw(1).abs(), 0.2 * draw(1), 4 * draw(S), draw(1)]

    def call(*args, backend):
        (region_lengths,) = op_checks.beside(args[0], lengths(regions))
        return scored(counts, *args, region_lengths=region_lengths, backend=backend)

    return call, args


def scored(counts, *args, **options):
    """The op as a function of the arguments that may need a gradient."""
    running = [r.to(args[0]) for r in RUNNING]
    (edge,) = op_checks.beside(args[0], edges(counts))
    return itm_fast.similarity_filter_score(*args[:4], edge, *args[4:12], *running, *args[12:], **options)


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
    rest = (torch.zeros(1), torch.ones(1), edges(counts), torch.tensor([6, 2, 3]), 9.0, 1e-5)
    torch.library.opcheck(torch.ops.itm_fast.similarity_filter_score.default, (*single, *rest, backend))
    op_checks.check_fake_backward("similarity_filter_score", (*single, *rest), 14, backend)


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
        bounds = torch.tensor([0, nodes.shape[1]])
        z = itm_fast.similarity_filter(nodes, bounds, *args[8:12], *RUNNING, backend="reference")[0]
        want.append((z[:, 0] @ args[12] + args[13]).sigmoid())
    found = call(*args, backend=backend)
    assert found.std() > 0.01  # or the comparison would see little
    torch.testing.assert_close(found, torch.stack(want, 1), rtol=1e-12, atol=1e-12)


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
        part = image[2:3], image_global[2:3], words[start:stop], caption_global[t : t + 1]
        one = scored((stop - start,), *part, *parameters, backend=backend)
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
        ({"filter_weight": torch.zeros(1, 8)}, ValueError, r"filter_weight must be \[S\], got \[1, 8\]"),
        ({"running_var": torch.ones(2)}, ValueError, r"running_var must be \[1\], got \[2\]"),
        ({"score_weight": torch.zeros(1, 8)}, ValueError, r"score_weight must be \[S\], got \[1, 8\]"),
        ({"score_bias": torch.zeros(1).double()}, TypeError, "score_bias and image must have one dtype"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, r"end at the 5 packed rows, got 0\.\.4"),
        ({"region_lengths": torch.tensor([7, 1])}, ValueError, r"region_lengths must lie in 1\.\.6"),
        ({"eps": 0.0}, ValueError, "eps must be more than 0"),
        ({"scale": 0.0}, ValueError, "scale must be more than 0"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    _, args = case(2, (3, 2))
    running = {"running_mean": torch.zeros(1), "running_var": torch.ones(1), "cu_seqlens": edges((3, 2))}
    arguments = dict(zip(NAMES, (a.float() for a in args), strict=True)) | running | change
    with pytest.raises(error, match=message) as refusal:
        itm_fast.similarity_filter_score(**arguments)
    assert str(refusal.value).startswith("similarity_filter_score")
