"""Every kernel compiles ahead of time for every architecture, within its registers and shared memory."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import itm_fast

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
KERNELS = Path(itm_fast.__file__).resolve().parent.parent / "kernels"
if not KERNELS.is_dir():  # installed
    KERNELS = Path(itm_fast.__file__).resolve().parent / "kernels"
FILES = sorted(p.stem for p in KERNELS.glob("*.py") if "def compilations(" in p.read_text())


def compiled(file, arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(Path(itm_fast.__file__).resolve().parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (environment.get("PYTHONPATH"), paths[0]) if p)
    command = [sys.executable, str(HERE / "triton_compile.py"), file, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def compilations(request):
    """What the tests that were selected will compile, as many at a time as there are processors; under pytest-xdist,
    whose workers all see all tests, nothing."""
    items = [] if "PYTEST_XDIST_WORKER" in os.environ else request.session.items
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wanted = [item.callspec.params for item in items if "compilations" in item.fixturenames]
        yield {(p["file"], p["arch"]): pool.submit(compiled, p["file"], p["arch"]) for p in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_compiles(file, arch, compilations):
    before = compilations.get((file, arch))
    rows = before.result() if before else compiled(file, arch)
    assert rows
    wrong = []
    for row in rows:
        name = f"{row['kernel']} {row['constants']}"
        if "error" in row:
            wrong.append(f"{name}: {row['error']}")
            continue
        if row["spilled"]:
            wrong.append(f"{name}: {row['spilled']} bytes spilled at {row['registers']} registers")
        if row["shared"] > row["shared_limit"]:
            wrong.append(f"{name}: {row['shared']} bytes of shared memory, the limit is {row['shared_limit']}")
        if arch == 90 and row["products"] and not row["wgmma"]:
            wrong.append(f"{name}: its products are not wgmma")
    assert not wrong, "\n".join(wrong)


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
