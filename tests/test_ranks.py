"""Training by several processes: losses, gradients, files and interruption are those of one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing
from ranks_cases import BLOCKS, CASES, all_gradients, cases, evaluated, evaluations, gradients, same_report, work
from training_cases import DEV, TRAIN, assert_same_run, log_rows, run_tiny, tensors_of

from itm_fast import _torchrun
from itm_fast._ranks import Ranks
from itm_fast.cli import main
from itm_fast.data import save_splits
from itm_fast.evaluation.tally import Tally
from itm_fast.training import resume

COUNTS = (2, 3)
KEYS = [*cases(), ("saf", "blocks"), ("sgr", "two")]


@pytest.fixture(scope="module")
def alone():
    return all_gradients(Ranks())


@pytest.fixture(scope="module", params=COUNTS)
def together(request, tmp_path_factory):
    """The number of processes, their folder, and what each found."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    torch.multiprocessing.start_processes(
        work, (request.param, folder), nprocs=request.param, start_method="spawn", join=True
    )
    ranks = range(request.param)
    found = [torch.load(folder / f"gradients{rank}", weights_only=False)["gradients"] for rank in ranks]
    living = [torch.load(folder / f"runs{rank}", weights_only=False) for rank in ranks[:-1]]
    return request.param, folder, found, living


@pytest.fixture(scope="module")
def exact():
    """The gradients of the float32 cases, computed in float64 by one process."""
    names = [name for name, case in cases() if case == "float32"]
    return {name: gradients(name, Ranks(), **{**CASES["float32"], "dtype": torch.float64}) for name in names}


def norm(gradients):
    return sum(g.double().norm() ** 2 for g in gradients if g is not None) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS, ids=" ".join)
