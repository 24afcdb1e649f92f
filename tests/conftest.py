import os

import pytest
import torch

from itm_fast import _native

if not torch.cuda.is_available():  # before anything imports the Triton kernels, which are then interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices this small gain nothing from threads, and on a busy machine two threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def kernels_compiled(pytestconfig):
    """Before any test looks at stderr or at the clock."""
    if pytestconfig.option.markexpr != "gpu":
        _native.why_not()


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty is filled with NaN, so an element that nobody wrote fails loudly."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
