"""`pytest` in a checkout tests the checkout, whatever is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import itm_fast
from itm_fast import _native, kernels

pytestmark = pytest.mark.slow  # starts pytest in other checkouts

ROOT = Path(__file__).resolve().parents[1]


def test_the_package_is_the_checkouts():
    assert Path(itm_fast.__file__) == ROOT / "itm_fast" / "__init__.py"
    assert Path(kernels.__file__) == ROOT / "kernels" / "__init__.py"
    assert _native.csrc_dir() == ROOT / "csrc"


def test_so_it_is_in_the_processes_that_tests_start(tmp_path):
    code = "import importlib.util; print(importlib.util.find_spec('itm_fast').origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / "itm_fast" / "__init__.py")


def run(installed, tmp_path, *options):
    """These two tests where another itm_fast is installed."""
    package = installed / "itm_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    tests = ("test_the_package_is_the_checkouts", "test_so_it_is_in_the_processes_that_tests_start")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += [f"{__file__}::{name}" for name in tests]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_an_installed_copy_is_not_tested(tmp_path):
    done = run(tmp_path / "installed", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_a_run_that_would_test_another_copy_is_refused(tmp_path):
    done = run(tmp_path / "installed", tmp_path, "-o", f"pythonpath={ROOT / 'tests'}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"the itm_fast that Python imports lies in {tmp_path / 'installed'}: nothing was tested" in done.stderr
