"""One model whose scores nobody asks for is evaluated without a score matrix, with the same results."""

from __future__ import annotations

import pytest
from cpu_cases import needs_cpu

import itm_fast
from itm_fast.cli import main
from itm_fast.evaluation import TIES, evaluate, pipeline

from .test_evaluate_cli import made  # noqa: F401
from .test_evaluation_pipeline import tied
from .test_evaluation_report import models, pets


def results(report) -> dict:
    """All but times, and memory."""
    found = report.to_dict()
    for system in found["systems"]:
        assert system.pop("pairs_per_second") > 0
        assert system.pop("seconds")["score"] > 0
    settings = dict(found["settings"])
    (plan,) = settings.pop("memory_plan_gb")
    return {**found, "settings": settings, "matrix": "score matrix" in plan}


@needs_cpu
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("kind", ["SCAN", "SAF"])
@pytest.mark.parametrize("folds", [None, 2])
def test_the_report_is_the_same(ties, kind, folds, monkeypatch):
    split, vocabulary = tied()
    nets = models(vocabulary, kind)
    given = dict(folds=folds, ties=ties, progress=False)
    expected = evaluate(nets, split, vocabulary, **given)
    monkeypatch.setattr(pipeline, "score_all", lambda *_, **__: pytest.fail("asked for the matrix"))
    found = evaluate(nets, split, vocabulary, keep_scores=False, **given)
    assert found.score is None
    assert results(found) == {**results(expected), "matrix": False}
    assert results(expected)["matrix"]
    assert str(found) == str(expected)


@pytest.mark.parametrize(
    "kinds, relevance, backend", [(["SAF", "SGR"], False, "auto"), (["SAF"], True, "auto"), (["SAF"], False, "torch")]
)
def test_several_models_cxc_metrics_and_other_backends_need_matrices(kinds, relevance, backend, monkeypatch):
    split, vocabulary = pets(2, 1)
    asked = []
    real = pipeline.score_all
    monkeypatch.setattr(pipeline, "score_all", lambda *given, **named: asked.append(1) or real(*given, **named))
    if relevance:
        monkeypatch.setattr(split, "image_ids", [1, 2])
        monkeypatch.setattr(pipeline, "why_no_relevance", lambda *_: None)
        monkeypatch.setattr(pipeline, "relevance_by_ties", lambda *_: {rule: {} for rule in TIES})
    with itm_fast.use_backend(backend):
        found = evaluate(models(vocabulary, *kinds), split, vocabulary, keep_scores=False, progress=False)
    assert found.score is None
    assert len(asked) == len(kinds)
    assert all(any("score matri" in name for name in plan) for plan in found.settings["memory_plan_gb"])


@needs_cpu
def test_the_command_needs_a_matrix_for_trec_files_only(made, tmp_path, capsys):  # noqa: F811
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{made}/pets_precomp", "--no-progress"]
    plans = []
    for more in ([], ["--trec", "2", "--output", f"{tmp_path}/trec"]):
        assert main([*words, *more, "--dry-run"]) == 0
        plans.append(capsys.readouterr().out)
    assert ["score matrix" in text for text in plans] == [False, True]
    for name, more in (("trec", ["--trec", "2"]), ("plain", [])):
        assert main([*words, *more, "--folds", "5", "--output", f"{tmp_path}/{name}"]) == 0
    for kind in ("txt", "csv", "tex"):
        texts = [(tmp_path / name / f"results.{kind}").read_text() for name in ("plain", "trec")]
        assert texts[0] == texts[1]
