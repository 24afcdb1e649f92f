"""`global_local_score` on every backend that runs on a CPU."""

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors, scratch_of

import itm_fast
from itm_fast import _native
from itm_fast.ops import _recompute
from itm_fast.testing import assert_accurate, inputs, op_checks

BACKENDS = op_checks.backends("global_local_score")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "I1-T1-W1-D1": (1, (1,), 1),
    "I5-T5-W13-D64": (5, (13, 4, 7, 1, 4), 64),
    "I3-T3-W5-D31": (3, (5, 5, 2), 31),
    "I2-T2-W460-D8": (2, (460, 3), 8),
    "I300-T9-W12-D65": (300, (12, 5, 9, 12, 8, 7, 3, 12, 11), 65),
}


def case(I, lengths, D, scale=1.0):
    image, words, cu_seqlens = inputs(I, lengths, 3, D, dtype=torch.float64)
    # Lengths other than 1, and attention that is sharper than cosines alone make it.
    vector = image.sum(1)
    words = words * torch.linspace(0.5, 2, len(words), dtype=torch.float64)[:, None]

    def call(vector, words, backend):
        return itm_fast.global_local_score(vector, words, cu_seqlens, scale=scale, backend=backend)

    return call, (vector, words)


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape, scale):
    call, args = case(*shape, scale=scale)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend):
    call, args = case(3, (3, 1, 4), 5, scale=3.0)
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend):
    call, args = case(3, (4, 2, 4), 8)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    rest = torch.tensor([0, 4, 6, 10]), 1.0
    torch.library.opcheck(torch.ops.itm_fast.global_local_score.default, (*single, *rest, backend))
    op_checks.check_fake_backward("global_local_score", (*single, *rest), 2, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_hand_computed_pair(backend):
    # The vector along the first of two unit words: cosines 1 and 0, whatever the vector's length.
    words = torch.eye(2, dtype=torch.float64)
    vector = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    score = itm_fast.global_local_score(vector, words, torch.tensor([0, 2]), backend=backend)
    assert score.item() == pytest.approx(torch.e / (torch.e**2 + 1) ** 0.5, abs=1e-7)


@pytest.mark.parametrize("I,lengths", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, lengths):
    call, args = case(I, lengths, 4)
    inputs = [a.requires_grad_() for a in args]
    score = call(*inputs, backend=backend)
    assert score.shape == (I, len(lengths))
    score.sum().backward()
    assert all(x.grad.eq(0).all() for x in inputs)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_vector_or_word_of_zeros_scores_zero(backend):
    call, (vector, words) = case(3, (3, 2), 6)
    vector[1], words[3:] = 0, 0
    vector, words = vector.requires_grad_(), words.requires_grad_()
    score = call(vector, words, backend=backend)
    assert not score[1].any()
    assert not score[:, 1].any()
    score.sum().backward()
    assert vector.grad.isfinite().all()
    assert words.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_does_not_depend_on_its_block(backend, monkeypatch):
    lengths = (5, 3, 6, 5, 10, 5, 2)
    call, (vector, words) = case(7, lengths, 16)
    whole = call(vector, words, backend=backend)
    edge = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        one = itm_fast.global_local_score(vector[2:3], words[start:stop], torch.tensor([0, stop - start]))
        torch.testing.assert_close(one[0, 0], whole[2, t], rtol=1e-12, atol=1e-12)
    for tile in (1, 1 << 12):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        torch.testing.assert_close(call(vector, words, backend=backend), whole, rtol=1e-12, atol=1e-12)
        op_checks.check_gradients(call, (vector, words), torch.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opposite_words_cancel_without_losing_the_score(backend):
    generator = torch.Generator().manual_seed(0)
    v, w = torch.nn.functional.normalize(torch.randn(2, 32, generator=generator, dtype=torch.float64), dim=-1)
    words = torch.nn.functional.normalize(torch.stack([v, -v + 1e-4 * w]), dim=-1)
    vector = torch.randn(3, 32, generator=generator, dtype=torch.float64)

    def call(vector, words, backend):
        return itm_fast.global_local_score(vector, words, torch.tensor([0, 2]), scale=1e-3, backend=backend)

    # |t*| is a thousandth of |t| at the most, so a rounding of t is a thousand of t*.
    for dtype in (torch.float64, torch.float32):
        op_checks.check_forward(call, (vector, words), dtype, backend)
        op_checks.check_gradients(call, (vector, words), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan_and_in_its_pair(backend):
    call, (vector, words) = case(3, (3, 2, 4), 8)
    words[4, 3] = torch.nan
    vector[1, 2] = torch.nan
    want = [[False, True, False], [True] * 3, [False, True, False]]
    assert call(vector, words, backend).isnan().tolist() == want


COUNTS = (9, 30, 1, 14, 260, 7)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_threads_change_no_bit(dtype):
    call, args = case(50, COUNTS * 3, 20, scale=5.0)
    op_checks.check_threads(call, args, dtype)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_pair_has_the_same_bits_in_any_block_and_order(dtype):
    call, args = case(40, COUNTS, 20, scale=5.0)
    vector, words = (a.to(dtype) for a in args)
    whole, parts = call(vector, words, backend="cpu"), words.split(COUNTS)

    def score(vector, captions):
        edge = torch.tensor([0, *(len(c) for c in captions)]).cumsum(0)
        return itm_fast.global_local_score(vector, torch.cat(captions), edge, scale=5.0, backend="cpu")

    for t, caption in enumerate(parts):
        assert torch.equal(score(vector[7:8], [caption])[0, 0], whole[7, t])
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(score(vector.flip(0), [parts[t] for t in order]), whole[:, order].flip(0))


@needs_cpu
@over_lesser_processors
def test_older_processors(level, monkeypatch):
    at_level(level, monkeypatch)
    for shape in SHAPES.values():
        call, args = case(*shape, scale=7.0)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            op_checks.check_forward(call, args, dtype, "cpu")
            op_checks.check_gradients(call, args, dtype, "cpu")


@pytest.mark.slow
@needs_cpu
@pytest.mark.parametrize("images,captions", [(20_000, 200), (200, 2_000)])
def test_scratch_is_bounded_however_large_the_block(images, captions):
    setup = [
        f"vector, words = torch.rand({images}, 512), torch.rand({captions * 10}, 512)",  # 40 MB of one of them
        f"cu_seqlens = torch.arange(0, {captions * 10} + 1, 10)",
        f"grad = torch.ones({images}, {captions})",
    ]
    forward = "itm_fast.global_local_score(vector, words, cu_seqlens, backend='cpu')"
    assert scratch_of(setup, forward) < 64 << 20
    op = "torch.ops.itm_fast.global_local_score_backward"
    assert scratch_of(setup, f"{op}(grad, [True] * 2, vector, words, cu_seqlens, 1.0, 'cpu')") < 64 << 20


@needs_cpu
def test_medium_precision_may_multiply_bfloat16_values():
    call, args = case(5, (13, 4, 7, 1, 4), 65)
    args = [a.float() for a in args]
    before = call(*args, backend="cpu")
    try:
        torch.set_float32_matmul_precision("medium")
        result = call(*args, backend="cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(result, before) == (_native.level() not in _native.BFLOAT16_LEVELS)

    def reference(dtype):
        return [call(*(a.to(dtype) for a in args), backend="reference")]

    assert_accurate([result], reference, torch.float32, products=torch.bfloat16)


def test_autocast_takes_its_dtype():
    call, args = case(2, (3, 2), 8)
    op_checks.check_autocast(call, args)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"vector": torch.zeros(2, 3, 8)}, ValueError, r"vector must be \[I, D\], got \[2, 3, 8\]"),
        ({"words": torch.zeros(5, 7)}, ValueError, r"words must be \[N, D\] with D = 8 as in vector"),
        ({"words": torch.zeros(5, 8).double()}, TypeError, "one dtype"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, r"end at the 5 packed rows, got 0\.\.4"),
        ({"scale": 0.0}, ValueError, "scale must be more than 0"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    arguments = {"vector": torch.zeros(2, 8), "words": torch.zeros(5, 8), "cu_seqlens": torch.tensor([0, 2, 5])}
    with pytest.raises(error, match=message):
        itm_fast.global_local_score(**{**arguments, **change})
