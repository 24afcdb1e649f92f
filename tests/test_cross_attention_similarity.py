"""`cross_attention_similarity` on every backend that runs on a CPU."""

import itertools

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors, scratch_of

import itm_fast
from itm_fast import _native
from itm_fast.ops import _recompute
from itm_fast.ops._attention import DIRECTIONS, NORMS
from itm_fast.testing import assert_accurate, inputs, op_checks

BACKENDS = op_checks.backends("cross_attention_similarity")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "I1-T1-R1-W1-D1-S2": (1, (1,), 1, 1, 2),  # with S 1 the result is +-1 and its gradients are rounding errors
    "I5-T5-R36-W13-D64-S32": (5, (13, 1, 4, 4, 7), 36, 64, 32),
    "I3-T3-R17-W5-D31-S7": (3, (5, 5, 2), 17, 31, 7),
    "I2-T3-R5-W230-D37-S9": (2, (230, 1, 3), 5, 37, 9),
    "I2-T2-R231-W4-D21-S5": (2, (4, 2), 231, 21, 5),
}
LENGTHS = (4, 1, 3, 4)


def case(I, lengths, R, D, S, region_lengths=None, **options):
    image, words, cu_seqlens = inputs(I, lengths, R, D, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(S, D, generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(S, generator=generator, dtype=torch.float64)

    def call(image, words, weight, bias, backend):
        edge, counts = op_checks.beside(image, cu_seqlens, region_lengths)
        return itm_fast.cross_attention_similarity(
            image, words, edge, weight, bias, region_lengths=counts, backend=backend, **options
        )

    return call, (image, words, weight, bias)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape, direction):
    call, args = case(*shape, direction=direction)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_norm_with_and_without_region_lengths(backend, norm, direction):
    for region_lengths in (None, torch.tensor([6, 1, 4])):
        call, args = case(3, LENGTHS, 6, 16, 8, region_lengths, direction=direction, affinity_norm=norm)
        op_checks.check_forward(call, args, torch.float64, backend)
        op_checks.check_forward(call, args, torch.float32, backend)
        op_checks.check_gradients(call, args, torch.float64, backend)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend, direction):
    call, args = case(2, (3, 1), 4, 5, 3, torch.tensor([4, 2]), direction=direction)
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend, direction):
    call, args = case(3, (4, 2, 4), 5, 8, 6, direction=direction)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8, requires_grad=True)
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.library.opcheck(
        torch.ops.itm_fast.cross_attention_similarity.default,
        (image, words, weight, bias, cu_seqlens, torch.tensor([4, 2]), direction, "l2norm", 4.0, backend),
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("I,lengths", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, lengths, direction):
    image, words, cu_seqlens = inputs(I, lengths, 4, 8, requires_grad=True)
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    similar = itm_fast.cross_attention_similarity(
        image, words, cu_seqlens, weight, bias, direction=direction, backend=backend
    )
    T = len(lengths)
    assert similar.shape == ((I, sum(lengths), 6) if direction == "t2i" else (I, T, 4, 6))
    similar.sum().backward()
    for leaf in (image, words, weight, bias):
        assert leaf.grad.eq(0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_regions_beyond_the_count_change_nothing(backend, direction):
    counts = torch.tensor([6, 2, 4])
    call, (image, words, weight, bias) = case(3, LENGTHS, 6, 16, 8, counts, direction=direction)
    cut_call, _ = case(3, LENGTHS, 6, 16, 8, direction=direction)
    poisoned = image.clone()
    for i, n in enumerate(counts.tolist()):
        poisoned[i, n:] = float("nan")
    poisoned.requires_grad_()
    similar = call(poisoned, words, weight, bias, backend)
    for i, n in enumerate(counts.tolist()):
        cut = cut_call(image[i : i + 1, :n], words, weight, bias, backend)[0]
        got = similar[i] if direction == "t2i" else similar[i, :, :n]
        torch.testing.assert_close(got, cut, rtol=0, atol=1e-13)
        if direction == "i2t":
            assert similar[i, :, n:].eq(0).all()
    similar.sum().backward()
    for i, n in enumerate(counts.tolist()):
        assert poisoned.grad[i, n:].eq(0).all()
        assert torch.isfinite(poisoned.grad[i, :n]).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_similarity_does_not_depend_on_its_block(backend, direction, monkeypatch):
    call, args = case(7, (4, 2, 5, 4, 9, 4, 1), 6, 16, 8, direction=direction)
    whole = call(*args, backend)
    edge = [0, 4, 6, 11, 15, 24, 28, 29]
    image, words, weight, bias = args
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        one = itm_fast.cross_attention_similarity(
            image[2:3],
            words[start:stop],
            torch.tensor([0, stop - start]),
            weight,
            bias,
            direction=direction,
            backend=backend,
        )
        want = whole[2:3, start:stop] if direction == "t2i" else whole[2:3, t : t + 1]
        torch.testing.assert_close(one, want, rtol=0, atol=1e-13)
    for tile in (1, 1 << 14):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        torch.testing.assert_close(call(*args, backend), whole, rtol=0, atol=1e-13)


# More columns than a chunk has in either direction, sets of every length, several chunks and groups of contexts.
MANY = 15, [1 + (7 * t) % 31 for t in range(40)], 19, 33, 21


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_kernels_give_the_same_bits_wherever_a_pair_lies(norm, direction):
    I, lengths, R, D, S = MANY
    _, (image, words, weight, bias) = case(*MANY)
    image, words, weight, bias = (a.float() for a in (image, words, weight, bias))
    counts = torch.tensor([1 + (5 * i) % R for i in range(I)])
    parts = words.split(lengths)

    def run(images, captions):
        edge = torch.tensor([0, *itertools.accumulate(lengths[t] for t in captions)])
        similar = itm_fast.cross_attention_similarity(
            image[images],
            torch.cat([parts[t] for t in captions]),
            edge,
            weight,
            bias,
            direction=direction,
            affinity_norm=norm,
            region_lengths=counts[images],
            backend="cpu",
        )
        if direction == "t2i":
            return dict(zip(captions, similar.split([lengths[t] for t in captions], 1), strict=True))
        return dict(zip(captions, similar.unbind(1), strict=True))

    whole = run(list(range(I)), list(range(40)))
    shuffled = torch.randperm(I, generator=torch.Generator().manual_seed(1)).tolist()
    for images, captions in ((shuffled, list(range(40))[::-1]), ([8], [23]), (list(range(3, 12)), list(range(11, 40)))):
        for t, similar in run(images, captions).items():
            assert torch.equal(similar, whole[t][images])


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_give_the_same_bits_for_any_number_of_threads(dtype, direction):
    call, args = case(*MANY, direction=direction)
    op_checks.check_threads(call, args, dtype)


@pytest.mark.slow
@needs_cpu
def test_float32_products_are_of_bfloat16_only_where_that_is_allowed():
    call, args = case(*MANY)
    single = [a.float() for a in args]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        medium = call(*single, backend="cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    op_checks.check_forward(call, args, torch.float32, "cpu")

    def reference(dtype):
        return [call(*(a.to(dtype) for a in single), backend="reference")]

    assert_accurate([medium], reference, torch.float32, products=torch.bfloat16)
    assert torch.equal(medium, call(*single, backend="cpu")) == (_native.outcome().level not in _native.BFLOAT16_LEVELS)


def results(call, args, dtype, backend="reference", precision="highest"):
    """Similarity vectors and all gradients at a precision of float32 matrix products."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        leaves = op_checks.leaves([a.to(dtype) for a in args], dtype)
        similar = call(*leaves, backend=backend)
        upstream = torch.randn(similar.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return [similar, *torch.autograd.grad(similar, leaves, upstream.to(dtype))]
    finally:
        torch.set_float32_matmul_precision(before)


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_by_products_of_bfloat16(direction):
    # More sets than are held at once, and odd numbers.
    call, args = case(17, [1 + (7 * t) % 5 for t in range(17)], 5, 33, 7, direction=direction)
    single = [a.float() for a in args]
    medium = results(call, single, torch.float32, "cpu", "medium")
    rounded = _native.outcome().level in _native.BFLOAT16_LEVELS
    for a, b in zip(medium, results(call, single, torch.float32, "cpu"), strict=True):
        assert torch.equal(a, b) != rounded
    assert_accurate(
        medium, lambda dtype: results(call, single, dtype), torch.float32, products=torch.bfloat16, gradients=True
    )


def opposite_contexts(direction):
    """Contexts in opposite pairs, orthogonal to all queries: P is a thousandth of them, so |P|^2 is lost in the
    roundings of the Gram form, and P itself if its terms, or the factors of affinities, are rounded to bfloat16."""
    call, (image, words, weight, bias) = case(3, (8, 6, 8), 8, 48, 16, direction=direction, affinity_norm="none")
    image[..., :24] = 0
    words[..., 24:] = 0
    context = image if direction == "t2i" else words
    context[..., 1::2, :] = -context[..., ::2, :] + 1e-3 * context[..., 1::2, :]
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    return call, (image @ turn, words @ turn, weight, bias)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attended_vectors_that_cancel(backend, direction):
    call, args = opposite_contexts(direction)
    op_checks.check_forward(call, args, torch.float32, backend)


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_products_of_bfloat16_where_attended_vectors_cancel(direction):
    """The rounding of a factor, 2^-9, is all that a product may lose: 2^-8 with both, and no result passes through
    more than four products of rounded factors. By terms of P that are rounded it would be all of a result."""
    call, args = opposite_contexts(direction)
    single = [a.float() for a in args]
    found = results(call, single, torch.float32, "cpu", "medium")
    for a, b in zip(found, results(call, single, torch.float64), strict=True):
        assert (a - b).norm() <= 4 * 2**-8 * b.norm()


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_products_of_bfloat16_beside_attended_vectors_that_cancel(direction):
    """The last queries attend to one context alone, and no P of theirs cancels. Neither the queries beside a pair in a
    tile nor the other contexts of the call change its bits."""
    _, (image, words, weight, bias) = opposite_contexts(direction)
    if direction == "t2i":
        words[-8:] += 2 * image[:, :1].mean(0)
    else:
        image[-1] += 2 * words[[0, 8, 14]].mean(0)
    args = [a.float() for a in (image, words, weight, bias)]

    def vectors(images, start, stop, lengths):
        alone, _ = case(len(images), lengths, 8, 48, 16, direction=direction, affinity_norm="none")
        return results(alone, [images, args[1][start:stop], *args[2:]], torch.float32, "cpu", "medium")[0]

    whole = vectors(args[0], 0, 22, (8, 6, 8))
    for t, (start, stop) in enumerate(itertools.pairwise((0, 8, 14, 22))):
        of_caption = whole[:, start:stop] if direction == "t2i" else whole[:, t : t + 1]
        for i in range(3):
            alone = vectors(args[0][i : i + 1], start, stop, (stop - start,))
            assert torch.equal(alone, of_caption[i : i + 1]), (i, t)


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@over_lesser_processors
def test_older_processors(level, direction, monkeypatch):
    at_level(level, monkeypatch)
    for I, lengths, R, D, S in ((5, (13, 4, 7, 1, 4), 36, 64, 32), (2, (230, 1, 3), 5, 37, 9), (2, (4, 2), 231, 21, 5)):
        call, args = case(I, lengths, R, D, S, direction=direction)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            op_checks.check_forward(call, args, dtype, "cpu")
            op_checks.check_gradients(call, args, dtype, "cpu")


@pytest.mark.slow
@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scratch_is_bounded_however_large_the_block(direction):
    # 80 MB of words, or of regions: a packed copy of either would pass the bound.
    I, T = (4, 1000) if direction == "t2i" else (1000, 4)
    setup = [
        "torch.set_num_threads(2)",
        f"args = [torch.randn({I}, 20, 1024), torch.randn({T} * 20, 1024), torch.randn(16, 1024), torch.randn(16)]",
        f"args += [torch.arange({T} + 1) * 20, None, '{direction}', 'clipped_l2norm', 9.0, 'cpu']",
        "grad = torch.ones_like(torch.ops.itm_fast.cross_attention_similarity(*args))",
    ]
    assert scratch_of(setup, "torch.ops.itm_fast.cross_attention_similarity(*args)") < 64 << 20
    backward = "torch.ops.itm_fast.cross_attention_similarity_backward(grad, [True] * 4, *args)"
    assert scratch_of(setup, backward) < 64 << 20


def test_autocast_takes_its_dtype():
    call, args = case(2, (3, 2), 4, 8, 6)
    single = [a.float().requires_grad_() for a in args]
    with torch.autocast("cpu", torch.bfloat16):
        similar = call(*single, "torch")
    assert similar.dtype == torch.bfloat16
    torch.testing.assert_close(similar.double(), call(*args, "reference"), rtol=0.05, atol=0.05)
    similar.sum().backward()
    assert all(s.grad.dtype == torch.float32 for s in single)


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(weight=torch.zeros(6, 9)), ValueError, r"weight must be \[S, D\] with D = 8 as in image, got \[6, 9\]"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias must be \[S\] with S = 6 as in weight, got \[5\]"),
        (dict(bias=torch.zeros(6).half()), TypeError, "bias and image must have one dtype"),
        (dict(direction="v2t"), ValueError, "direction must be one of t2i, i2t"),
        (dict(cu_seqlens=torch.tensor([1, 5])), ValueError, r"must start at 0 .* got 1\.\.5"),
        (dict(backend="cuda"), NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    arguments = dict(
        image=torch.zeros(2, 4, 8),
        words=torch.zeros(5, 8),
        cu_seqlens=torch.tensor([0, 5]),
        weight=torch.zeros(6, 8),
        bias=torch.zeros(6),
    )
    arguments.update(change)
    with pytest.raises(error, match=message):
        itm_fast.cross_attention_similarity(**arguments)
