"""Settings of all tests: the checkout under test, poisoned outputs, and marks that depend on the machine."""

import contextlib
import importlib
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import itm_fast

ROOT = Path(__file__).resolve().parents[1]
# pytest's own `pythonpath` puts the checkout before what is installed; so it is for the processes that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

if not torch.cuda.is_available():  # before anything imports the Triton kernels, which are then interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with contextlib.suppress(Exception):  # no Triton, a broken one, or one whose interpreter is another
        import quick_interpreter

        quick_interpreter.install()

# Of the processes that tests start: as `one_thread` here. Theirs would wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same products on every processor that has them, whether they pay there or not.
os.environ.setdefault("ITM_FAST_BFLOAT16", "1")

# By `torch`, calls as small as those of tests keep what autograd records. Here they stand for large ones, which do not:
# the limit is 0, but for tests that use `small_calls`.
RECORDED: list[int] = []  # the limit as shipped


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as where a shell starts pytest in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.option.loadscopereorder = False  # pytest-xdist then begins with the files that come first here
    found = Path(itm_fast.__file__).resolve().parents[1]
    if found != ROOT:
        raise pytest.UsageError(
            f"these tests are of the checkout {ROOT}, but the itm_fast that Python imports lies in {found}: nothing "
            f"was tested. Run pytest with the checkout's pyproject.toml, or with PYTHONPATH={ROOT}."
        )
    recompute = importlib.import_module("itm_fast.ops._recompute")
    RECORDED.append(recompute.RECORDED_PAIRS)
    recompute.RECORDED_PAIRS = 0


def pytest_sessionstart(session):
    """Compiles the C++ kernels before any test looks at stderr or at the clock. Without kernels the tests of `cpu` are
    skipped and the run passes: so where there is a compiler but no kernels, nothing runs."""
    if session.config.option.markexpr != "gpu" and (reason := itm_fast._native.why_not()):
        with contextlib.suppress(itm_fast._native.Unavailable):
            itm_fast._native.compiling.find_compiler()
            pytest.exit(f"the C++ kernels cannot be tested: {reason}", returncode=1)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that two processes end together."""
    items.sort(key=lambda item: not item.path.name.startswith("test_triton"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices this small gain nothing from threads, and on a busy machine two threads wait for each other."""
    torch.set_num_threads(1)


def seed():
    """Seed the generators that all tests share. torch.manual_seed itself takes many times as long without a GPU."""
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """What a fixture of several tests draws does not depend on which test comes first."""
    if fixturedef.scope != "function":
        seed()


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    seed()


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty is filled with NaN, so an element that nobody wrote fails loudly."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_calls(monkeypatch):
    """Small calls by `torch` as users have them."""
    monkeypatch.setattr("itm_fast.ops._recompute.RECORDED_PAIRS", RECORDED[0])


@pytest.fixture
def as_matrix_units_add(monkeypatch):
    """Products of the interpreter whose sums go 16 terms at a time, those in a tree: where a term lies in its 16
    changes the bits, and rows and columns do not, as on a GPU. BLAS adds otherwise at the edges of a matrix."""

    def matmul(a, b, dtype=None):
        terms = (a[:, :, None] * b[None]).astype(np.float32)
        total = np.zeros((a.shape[0], b.shape[1]), np.float32)
        for start in range(0, a.shape[1], 16):
            part = terms[:, start : start + 16]
            while part.shape[1] > 1:
                part = part[:, ::2] + part[:, 1::2]
            total += part[:, 0]
        return total

    monkeypatch.setattr(np, "matmul", matmul)