def test_losses_gradients_and_statistics_are_those_of_one_process(alone, exact, together, key):
    """To 1e-10 of the gradients' norm in float64. In float32 the gradients of one process, which are sums of thousands
    of terms, are themselves 1.3e-5 to 1.9e-5 of the norm off those in float64: several processes, which add the terms
    up in another order (0.9e-6 to 7e-6 from one process, as measured), may be off twice as far, as all kernels may.
    The losses agree to 1e-6."""
    wanted = alone[key]
    in_float64 = wanted["loss"].dtype == torch.float64
    tolerance = 1e-10 if in_float64 else 1e-5
    for found in together[2]:
        mine = found[key]
        assert mine["loss"].dtype == wanted["loss"].dtype
        assert mine["loss"].item() == pytest.approx(wanted["loss"].item(), rel=min(tolerance, 1e-6))
        if in_float64:
            assert difference(mine, wanted) <= tolerance * norm(wanted["gradients"])
        else:
            judge = exact[key[0]]
            assert difference(mine, judge) <= 2 * difference(wanted, judge) < 5e-5 * norm(judge["gradients"])
        for a, b in zip(mine["buffers"], wanted["buffers"], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert torch.equal(mine["random"], wanted["random"]), "a resumed run would draw other numbers"


def difference(one, other):
    """The norm of the difference of the gradients, which have the same parameters."""
    assert [g is None for g in one["gradients"]] == [g is None for g in other["gradients"]]
    pairs = zip(one["gradients"], other["gradients"], strict=True)
    return norm([a.double() - b for a, b in pairs if a is not None])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgr", "saf", "hgan"])
def test_a_batch_encoded_in_parts_has_the_same_gradients(alone, name):
    whole, parts = alone[name, "float64"], gradients(name, Ranks(), **CASES["float64"])
    assert parts["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-12)
    assert difference(parts, whole) <= 1e-12 * norm(whole["gradients"])
    assert torch.equal(parts["random"], whole["random"])


@pytest.mark.slow
def test_an_evaluation_has_the_bits_of_one_process(together):
    count, folder, _, _ = together
    found = [torch.load(folder / f"evaluations{rank}", weights_only=False) for rank in range(count)]
    blocks = 4 * 7  # of 20 images and 46 distinct captions
    for name, (wanted, all_blocks) in evaluations(Ranks()).items():
        assert all_blocks == blocks
        mine, counted = found[0][name]
        assert len(mine) == len(wanted) > 10
        assert all(np.array_equal(a, b) for a, b in zip(mine, wanted, strict=True))
        assert sum(each[name][1] for each in found) == blocks
        assert not any(each[name][0] for each in found[1:])
    assert wanted[6].any(), "no captions have images with equal scores"
    assert 1 <= found[-1]["one is busy"][1] <= 2, "not the block that it was busy with, and at most the next"


@pytest.mark.slow
def test_reports_are_those_of_one_process(together):
    count, folder, _, _ = together
    wanted = evaluated(together=False)
    found = [torch.load(folder / f"reports{rank}", weights_only=False) for rank in range(count)]
    assert found[0]["begun"].startswith(f"KeyboardInterrupt: interrupted; 5 of {BLOCKS} blocks are kept")
    for one in found:
        assert same_report(one["new"], wanted)
        assert same_report(one["gone on"], wanted)
    assert sum(one["blocks"] for one in found) == BLOCKS - 5
    assert "tally.npz" in found[0]["left"]
    assert not [name for name in (folder / "begun").iterdir() if name.is_dir()]


@pytest.mark.slow
def test_one_process_goes_on_where_another_has_died(tmp_path, together):
    count, folder, _, living = together
    assert all(found["dead"].startswith("ConnectionError: stopped, because another process") for found in living)
    if count < 3:  # it has died in training
        return
    state = tmp_path / "dead"
    shutil.copytree(folder / "dead", state)
    assert Tally.load(state / "process-2" / "tally.npz").done.sum() == 1
    add, again = Tally.add, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tally, "add", lambda self, *given: again.append(given[0]) or add(self, *given))
        found = evaluated(together=False, state=state)
    assert same_report(found, evaluated(together=False))
    assert len(again) == 1  # the block that it had taken and not finished
    assert not list(state.glob("process-*"))


@pytest.mark.slow
def test_a_run_is_that_of_one_process(tmp_path, together):
    count, folder, _, living = together
    assert all(found["whole"] == living[0]["whole"] for found in living)
    assert living[0]["whole"].finished
    run_tiny(tmp_path / "alone", "saf")
    mine, theirs = (
        [float(row["loss"]) for row in log_rows(path) if row["loss"]] for path in (folder / "whole", tmp_path / "alone")
    )
    # Adam's first step takes only the signs of gradients, so rounding near zero moves weights by twice the rate.
    assert mine[0] == pytest.approx(theirs[0], rel=1e-6)
    assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_a_run_interrupted_in_one_process_resumes_as_if_it_had_not_been(together):
    count, folder, _, living = together
    for found in living:
        assert found["steps before"] == 4
        assert found["interrupted"].startswith("Terminated: interrupted in epoch 1 after 4 steps")
        assert found["resumed"] == found["whole"]
    assert_same_run(folder / "parts", folder / "whole")


@pytest.mark.slow
def test_a_run_is_resumed_by_another_number_of_processes(together):
    count, folder, _, _ = together
    run_tiny(folder / "changed", "saf", resuming=True)
    mine, theirs = (resume.load(folder / name) for name in ("changed", "whole"))
    for a, b in zip(tensors_of(mine.model), tensors_of(theirs.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    assert torch.equal(mine.rng["cpu"], theirs.rng["cpu"])


@pytest.mark.slow
def test_what_stops_one_process_stops_all_with_one_reason(together):
    count, folder, _, living = together
    assert living[0]["again"].startswith("FileExistsError: ")
    assert "already holds a run" in living[0]["again"]
    assert all(found["again"].startswith("ChildProcessError: ") for found in living[1:])
    for found in living:
        assert "the loss is nan" in found["broken"]
        assert "training image 5 hold NaN" in found["broken"]
        assert "all processes must have the same kind of device, got cpu in process 0, cuda in" in found["other"]


def test_encoders_with_batch_norm_are_not_run_in_parts(tmp_path):
    with pytest.raises(ValueError, match=r"the encoders of RCAR have a BatchNorm, .* leave chunk"):
        run_tiny(tmp_path / "run", "rcar", chunk=4)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        run_tiny(tmp_path / "run", chunk=0)
    run_tiny(tmp_path / "run", chunk=4, max_steps=1)


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, printed in (("0", True), ("3", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            main(["doctor"])
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert ("torchrun started 4 processes, and this command runs in one" in err) == printed
        assert not out
    monkeypatch.setenv("RANK", "0")
    for words, flag in ((["--scores", "s.npy"], "--scores"), (["--workload", "coco-eval-5k"], "--workload")):
        assert main(["evaluate", *words]) == 2
        assert f"torchrun started 4 processes, and {flag} is for one" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ValueError, match="RANK, which torchrun sets, must be a whole number, got 'one'"):
        _torchrun.rank()


def torchrun(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "itm_fast"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False, env=alone)


@pytest.mark.slow
def test_torchrun_trains_and_evaluates_one_model_with_two_processes(tmp_path, capsys):
    data, run = tmp_path / "tiny.h5", tmp_path / "run"
    save_splits(data, {"train": TRAIN, "dev": DEV})
    small = "--embed-size 16 --word-dim 8 --batch-size 8 --epochs 2 --min-count 1 --device cpu --max-steps 2 --chunk 2"
    done = torchrun("train", "--model", "scan", "--data", data, "--output", run, *small.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped after 2 steps") == 1
    assert done.stderr.count("42 captions of 14 images") == 1
    assert len([row for row in log_rows(run) if row["loss"]]) == 2

    words = ["evaluate", "--checkpoint", run, "--data", data, "--split", "dev", "--device", "cpu", "--trec", 2]
    done = torchrun(*words, "--output", tmp_path / "together")
    assert done.returncode == 0, done.stderr
    assert main([*map(str, words), "--output", str(tmp_path / "alone")]) == 0
    assert done.stdout.splitlines()[:6] == capsys.readouterr().out.splitlines()[:6]
    assert done.stdout.count("written: ") == 1
    for name in ("results.csv", "ranks.npz"):
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    runs = [sorted((tmp_path / folder).glob("*.run*")) for folder in ("together", "alone")]
    assert runs[0]
    assert [path.read_text() for path in runs[0]] == [path.read_text() for path in runs[1]]
