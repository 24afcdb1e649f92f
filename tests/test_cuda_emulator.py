"""The emulator of CUDA kernels notices what a kernel does wrong."""

import ctypes
import itertools
import re

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


class Clustered(ctypes.Structure):
    _fields_ = [("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("failed", ctypes.c_void_p)]


def sums(emulated, fault, order):
    """What two blocks of a cluster compute; what they should; and whether one has given up waiting."""
    given, to = torch.arange(8 * 256.0).view(8, 256), torch.full((2, 256), torch.nan)
    failed = torch.zeros(1, dtype=torch.int32)
    problem = Clustered(*(x.data_ptr() for x in (given, to, failed)))
    emulated.run(f"clustered<CLUSTER_{fault}>", ctypes.addressof(problem), 1, 2, 64, 2 * 1024 + 40, order)
    return to, given.sum(0).expand(2, -1), bool(failed)


@pytest.mark.parametrize("order", ORDERS)
def test_two_blocks_of_a_cluster(order, emulated):
    found, want, failed = sums(emulated, "NOTHING", order)
    assert torch.equal(found, want)
    assert not failed


@pytest.mark.parametrize(
    "fault, message",
    [
        ("NO_FENCE", "an mbarrier without a fence"),
        ("NO_FIRST_BARRIER", "an mbarrier that has not been made"),
        ("NO_LAST_BARRIER", "a block uses the shared memory of one that has ended"),
        ("NO_ARRIVAL", "a wait for an mbarrier that nothing ends"),
        ("TWO_ARRIVALS", "a wait for an mbarrier that nothing ends"),
        ("FEW_BYTES", None),
        ("MANY_BYTES", "a wait for an mbarrier that nothing ends"),
        ("NO_WAIT", None),
        ("NO_OTHER_WAIT", None),
        ("PARITY", None),
    ],
)
def test_a_fault_between_the_blocks_of_a_cluster_is_noticed(fault, message, emulated):
    noticed = set()
    for order in ORDERS:
        try:
            found, want, _ = sums(emulated, fault, order)
            noticed |= set() if torch.equal(found, want) else {"a wrong result"}
        except RuntimeError as error:
            noticed.add(str(error))
    assert noticed
    assert message is None or any(re.search(message, said) for said in noticed)


@pytest.mark.parametrize("order", ORDERS)
def test_waits_for_a_message_that_is_lost_end(order, emulated):
    for message in range(0, 24, 3):  # two blocks each send 8 copies and 6 arrivals that are waited for
        emulated.lose(message)
        found, want, failed = sums(emulated, "NOTHING", order)
        assert failed
        assert found.isnan().any()
        assert torch.equal(found[~found.isnan()], want[~found.isnan()])


@pytest.mark.parametrize("fault", ["NOTHING", "HASTY"])
def test_a_block_that_gives_up_leaves_alone_what_a_late_one_reads(fault, emulated):
    wrong, gave_up = 0, 0
    for order, waits in itertools.product(ORDERS, range(24)):
        emulated.hurry(waits)
        found, want, failed = sums(emulated, fault, order)
        assert found.isnan().any() == failed
        wrong += not torch.equal(found[~found.isnan()], want[~found.isnan()])
        gave_up += failed
    assert gave_up
    assert bool(wrong) == (fault == "HASTY")


def test_an_instance_that_was_not_built(emulated):
    with pytest.raises(ValueError, match="nothing<1> was not built"):
        emulated.run("nothing<1>", 0, 1, 1, 32, 0, 0)
