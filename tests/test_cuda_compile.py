"""CUDA kernels compile for GPUs that are not here, within their registers and shared memory and without spills.

For sm_90 so many that every template argument of every kernel occurs, for each other architecture one, of the ops in
turn; `python tests/cuda_compile.py` compiles all for all.
"""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import cuda_compile
import pytest
from cuda_cases import KERNEL, Affine, own_sources

from itm_fast import _native
from itm_fast._cuda import Kernel, cubins, nvrtc

pytestmark = pytest.mark.slow
if nvrtc.why_not():
    pytest.skip(nvrtc.why_not(), allow_module_level=True)

COVERED = 90  # the architecture that most are compiled for


def jobs():
    """Kernels and the architectures that they are compiled for."""
    modules = cuda_compile.modules()
    for turn, architecture in enumerate(cuda_compile.SHARED):
        found = [cuda_compile.kernels(module, architecture) for module in modules]
        if architecture == COVERED:
            chosen = [kernel for kernels in found for kernel in cuda_compile.covering(kernels)]
        else:
            chosen = found[turn % len(found)][:1]
        yield from ((kernel, architecture) for kernel in chosen)


JOBS = list(jobs())


def problems(job):
    return list(cuda_compile.problems(*job))


@pytest.fixture(scope="module")
def compilations(request):
    """What is wrong with each job that was selected, as many at a time as there are processors; under pytest-xdist,
    whose workers all see all tests, nothing."""
    items = [] if "PYTEST_XDIST_WORKER" in os.environ else request.session.items
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wanted = [item.callspec.params["job"] for item in items if "compilations" in item.fixturenames]
        yield {job: pool.submit(problems, job) for job in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"sm_{job[1]}-{job[0].name}".replace(" ", ""))
def test_a_kernel_compiles(job, compilations):
    assert not (compilations[job].result() if job in compilations else problems(job))


def test_every_kernel_of_the_sources_is_compiled():
    sources = [file.read_text() for file in (_native.csrc_dir() / "cuda").glob("*.cu")]
    named = {name for source in sources for name in re.findall(r"__global__ .* (\w+)\(\w+ \w+\) {", source)}
    assert named
    assert named == {kernel.name.partition("<")[0] for kernel, _ in JOBS}


def test_a_few_kernels_cover_all_template_arguments():
    names = ["a<X, 1>", "a<X, 2>", "a<Y, 1>", "a<Y, 2>", "b"]
    kernels = [Kernel("affine.cu", name, Affine, 32, 128) for name in names]
    assert [kernel.name for kernel in cuda_compile.covering(kernels)] == ["a<X, 1>", "a<Y, 2>", "b"]
    assert cuda_compile.covering([]) == []


def test_kernels_of_one_gpu_multiply_by_groups_of_warps():
    tool = find_spec("triton") and Path(find_spec("triton").origin).parent / "backends/nvidia/bin/nvdisasm"
    if not tool or not tool.is_file():
        pytest.skip("Triton brings the disassembler")
    specific = [kernel for kernel, _ in JOBS if kernel.specific]
    assert {kernel.source for kernel in specific} == {"graph.cu", "filter.cu", "scan.cu"}
    with tempfile.NamedTemporaryFile() as file:
        for kernel in specific:
            Path(file.name).write_bytes(cubins.build(kernel, COVERED).code)
            said = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
            for columns in (144,) if kernel.source == "scan.cu" else (256, 64):
                assert f"HGMMA.64x{columns}x16.F32" in said
            in_clusters = {"UBLKCP.S.G.MULTICAST", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "SYNCS.ARRIVE.TRANS64.RED"}
            assert {name in said for name in in_clusters} == {kernel.cluster > 1}


# The first product's sums are read before it is waited for.
GROUPED = """
#include "hopper.h"
struct Problem { float *y; };
__global__ void __launch_bounds__(128) grouped(Problem p) {
    DYNAMIC_SHARED(memory);
    float d[8][4] = {};
    unsigned a[4] = {threadIdx.x, 1, 2, 3};
    for (int i = 0; i < 9; ++i) {
        group_fence(d);
        group_multiply<F16, 64, true, false>(d, a, described(memory));
        group_commit();
        TOUCHED
        group_wait<0>(d);
    }
    for (int n = 0; n < 8; ++n) p.y[threadIdx.x + n * 128] = d[n][0];
}
"""


@pytest.mark.parametrize("touched", ["", "d[1][2] += 1;"])
def test_products_that_wait_for_each_other_are_noticed(touched):
    headers = dict(cubins._sources(_native.csrc_dir() / "cuda"))
    source = GROUPED.replace("TOUCHED", touched)
    built = nvrtc.compile(source, "grouped.cu", headers, "grouped", COVERED, specific=True)
    assert built.serialized == bool(touched)


@pytest.fixture
def affine(monkeypatch, tmp_path):
    """A kernel whose source can be changed."""
    return own_sources(monkeypatch, tmp_path) / "affine.cu"


@pytest.mark.parametrize("architecture", cuda_compile.SHARED)
def test_a_kernel_that_fits_has_no_problem(affine, architecture):
    assert list(cuda_compile.problems(KERNEL, architecture)) == []


def test_a_kernel_that_does_not_fit_is_found(affine):
    def said(architecture, threads=32, shared=128, name="affine<3>"):
        kernel = Kernel("affine.cu", name, Affine, threads, shared)
        return "; ".join(cuda_compile.problems(kernel, architecture))

    assert said(75, shared=65 << 10) == "66560 bytes of shared memory, the limit is 65536"
    assert said(80, shared=65 << 10) == ""
    assert "threads of" in said(80, threads=65536)
    assert "cannot compile affine<x> of affine.cu for sm_80: " in said(80, name="affine<x>")


def test_a_kernel_that_spills_is_found(affine):
    bounds = "__launch_bounds__(32)"
    source = affine.read_text()
    assert bounds in source
    # 1,024 threads have 64 registers each, too few for 96 numbers that live at once.
    numbers = "float n[96]; for (int k = 0; k < 96; ++k) n[k] = p.x[k * p.n];\n"
    uses = "__syncthreads(); for (int k = 0; k < 96; ++k) p.y[k * p.n] = n[k] * p.y[k];\n"
    source = source.replace(bounds, "__launch_bounds__(1024, 1)").replace("const int i", numbers + uses + "const int i")
    affine.write_text(source.replace("for (int", "_Pragma(\"unroll\") for (int"))
    (said,) = cuda_compile.problems(KERNEL, 80)
    assert "bytes spilled at 64 registers" in said
