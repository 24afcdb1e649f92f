"""Four processes evaluate together: one copy of the encoded split on a machine, the bits of one process, and a kill."""

from __future__ import annotations

import shutil
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_cases import BLOCKS, RAGGED, evaluated, evaluations, same_report
from sharing_cases import PROCESSES, encoded, work

from itm_fast._ranks import Ranks, _require_own_gpus
from itm_fast.evaluation.crc import joined_crc
from itm_fast.evaluation.tally import Tally
from itm_fast.models._common import usable_device

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The folder of the processes, and what each found before it was killed."""
    folder = tmp_path_factory.mktemp("four")
    for name in ("one", "first", "second"):
        (folder / name).mkdir()
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    errors = [path.read_text() for path in folder.glob("error*")]
    assert not errors, errors[0]
    return folder, [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.slow
@pytest.mark.parametrize("machines", ["one machine", "two machines"])
def test_the_processes_of_a_machine_encode_once_into_one_copy(four, machines):
    wanted = encoded(None, Ranks())
    found = [one[machines] for one in four[1]]
    nodes = [found] if machines == "one machine" else [found[0::2], found[1::2]]
    for node in nodes:
        for one in node:
            assert one["identity"] == wanted["identity"]
            assert len(one["tensors"]) == len(wanted["tensors"]) > 3
            assert all(torch.equal(a, b) for a, b in zip(one["tensors"], wanted["tensors"], strict=True))
            assert one["maps"] == node[0]["maps"], "another copy"
            assert {permissions for permissions, _ in one["maps"]} == {"r--s"}
            assert 0 < one["seen"]["img_enc"] < len(RAGGED.features)
            assert one["left"] == set(), "a file that a killed process would leave behind"
            assert (one["node"], one["memory"]) == (len(node), 10**9 // len(node))
        for name, count in wanted["seen"].items():
            assert sum(one["seen"][name] for one in node) == count
    assert len({one["maps"][0] for one in found}) == len(nodes)


@pytest.mark.slow
def test_threads_are_shared_out_and_given_back(four):
    for found in four[1]:
        assert 1 <= found["one machine"]["threads"] < 3
        assert found["threads"] == 3


@pytest.mark.slow
def test_a_full_disk_is_refused_by_the_one_that_finds_it(four):
    folder, found = four
    for when in ("full", "too small"):
        assert found[0][when].startswith("OSError: [Errno 28] No space left on device; ")
        assert f"are needed for embeddings that {PROCESSES} processes share: make room, or name" in found[0][when]
        assert "--state" not in found[0][when]
        assert all(one[when].startswith("ChildProcessError: ") for one in found[1:])
    assert not [*(folder / "one").iterdir(), *(folder / "first").iterdir(), *(folder / "second").iterdir()]


@pytest.mark.slow
def test_four_processes_have_the_bits_of_one(four):
    _, found = four
    for name, (wanted, blocks) in evaluations(Ranks()).items():
        mine = found[0]["evaluations"][name][0]
        assert len(mine) == len(wanted)
        assert all(np.array_equal(a, b) for a, b in zip(mine, wanted, strict=True))
        assert sum(one["evaluations"][name][1] for one in found) == blocks
    wanted = evaluated(together=False)
    assert all(same_report(one["report"], wanted) for one in found)


@pytest.mark.slow
def test_a_job_of_which_all_were_killed_goes_on_in_one_process(four, tmp_path, monkeypatch):
    folder, _ = four
    state = tmp_path / "killed"
    shutil.copytree(folder / "killed", state)
    kept = [Tally.load(path).done for path in sorted(state.glob("**/tally.npz"))]
    assert len(kept) > 1
    add, again = Tally.add, []
    monkeypatch.setattr(Tally, "add", lambda self, *given: again.append(given[0]) or add(self, *given))
    found = evaluated(together=False, state=state)
    assert 0 < len(again) == BLOCKS - sum(done.sum() for done in kept)
    assert same_report(found, evaluated(together=False))
    assert sorted(path.name for path in state.iterdir()) == ["tally.npz"]


def test_processes_of_a_group_that_torchrun_did_not_make_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert str(usable_device(None)) == "cuda"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 6)
    for current, asked, wanted in ((0, None, "cuda:2"), (3, "cuda", "cuda:3"), (3, "cuda:1", "cuda:1")):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert str(usable_device(asked)) == wanted
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    others = SimpleNamespace(each=lambda name: [name, "GPU-0"])
    _require_own_gpus(others, torch.device("cuda", 1))
    with pytest.raises(
        ValueError, match=r"share a GPU \(cuda:0\), and each needs its own; call torch\.cuda\.set_device"
    ):
        _require_own_gpus(others, torch.device("cuda", 0))


@settings(deadline=None, max_examples=50, database=None, derandomize=True)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_of_parts_are_joined(first, second):
    assert joined_crc(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
