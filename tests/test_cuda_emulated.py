"""The CUDA kernels of `cross_attention_score`, emulated on the CPU, against the reference in float64."""

import cuda_stub
import pytest
import torch
from cuda_emulated import device, emulated
from torch.utils._python_dispatch import TorchDispatchMode

import itm_fast
from itm_fast import _cuda
from itm_fast.ops._attention import NORMS, POOLS
from itm_fast.ops._cuda import _rows, _tiles
from itm_fast.ops._cuda import cross_attention_score as op
from itm_fast.testing import assert_accurate, inputs

__all__ = ["device", "emulated"]  # fixtures
DIRECTIONS = ["t2i", "i2t"]
KINDS = ["F16", "BF16", "F16X3", "TF32X3", "one F16"]  # "one F16": float32 rows at the precision "high"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
# More images than a tile has of 36 regions; tiles of one and of many captions.
LENGTHS = (127, 12, 1, 7, 25, 5, 2, 24, 120, 3)
LAUNCH = _cuda.launch
OPTIONS = dict(direction="t2i", affinity_norm="clipped_l2norm", scale=9.0, pool="lse", pool_scale=6.0)


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    choose(request.param, monkeypatch)
    return request.param


def choose(kind, monkeypatch):
    """Let float32 rows be multiplied in one way."""
    monkeypatch.setattr(op, "matmul_precision", lambda: "high" if kind == "one F16" else "highest")
    if kind == "TF32X3":
        monkeypatch.setattr(_rows, "LOW", torch.inf)  # every row is wide


def dtype_of(kind):
    return DTYPES.get(kind, torch.float32)


def drawn(I, lengths, R, D, dtype=torch.float32):
    image, words, cu_seqlens = inputs(I, lengths, R, D, dtype=torch.float64)
    return image.to(dtype), words.to(dtype), cu_seqlens


def run(image, words, cu_seqlens, region_lengths=None, **options):
    return op.forward(image, words, cu_seqlens, region_lengths, *{**OPTIONS, **options}.values())


def check(kind, image, words, cu_seqlens, region_lengths=None, **options):
    """The accuracy rule for one call."""

    def reference(dtype):
        return [
            itm_fast.cross_attention_score(
                image.to(dtype), words.to(dtype), cu_seqlens, region_lengths=region_lengths, backend="reference",
                **{**OPTIONS, **options},
            )
        ]  # fmt: skip

    found = run(image, words, cu_seqlens, region_lengths, **options)
    assert found.dtype == image.dtype
    assert_accurate([found], reference, image.dtype, products=torch.float16 if kind == "one F16" else None)


