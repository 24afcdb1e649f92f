"""What `pip wheel` makes of the checkout: seconds, and bytes of the wheel by what is in it.

    python -m benchmarks.wheel    # writes benchmarks/results/wheel.json

It compiles all instruction levels with an empty cache folder, then makes the wheel once more, with the libraries kept.
cpu_seconds are those of all cores together, and say more than seconds where the machine does other things as well.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

from benchmarks.harness import write
from benchmarks.machine import environment
from itm_fast._native import compiling

ROOT = Path(__file__).resolve().parents[1]


def make(out: Path, cache: Path) -> tuple[Path, dict[str, float]]:
    """The wheel, the seconds that it took, and those of all processors together."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    given = {key: value for key, value in os.environ.items() if key != "ITM_FAST_LEVELS"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env={**given, "ITM_FAST_CACHE_DIR": str(cache)})
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (wheel,) = out.glob("*.whl")
    return wheel, {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def contents(wheel: Path) -> dict[str, int]:
    """Bytes in the wheel, which are compressed: of each level's library, of the demo's data, and of the rest."""
    sizes: Counter[str] = Counter()
    for file in zipfile.ZipFile(wheel).infolist():
        folders = Path(file.filename).parts
        if "libraries" in folders:
            sizes[folders[3].partition("-")[0]] += file.compress_size
        else:
            sizes["demo" if "openclipart" in folders else "other"] += file.compress_size
    return dict(sizes.most_common())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wheel, compiled = make(root / "first", root / "cache")
        _, again = make(root / "again", root / "cache")
        found = {
            "environment": environment(),
            "compiler": compiling.find_compiler().version,
            "cores": len(os.sched_getaffinity(0)),
            "wheel": wheel.name,
            "bytes": wheel.stat().st_size,
            "bytes_by_content": contents(wheel),
            "compiled": compiled,
            "with_the_libraries_kept": again,
        }
    print(write("wheel", found))


if __name__ == "__main__":
    main()
