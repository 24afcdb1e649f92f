"""Every kernel compiles ahead of time for GPUs that are not here, within its registers and shared memory.

Of all ways to compile a file's kernels a few that have everything between them, for one architecture; `python
tests/triton_compile.py` compiles all for all, and .ci/run a few of every file for sm_90 with the oldest Triton.
"""

import os
from types import SimpleNamespace

import pytest
import triton_compile

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow

FILES, KERNELS = triton_compile.files(), triton_compile.kernels()
JOBS = [(file, (80, 90, 100)[turn % 3]) for turn, file in enumerate(FILES)]


@pytest.fixture(scope="module")
def compile(request):
    """A function that compiles. What the tests that were selected will ask for is compiled ahead, by as many processes
    as there are processors; under pytest-xdist, whose workers all see all tests, when it is asked for."""
    spread = "PYTEST_XDIST_WORKER" in os.environ
    with triton_compile.compilers(1 if spread else len(os.sched_getaffinity(0))) as pool:
        wanted = [item.callspec.params for item in request.session.items if "compile" in item.fixturenames]
        jobs = [] if spread else [(p["file"], p["arch"]) for p in wanted]
        ahead = {job: pool.submit(triton_compile.compiled, *job, few=True) for job in jobs}
        yield lambda *job: (ahead.get(job) or pool.submit(triton_compile.compiled, *job, few=True)).result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("file,arch", JOBS)
def test_every_kernel_compiles(file, arch, compile):
    rows = compile(file, arch)
    assert rows
    assert not [line for row in rows for line in triton_compile.problems(row, arch)]


def test_what_is_wrong_with_a_kernel_is_told():
    row = {"kernel": "_k", "constants": {}, "spilled": 0, "registers": 255, "products": True, "wgmma": True}
    row |= {"shared": 99, "shared_limit": 99}
    assert not list(triton_compile.problems(row, 90))
    for change, said in (
        ({"registers": 4}, "4 registers: it does nothing"),
        ({"spilled": 8}, "8 bytes spilled at 255 registers"),
        ({"shared": 100}, "100 bytes of shared memory, the limit is 99"),
        ({"wgmma": False}, "its products are not wgmma"),
        ({"error": "no such type"}, "no such type"),
    ):
        assert [said in line for line in triton_compile.problems(row | change, 90)] == [True]
    assert not list(triton_compile.problems(row | {"wgmma": False}, 80))


def test_a_few_ways_cover_all_constants_types_and_tile_sizes():
    kernel = SimpleNamespace(__name__="_k")
    ways = [dict(D=1, S=1), dict(D=1, S=2), dict(D=2, S=1), dict(D=2, S=2)]
    rows = [SimpleNamespace(kernel=kernel, constants=c, tile={"num_warps": 4}, types="*fp32 i32") for c in ways]
    assert triton_compile.covering(rows) == [rows[0], rows[3]]
    rows[1].types = "*fp16 i32"
    assert rows[1] in triton_compile.covering(rows)
    assert triton_compile.covering([]) == []


def test_every_kernel_is_compiled_somewhere():
    named = [
        (path.stem, line.split("(")[0].removeprefix("def "))
        for path in KERNELS.glob("*.py")
        if path.stem != "_tl"
        for before, line in zip(path.read_text().splitlines(), path.read_text().splitlines()[1:])
        if before.startswith("@triton.jit") and line.startswith("def ")
    ]
    assert named
    for stem, kernel in named:
        assert (KERNELS / f"{stem}.py").read_text().count(kernel) > 1, f"{stem}.{kernel} is launched nowhere"
        assert stem in FILES, f"{stem}.py has no compilations()"
