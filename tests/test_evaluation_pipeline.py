"""What `evaluate` passes on and reports: ties, backends, unknown words, the plan of an ensemble, CxC and ECCV."""

from __future__ import annotations

import numpy as np
import pytest

import itm_fast
from itm_fast.data import Split, Vocabulary, caption_batches
from itm_fast.evaluation import TIES, average, evaluate, fold_metrics, memory_plan, metrics, pipeline, relevance
from itm_fast.evaluation import plausible as plausible_module
from itm_fast.evaluation.unknown_words import unknown_words
from itm_fast.models import build

from .test_evaluation_report import AUTO, models, options, pets


def tied() -> tuple[Split, Vocabulary]:
    """Ten images, of which two and two are the same, and captions that are all the same two words."""
    split, vocabulary = pets()
    features = split.features[:]
    features[1], features[5] = features[0], features[7]
    return Split(features, ["red cat", "old dog"] * 25, split.caption_to_image), vocabulary


@pytest.mark.parametrize("ties", TIES)
def test_every_pool_is_ranked_by_the_rule_asked_for_and_carries_the_others(ties: str):
    split, vocabulary = tied()
    nets = models(vocabulary, "SCAN", "SGR")
    found = evaluate(nets, split, vocabulary, folds=2, ties=ties, progress=False)
    assert found.settings["ties"] == ties
    folds, whole = found.systems[-1].pools
    assert whole.metrics == metrics(found.score, split.caption_to_image, ties=ties)
    assert folds.folds == tuple(fold_metrics(found.score, split.caption_to_image, 2, ties=ties))
    assert folds.metrics == average(folds.folds)
    for system in found.systems:
        for pool in system.pools:
            rsums = {rule: one.rsum for rule, one in pool.metrics.by_ties.items()}
            assert rsums["pessimistic"] < rsums["expected"] < rsums["optimistic"]
            assert rsums["pessimistic"] < rsums["published"] < rsums["optimistic"]
    line = f"mean of the scores, ties: rsum {rsums['pessimistic']:.1f} to {rsums['optimistic']:.1f}; "
    assert line + f"{rsums['published']:.1f} by the published order" in str(found).splitlines()


