"""Scoring by blocks: equal to one call, states once, numbers refused by name, all of it within a memory budget."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import itm_fast
from itm_fast.evaluation import Encoded, block_scores, memory, plan, plan_for, score_all, score_file, scoring
from itm_fast.evaluation.distinct import columns, first_of_equals
from itm_fast.models._common import score_arrays
from itm_fast.nn import CrossAttentionScore


class Scorer(nn.Module):
    """Mean region times mean word, plus what the states hold; counts its calls."""

    per_word = 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))
        self.calls = {"image": 0, "caption": 0, "score": 0}
        self.scratch: set[int] = set()
        self.stop_after: int | None = None

    def image_state(self, image, region_lengths=None):
        self.calls["image"] += len(image)
        assert not self.training
        assert not torch.is_grad_enabled()
        count = torch.full((len(image),), image.shape[1]) if region_lengths is None else region_lengths
        return image, image.pow(2).mean((1, 2)), count.to(image.dtype)

    def caption_state(self, words, cu_seqlens):
        self.calls["caption"] += len(cu_seqlens) - 1
        return words[:, :3].square(), segments(words, cu_seqlens).sum(1)

    def score(self, image_state, words, cu_seqlens, caption_state, region_lengths=None):
        if self.calls["score"] == self.stop_after:
            raise KeyboardInterrupt
        self.calls["score"] += 1
        self.scratch.add(itm_fast._workspace.scratch_bytes(words.device))
        image, square, count = image_state
        if region_lengths is not None:
            torch.testing.assert_close(region_lengths.to(image.dtype), count)
        both = image.mean(1) @ segments(words, cu_seqlens).T
        of_words, of_caption = caption_state
        assert torch.equal(of_words, words[:, :3].square())
        of_caption = of_caption + segments(of_words, cu_seqlens).sum(1)
        return self.weight * both + square[:, None] * count[:, None] + of_caption[None]


def segments(words, cu_seqlens):
    ends = cu_seqlens.long()
    return torch.stack([words[a:b].mean(0) for a, b in zip(ends[:-1], ends[1:], strict=True)])


def random_encoded(images: int, captions: int, dim: int = 8, longest: int = 9, seed: int = 0) -> Encoded:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (captions,), generator=rng)
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return Encoded(
        torch.randn(images, 5, dim, generator=rng),
        torch.randint(1, 6, (images,), generator=rng).int(),
        torch.randn(int(edges[-1]), dim, generator=rng),
        edges,
        np.arange(captions) % images,
        fingerprint={"features": "1", "captions": "2", "encoders": "3"},
    )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(memory._BLOCK, "cpu", (3, 4))
    monkeypatch.setattr(block_scores, "CHUNK", 2)
    monkeypatch.setattr(scoring, "STRIPE", 2)
    monkeypatch.setattr(score_file, "STRIPE", 2)


def whole(scorer: Scorer, encoded: Encoded) -> np.ndarray:
    with torch.no_grad():
        scorer.eval()
        state = scorer.image_state(encoded.image, encoded.region_lengths)
        captions = scorer.caption_state(encoded.words, encoded.cu_seqlens)
        return scorer.score(state, encoded.words, encoded.cu_seqlens, captions, encoded.region_lengths).numpy()


@pytest.mark.parametrize("images, captions", [(1, 1), (3, 4), (7, 23), (8, 9), (150, 9)])
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_equal_one_call_and_columns_are_restored(images, captions, in_file, tmp_path):
    encoded = random_encoded(images, captions)
    expected = whole(Scorer(), encoded)
    found = score_all(Scorer(), encoded, out=tmp_path / "x.npy" if in_file else None, progress=False)
    assert found.dtype == np.float32
    assert found.shape == (images, captions)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_states_are_computed_once_and_the_mode_comes_back():
    scorer = Scorer().train()
    found = score_all(scorer, random_encoded(7, 23), progress=False)
    # two of each are the plan's probe for the size of a state
    assert scorer.calls == {"image": 7 + 2, "caption": 23 + 2, "score": 3 * 6}
    assert scorer.training
    assert np.isfinite(found).all()


def test_scores_do_not_depend_on_the_blocks(monkeypatch):
    encoded = random_encoded(9, 31)
    one = score_all(CrossAttentionScore(), encoded, progress=False)
    monkeypatch.setitem(memory._BLOCK, "cpu", (2, 5))
    np.testing.assert_allclose(score_all(CrossAttentionScore(), encoded, progress=False), one, rtol=0, atol=1e-6)
    direct = CrossAttentionScore()(encoded.image, encoded.words, encoded.cu_seqlens, encoded.region_lengths)
    np.testing.assert_allclose(one, direct.numpy(), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_encodings_that_do_not_fit_travel_block_by_block(monkeypatch):
    encoded = random_encoded(7, 23)
    expected = score_all(Scorer(), encoded, progress=False)
    original = scoring.plan_for

    def travelling(*args, **keywords):
        found = original(*args, **keywords)
        return memory.MemoryPlan(**{**found.__dict__, "resident": False})

    monkeypatch.setattr(scoring, "plan_for", travelling)
    np.testing.assert_array_equal(score_all(Scorer(), encoded, progress=False), expected)


@pytest.mark.parametrize("where, culprit", [("image", "that image's"), ("words", "that caption's"), ("", "weights")])
@pytest.mark.usefixtures("small_blocks")
def test_a_nan_score_is_refused_by_name(where, culprit):
    encoded, scorer = random_encoded(7, 23), Scorer()
    pair = r"image \d+ and caption \d+"
    if where == "image":
        encoded.image[5, 1, 2], pair = torch.nan, r"image 5 and caption \d+"
    elif where == "words":
        encoded.words[encoded.cu_seqlens[11], 3], pair = torch.inf, r"image \d+ and caption 11"
    else:
        with torch.no_grad():
            scorer.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"the score of {pair} is .*Not finite: .*{culprit}"):
        score_all(scorer, encoded, progress=False)


def sizes(**changes):
    given = dict(images=1000, regions=36, dim=64, lengths=np.full(5000, 13), device=torch.device("cpu"))
    return plan(Scorer(), **{**given, **changes})


def test_plan_counts_what_is_held():
    found = sizes(memory_gb=4)
    assert found.held["encoded images"] == 1000 * 36 * 64 * 4
    assert found.held["encoded captions"] == 5000 * 13 * 64 * 4
    assert found.held["score matrix"] == 1000 * 5000 * 4
    assert found.held["states computed once"] == 1000 * 8 + 5000 * 4 + 5000 * 13 * 3 * 4
    assert (found.image_block, found.caption_block, found.blocks) == (500, 256, 2 * 20)
    assert found.total == sum(found.held.values()) + found.workspace <= 4e9
    assert "score matrix" not in sizes(memory_gb=4, matrices=0).held
    assert sizes(memory_gb=4, dtype=torch.float64).held["encoded images"] == 2 * found.held["encoded images"]


def test_plan_names_the_least_budget_and_that_one_works(monkeypatch):
    monkeypatch.setattr(memory, "_process_bytes", lambda _: 10**9)  # nothing else is freed or taken meanwhile
    with pytest.raises(ValueError, match="the least that can is") as refusal:
        sizes(memory_gb=0.1)
    least = float(str(refusal.value).split("the least that can is ")[1].split(" GB")[0])
    assert memory.LEAST_WORKSPACE <= sizes(memory_gb=least + 0.02).workspace < memory.LEAST_WORKSPACE + 5e7
    with pytest.raises(ValueError, match="least"):
        sizes(memory_gb=least - 0.05)
    with pytest.raises(ValueError, match="must be a number more than 0"):
        sizes(memory_gb=0)


def test_scores_in_a_file_need_no_memory(tmp_path):
    encoded = random_encoded(7, 23)
    assert "score matrix" in plan_for(Scorer(), encoded, memory_gb=4).held
    assert "score matrix" not in plan_for(Scorer(), encoded, memory_gb=4, out=tmp_path / "x.npy").held


def with_copies(copies: int = 3) -> Encoded:
    """Captions 0 to 10, some of them several times, as nobody encoded them: equal bits are all that is known."""
    plain = random_encoded(7, 11)
    rows = [plain.words[a:b] for a, b in zip(plain.cu_seqlens[:-1], plain.cu_seqlens[1:], strict=True)]
    chosen = [t for t in range(11) for _ in range(copies if t % 2 else 1)]
    chosen = [chosen[at] for at in np.random.default_rng(0).permutation(len(chosen))]
    lengths = torch.tensor([len(rows[t]) for t in chosen])
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    words = torch.cat([rows[t] for t in chosen])
    return dataclasses.replace(plain, words=words, cu_seqlens=edges, caption_to_image=np.arange(len(chosen)) % 7)


class Noisy(Scorer):
    """Never gives the same pair the same score twice."""

    def score(self, *given):
        found = super().score(*given)
        return found + 1e-3 * torch.rand(found.shape)

    def forward(self, image, words, cu_seqlens):
        return self.score(self.image_state(image), words, cu_seqlens, self.caption_state(words, cu_seqlens))


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_equal_captions_are_scored_once_and_share_their_bits(in_file, tmp_path):
    encoded, scorer = with_copies(), Noisy()
    out = tmp_path / "x.npy" if in_file else None
    found = score_all(scorer, encoded, out=out, progress=False)
    assert found.shape == (7, 21)
    assert scorer.calls == {"image": 7 + 2, "caption": 11 + 2, "score": 3 * 3}
    np.testing.assert_allclose(found, whole(Scorer(), encoded), rtol=1e-5, atol=2e-3)
    first = first_of_equals(encoded.words.numpy(), encoded.cu_seqlens.numpy())
    assert len(set(first.tolist())) == 11
    np.testing.assert_array_equal(found, found[:, first])
    if in_file:
        assert np.isfinite(score_all(scorer, encoded, out=out, resume=True, progress=False)).all()
        assert scorer.calls["score"] == 3 * 3


@pytest.mark.usefixtures("small_blocks")
def test_an_interrupted_run_with_equal_captions_goes_on(tmp_path):
    encoded, scorer = with_copies(), Scorer()
    scorer.stop_after = 5
    with pytest.raises(KeyboardInterrupt, match="5 of 9 blocks"):
        score_all(scorer, encoded, out=tmp_path / "x.npy", progress=False)
    scorer.stop_after = None
    found = score_all(scorer, encoded, out=tmp_path / "x.npy", resume=True, progress=False)
    assert scorer.calls["score"] == 9
    np.testing.assert_array_equal(found, score_all(Scorer(), encoded, progress=False))


def test_word_ids_and_not_bits_decide_where_they_are_known():
    encoded = dataclasses.replace(random_encoded(2, 4), first_of_equals=np.array([0, 1, 1, 3]))
    found = score_all(Scorer(), encoded, progress=False)
    np.testing.assert_array_equal(found[:, 1], found[:, 2])
    assert len(np.unique(found[0])) == 3
    assert plan_for(Scorer(), encoded, memory_gb=4).distinct == 3


def test_the_plan_says_how_many_captions_are_distinct():
    encoded = with_copies()
    found = plan_for(Scorer(), encoded, memory_gb=4)
    assert (found.captions, found.distinct, found.pairs) == (21, 11, 77)
    assert "7 images x 21 captions, 11 distinct (" in str(found)
    assert "= 77 pairs on cpu" in str(found)
    assert "  1 block of up to 7 images x " in str(found)
    order, _ = columns(first_of_equals(encoded.words.numpy(), encoded.cu_seqlens.numpy()), encoded.lengths)
    distinct = int(encoded.lengths[order].sum())
    assert found.held["states computed once"] == 7 * 8 + 11 * 4 + distinct * 3 * 4
    assert found.held["encoded captions"] == int(encoded.lengths.sum()) * 8 * 4
    assert found.held["score matrix"] == 7 * 21 * 4
    assert "distinct" not in str(plan_for(Scorer(), random_encoded(7, 23), memory_gb=4))


def test_the_bar_counts_the_pairs_that_are_scored(capsys):
    score_all(Scorer(), with_copies(), progress=True)
    assert "77.0/77.0" in capsys.readouterr().err


@pytest.mark.usefixtures("small_blocks")
def test_the_bar_of_a_resumed_run_begins_with_what_is_kept(tmp_path, capsys):
    scorer = Scorer()
    scorer.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        score_all(scorer, random_encoded(7, 23), out=tmp_path / "x.npy", progress=False)
    score_all(Scorer(), random_encoded(7, 23), out=tmp_path / "x.npy", resume=True, progress=True)
    bar = capsys.readouterr().err
    assert "60.0/161" in bar  # five blocks of 3 x 4
    assert "161/161" in bar


@pytest.mark.usefixtures("small_blocks")
def test_captions_are_scored_longest_first():
    seen = []

    class Watching(Scorer):
        def score(self, image_state, words, cu_seqlens, *more):
            seen.append(cu_seqlens.diff().tolist())
            return super().score(image_state, words, cu_seqlens, *more)

    score_all(Watching(), random_encoded(3, 23), progress=False)
    lengths = [length for block in seen for length in block]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 3


def test_published_evaluators_score_equal_captions_once():
    rng = np.random.default_rng(0)
    captions = rng.standard_normal((6, 4, 8)).astype(np.float32)
    lengths = [4, 2, 2, 3, 4, 4]
    captions[2, :2], captions[4] = captions[1, :2], captions[0]  # what lies beyond a caption's words does not count
    images = rng.standard_normal((3, 5, 8)).astype(np.float32)
    scorer = Noisy().eval()
    found = score_arrays(scorer, images, captions, torch.tensor(lengths), torch.device("cpu"), torch.float32)
    assert found.dtype == np.float64
    words, cu_seqlens = itm_fast.pack(torch.from_numpy(captions), lengths)
    encoded = Encoded(torch.from_numpy(images), None, words, cu_seqlens, np.arange(6) % 3)
    np.testing.assert_allclose(found, whole(Scorer(), encoded), rtol=1e-5, atol=2e-3)
    np.testing.assert_array_equal(found, found[:, [0, 1, 1, 3, 0, 5]])
    assert len(np.unique(found[0])) == 4


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("limit, used, available", [("3000", "1000", 2000), ("3", "4", 0), ("max", "1000", 10**6)])
def test_a_containers_limit_counts(tmp_path, monkeypatch, version, limit, used, available):
    files = [(tmp_path / f"limit{n}", tmp_path / f"used{n}") for n in range(2)]
    files[version][0].write_text(f"{limit}\n")
    files[version][1].write_text(f"{used}\n")
    monkeypatch.setattr(memory, "_CGROUPS", files)
    monkeypatch.setattr(memory, "_meminfo", lambda: 10**6)
    assert memory.available_bytes(torch.device("cpu")) == available


def test_plan_without_a_budget_takes_a_share_of_what_is_there(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10 * 10**9)
    monkeypatch.setattr(memory, "_process_bytes", lambda device: 10**9)
    found = sizes()
    assert found.budget == 8 * 10**9
    assert "70% of the 10.0 GB available" in str(found)


def test_plan_limits_the_scorer_to_what_is_left(monkeypatch):
    monkeypatch.setattr(memory, "_process_bytes", lambda _: 10**9)  # nothing else is freed or taken meanwhile
    scorer, encoded = Scorer(), random_encoded(7, 23)
    needed = plan_for(scorer, encoded, memory_gb=64).total / 1e9 - 2**30 / 1e9
    found = plan_for(scorer, encoded, memory_gb=needed + 0.2)
    assert abs(found.workspace - 2e8) < 5e7
    score_all(scorer, encoded, memory_gb=needed + 0.2, progress=False)
    assert max(scorer.scratch) < 2.6e8
    with itm_fast.workspace(0.1):
        assert plan_for(scorer, encoded, memory_gb=64).workspace == int(0.1 * 2**30)


_PEAK = """
import json, numpy as np, torch
from itm_fast._workspace import scratch_bytes
from itm_fast.evaluation import Encoded, plan_for, score_all
from itm_fast.nn import PairScorer

