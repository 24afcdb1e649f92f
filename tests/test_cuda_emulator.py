"""The emulator of CUDA kernels notices what a kernel does wrong."""

import ctypes

import pytest
import torch
from cuda_emulated import emulated

__all__ = ["emulated"]  # a fixture
ORDERS = (0, 1, 2, 3)


class Unsound(ctypes.Structure):
    _fields_ = [("from_", ctypes.c_void_p), ("to", ctypes.c_void_p)]


def results(emulated, fault, orders=ORDERS, shared=1024):
    """What the kernel with this fault computes in each order; and what it should."""
    given = torch.arange(512.0).view(2, 64, 4)
    found = []
    for order in orders:
        to = torch.full((64,), torch.nan)
        problem = Unsound(given.data_ptr(), to.data_ptr())
        emulated.run(f"unsound<{fault}>", ctypes.addressof(problem), 1, 1, 64, shared, order)
        found.append(to)
    sums = given[:, :, 0].sum(0).flip(0)
    return found, sums + sums.view(32, 2).flip(1).flatten()


def test_a_sound_kernel_gives_the_same_in_every_order(emulated):
    found, want = results(emulated, "NOTHING")
    assert all(torch.equal(to, want) for to in found)


# Copies that land late, at the wait, show a missing one; copies that land at once show what they overwrite too early.
@pytest.mark.parametrize("fault", ["NO_BARRIER", "NO_SECOND_BARRIER", "NO_WAIT", "UNWRITTEN"])
def test_a_race_changes_the_result(emulated, fault):
    found, want = results(emulated, fault)
    assert not all(torch.equal(to, want) for to in found)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("NO_WAIT_EVER", "a thread ends while copies are on their way"),
        ("HALF_A_WARP", "not all lanes of a warp come to shuffle"),
        ("HALF_A_BLOCK", "a barrier that not all threads come to"),
        ("OUTSIDE", r"block \(0, 0\), thread 63: an address outside of shared memory"),
        ("ODD_ADDRESS", "an address in shared memory that is not aligned"),
    ],
)
def test_what_the_hardware_does_not_allow_is_an_error(emulated, fault, message):
    with pytest.raises(RuntimeError, match=message):
        results(emulated, fault)


def test_a_launch_with_too_little_shared_memory(emulated):
    with pytest.raises(RuntimeError, match="the launch gives less shared memory than the kernel uses"):
        results(emulated, "NOTHING", shared=1023)


def test_a_kernel_runs_after_one_that_failed(emulated):
    with pytest.raises(RuntimeError):
        results(emulated, "HALF_A_BLOCK", [0])
    test_a_sound_kernel_gives_the_same_in_every_order(emulated)


@pytest.mark.parametrize("pitch, conflicts", [(16, 0), (80, 0), (32, 4 * 4), (128, 7 * 4)])
def test_bank_conflicts_are_counted(emulated, pitch, conflicts):
    to = torch.full((32,), torch.nan)
    problem = Unsound(0, to.data_ptr())
    counts = emulated.run(f"matrices<{pitch}>", ctypes.addressof(problem), 1, 1, 32, 32 * pitch, 0)
    assert counts["bank_conflicts"] == conflicts
    lane = torch.arange(32)
    assert torch.equal(to, (2 * (lane // 4) + 24) * pitch / 4 + 2 * (lane % 4))


class Grouped(ctypes.Structure):
    _fields_ = [("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("to", ctypes.c_void_p)]


def products(emulated, fault, transposed=False):
    """What a kernel that multiplies by a group of warps computes in each order; and what it should."""
    a, b = torch.arange(64.0 * 16).view(64, 16) % 7 - 3, torch.arange(64.0 * 64).view(64, 64) % 11 - 5
    given, found = [x.half() for x in (a, b)], []
    name = f"grouped<GROUP_{fault}, {str(transposed).lower()}>"
    for order in ORDERS:
        to = torch.full((64, 64), torch.nan)
        problem = Grouped(*(x.data_ptr() for x in (*given, to)))
        counts = emulated.run(name, ctypes.addressof(problem), 1, 1, 128, 9 << 10, order)
        assert counts["group_flops"] == counts["flops"] == 2 * 64 * 64 * 16
        found.append(to)
    return found, a @ (b[16:32] if transposed else b[:, 16:32].T)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_by_a_group_of_warps(emulated, transposed):
    found, want = products(emulated, "NOTHING", transposed)
    assert all(torch.equal(to, want) for to in found)


# At once or when it is waited for: one of the two shows what a product needs and what it still reads.
@pytest.mark.parametrize("fault", ["NO_WAIT", "NO_BARRIER", "REGISTERS", "OVERWRITTEN"])
def test_a_race_with_a_product_changes_the_result(emulated, fault):
    found, want = products(emulated, fault)
    assert not all(torch.equal(to, want) for to in found)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("NO_FENCE", "a product of a group of warps without a fence before"),
        ("NO_COMMIT", "a thread ends while products are on their way"),
        ("NO_WAIT_EVER", "a thread ends while products are on their way"),
        ("NO_COPY_FENCE", "a product reads what was copied without a fence"),
        ("HALF", "the warps of a group start different products"),
        ("ODD_PLACE", "a factor that does not begin at a multiple of 1024"),
        ("OUTSIDE", "a product reads outside of shared memory"),
    ],
)
def test_what_a_product_does_not_allow_is_an_error(emulated, fault, message):
    with pytest.raises(RuntimeError, match=message):
        products(emulated, fault)


def test_an_instance_that_was_not_built(emulated):
    with pytest.raises(ValueError, match="nothing<1> was not built"):
        emulated.run("nothing<1>", 0, 1, 1, 32, 0, 0)
