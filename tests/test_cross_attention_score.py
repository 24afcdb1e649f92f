"""`cross_attention_score` on every backend that runs on a CPU."""

import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors

import itm_fast
from itm_fast import _native
from itm_fast.ops import _recompute
from itm_fast.ops import cross_attention_score as op
from itm_fast.ops._attention import DEFAULT, DIRECTIONS, NORMS, POOLS
from itm_fast.testing import assert_accurate, inputs, op_checks

BACKENDS = op_checks.backends("cross_attention_score")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# One of everything; ragged with a one-word caption, none of whose affinities is near zero, where the gradient of its
# norm is ill-conditioned (1e-8 / s^2); a prime everywhere; a caption longer than a chunk; an image longer than a block.
SHAPES = [
    (1, (1,), 1, 1),
    (5, (13, 4, 7, 1, 4), 36, 64),
    (3, (5, 5, 2), 17, 31),
    (2, (460, 3), 5, 8),
    (2, (9, 4), 150, 20),
]
OPTIONS = list(itertools.product(NORMS, POOLS))


def ids(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and len(value) == 4:
        I, lengths, R, D = value
        return f"I{I}-T{len(lengths)}-R{R}-W{max(lengths, default=0)}-D{D}"
    return str(value)


def case(I, lengths, R, D, region_lengths=None, **options):
    image, words, cu_seqlens = inputs(I, lengths, R, D, dtype=torch.float64)

    def call(image, words, backend):
        edge, counts = op_checks.beside(image, cu_seqlens, region_lengths)
        return itm_fast.cross_attention_score(
            image, words, edge, region_lengths=counts, backend=backend, **options
        )

    return call, (image, words)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape, direction):
    call, args = case(*shape, direction=direction)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm,pool", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_norm_and_pool(backend, norm, pool, direction):
    counts = torch.tensor([6, 1, 4])
    for region_lengths in (None, counts):
        call, args = case(3, (4, 1, 3, 4), 6, 16, region_lengths, direction=direction, affinity_norm=norm, pool=pool)
        for dtype in (torch.float64, torch.float32):
            op_checks.check_forward(call, args, dtype, backend)
        op_checks.check_gradients(call, args, torch.float64, backend)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend, norm, direction):
    call, args = case(2, (3, 1), 4, 5, torch.tensor([4, 2]), direction=direction, affinity_norm=norm)
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend):
    call, args = case(3, (4, 2, 4), 5, 8)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8, requires_grad=True)
    permuted = image.detach().transpose(0, 1).contiguous().transpose(0, 1)
    options = (None, "t2i", "l2norm", 9.0, "lse", 6.0, *DEFAULT)
    op_checks.check_fake_backward("cross_attention_score", (permuted, words, cu_seqlens, *options), 2, backend)
    for region_lengths in (None, torch.tensor([4, 2])):
        torch.library.opcheck(
            torch.ops.itm_fast.cross_attention_score.default,
            (image, words, cu_seqlens, region_lengths, "i2t", "l1norm", 4.0, "mean", 6.0, *DEFAULT, backend),
        )


def test_auto_compiles_into_one_graph():
    op_checks.check_compile(*case(2, (3, 2), 4, 8), None)


