"""`hierarchical_alignment_score` on every backend that runs on a CPU."""

import pytest
import torch
from pair_score_cases import DTYPES, drawer, edges, lengths

import itm_fast
from itm_fast.ops import _recompute
from itm_fast.testing import op_checks

OP = "hierarchical_alignment_score"
BACKENDS = op_checks.backends(OP)
NAMES = ["image", "image_key", "image_gate", "words", "word_key", "word_gate", "image_pool", "caption_pool"]
DIRECTIONS = ["t2i", "i2t", "both"]
# images, words per caption, regions, D, regions of each image
SHAPES = {
    "I2-T3-R1-W1-D8": (2, (1, 1, 1), 1, 8, None),
    "I5-T5-R9-W13-D64": (5, (13, 1, 4, 4, 7), 9, 64, None),
    "I3-T3-R7-W5-D17-ragged": (3, (5, 5, 2), 7, 17, (7, 1, 4)),
}


def case(I, counts, R=6, D=16, regions=None, gate="scalar", **options):
    draw, N, K = drawer(), sum(counts), 1 if gate == "scalar" else D
    unit = torch.nn.functional.normalize
    P = max(1, D // 2)
    args = [
        *(unit(draw(I, R, D), dim=-1), unit(draw(I, R, P), dim=-1), draw(I, R, 2, K)),
        *(unit(draw(N, D), dim=-1), unit(draw(N, P), dim=-1), draw(N, 2, K)),
        *(4 * draw(D), 4 * draw(D)),  # large enough for the pooling to prefer rows
    ]
    options = {"scale": 5.0, **options}

    def call(*args, backend):
        edge, region_lengths = op_checks.beside(args[0], edges(counts), lengths(regions))
        return itm_fast.hierarchical_alignment_score(
            *args[:6], edge, *args[6:], region_lengths=region_lengths, backend=backend, **options
        )

    return call, args


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape, direction, gate):
    call, args = case(*shape, gate=gate, direction=direction)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.parametrize("options", [{"pool": "sum"}, {"local_mix": 0.8, "global_mix": 0.1}, {"scale": 0.5}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend, options):
    call, args = case(4, (5, 3, 5), regions=(6, 2, 5, 6), **options)
    plain, _ = case(4, (5, 3, 5), regions=(6, 2, 5, 6))
    assert (call(*args, backend="reference") - plain(*args, backend="reference")).abs().min() > 1e-4
    op_checks.check_forward(call, args, torch.float64, backend)
    op_checks.check_gradients(call, args, torch.float64, backend)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend, direction, gate):
    call, args = case(2, (3, 1), 3, 4, (3, 2), gate=gate, direction=direction)
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend, gate):
    counts = (4, 2, 4)
    call, args = case(3, counts, gate=gate)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    rest = (edges(counts), torch.tensor([6, 2, 3]), "both", 5.0, "mean", 0.3, 0.5)
    torch.library.opcheck(torch.ops.itm_fast.hierarchical_alignment_score.default, (*single, *rest, backend))
    op_checks.check_fake_backward(OP, (*single, *rest), 8, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_vector_gate_of_equal_entries_is_the_scalar_gate(backend):
    call, args = case(3, (5, 2, 4), regions=(6, 1, 4))
    want = call(*args, backend=backend)
    wide = [a.expand(*a.shape[:-1], 16) if name.endswith("_gate") else a for name, a in zip(NAMES, args)]
    torch.testing.assert_close(call(*wide, backend=backend), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_one_modality_is_the_other_one_swapped(backend):
    """An image and a caption of as many rows change places: i2t becomes t2i."""
    call, args = case(1, (6,), direction="i2t")
    swapped, _ = case(1, (6,), direction="t2i")
    image, image_key, image_gate, words, word_key, word_gate, image_pool, caption_pool = args
    other = swapped(
        words[None], word_key[None], word_gate.flip(1)[None], image[0], image_key[0], image_gate[0].flip(1),
        caption_pool, image_pool, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(other, call(*args, backend=backend), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("I,counts", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, counts, gate):
    call, args = case(I, counts, gate=gate)
    leaves = [a.requires_grad_() for a in args]
    result = call(*leaves, backend=backend)
    assert result.shape == (I, len(counts))
    result.sum().backward()
    assert all(x.grad.eq(0).all() for x in leaves)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_does_not_depend_on_its_block(backend, gate, monkeypatch):
    counts = (5, 3, 6, 5, 10, 5, 2)
    call, args = case(7, counts, gate=gate)
    whole = call(*args, backend=backend)
    edge = edges(counts).tolist()
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        one = itm_fast.hierarchical_alignment_score(
            *(a[2:3] for a in args[:3]), *(a[start:stop] for a in args[3:6]),
            torch.tensor([0, stop - start]), *args[6:], scale=5.0, backend=backend,
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


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_regions_never_leak(backend, direction, gate):
    regions = (6, 1, 4)
    call, args = case(3, (4, 2), regions=regions, gate=gate, direction=direction)
    want = call(*args, backend="reference")
    for i, n in enumerate(regions):
        for padded in args[:3]:
            padded[i, n:] = float("nan")
    leaves = [a.requires_grad_() for a in args]
    score = call(*leaves, backend=backend)
    torch.testing.assert_close(score, want)
    score.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves if x.grad is not None)
    assert not any(x.grad[1, 1:].any() for x in leaves[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_have_finite_scores_and_gradients(backend):
    call, args = case(3, (4, 2, 1))
    args[0][1], args[3][4:6] = 0.0, 0.0
    leaves = [a.requires_grad_() for a in args]
    score = call(*leaves, backend=backend)
    torch.testing.assert_close(score, call(*args, backend="reference"))
    score.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_that_cancel_keep_their_accuracy(backend):
    """Rows that nearly cancel: the norm of what is attended to is far smaller than that of its terms."""
    call, args = case(2, (4, 3), R=6, D=32)
    args[0][:, 3:] = -args[0][:, :3] + 1e-3 * args[0][:, 3:]
    args[1][:] = args[1][:, :1]  # all keys alike: every word attends to the mean
    op_checks.check_forward(call, args, torch.float32, backend)


def test_autocast_takes_its_dtype():
    call, args = case(2, (3, 2))
    op_checks.check_autocast(call, args)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"image_key": torch.zeros(2, 5, 8)}, ValueError, r"image_key must be \[I, R, P\] with R = 6 as in image"),
        ({"word_key": torch.zeros(5, 7)}, ValueError, r"word_key must be \[N, P\] with P = 8 as in image_key"),
        ({"image_gate": torch.zeros(2, 6, 1, 1)}, ValueError, r"image_gate must be \[I, R, 2, K\], got"),
        ({"image_gate": torch.zeros(2, 6, 2, 3)}, ValueError, r"with K = 1 or D = 16, got \[2, 6, 2, 3\]"),
        ({"word_gate": torch.zeros(5, 2, 16)}, ValueError, r"word_gate must be \[N, 2, K\] with K = 1"),
        ({"image_pool": torch.zeros(8)}, ValueError, r"image_pool must be \[D\] with D = 16"),
        ({"caption_pool": torch.zeros(16).double()}, TypeError, "caption_pool and image must have one dtype"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, r"end at the 5 packed rows, got 0\.\.4"),
        ({"region_lengths": torch.tensor([7, 1])}, ValueError, r"region_lengths must lie in 1\.\.6"),
        ({"direction": "full"}, ValueError, "direction must be one of t2i, i2t, both, got 'full'"),
        ({"pool": "max"}, ValueError, "pool must be one of mean, sum, got 'max'"),
        ({"scale": 0.0}, ValueError, "scale must be more than 0"),
        ({"local_mix": 1.5}, ValueError, r"local_mix must lie in 0\.\.1, got 1.5"),
        ({"global_mix": -0.5}, ValueError, r"global_mix must lie in 0\.\.1, got -0.5"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refusals(change, error, message):
    _, args = case(2, (3, 2))
    arguments = dict(zip(NAMES, (a.float() for a in args), strict=True)) | {"cu_seqlens": edges((3, 2))} | change
    with pytest.raises(error, match=message) as refusal:
        itm_fast.hierarchical_alignment_score(**arguments)
    assert str(refusal.value).startswith(OP)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_what_a_direction_does_not_read_has_gradient_zero(backend):
    call, args = case(2, (3, 2), direction="t2i")
    args[6].requires_grad_()
    call(*args, backend=backend).sum().backward()
    assert args[6].grad.eq(0).all()
