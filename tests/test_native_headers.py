"""The headers that all CPU kernels are made of, one function at a time: dtypes, products, transposes, threads."""

import ctypes
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from cpu_cases import needs_cpu

from itm_fast import _native

pytestmark = needs_cpu
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
HALVES = [torch.float16, torch.bfloat16]
NOWHERE = -1


@pytest.fixture(scope="module", params=["best", "generic"])
def library(request, tmp_path_factory):
    """native_headers.cpp and the headers of csrc/cpu, compiled for this processor and for any."""
    folder = tmp_path_factory.mktemp("headers")
    shutil.copytree(_native.csrc_dir() / "cpu", folder / "cpu", ignore=shutil.ignore_patterns("*.cpp"))
    shutil.copy(Path(__file__).with_name("native_headers.cpp"), folder / "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITM_FAST_CACHE_DIR", str(folder / "cache"))
        built = _native.build(folder, _native.level() if request.param == "best" else request.param)
    for name in ("widened", "spread"):
        getattr(built.library, name).restype = ctypes.c_char_p
    for name in ("lanes", "cut", "distance", "unclean"):
        getattr(built.library, name).restype = ctypes.c_int64
    for name in ("paired", "product32", "product64", "product16"):
        if hasattr(built.library, name):
            getattr(built.library, name).restype = ctypes.c_bool
    return built.library


def call(function, *args):
    return function(*(ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else ctypes.c_int64(a) for a in args))


