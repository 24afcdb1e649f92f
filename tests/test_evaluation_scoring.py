"""Encoding once, scoring by blocks under a budget, and score files that survive an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import itm_fast
from itm_fast.data import Split, Vocabulary, encode_caption
from itm_fast.evaluation import Encoded, encode, memory, plan, plan_for, score_all, scoring
from itm_fast.nn import CrossAttentionScore


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.dropout = nn.Dropout(0.5)
        self.seen = 0

    def forward(self, features):
        self.seen += len(features)
        return self.dropout(self.fc(features))


class Words(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.dropout = nn.Dropout(0.5)
        self.lengths: list[list[int]] = []

    def forward(self, ids, lengths):
        self.lengths.append(lengths)
        position = torch.arange(ids.shape[1], device=ids.device)[:, None]
        caption = self.dropout(self.embed(ids)) * (1 + position)
        caption[position.squeeze(1)[None] >= torch.tensor(lengths)[:, None]] = torch.nan
        return caption, lengths


class Scorer(nn.Module):
    """Mean region times mean word, plus what the states hold; counts its calls."""

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
        return (segments(words, cu_seqlens).sum(1),)

    def score(self, image_state, words, cu_seqlens, caption_state, region_lengths=None):
        if self.calls["score"] == self.stop_after:
            raise KeyboardInterrupt
        self.calls["score"] += 1
        self.scratch.add(itm_fast._workspace.scratch_bytes(words.device))
        image, square, count = image_state
        if region_lengths is not None:
            torch.testing.assert_close(region_lengths.to(image.dtype), count)
        both = image.mean(1) @ segments(words, cu_seqlens).T
        return self.weight * both + square[:, None] * count[:, None] + caption_state[0][None]


def segments(words, cu_seqlens):
    ends = cu_seqlens.long()
    return torch.stack([words[a:b].mean(0) for a, b in zip(ends[:-1], ends[1:], strict=True)])


def split(images: int = 7, captions: int = 23, ragged: bool = True) -> tuple[Split, Vocabulary]:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["red", "cat", "dog", "sits", "on"], rng.integers(1, 9))) for _ in range(captions)]
    made = Split(
        rng.standard_normal((images, 4, 6)).astype(np.float32),
        texts,
        rng.integers(0, images, captions),
        region_lengths=rng.integers(1, 5, images) if ragged else None,
    )
    return made, Vocabulary.build(texts, min_count=1)


def model(vocabulary: Vocabulary) -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(img_enc=Regions(), txt_enc=Words(len(vocabulary)), scorer=Scorer())


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
    monkeypatch.setattr(scoring, "CHUNK", 2)


@pytest.mark.parametrize("batch_size", [1, 4, 128])
def test_encode_is_packed_in_the_split_order(batch_size):
    data, vocabulary = split()
    net = model(vocabulary)
    found = encode(net, data, vocabulary, batch_size=batch_size, progress=False)
    net.img_enc.eval()
    torch.testing.assert_close(found.image, net.img_enc(torch.as_tensor(data.features[:])).detach())
    ids = [encode_caption(caption, vocabulary) for caption in data.captions]
    assert found.lengths.tolist() == [len(one) for one in ids]
    assert found.cu_seqlens.dtype == torch.int32
    expected = [net.txt_enc.embed(torch.tensor(one)) * (1 + torch.arange(len(one))[:, None]) for one in ids]
    torch.testing.assert_close(found.words, torch.cat(expected).detach())
    np.testing.assert_array_equal(found.caption_to_image, data.caption_to_image)
    assert found.region_lengths is not None
    assert found.region_lengths.tolist() == data.region_lengths.tolist()
    assert not found.image.requires_grad
    assert not found.words.requires_grad


def test_encode_sees_each_image_once_and_sorts_captions():
    data, vocabulary = split()
    net = model(vocabulary)
    encode(net, data, vocabulary, batch_size=4, progress=False)
    assert net.img_enc.seen == 7
    lengths = [length for batch in net.txt_enc.lengths for length in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_encode_gives_every_module_its_mode_back():
    data, vocabulary = split()
    net = model(vocabulary)
    net.img_enc.train()
    net.img_enc.dropout.eval()
    net.txt_enc.eval()
    encode(net, data, vocabulary, progress=False)
    assert net.img_enc.training
    assert not net.img_enc.dropout.training
    assert not net.txt_enc.training


def test_encode_keeps_float64():
    data, vocabulary = split()
    net = model(vocabulary)
    net.img_enc.double()
    net.txt_enc.double()
    found = encode(net, data, vocabulary, progress=False)
    assert found.image.dtype == found.words.dtype == torch.float64


def test_fingerprint_tells_inputs_apart_but_not_batches():
    data, vocabulary = split()
    net = model(vocabulary)
    first = encode(net, data, vocabulary, batch_size=128, progress=False).fingerprint
    assert encode(net, data, vocabulary, batch_size=128, progress=False).fingerprint == first
    with torch.no_grad():
        net.txt_enc.embed.weight[1, 1] += 1e-3
    assert encode(net, data, vocabulary, progress=False).fingerprint["encoders"] != first["encoders"]
    features = data.features[:]
    features[3, 2, 1] += 1e-3
    other = Split(features, [*data.captions[:-1], "cat"], data.caption_to_image)
    changed = encode(net, other, vocabulary, progress=False).fingerprint
    assert changed["features"] != first["features"]
    assert changed["captions"] != first["captions"]


def test_encode_refusals():
    data, vocabulary = split()
    net = model(vocabulary)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        encode(net, data, vocabulary, batch_size=0)
    with pytest.raises(ValueError, match="data has 7 features per region"):
        encode(net, Split(np.zeros((2, 3, 7), np.float32), ["a"], np.array([0])), vocabulary, progress=False)
    net.txt_enc = Words(5)
    with pytest.raises(ValueError, match="beyond the 5 words that the checkpoint embeds"):
        encode(net, data, vocabulary, progress=False)


def whole(scorer: Scorer, encoded: Encoded) -> np.ndarray:
    with torch.no_grad():
        scorer.eval()
        state = scorer.image_state(encoded.image, encoded.region_lengths)
        captions = scorer.caption_state(encoded.words, encoded.cu_seqlens)
        return scorer.score(state, encoded.words, encoded.cu_seqlens, captions, encoded.region_lengths).numpy()


@pytest.mark.parametrize("images, captions", [(1, 1), (3, 4), (7, 23), (8, 9)])
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
def test_a_score_that_is_no_number_is_refused_by_name(where, culprit):
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


def interrupted(path, encoded, after: int) -> None:
    scorer = Scorer()
    scorer.stop_after = after
    with pytest.raises(KeyboardInterrupt, match=rf"{after} of 18 blocks are kept beside .*x\.npy: resume"):
        score_all(scorer, encoded, out=path, progress=False)


@pytest.mark.usefixtures("small_blocks")
def test_interruption_keeps_blocks_and_resuming_skips_them(tmp_path):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    interrupted(path, encoded, 7)
    assert sorted(os.listdir(tmp_path)) == ["x.npy.journal", "x.npy.partial"]
    with pytest.raises(FileExistsError, match="begun and interrupted"):
        score_all(Scorer(), encoded, out=path, progress=False)
    scorer = Scorer()
    found = score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 11
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "x.npy.json"]
    np.testing.assert_array_equal(found, score_all(Scorer(), encoded, progress=False))
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), found)


@pytest.mark.usefixtures("small_blocks")
def test_a_finished_file_is_used_again_or_refused(tmp_path):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    first = score_all(Scorer(), encoded, out=path, progress=False)
    with pytest.raises(FileExistsError, match="exists; give another name"):
        score_all(Scorer(), encoded, out=path, progress=False)
    scorer = Scorer()
    again = score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 0
    np.testing.assert_array_equal(again, first)
    with torch.no_grad():
        scorer.weight.fill_(2.0)
    with pytest.raises(ValueError, match="computed with other scorer"):
        score_all(scorer, encoded, out=path, resume=True, progress=False)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("change", ["features", "captions", "encoders", "scorer", "precision"])
def test_another_checkpoint_or_data_cannot_be_mixed_in(change, tmp_path, monkeypatch):
    encoded, path, scorer = random_encoded(7, 23), tmp_path / "x.npy", Scorer()
    interrupted(path, encoded, 7)
    if change == "scorer":
        with torch.no_grad():
            scorer.weight.fill_(2.0)
    elif change == "precision":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    else:
        encoded.fingerprint[change] = "another"
    with pytest.raises(ValueError, match=f"computed with other .*{change}"):
        score_all(scorer, encoded, out=path, resume=True, progress=False)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("damage", ["bytes", "torn line", "size"])
def test_damaged_blocks_are_scored_again(damage, tmp_path):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    interrupted(path, encoded, 7)
    partial, journal = tmp_path / "x.npy.partial", tmp_path / "x.npy.journal"
    scorer = Scorer()
    if damage == "size":
        os.truncate(partial, 100)
        with pytest.raises(ValueError, match="does not hold what"):
            score_all(scorer, encoded, out=path, resume=True, progress=False)
        return
    if damage == "bytes":
        with open(partial, "r+b") as file:
            file.write(b"\x01\x02")
    else:
        os.truncate(journal, journal.stat().st_size - 3)
    found = score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 12
    np.testing.assert_array_equal(found, score_all(Scorer(), encoded, progress=False))


@pytest.mark.usefixtures("small_blocks")
def test_a_continued_run_keeps_the_block_size_it_began_with(tmp_path, monkeypatch):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    interrupted(path, encoded, 7)
    monkeypatch.setitem(memory._BLOCK, "cpu", (500, 256))
    scorer = Scorer()
    found = score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 11
    np.testing.assert_allclose(found, score_all(Scorer(), encoded, progress=False), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_a_full_disk_leaves_no_file_that_looks_whole(tmp_path, monkeypatch):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        score_all(Scorer(), encoded, out=path, progress=False)
    monkeypatch.undo()
    assert "x.npy" not in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".unfinished")]


def test_score_file_refusals(tmp_path):
    encoded = random_encoded(2, 2)
    with pytest.raises(ValueError, match=r"is a \.npy file, got"):
        score_all(Scorer(), encoded, out=tmp_path / "x.h5", progress=False)
    with pytest.raises(FileNotFoundError, match="folder of the score file does not exist"):
        score_all(Scorer(), encoded, out=tmp_path / "no" / "x.npy", progress=False)
    (tmp_path / "x.npy.journal").write_text("rubbish\n")
    with pytest.raises(ValueError, match=r"x\.npy\.journal is damaged"):
        score_all(Scorer(), encoded, out=tmp_path / "x.npy", resume=True, progress=False)


def sizes(**changes):
    given = dict(images=1000, regions=36, dim=64, lengths=np.full(5000, 13), device=torch.device("cpu"))
    return plan(Scorer(), **{**given, **changes})


def test_plan_counts_what_is_held():
    found = sizes(memory_gb=4)
    assert found.held["encoded images"] == 1000 * 36 * 64 * 4
    assert found.held["encoded captions"] == 5000 * 13 * 64 * 4
    assert found.held["score matrix"] == 1000 * 5000 * 4
    assert found.held["states computed once"] == 1000 * 8 + 5000 * 4
    assert (found.image_block, found.caption_block, found.blocks) == (500, 256, 2 * 20)
    assert found.total == sum(found.held.values()) + found.workspace <= 4e9
    assert "score matrix" not in sizes(memory_gb=4, matrices=0).held
    assert sizes(memory_gb=4, dtype=torch.float64).held["encoded images"] == 2 * found.held["encoded images"]


def test_plan_names_the_least_budget_and_that_one_works():
    with pytest.raises(ValueError, match="the least that can is") as refusal:
        sizes(memory_gb=0.1)
    least = float(str(refusal.value).split("the least that can is ")[1].split(" GB")[0])
    assert memory.LEAST_WORKSPACE <= sizes(memory_gb=least + 0.02).workspace < memory.LEAST_WORKSPACE + 5e7
    with pytest.raises(ValueError, match="least"):
        sizes(memory_gb=least - 0.05)
    with pytest.raises(ValueError, match="must be more than 0"):
        sizes(memory_gb=0)


def test_plan_without_a_budget_takes_a_share_of_what_is_there(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10 * 10**9)
    monkeypatch.setattr(memory, "_process_bytes", lambda device: 10**9)
    found = sizes()
    assert found.budget == 8 * 10**9
    assert "70% of the 10.0 GB available" in str(found)


def test_plan_limits_the_scorer_to_what_is_left():
    scorer, encoded = Scorer(), random_encoded(7, 23)
    needed = plan_for(scorer, encoded, memory_gb=64).total / 1e9 - 2**30 / 1e9
    found = plan_for(scorer, encoded, memory_gb=needed + 0.2)
    assert abs(found.workspace - 2e8) < 5e7
    score_all(scorer, encoded, memory_gb=needed + 0.2, progress=False)
    assert max(scorer.scratch) < 2.6e8
    with itm_fast.workspace(0.1):
        assert plan_for(scorer, encoded, memory_gb=64).workspace == int(0.1 * 2**30)


_PEAK = """
import json, numpy as np, resource, torch
from itm_fast._workspace import scratch_bytes
from itm_fast.evaluation import Encoded, plan_for, score_all
from itm_fast.nn import PairScorer