def test_hand_computed_pair():
    # One word (1, 0) on regions (1, 0) and (0, 1): l2norm over one query makes the affinities 1 and 0.
    image = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    words = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    e = torch.e
    want = (e / (1 + e)) / ((e**2 + 1) ** 0.5 / (1 + e))
    for backend in (*BACKENDS, "reference"):
        score = itm_fast.cross_attention_score(
            image, words, torch.tensor([0, 1]), scale=1.0, pool="sum", affinity_norm="l2norm", backend=backend
        )
        assert score.item() == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize("I,lengths", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, lengths):
    image, words, cu_seqlens = inputs(I, lengths, 4, 8, requires_grad=True)
    score = itm_fast.cross_attention_score(image, words, cu_seqlens, backend=backend)
    assert score.shape == (I, len(lengths))
    score.sum().backward()
    assert image.grad.eq(0).all()
    assert words.grad.eq(0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_regions_beyond_the_count_change_nothing(backend, direction):
    image, words, cu_seqlens = inputs(3, (4, 2, 5), 6, 16, dtype=torch.float64)
    counts = torch.tensor([6, 2, 4], dtype=torch.int32)
    poisoned = image.clone()
    for i, n in enumerate(counts.tolist()):
        poisoned[i, n:] = float("nan")
    poisoned.requires_grad_()
    options = dict(direction=direction, backend=backend)
    score = itm_fast.cross_attention_score(poisoned, words, cu_seqlens, region_lengths=counts, **options)
    cut = [itm_fast.cross_attention_score(v[None, :n], words, cu_seqlens, **options) for v, n in zip(image, counts)]
    torch.testing.assert_close(score, torch.cat(cut), rtol=0, atol=1e-14)
    score.sum().backward()
    for i, n in enumerate(counts.tolist()):
        assert poisoned.grad[i, n:].eq(0).all()
        assert torch.isfinite(poisoned.grad[i, :n]).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_does_not_depend_on_its_block(backend, direction, monkeypatch):
    image, words, cu_seqlens = inputs(7, (4, 2, 5, 4, 9, 4, 1), 6, 16, dtype=torch.float64)

    def run(image, words, cu_seqlens):
        return itm_fast.cross_attention_score(image, words, cu_seqlens, direction=direction, backend=backend)

    whole = run(image, words, cu_seqlens)
    edge = cu_seqlens.tolist()
    for t in range(7):
        one = run(image[2:3], words[edge[t] : edge[t + 1]], torch.tensor([0, edge[t + 1] - edge[t]]))
        torch.testing.assert_close(one[0, 0], whole[2, t], rtol=0, atol=1e-14)
    for tile in (1, 1 << 14):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        torch.testing.assert_close(run(image, words, cu_seqlens), whole, rtol=0, atol=1e-14)


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_kernels_give_the_same_bits_wherever_a_pair_lies(norm, direction):
    # More rows than a block of contexts has and more columns than a chunk, of sets of every length.
    lengths = [1 + (7 * t) % 31 for t in range(40)]
    image, words, cu_seqlens = inputs(33, lengths, 19, 33)
    counts = torch.tensor([1 + (5 * i) % 19 for i in range(33)])

    def run(images, captions):
        edge = cu_seqlens.tolist()
        rows = torch.cat([words[edge[t] : edge[t + 1]] for t in captions])
        bounds = torch.tensor([0, *itertools.accumulate(lengths[t] for t in captions)])
        options = dict(direction=direction, affinity_norm=norm, region_lengths=counts[images], backend="cpu")
        return itm_fast.cross_attention_score(image[images], rows, bounds, **options)

    images, captions = torch.randperm(33, generator=torch.Generator().manual_seed(1)).tolist(), list(range(40))
    whole = run(list(range(33)), captions)
    assert torch.equal(run(images, captions[::-1]), whole[images].flip(1))
    assert torch.equal(run([8], [23]), whole[8:9, 23:24])
    assert torch.equal(run(list(range(5, 30)), [*range(11, 40)]), whole[5:30, 11:])


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_kernels_give_the_same_bits_for_any_number_of_threads(direction):
    call, args = case(33, [1 + (7 * t) % 31 for t in range(40)], 19, 33, direction=direction)
    op_checks.check_threads(call, args, torch.float32)


def alone(code, **environment):
    """Run a program in a process of its own, whose memory is not this one's."""
    program = textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@over_lesser_processors
def test_older_processors(level, direction, monkeypatch):
    at_level(level, monkeypatch)
    call, args = case(5, (13, 5, 40, 4, 7), 37, 23, direction=direction)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        op_checks.check_forward(call, args, dtype, "cpu")
        op_checks.check_gradients(call, args, dtype, "cpu")


@pytest.mark.slow
@needs_cpu
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_kernels_keep_to_their_scratch(direction):
    # 80 MB of queries: their packed copy alone would pass the bound.
    images, words = (8, 20000) if direction == "t2i" else (1700, 100)
    code = f"""
        import re, torch
        from itm_fast.ops import _cpu_calls
        from itm_fast.testing import inputs

        cpu = _cpu_calls.implementation("cross_attention_score")

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

        torch.set_num_threads(2)
        rest = None, "{direction}", "clipped_l2norm", 9.0, "lse", 6.0, "softmax", 0.0, "cosine"
        small = inputs(2, (3, 2), 4, 8)
        cpu.backward(cpu.forward(*small, *rest), [True, True], *small, *rest)
        image, words = torch.randn({images}, 12, 1024), torch.randn({words}, 1024)
        cu_seqlens = torch.arange(0, {words} + 1, 20)
        grad = torch.ones({images}, {words} // 20)
        for step in (lambda: cpu.forward(image, words, cu_seqlens, *rest),
                     lambda: cpu.backward(grad, [True, True], image, words, cu_seqlens, *rest)):
            open("/proc/self/clear_refs", "w").write("5")
            before, result = peak(), step()
            result = [result] if torch.is_tensor(result) else result
            print(peak() - before - sum(x.nbytes for x in result) / 2**20)
    """
    # A fixed threshold gives what is freed back to the system, so that the next step takes it anew.
    forward, backward = map(float, alone(code, MALLOC_MMAP_THRESHOLD_=str(1 << 16)).split())
    assert 1 < forward < 64
    assert 1 < backward < 64


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_zero_features_give_finite_scores_and_gradients(backend):
    image = torch.zeros(2, 3, 4, requires_grad=True)
    words = torch.zeros(5, 4, requires_grad=True)
    score = itm_fast.cross_attention_score(image, words, torch.tensor([0, 2, 5]), backend=backend)
    score.sum().backward()
    assert torch.isfinite(score).all()
    assert torch.isfinite(image.grad).all()
    assert torch.isfinite(words.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opposite_regions_cancel_without_losing_the_score(backend):
    generator = torch.Generator().manual_seed(0)
    v, w = torch.nn.functional.normalize(torch.randn(2, 32, generator=generator, dtype=torch.float64), dim=-1)
    image = torch.nn.functional.normalize(torch.stack([v, -v + 1e-4 * w]), dim=-1)[None]
    words = 1e-3 * torch.randn(2, 32, generator=generator, dtype=torch.float64)  # so the attention is nearly uniform
    words = torch.cat([words, 2e4 * v[None]])  # but for the last word, which attends to one region

    def call(image, words, backend):
        return itm_fast.cross_attention_score(
            image, words, torch.tensor([0, 3]), affinity_norm="none", scale=1e-3, pool="mean", backend=backend
        )

    # |P| is 5e-5 of |x|, so a rounding of x is 20,000 of P: the Gram form alone would leave nothing of float32.
    for dtype in (torch.float64, torch.float32):
        op_checks.check_forward(call, (image, words), dtype, backend)
        op_checks.check_gradients(call, (image, words), dtype, backend)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan_and_in_its_caption(backend, pool):
    call, (image, words) = case(2, (3, 2, 4), 5, 8, pool=pool)
    words = words.clone()
    words[4, 3] = torch.nan
    assert call(image, words, backend).isnan().tolist() == [[False, True, False]] * 2


def test_a_second_derivative_is_refused():
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8, requires_grad=True)
    score = itm_fast.cross_attention_score(image, words, cu_seqlens)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(score.sum(), image, create_graph=True)


def test_autocast_takes_its_dtype():
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        score = itm_fast.cross_attention_score(image, words, cu_seqlens)
        exact = itm_fast.cross_attention_score(image.double(), words.double(), cu_seqlens)
    assert score.dtype == torch.bfloat16
    assert exact.dtype == torch.float64
    torch.testing.assert_close(score.double(), exact, rtol=0.02, atol=0.02)
    score.sum().backward()
    assert image.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(words=torch.zeros(5, 9)), ValueError, r"words must be \[N, D\] with D = 8 as in image, got \[5, 9\]"),
        (dict(image=torch.zeros(2, 8)), ValueError, r"image must be \[I, R, D\], got \[2, 8\]"),
        (dict(words=torch.zeros(5, 8).double()), TypeError, "words and image must have one dtype"),
        (dict(words=torch.zeros(5, 8).long(), image=torch.zeros(2, 4, 8).long()), TypeError, "image must be float64"),
        (dict(cu_seqlens=torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens must be int32 or int64"),
        (dict(cu_seqlens=torch.tensor([0, 4])), ValueError, r"end at the 5 packed rows, got 0\.\.4"),
        (dict(cu_seqlens=torch.tensor([0, 3, 3, 5])), ValueError, "caption 1 is empty"),
        (dict(region_lengths=torch.tensor([4, 5])), ValueError, r"must lie in 1\.\.4 \(R\), got 5 for image 1"),
        (dict(region_lengths=torch.tensor([4])), ValueError, r"region_lengths must be \[I\] with I = 2"),
        (dict(direction="both"), ValueError, "direction must be one of t2i, i2t, got 'both'"),
        (dict(affinity_norm="no_norm"), ValueError, "affinity_norm must be one of softmax, .* got 'no_norm'"),
        (dict(pool="avg"), ValueError, "pool must be one of lse"),
        (dict(scale=0.0), ValueError, "scale must be more than 0"),
        (dict(scale=float("inf")), ValueError, "more than 0 and finite, got inf"),
        (dict(image=torch.zeros(2, 0, 8)), ValueError, r"image must be \[I, R, D\] with R > 0, got \[2, 0, 8\]"),
        (dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), ValueError, r"must be \[T\+1\] with T\+1 > 0"),
        (dict(words=[1, 2]), TypeError, "words must be a tensor, got list"),
        (dict(backend="cuda"), NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    arguments = dict(image=torch.zeros(2, 4, 8), words=torch.zeros(5, 8), cu_seqlens=torch.tensor([0, 5]))
    arguments.update(change)
    with pytest.raises(error, match=message):
        itm_fast.cross_attention_score(**arguments)


def test_the_public_function_is_the_op_modules():
    assert itm_fast.cross_attention_score is op


@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_medium_precision_may_multiply_bfloat16_values(direction):
    call, args = case(5, (13, 4, 7, 1, 4), 36, 65, direction=direction)
    args = [a.float() for a in args]
    before, torch_precision = call(*args, backend="cpu"), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        result = call(*args, backend="cpu")
        gradients = op_checks.gradients(call, args, torch.float32, "cpu", torch.float32)
    finally:
        torch.set_float32_matmul_precision(torch_precision)
    assert torch.equal(result, before) == (_native.level() not in _native.BFLOAT16_LEVELS)

    def reference(dtype):
        return [call(*(a.to(dtype) for a in args), backend="reference")]

    assert_accurate([result], reference, torch.float32, products=torch.bfloat16)

    def differentiated(dtype):
        return op_checks.gradients(call, args, dtype, "reference", torch.float32)

    assert_accurate(gradients, differentiated, torch.float32, products=torch.bfloat16, gradients=True)