def all_values(dtype):
    """Every value of a dtype of 16 bits."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def bits(values):
    """Bits of the values, all NaN alike."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.where(values.isnan(), torch.full_like(values, torch.nan), values).view(kinds[values.element_size()])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_all_values_of_16_bits_are_read_exactly(library, dtype):
    values = all_values(dtype)
    single, exact = torch.empty(1 << 16), torch.empty(1 << 16, dtype=torch.float64)
    assert call(library.widened, values, DTYPES[dtype], 0, 1 << 16, single, exact) is None
    assert torch.equal(bits(single), bits(values.float()))
    assert torch.equal(bits(exact), bits(values.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_read_from_an_offset(library, dtype):
    values = torch.randn(9).to(dtype)
    single, exact = torch.empty(5), torch.empty(5, dtype=torch.float64)
    assert call(library.widened, values, DTYPES[dtype], 3, 5, single, exact) is None
    assert torch.equal(single, values[3:8].float())
    assert torch.equal(exact, values[3:8].double())


def test_an_unknown_dtype_is_refused(library):
    room = torch.empty(1), torch.empty(1, dtype=torch.float64)
    assert call(library.widened, torch.zeros(1), 9, 0, 1, *room) == b"a CPU kernel got a dtype it does not know"


def around(dtype):
    """Every finite and infinite value of a dtype of 16 bits as float32, the ones halfway to the next one, and the
    float32 neighbours of both."""
    values = all_values(dtype).float()
    values = values[~values.isnan()].sort().values
    middle = (values[1:].double() + values[:-1].double()).div(2).float()
    middle = middle[middle.isfinite()]
    large = torch.tensor([65519.996, 65520.0, -65520.0, 1e30, 3.4e38, 1e-44])
    no_numbers = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    exact = torch.cat([values, middle, large, no_numbers])
    sides = [torch.nextafter(exact, torch.full_like(exact, to)) for to in (-torch.inf, torch.inf)]
    return torch.cat([exact, *sides])


@pytest.mark.parametrize("dtype", HALVES)
def test_values_are_rounded_to_16_bits_as_torch_rounds_them(library, dtype):
    values = around(dtype)
    results = torch.empty(2, len(values), dtype=dtype)
    call(library.narrowed, values, len(values), DTYPES[dtype], results[0], results[1])
    for result in results:
        assert torch.equal(bits(result), bits(values.to(dtype)))


def test_pairs_hold_the_even_value_below_the_odd_one(library):
    values = around(torch.bfloat16)
    # The instruction takes smaller ones for zeros.
    values = values[(values.abs() >= 2.0**-126) | (values == 0) | values.isnan()]
    values = values[len(values) % 32 :]
    even, odd = values, values.flip(0).contiguous()
    soft, hard = torch.empty(2, len(values), dtype=torch.int32)
    wanted = torch.stack([even, odd], 1).bfloat16().flatten()
    available = call(library.paired, even, odd, len(values), soft, hard)
    for pairs in (soft, hard) if available else (soft,):
        assert torch.equal(bits(pairs.view(torch.bfloat16)), bits(wanted))


SIZES = [(1, 1, 1), (4, 33, 3), (5, 31, 2), (8, 64, 4), (11, 65, 5), (12, 16, 1), (13, 97, 7), (17, 47, 6), (36, 1, 8)]


def whole_numbers(*shape, dtype=torch.float32):
    """Numbers so small that every sum of their products is exact, whatever its order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("M,N,K", SIZES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products(library, dtype, packed, M, N, K):
    a, b, c = (whole_numbers(*s, dtype=dtype) for s in ((K, M), (K, N), (M, N)))
    wanted = c + a.T @ b
    assert call(library.product32 if dtype == torch.float32 else library.product64, M, N, K, a, b, c, packed)
    assert torch.equal(c, wanted)


@pytest.mark.parametrize("M,N,K", SIZES)
def test_products_of_pairs(library, M, N, K):
    a, b, c = (whole_numbers(*s) for s in ((K, M), (K, N), (M, N)))
    wanted = c + a.T @ b
    if hasattr(library, "product16"):  # compiled for a processor that has them
        assert call(library.product16, M, N, K, a, b, c)
        assert torch.equal(c, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_of_a_product_has_the_same_bits_wherever_it_stands(library, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((29, 1), (29, 1), (1, 1)))
    function = library.product32 if dtype == torch.float32 else library.product64
    alone = c.clone()
    call(function, 1, 1, 29, a, b, alone, False)
    for M, N in ((13, 97), (8, 5), (4, 33)):
        many = [x.expand(*s).contiguous() for x, s in ((a, (29, M)), (b, (29, N)), (c, (M, N)))]
        for packed in (False, True):
            result = many[2].clone()
            call(function, M, N, 29, many[0], many[1], result, packed)
            assert torch.equal(result, alone.expand(M, N))


@pytest.mark.parametrize("count,K", [(1, 1), (3, 40), (16, 16), (17, 33), (35, 15), (64, 50)])
def test_rows_become_columns(library, count, K):
    rows = torch.arange(count * K).float().view(count, K)
    results = torch.full((4, K, count), torch.nan)
    call(library.turned, rows, count, K, *results)
    for result in results:
        assert torch.equal(result, rows.T)
    wide = torch.full((K, count), torch.nan, dtype=torch.float64)
    call(library.turned64, rows.double(), count, K, wide)
    assert torch.equal(wide, rows.T.double())


def test_sums_along_the_lanes_of_many_vectors(library):
    for dtype, function, lanes in (
        (torch.float32, library.summed, library.lanes()),
        (torch.float64, library.summed64, library.lanes() // 2),
    ):
        rows, result = whole_numbers(lanes, lanes, dtype=dtype), torch.empty(lanes, dtype=dtype)
        call(function, rows, result)
        assert torch.equal(result, rows.sum(1))


def test_sets_are_cut_into_chunks(library):
    edge = torch.tensor([0, 3, 5, 5, 14, 16])
    out = torch.full((5, 4), NOWHERE)
    assert call(library.cut, edge, 5, 5, out) == 3
    assert out[:3].tolist() == [[0, 3, 0, 5], [3, 4, 5, 9], [4, 5, 14, 2]]


def test_rows_lie_an_odd_number_of_cache_lines_apart_with_room_for_a_vector(library):
    for columns in range(1, 300):
        distance = library.distance(columns)
        assert distance % 32 == 16
        assert distance >= columns + library.lanes()


def test_buffers_are_zeros(library):
    assert [call(library.unclean, n) for n in (0, 1, 7, 1000, 40_000)] == [0] * 5


@pytest.mark.parametrize("parts,threads", [(0, 3), (1, 3), (40, 1), (40, 4), (3, 40)])
def test_every_part_is_done_once(library, parts, threads):
    seen = torch.zeros(parts, dtype=torch.int64)
    assert call(library.spread, parts, threads, NOWHERE, 0, seen) is None
    assert seen.tolist() == [1] * parts


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("bad", [0, 17, 39])
@pytest.mark.parametrize(
    "kind,sentence",
    [(1, b"out of memory in a CPU kernel; close other programs or score smaller blocks"), (2, b"a bad part")],
)
def test_what_fails_in_a_thread_is_passed_on(library, kind, sentence, bad, threads):
    seen = torch.zeros(40, dtype=torch.int64)
    assert call(library.spread, 40, threads, bad, kind, seen) == sentence
    assert seen.max() == 1
    assert threads > 1 or seen.sum() == bad + 1


def test_no_part_is_begun_after_a_failure(library):
    seen = torch.zeros(10_000, dtype=torch.int64)  # seconds of work
    assert call(library.spread, 10_000, 4, 0, 2, seen) == b"a bad part"
    assert seen.sum() < 10_000


@pytest.mark.parametrize("bad", [0, 1])
def test_a_worker_that_cannot_be_made_is_passed_on(library, bad):
    seen = torch.zeros(40, dtype=torch.int64)
    assert call(library.spread, 40, 4, bad, 3, seen) == b"no worker"


def test_threads_that_cannot_start_leave_their_parts_to_the_others(library):
    """No memory is left for most of the stacks: all parts are done all the same, and the process lives."""
    seen = torch.zeros(256, dtype=torch.int64)
    child = os.fork()
    if not child:
        signal.alarm(20)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (100 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        failed = call(library.spread, 256, 256, NOWHERE, 0, seen)
        os._exit(0 if failed is None and seen.tolist() == [1] * 256 else 1)
    assert os.waitpid(child, 0)[1] == 0
