"""Everything that needs a GPU, in one command of at most nine minutes: checks and tests of kernels, then benchmarks.

    python benchmarks/gpu_suite.py --out gpu.json
    python benchmarks/gpu_suite.py --out smoke.json --smoke        # tiny sizes, without a GPU too

Needs a checkout, PyTorch and Triton; with pytest the GPU tests run too (with pytest-xdist, side by side). Each step is
a process of its own with a share of the time: one that fails, hangs or takes the GPU down loses no other's results.
The file is written again after every step. The most important steps run first: checks of every op in every precision,
the whole of COCO 5K, tests, the paper's loop, training, SHAN, HGAN and TSHSR, MaxSim, ranking by precision, and the
compiled rewrite last; each in Triton and, where there are such kernels, in CUDA C++.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.0
WORKERS = 12
# step -> the most seconds that it may take; the steps named check-OP run side by side within those of "checks"
SHARES = {
    "machine": 40, "checks": 120, "evaluate-scan": 60, "evaluate-sgraf": 180, "tests": 150, "against-loop": 75,
    "train": 75, "evaluate-systems": 120, "systems-against-loop": 60, "systems-tests": 90, "maxsim": 45,
    "precision": 60, "against-compiled": 200,
}  # fmt: skip
TESTS = {"tests": "test_*gpu*.py", "systems-tests": "test_triton_alignment.py"}  # steps that pytest runs


def environment() -> dict[str, str]:
    """Of the steps: this checkout first, and no C++ kernels to compile, which are the CPU's."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "CXX": "none", "PYTHONUNBUFFERED": "1"}


class Running:
    """A process of a step, its output kept in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log, self.start = log, time.monotonic()
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self, seconds: float) -> dict[str, Any]:
        """Wait at most so long, then end the process and all that it started; return how it went."""
        try:
            code = self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        found: dict[str, Any] = {"exit": code, "seconds": round(time.monotonic() - self.start, 1)}
        if code != 0:
            found["stopped" if code is None else "failed"] = self.log.read_text(errors="replace")[-3000:]
        return found


def step(name: str, folder: Path, smoke: bool) -> Running:
    """Start a step of `gpu_steps.py`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_steps.py"), name, str(folder / f"{name}.json")]
    return Running(command + ["--smoke"] * smoke, folder / f"{name}.log")


def result(name: str, folder: Path) -> dict[str, Any]:
    """The result that a step has written."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def steps() -> list[str]:
    """All steps that `gpu_steps.py` knows here."""
    code = "from benchmarks.gpu_steps import STEPS; print('\\n'.join(STEPS))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the steps do not import:\n{done.stderr[-3000:]}")
    return done.stdout.split()


def checks(names: list[str], folder: Path, smoke: bool, seconds: float) -> dict[str, Any]:
    """Every op's check, side by side: they compile more than they compute."""
    deadline = time.monotonic() + seconds
    running = {name: step(name, folder, smoke) for name in names}
    return {
        name: one.ended(deadline - time.monotonic()) | {"result": result(name, folder)}
        for name, one in running.items()
    }


def tests(name: str, folder: Path, smoke: bool, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu` on a step's files; with `smoke`, only that they are collected."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed; the checks of every op ran without it"}
    report = folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None and not smoke:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob(TESTS[name]))
    command += [*files, *["--collect-only"] * smoke]
    found = Running(command, folder / f"{name}.log").ended(seconds)
    found["last_lines"] = (folder / f"{name}.log").read_text(errors="replace")[-3000:]
    if report.exists() and not smoke:
        cases = list(ElementTree.parse(report).iter("testcase"))
        bad = {
            f"{case.get('classname')}::{case.get('name')}": (child.get("message") or "")[:400]
            for case in cases
            for child in case
            if child.tag in ("failure", "error")
        }
        skipped = sum(child.tag == "skipped" for case in cases for child in case)
        found |= {"ran": len(cases) - skipped, "skipped": skipped, "failed_tests": bad}
    return found


def main(argv: list[str] | None = None) -> int:
    """Run everything; 1 when a check, a test or a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for all results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all of it (default: {MINUTES:g})")
    parser.add_argument("--only", nargs="+", metavar="STEP", help=f"of {', '.join(SHARES)}")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that everything runs")
    args = parser.parse_args(argv)
    if unknown := set(args.only or ()) - set(SHARES):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    start = time.monotonic()
    deadline = start + 60 * args.minutes - 10  # the last file is written, the last process ended
    found: dict[str, Any] = {"smoke": args.smoke, "steps": {}}
    known = [name for name in steps() if name.startswith("check-")]
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        for name in args.only or SHARES:
            seconds = deadline - time.monotonic()
            if not args.smoke:  # which shows that everything runs, however fast
                seconds = min(SHARES[name], seconds)
            if seconds < 5:
                found["steps"][name] = {"skipped": "no time was left"}
                continue
            print(f"{time.monotonic() - start:6.0f} s  {name}, at most {seconds:.0f} s", file=sys.stderr, flush=True)
            if name == "checks":
                found["steps"][name] = checks(known, folder, args.smoke, seconds)
            elif name in TESTS:
                found["steps"][name] = tests(name, folder, args.smoke, seconds)
            else:
                one = step(name, folder, args.smoke).ended(seconds)
                found["steps"][name] = one | {"result": result(name, folder)}
            found["seconds"] = round(time.monotonic() - start, 1)
            write(args.out, found)
    wrong = list(problems(found["steps"]))
    found["problems"] = wrong
    write(args.out, found)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{args.out}: {len(found['steps'])} steps in {found.get('seconds', 0):.0f} s, {len(wrong)} problems")
    return 1 if wrong else 0


def problems(found: dict[str, Any]) -> list[str]:
    """One line for everything that failed, was stopped, or raised."""
    lines: list[str] = []
    for name, one in found.items():
        if name == "checks":
            lines += problems(one)
            continue
        if one.get("exit") != 0:
            reason = "stopped: its time was over" if one.get("exit", 1) is None else one.get("skipped", "failed")
            lines.append(f"{name}: {reason}")
        lines += [f"{name}: {test}" for test in one.get("failed_tests", {})]
        for row, value in one.get("result", {}).items():
            bad = [value, *value.values()] if isinstance(value, dict) else []
            lines += [
                f"{name}: {row}: {entry.get('error') or entry['problem']}"
                for entry in bad
                if isinstance(entry, dict) and (entry.get("error") or entry.get("problem"))
            ]
    return lines


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