KINDS = {
    "SCAN": ["cross_attention_score"],
    "SGR": ["similarity_graph_score"],
    "SAF": ["similarity_filter_score"],
    "DualEncoder": [],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_report_names_the_backend_of_every_op_that_the_scorer_ran(kind: str, backend: str):
    split, vocabulary = pets(2, 1)
    opt = options("SAF" if kind == "DualEncoder" else kind, len(vocabulary))
    if kind == "DualEncoder":
        opt.system = kind
    with itm_fast.use_backend(backend):
        found = evaluate(build(opt), split, vocabulary, progress=False)
    name = AUTO if backend == "auto" else backend
    assert found.systems[0].backends == dict.fromkeys(KINDS[kind], name)
    assert found.settings["backend"] == (name if KINDS[kind] else "torch")
    assert found.settings["backend_asked"] == backend
    assert found.to_dict()["systems"][0]["backends"] == found.systems[0].backends


def test_an_ensemble_names_the_backends_of_each_member_and_finished_scores_none(tmp_path):
    split, vocabulary = pets(2, 1)
    nets = models(vocabulary, "SCAN", "SAF")
    found = evaluate(nets, split, vocabulary, scores=tmp_path / "s.npy", progress=False)
    ran = [system.backends for system in found.systems]
    assert ran == [{"cross_attention_score": AUTO}, {"similarity_filter_score": AUTO}, {}]
    again = evaluate(nets, split, vocabulary, scores=tmp_path / "s.npy", resume=True, progress=False)
    assert [system.backends for system in again.systems] == [{}, {}, {}]
    assert again.settings["backend"] is None


def test_backends_that_differ_are_all_named(monkeypatch):
    split, vocabulary = pets(2, 1)
    nets = models(vocabulary, "SCAN", "SAF")
    real = pipeline.score_all

    def score_all(scorer, *args, **kwargs):
        with itm_fast.use_backend("reference" if scorer is nets[1].scorer else "torch"):
            return real(scorer, *args, **kwargs)

    monkeypatch.setattr(pipeline, "score_all", score_all)
    found = evaluate(nets, split, vocabulary, progress=False)
    assert found.settings["backend"] == "torch, reference"


def test_an_ensemble_is_planned_with_two_matrices_and_a_file_with_none():
    split, vocabulary = pets()
    (net,) = models(vocabulary, "SAF")
    captions = list(caption_batches(split.captions, vocabulary))
    rows = [
        dict(memory_plan(net, split, captions, number, in_file=in_file).rows())
        for number, in_file in ((1, False), (2, False), (3, False), (2, True))
    ]
    matrix = 4 * 10 * 50
    found = [sum(size for name, size in row.items() if "score matri" in name) for row in rows]
    assert found == [matrix, 2 * matrix, 2 * matrix, 0]


def test_the_plans_of_an_ensemble_count_its_members(monkeypatch):
    split, vocabulary = pets(2, 1)
    asked = []
    real = pipeline.memory_plan
    monkeypatch.setattr(pipeline, "memory_plan", lambda *args: asked.append(args[3:]) or real(*args))
    evaluate(models(vocabulary, "SAF", "SGR"), split, vocabulary, memory_gb=64.0, progress=False)
    assert asked == [(2, 64.0, False)] * 2


@pytest.mark.parametrize("ties", TIES)
def test_cxc_and_eccv_take_the_rule_for_ties_and_say_which(ties: str, monkeypatch):
    split, vocabulary = pets(2, 1)
    split = Split(split.features, split.captions, split.caption_to_image, image_ids=[7, 8], caption_ids=[1, 2])
    metrics = ["eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_r1", "cxc_r5", "cxc_r10"]
    rules = {"pessimistic": 1.0, "optimistic": 7.0, "published": 3.0}
    values = {rule: {key: {"i2t": x, "t2i": x + 1} for key in metrics} for rule, x in rules.items()}
    asked = []
    monkeypatch.setattr(pipeline, "why_no_relevance", lambda *_: None)
    monkeypatch.setattr(plausible_module, "relevance_by_ties", lambda *ids: asked.append(ids[1:]) or values)
    found = evaluate(models(vocabulary, "SAF"), split, vocabulary, ties=ties, progress=False)
    rule = "pessimistic" if ties == "expected" else ties
    ((images, captions),) = asked
    assert (images.tolist(), captions.tolist()) == ([7, 8], [1, 2])
    assert found.systems[0].relevance == values[rule]
    assert found.systems[0].relevance_by_ties == values
    assert found.settings["relevance_ties"] == rule
    table = str(found).split("\n\n")[1].splitlines()
    assert table[0] == f"CxC and ECCV Caption relevance, %, ties {rule}"
    assert table[-2].split() == ["ties", *["1.0-7.0"] * 6, *["2.0-8.0"] * 6]


RULES = ["pessimistic", "optimistic", "published"]


@pytest.mark.parametrize("ties", RULES)
def test_relevance_orders_equal_scores_by_the_rule(ties: str):
    """Every item of every labelled query, against one sort written here."""
    score = np.random.default_rng(0).integers(0, 3, (4, 9)).astype(np.float32)
    images, captions = np.arange(4) + 100, np.arange(9) + 900
    right = {"i2t": {100: [900, 903, 908], 103: [902]}, "t2i": {901: [100, 102], 908: [103], 904: []}}
    found = relevance._ranked(score, images, captions, right, 9, RULES)[ties]
    for side, table, queries, items in (("i2t", score, 100, captions), ("t2i", score.T, 900, images)):
        assert found[side].keys() == right[side].keys()
        for query, own in right[side].items():
            is_right = np.isin(items, own)
            first = {"pessimistic": is_right, "optimistic": ~is_right, "published": np.arange(len(items), 0, -1)}[ties]
            order = np.lexsort((np.arange(len(items)), first, -table[query - queries]))
            assert found[side][query] == items[order].tolist()


def test_relevance_refuses_a_rule_it_does_not_have():
    with pytest.raises(ValueError, match="relevance_metrics: ties must be one of pessimistic, optimistic, published"):
        relevance.relevance_metrics(np.zeros((1, 1)), np.arange(1), np.arange(1), ties="expected")


def shares(texts: list[str], known: list[str], batch: int = 2) -> list[float]:
    vocabulary = Vocabulary.build(known, min_count=1)
    return list(unknown_words(list(caption_batches(texts, vocabulary, batch)), vocabulary).values())


@pytest.mark.filterwarnings("ignore:the vocabulary lacks")
def test_unknown_words_are_counted_without_start_and_end():
    texts = ["a b c d", "a x", "", "a b c d e f x", "a b c a b c"]
    assert shares(texts, ["a b c d e f"]) == [100 * 2 / 19, 100 * 1 / 5]
    assert shares(["", ""], ["a"]) == [0.0, 100.0]
    assert shares([], ["a"]) == [0.0, 0.0]
    some = ["red zebra dog", "zebra", "", "the big zebra", "red", "red the"]
    for batch in (1, 2, 5):  # whatever is padded
        assert shares(some, ["red dog"], batch) == [60.0, 50.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unknown, warned", [(19, False), (20, True)])
def test_a_fifth_of_unknown_words_or_of_lost_captions_is_warned_of(unknown: int, warned: bool):
    one_caption = [" ".join(["x"] * unknown + ["a"] * (100 - unknown))]
    captions = ["x"] * unknown + ["a a a a a a"] * (100 - unknown)
    said_of_words, said_of_captions = f"lacks {unknown}.0 % of the", f"and {unknown}.0 % of the captions have no word"
    for texts, said in ((one_caption, said_of_words), (captions, said_of_captions)):
        if warned:
            with pytest.warns(UserWarning, match=said):
                shares(texts, ["a"])
        else:
            shares(texts, ["a"])


@pytest.mark.filterwarnings("ignore:the vocabulary lacks")
def test_a_report_tells_what_the_vocabulary_does_not_know():
    split, vocabulary = pets()
    known = Vocabulary([word for word in vocabulary.word2idx if word not in ("cat", "mat")])
    found = evaluate(models(known, "SAF"), split, known, progress=False)
    words = [word for text in split.captions for word in text.split()]
    share = 100 * sum(word in ("cat", "mat") for word in words) / len(words)
    assert found.settings["unknown_tokens_percent"] == pytest.approx(share)
    assert f"unknown words: {share:.1f} % of the words; " in str(found).splitlines()[-1]
    assert found.to_dict()["settings"]["unknown_tokens_percent"] == found.settings["unknown_tokens_percent"]
    whole = evaluate(models(vocabulary, "SAF"), split, vocabulary, progress=False)
    assert whole.settings["unknown_tokens_percent"] == 0.0
    assert "unknown" not in str(whole)


@pytest.mark.parametrize("ties", RULES)
def test_both_sets_of_labels_are_ranked_by_the_rule(ties: str, monkeypatch):
    """Labels of two images and three captions, whose scores are all equal."""
    ranked = {"cxc_r1": [], "cxc_r5": [], "cxc_r10": [], "eccv": []}  # under one rule after another

    class Labels:
        def __init__(self):
            self.cxc_gts = self.eccv_gts = {"i2t": {7: [2, 1], 8: [3]}, "t2i": {1: [7], 2: [7], 3: [8]}}

        def cxc_recalls(self, found, name, K):
            ranked[f"cxc_r{K}"].append(found)
            return {"i2t": K / 100, "t2i": K / 50}

        def eccv_metrics(self, found, name):
            ranked["eccv"].append(found)
            return {"eccv_r1": {"i2t": 0.5, "t2i": 0.25}}

    monkeypatch.setattr(relevance, "_labels", Labels)
    monkeypatch.setattr(relevance, "why_no_relevance", lambda *_: None)
    data = np.zeros((2, 3)), np.array([7, 8]), np.array([1, 2, 3])
    by_ties = relevance.relevance_by_ties(*data)
    assert list(by_ties) == RULES
    found = by_ties[ties]
    assert found["eccv_r1"] == {"i2t": 50.0, "t2i": 25.0}
    assert found["cxc_r5"] == {"i2t": 5.0, "t2i": 10.0}
    whole = {
        "pessimistic": {"i2t": {7: [3, 1, 2], 8: [1, 2, 3]}, "t2i": {1: [8, 7], 2: [8, 7], 3: [7, 8]}},
        "optimistic": {"i2t": {7: [1, 2, 3], 8: [3, 1, 2]}, "t2i": {1: [7, 8], 2: [7, 8], 3: [8, 7]}},
        "published": {"i2t": {7: [3, 2, 1], 8: [3, 2, 1]}, "t2i": {1: [8, 7], 2: [8, 7], 3: [8, 7]}},
    }[ties]
    at = RULES.index(ties)
    assert ranked["cxc_r1"][at] == ranked["cxc_r5"][at] == ranked["cxc_r10"][at] == whole
    # Of ECCV Caption's labels only as many are ranked as a query has right answers at most.
    best = {side: {q: items[:2] for q, items in sides.items()} for side, sides in whole.items()}
    assert ranked["eccv"][at] == best
    assert relevance.relevance_metrics(*data, ties=ties) == found  # one rule alone
    assert [ranked["cxc_r1"][-1], ranked["eccv"][-1]] == [whole, best]
    assert len(ranked["eccv"]) == len(RULES) + 1