class Greedy(PairScorer):
    # Takes all the scratch that it may, and scores little: one region with one word.
    peak = 0

    def caption_state(self, words, cu_seqlens):
        return (words[cu_seqlens[:-1].long()],)

    def score(self, image_state, words, cu_seqlens, caption_state, region_lengths=None):
        # Only for the shortest captions, when nearly all scores are held: filling memory takes time.
        scratch = torch.ones(scratch_bytes(words.device) if cu_seqlens[1] == 3 else 0, dtype=torch.uint8)
        score = image_state[0][:, 0] @ caption_state[0].T
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                self.peak = max(self.peak, int(line.split()[1]) * 1024)
        return score

torch.set_num_threads(2)
lengths = torch.arange(6000) % 12 + 3
edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
image, words = torch.full((2000, 36, 256), 0.1), torch.rand(int(lengths.sum()), 256)
encoded = Encoded(image, None, words, edges, np.arange(6000) % 2000)
scorer = Greedy()
held = plan_for(scorer, encoded, memory_gb=64)
budget = (held.total - held.workspace) / 1e9 + 0.1
score_all(scorer, encoded, memory_gb=budget, progress=False)
print(json.dumps({"peak": scorer.peak, "budget": budget * 1e9, "plan": str(held)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_within_the_budget():
    """A whole process that scores under hardly more than the least budget, with a scorer that uses all it may."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] <= found["budget"], found["plan"]
    assert found["peak"] >= 0.8 * found["budget"], found["plan"]