class Greedy(PairScorer):
    # Takes all the scratch that it may, once, and scores little: one region with one word.
    taken = False

    def caption_state(self, words, cu_seqlens):
        return (words[cu_seqlens[:-1].long()],)

    def score(self, image_state, words, cu_seqlens, caption_state, region_lengths=None):
        if not self.taken and int(cu_seqlens[1]) == 3:  # the shortest captions: nearly all scores are held by then
            self.taken = bool(torch.ones(scratch_bytes(words.device), dtype=torch.uint8)[-1])
        return image_state[0][:, 0] @ caption_state[0].T

def anonymous():
    return [int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith("RssAnon")][0]

torch.set_num_threads(2)
lengths = torch.arange(6000) % 12 + 3
edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
image, words = torch.full((2000, 36, 256), 0.1), torch.full((int(lengths.sum()), 256), 0.1)
encoded = Encoded(image, None, words, edges, np.arange(6000) % 2000)
held = plan_for(Greedy(), encoded, memory_gb=64)
budget = (held.total - held.workspace) / 1e9 + 0.1
mapped = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - anonymous()
score_all(Greedy(), encoded, memory_gb=budget, progress=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - mapped
print(json.dumps({"peak": peak, "budget": budget * 1e9, "plan": str(plan_for(Greedy(), encoded, memory_gb=64))}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_within_the_budget():
    """A whole process that scores under hardly more than the least budget, with a scorer that uses all it may."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] <= found["budget"], found["plan"]
    assert found["peak"] >= 0.8 * found["budget"], found["plan"]
