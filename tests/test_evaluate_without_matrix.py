"""Models whose scores nobody asks for are evaluated without a score matrix, with the same results."""

from __future__ import annotations

import os
import signal
import zlib
from argparse import Namespace

import numpy as np
import pytest
from cpu_cases import needs_cpu

import itm_fast
from itm_fast.cli import main
from itm_fast.data import Split
from itm_fast.evaluation import evaluate, mapped, memory, pipeline, relevance, tally, write_trec
from itm_fast.evaluation.counters import Counters

from .test_evaluate_cli import made  # noqa: F401
from .test_evaluation_pipeline import tied
from .test_evaluation_report import models, pets


def results(report) -> dict:
    """All but times, and memory."""
    found = report.to_dict()
    for system in found["systems"]:
        seconds = system.pop("seconds")
        if system["backends"]:
            assert seconds["score"] > 0
            assert system.pop("pairs_per_second") > 0
    settings = dict(found["settings"])
    plans = settings.pop("memory_plan_gb")
    return {**found, "settings": settings, "matrix": ["score matri" in str(plan) for plan in plans]}


class Labels:
    """Of images 7, 8, ... and captions 100, 101, ...: each caption is right for its image and the next one."""

    def __init__(self):
        self.cxc_gts = self.eccv_gts = {
            "i2t": {7 + i: [100 + (5 * i + k) % 50 for k in range(10)] for i in range(10) if i != 4},
            "t2i": {100 + t: [7 + (t // 5 + k) % 10 for k in range(2)] for t in range(0, 50, 3)},
        }

    def cxc_recalls(self, found, name, K):
        """Another number for every other ranking."""
        return {side: zlib.crc32(repr(sorted((q, r[:K]) for q, r in found[side].items())).encode()) for side in found}

    def eccv_metrics(self, found, name):
        return {f"eccv_{name}": self.cxc_recalls(found, name, 99) for name in ("map_at_r", "rprecision", "r1")}


@pytest.fixture
def labelled(monkeypatch):
    monkeypatch.setattr(relevance, "_labels", Labels)
    for module in (relevance, pipeline):
        monkeypatch.setattr(module, "why_no_relevance", lambda *_: None)
    monkeypatch.setattr("itm_fast.evaluation.counted.why_no_relevance", lambda *_: None)


CASES = [
    (["SCAN"], "auto", None, "pessimistic"),
    (["SCAN"], "torch", 2, "expected"),
    (["SAF"], "auto", 2, "optimistic"),
    (["SGR", "SAF"], "auto", 5, "published"),
    (["SGR", "SCAN", "SAF"], "torch", 2, "pessimistic"),
]


@pytest.mark.usefixtures("labelled")
@pytest.mark.parametrize("kinds, backend, folds, ties", CASES)
@pytest.mark.parametrize("block", [(500, 256), (3, 1)])
def test_the_report_is_the_same(kinds, backend, folds, ties, block, monkeypatch, tmp_path):
    split, vocabulary = tied()
    ids = {"image_ids": np.arange(10) + 7, "caption_ids": np.arange(50) + 100}
    split = Split(split.features[:], split.captions, split.caption_to_image, **ids)
    monkeypatch.setitem(memory._BLOCK, "cpu", block)
    nets = models(vocabulary, *kinds)
    given = dict(folds=folds, ties=ties, progress=False)
    with itm_fast.use_backend(backend):
        expected = evaluate(nets, split, vocabulary, **given)
        for name in ("score_all", "score_into", "fold_metrics", "count_matrix", "relevance_with_plausible"):
            monkeypatch.setattr(pipeline, name, lambda *_, **__: pytest.fail("asked for the matrix"))
        found = evaluate(nets, split, vocabulary, keep_scores=False, best=7, **given)
    assert found.score is None
    count = len(kinds)
    assert results(found) == {**results(expected), "matrix": [False] * count}
    assert results(expected)["matrix"] == [True] * count
    assert found.systems[-1].relevance["cxc_r5"] == expected.systems[-1].relevance["cxc_r5"]
    assert str(found) == str(expected)
    for name, score in (("a", expected.score), ("b", found.best)):
        write_trec(tmp_path / name, score, split.caption_to_image, top=7)
    for path in (tmp_path / "a").iterdir():
        assert path.read_text() == (tmp_path / "b" / path.name).read_text()
    with pytest.raises(ValueError, match="top is 8, but only the 7 best items"):
        write_trec(tmp_path / "c", found.best, split.caption_to_image, top=8)


def test_a_matrix_has_no_snapshots_and_keeps_its_own_best_items(tmp_path):
    split, vocabulary = pets(2, 1)
    for given in (dict(best=1), dict(state=tmp_path), dict(together=True)):
        with pytest.raises(ValueError, match="best, state and together are for evaluations without a matrix"):
            evaluate(models(vocabulary, "SAF"), split, vocabulary, **given)


@needs_cpu
@pytest.mark.parametrize("kinds", [["SAF"], ["SGR", "SAF"]])
def test_embeddings_that_do_not_fit_are_in_files(kinds, monkeypatch, tmp_path):
    """Of the same embeddings in files the same report; nothing is left in the folder."""
    split, vocabulary = pets()
    nets = models(vocabulary, *kinds)
    expected = evaluate(nets, split, vocabulary, keep_scores=False, progress=False)
    held = expected.settings["memory_plan_gb"]
    assert not any("files" in name for plan in held for name in plan)
    real = memory._budget
    least = []

    def budget(memory_gb, device, process, kept, in_memory):
        if memory_gb is not None:
            return real(memory_gb, device, process, kept, in_memory)
        without = sum(size for name, size in kept.items() if name not in (*memory._SPLIT, memory._OTHERS))
        least.append(without + memory.LEAST_WORKSPACE + 20_000)
        return least[-1], "a little"

    monkeypatch.setattr(memory, "_budget", budget)
    monkeypatch.setattr(memory, "_process_bytes", lambda _: 10**8)
    monkeypatch.setattr(memory, "CHUNK", 1)
    monkeypatch.setitem(memory._BLOCK, "cpu", (1, 1))
    names = []
    monkeypatch.setattr(mapped, "reserve", lambda file, size: names.append(file) or file.truncate(size))
    found = evaluate(nets, split, vocabulary, keep_scores=False, progress=False, state=tmp_path / "run")
    assert len(names) > 2 * len(kinds)
    assert str(found) == str(expected)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tally.npz"]


    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda _: Namespace(free=0))
    monkeypatch.setattr("itm_fast.evaluation.counted.encode", lambda *_, **__: pytest.fail("the disk is full"))
    with pytest.raises(OSError, match=r"1 MB are needed .* that do not fit in memory: .* TMPDIR \(or --state\)"):
        evaluate(nets, split, vocabulary, keep_scores=False, progress=False, state=tmp_path / "other")


def command(folder, *kinds: str) -> list[str]:
    words = ["evaluate", "--data", f"{folder}/pets_precomp", "--no-progress", "--folds", "5"]
    return words + [word for kind in kinds for word in ("--checkpoint", f"{folder}/{kind}.pth.tar")]


@needs_cpu
def test_the_command_keeps_the_best_items_for_trec_files(made, tmp_path, capsys):  # noqa: F811
    words = command(made, "SAF")
    for more in ([], ["--trec", "2", "--output", f"{tmp_path}/trec"]):
        assert main([*words, *more, "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "score matrix" not in text
        assert " to encode\n" in text
    assert main([*words, "--trec", "2", "--output", f"{tmp_path}/plain"]) == 0
    assert main([*words, "--trec", "2", "--output", f"{tmp_path}/scored", "--scores", f"{tmp_path}/s.npy"]) == 0
    for name in ("results.txt", "results.csv", "results.tex", "i2t.run", "t2i.run", "i2t.qrels", "t2i.qrels"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("plain", "scored")]
        assert texts[0] == texts[1]


@needs_cpu
def test_parts_are_merged_into_the_report_of_one_process(made, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(memory._BLOCK, "cpu", (4, 16))
    words = [*command(made, "SGR", "SAF"), "--trec", "3"]
    assert main([*words, "--output", f"{tmp_path}/one"]) == 0
    expected = [line for line in capsys.readouterr().out.splitlines() if "encoded in" not in line][:-1]
    folders = [f"{tmp_path}/run{k}" for k in (1, 2, 3)]
    for k in (3, 1, 2):
        assert main([*words, "--state", folders[k - 1], "--part", f"{k}/3"]) == 0
    assert "4 of 12 blocks are in" in capsys.readouterr().out
    assert main(["evaluate", "--merge", *folders, "--output", f"{tmp_path}/merged", "--trec", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == expected
    for name in ("results.txt", "results.csv", "results.tex", "i2t.run", "t2i.run", "i2t.qrels", "t2i.qrels"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "merged" / name).read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Counters, "outside", lambda self: np.arange(len(self.right)) == 3)
        with pytest.warns(UserWarning, match=r"^1 right pair has scores that differ .* rank of up to 1 query in each"):
            assert main(["evaluate", "--merge", *folders]) == 0
    for wrong, sentence in (
        (folders[:2], f"missing in {folders[0]}, {folders[1]}: blocks 8-11 of 12; run the other parts first"),
        ([*folders, folders[0]], f"{folders[0]} and {folders[0]} both have blocks 0-3; leave one of them out"),
        ([*folders, "--trec", "4", "--output", "x"], "the parts kept only the 3 best items of each query"),
        ([*folders, "--ties", "expected"], "does not read --ties; leave that out"),
        ([f"{tmp_path}/one"], f"one is no --state folder of a part; run `--part k/n --state {tmp_path}/one` first"),
    ):
        assert main(["evaluate", "--merge", *wrong]) == 2
        assert sentence in capsys.readouterr().err
    assert main([*words, "--state", folders[0], "--part", "2/3"]) == 2
    assert "is of an evaluation with other --part; give another --state" in capsys.readouterr().err
    assert main([*command(made, "SAF", "SAF"), "--trec", "3", "--state", f"{tmp_path}/other", "--part", "3/3"]) == 0
    assert main(["evaluate", "--merge", *folders[:2], f"{tmp_path}/other"]) == 2
    assert "other encoders of model 1, scorer of model 1" in capsys.readouterr().err


@needs_cpu
def test_a_part_without_blocks_says_so_and_is_merged(made, tmp_path, capsys):  # noqa: F811
    words = command(made, "SAF")
    folders = [f"{tmp_path}/{k}" for k in (1, 2)]
    assert main([*words, "--state", folders[0], "--part", "1/2"]) == 0
    assert f"part 1/2 has none to do, as there is only 1 block; {folders[0]} may be merged" in capsys.readouterr().out
    assert main(["evaluate", "--merge", folders[0]]) == 2
    assert f"missing in {folders[0]}: block 0 of 1; run the other parts first" in capsys.readouterr().err
    assert main([*words, "--state", folders[1], "--part", "2/2"]) == 0
    assert f"1 of 1 block is in {folders[1]}" in capsys.readouterr().out
    assert main(["evaluate", "--merge", *folders]) == 0


@needs_cpu
@pytest.mark.parametrize("how, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_goes_on_from_its_snapshot(made, tmp_path, capsys, monkeypatch, how, code):  # noqa: F811
    monkeypatch.setitem(memory._BLOCK, "cpu", (4, 16))
    words = [*command(made, "SAF"), "--state", f"{tmp_path}/run"]
    assert main(command(made, "SAF")) == 0
    expected = capsys.readouterr().out
    real, added = tally.Tally.add, []

    def add(self, number, *given):
        if len(added) == 5:
            os.kill(os.getpid(), getattr(signal, how))
        added.append(number)
        return real(self, number, *given)

    monkeypatch.setattr(tally.Tally, "add", add)
    assert main(words) == code
    kept = f"interrupted; 5 of 12 blocks are kept in {tmp_path}/run: the same command goes on"
    assert capsys.readouterr().err == f"itm-fast evaluate: {kept}\n"
    assert main([*words, "--ties", "published"]) == 2
    assert "other --ties; give another --state" in capsys.readouterr().err
    added.append(None)
    assert main(words) == 0
    assert len(added) == 5 + 1 + 7
    table, found = (text.split("vocabulary:")[0] for text in (expected, capsys.readouterr().out))
    assert found == table
    assert main(words) == 0
    assert len(added) == 13
    assert capsys.readouterr().out.startswith(table)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--part", "3/2", "--state", "x"], "wants K/N, such as 3/8 for the third of eight parts, got 3/2"),
        (["--part", "1/2"], "name it with --state DIR"),
        (["--part", "1/2", "--state", "x", "--output", "y"], "give --output when the parts are added up by --merge"),
        (["--scores", "s.npy", "--state", "x"], "(--resume); leave out --state"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, sentence, capsys):
    try:
        code = main(["evaluate", "--checkpoint", "x", "--data", "y", *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert sentence in capsys.readouterr().err