def assert_same_bits(found, want):
    assert torch.equal(found.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_norm(device, kind, direction, norm):
    pool = POOLS[NORMS.index(norm) % 4]
    given = drawn(3, (12, 1, 7, 30), 36, 40, dtype_of(kind))
    check(kind, *given, direction=direction, affinity_norm=norm, pool=pool)
    assert [kind.removeprefix("one ") in k.name for k, counts in device.launches if counts["products"]] == [True]
    check(kind, *given, torch.tensor([36, 1, 19]), direction=direction, affinity_norm=norm, pool=pool)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_pool(device, direction, pool):
    given = drawn(3, (12, 1, 7), 7, 24)
    for lengths in (None, torch.tensor([2, 7, 1])):
        check("F16X3", *given, lengths, direction=direction, pool=pool, pool_scale=11.0)


# Wide tiles of bfloat16 are those of float16 but for how numbers are read, as narrower ones show.
@pytest.mark.parametrize(
    "kind, R", [(k, R) for k in KINDS for R in (1, 7, 36, 72, 128) if k != "BF16" or R <= 36], indirect=["kind"]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_width(device, kind, direction, R):
    I = 2 * _tiles.tile_of(R, device.capability).images + 1
    check(kind, *drawn(min(I, 9), (9, 1), R, 136, dtype_of(kind)), direction=direction)
    assert device.launches[-1][1]["bank_conflicts"] == 0


@pytest.mark.parametrize("D", [8, 64, 72])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dimensions_that_fill_no_stage(device, kind, direction, D):
    check(kind, *drawn(2, (5, 3), 5, D, dtype_of(kind)), direction=direction)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("R", range(1, 129))
def test_every_number_of_regions(device, direction, R):
    check("F16X3", *drawn(2, (5, 3), R, 32), direction=direction)


@pytest.mark.parametrize("kind, R", [("F16", 36), ("F16X3", 36), ("F16", 100), ("F16X3", 100)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_gpu_without_tf32(device, monkeypatch, kind, direction, R):
    device.capability = (7, 5)
    choose(kind, monkeypatch)
    check(kind, *drawn(3, (64, 9, 1), R, 64, dtype_of(kind)), direction=direction)
    (kernel, counts), *others = device.launches
    assert kernel.shared <= 64 << 10
    assert not others
    assert counts["bank_conflicts"] == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_gpu_of_little_shared_memory(device, direction):
    device.capability = (8, 9)
    given = drawn(5, (64, 9, 1), 36, 136)
    few = run(*given, direction=direction)
    assert all(kernel.shared <= 99 << 10 for kernel, _ in device.launches)
    device.capability = (9, 0)
    assert_same_bits(run(*given, direction=direction), few)


@pytest.mark.parametrize("kind, R", [("F16", 36), ("F16X3", 36), ("TF32X3", 36), ("F16X3", 10), ("F16X3", 101)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_order_of_threads_changes_no_bit(device, monkeypatch, direction, R, kind):
    choose(kind, monkeypatch)
    given = drawn(5 if R < 100 else 2, (12, 7, 1, 9), R, 136, dtype_of(kind))
    want = run(*given, direction=direction).float()
    for device.order in (1, 2, 3):
        assert_same_bits(run(*given, direction=direction).float(), want)


@pytest.mark.parametrize("R, I", [(12, 13), (7, 13), (36, 5), (56, 3), (100, 2)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pairs_bits_do_not_depend_on_its_neighbours(device, direction, R, I):
    lengths = (12, 7, 30, 1, 9, 120)
    image, words, cu_seqlens = drawn(I, lengths, R, 40)
    whole = run(image, words, cu_seqlens, direction=direction)
    for i in range(I):
        t = i % len(lengths)
        caption = words[cu_seqlens[t] : cu_seqlens[t + 1]]
        alone = run(image[i : i + 1], caption, torch.tensor([0, len(caption)]), direction=direction)
        assert_same_bits(alone[0, 0], whole[i, t])
    some = run(image, words[: cu_seqlens[3]], cu_seqlens[:4], direction=direction)
    assert_same_bits(some, whole[:, :3].contiguous())


@pytest.mark.parametrize(
    "norm, pool", [("softmax", "lse"), ("l2norm", "max"), ("clipped_l1norm", "mean"), ("none", "sum")]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_nan_stays_in_its_pairs(device, kind, direction, norm, pool):
    image, words, cu_seqlens = drawn(5, (12, 7, 9), 36, 40, dtype_of(kind))
    options = dict(direction=direction, affinity_norm=norm, pool=pool)
    clean = run(image, words, cu_seqlens, **options)
    image[1, 0, 1] = image[2, 35, 1] = words[13, 4] = torch.nan  # beside columns of images 0 and 3
    found = run(image, words, cu_seqlens, **options)
    hit = torch.zeros(5, 3, dtype=torch.bool)
    hit[1:3] = hit[:, 1] = True
    assert found[hit].isnan().all()
    assert torch.equal(found[~hit], clean[~hit])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_regions_beyond_an_images_own_are_not_read(device, kind, direction):
    image, words, cu_seqlens = drawn(3, (12, 7), 36, 40, dtype_of(kind))
    counts = torch.tensor([36, 20, 1])
    clean = run(image, words, cu_seqlens, counts, direction=direction)
    for i, n in enumerate(counts):
        image[i, n:] = torch.nan
    assert torch.equal(run(image, words, cu_seqlens, counts, direction=direction), clean)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attended_vectors_that_cancel(device, kind, direction):
    image, words, cu_seqlens = drawn(1, (12,), 36, 128, torch.float64)
    rows = image[0] if direction == "t2i" else words
    half = len(rows) // 2
    rows[half:] = -rows[:half] + 1e-3 * rows[half:]
    dtype = dtype_of(kind)
    check(kind, image.to(dtype), words.to(dtype), cu_seqlens, direction=direction, scale=1e-2)


def rows_of_all_sizes(n, D, seed):
    """Rows whose lengths lie between 1e-18 and 1e15."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return (rows * 10 ** (33 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 18)).float()


@pytest.fixture
def affinity_error(device, monkeypatch):
    """Function (kind, x [n, D], q [m, D]) -> the largest error of x q^T, in each row's length.

    With one region, a word's cosine is the affinity divided by the lengths, or by 1e-8 if their product is less.
    """

    def error(kind, x, q):
        with monkeypatch.context() as patch:
            choose(kind, patch)
            found = run(x[:, None], q, torch.arange(len(q) + 1), affinity_norm="none", pool="sum").double()
        both = x.double().norm(dim=1)[:, None] * q.double().norm(dim=1)
        return ((found * both.clamp_min(1e-8) - x.double() @ q.double().T) / both).abs().max().item()

    return error


def test_two_float16_numbers_are_as_exact_as_three_tf32_products(affinity_error):
    x, q = rows_of_all_sizes(37, 264, 0), rows_of_all_sizes(45, 264, 1)
    ours = affinity_error("F16X3", x, q)
    assert ours <= affinity_error("TF32X3", x, q) < 1e-6
    assert affinity_error("one F16", x, q) < 1e-3


def test_wide_rows_are_multiplied_in_tf32(device, affinity_error, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, q = (torch.randn(n, 64, generator=generator) for n in (3, 5))
    affinity_error("F16X3", x, q)
    assert [bool(counts["products"]) for _, counts in device.launches] == [False, True]
    x[:, 0], q[2, 0] = 0, 1e9  # the other numbers decide, and have few bits in units of the largest
    found = run(x[:, None], q, torch.arange(len(q) + 1), affinity_norm="none", pool="sum").double()
    want = x.double() @ q.double().T / (x.double().norm(dim=1)[:, None] * q.double().norm(dim=1))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
    assert all(counts["products"] for _, counts in device.launches[-2:])
    with monkeypatch.context() as patch:
        patch.setattr(_rows, "LOW", 0)
        worse = run(x[:, None], q, torch.arange(len(q) + 1), affinity_norm="none", pool="sum")
    assert (worse[:, 2] / want[:, 2] - 1).abs().max() > 1e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wide_row_changes_no_other_pairs_bits(device, direction):
    image, words, cu_seqlens = drawn(5, (12, 7, 9), 36, 40)
    clean = run(image, words, cu_seqlens, direction=direction)
    for row in (image[2, 35], words[13]):
        row *= 2.0 ** torch.arange(40)
    found = run(image, words, cu_seqlens, direction=direction)
    assert (found != clean).sum() == 7  # those of image 2 and of caption 1
    others = torch.arange(5) != 2
    assert_same_bits(found[others][:, ::2], clean[others][:, ::2])
    check("F16X3", image, words, cu_seqlens, direction=direction)
    alone = run(image[2:3], words[:12], cu_seqlens[:2], direction=direction)
    assert_same_bits(alone, found[2:3, :1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_of_all_sizes(device, direction):
    image, words = rows_of_all_sizes(2 * 36, 64, 3).view(2, 36, 64), rows_of_all_sizes(20, 64, 4)
    cu_seqlens = torch.tensor([0, 8, 20])
    for norm in ("clipped_l2norm", "l1norm", "none"):
        options = dict(OPTIONS, direction=direction, affinity_norm=norm, pool="mean")
        wide = image.double(), words.double()
        want = itm_fast.cross_attention_score(*wide, cu_seqlens, backend="reference", **options)
        found = run(image, words, cu_seqlens, **options)
        torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-6)


def test_more_groups_of_images_than_go_together(device):
    image, words, cu_seqlens = drawn(2 * 17, (127, 3), 70, 8, torch.float16)
    whole = run(image, words, cu_seqlens)
    assert torch.equal(torch.cat([run(part, words, cu_seqlens) for part in image.split(9)]), whole)


def test_a_launch_through_the_driver(emulated, device):
    given = drawn(3, (12, 5), 36, 40)
    want = run(*given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "launch", LAUNCH)
        with cuda_stub.installed(emulated.run):
            assert_same_bits(run(*given), want)


def test_places_of_captions_factors_come_from_the_host():
    """They are kept, so another stream may read them: no kernel of the stream that came first may still write them."""
    ran = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if result.is_meta:
                ran.append(function.name())
            return result

    edge = [0, 3, 4, 7, 8, 10]
    assert _rows._caption_runs(edge, torch.device("cpu"), 9).place.tolist() == [4, 0, 7, 1, 2]
    with Recorder():
        _rows._caption_runs(edge, torch.device("meta"), 9)
    assert set(ran) == {"aten::_to_copy"}


def test_split_rows_hold_22_bits():
    rows = rows_of_all_sizes(50, 40, 2)
    rows[3], rows[4, 1:], rows[5, 0] = 0, 0, 1e-42
    found = _rows.split_rows(rows, True)
    first, second = found.rows.double().unflatten(1, (2, 2, 32)).unbind(2)
    both = (first + second).flatten(1) * 2.0 ** found.exponent.double()[:, None]
    assert not both[:, 40:].any()
    bound = torch.maximum(rows.double().abs() * 2.0**-22, rows.double().abs().amax(1, keepdim=True) * 2.0**-34)
    assert ((both[:, :40] - rows.double()).abs() <= bound).all()
    assert not found.wide.any()


def test_a_factor_of_a_gram_matrix_without_full_rank():
    x = torch.randn(3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 4], x[1, 0] = x[0, 2], 0
    F = _rows.gram_factor(x)
    torch.testing.assert_close(F.transpose(1, 2) @ F, x @ x.transpose(1, 2), rtol=0, atol=1e-6)
    assert torch.equal(F, F.triu())


def test_captions_fill_their_tiles():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 20, (3000,), generator=generator)
    lengths[::50] = 100
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    plan = _tiles.plan_tiles(cu_seqlens, int(lengths.sum()), "x", 128)
    assert lengths.sum() > 0.97 * 128 * plan.tiles
    row, owner, first = plan.row.view(-1, 128), plan.owner.view(-1, 128), plan.first.tolist()
    seen = []
    for k in range(plan.tiles):
        for i, member in enumerate(range(first[k], first[k + 1])):
            t, slots = plan.caption[member].item(), slice(plan.begin[member], plan.end[member])
            assert row[k, slots].tolist() == list(range(cu_seqlens[t], cu_seqlens[t + 1]))
            assert (owner[k, slots] == i).all()
            seen.append(t)
        assert first[k + 1] - first[k] <= _tiles.CAPTIONS
    assert sorted(seen) == list(range(3000))
    assert (plan.row >= 0).sum() == lengths.sum()


@pytest.mark.parametrize(
    "R, D, lengths, capability, message",
    [
        (129, 8, (3,), (8, 0), "CUDA kernels take images of 1 to 128 regions, got 129"),
        (3, 12, (3,), (8, 0), "CUDA kernels need D to be a multiple of 8, got 12"),
        (3, 8, (2, 128), (8, 0), "captions of at most 127 words here, got 128"),
        (73, 8, (2, 65), (7, 5), "captions of at most 64 words here, got 65"),
    ],
)
def test_what_the_kernels_do_not_take(device, R, D, lengths, capability, message):
    device.capability = capability
    with pytest.raises(NotImplementedError, match=message):
        run(*drawn(2, lengths, R, D))


def test_more_than_a_launch_takes(device, monkeypatch):
    given = drawn(5, (9, 127), 36, 8)
    monkeypatch.setattr(op, "BLOCKS", 3)
    with pytest.raises(NotImplementedError, match="too many pairs"):
        run(*given)


def test_nothing_to_score(device):
    image, words, cu_seqlens = drawn(2, (3,), 5, 8)
    assert run(image[:0], words, cu_seqlens).shape == (0, 1)
    assert run(image, words[:0], cu_seqlens[:1]).shape == (2, 0)
    assert not device.launches
