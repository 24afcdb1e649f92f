"""The pair scorers of the family against vectors that their published code computed, on every backend."""

import argparse

import pytest
import torch
from cpu_cases import needs_cpu
from family_cases import FOLDER, check, golden
from sgraf_cases import under
from training_cases import SMALL, run_tiny

import itm_fast
from itm_fast.models import NAAF, checkpoint, scorer
from itm_fast.models.naaf import xattn_score
from itm_fast.nn import CrossAttentionScore
from itm_fast.testing import inputs, op_checks
from itm_fast.training import options

MODELS = ("bfan", "chan", "gsmn", "laps", "naaf")
FILES = sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem.startswith(MODELS))
BACKENDS = [*op_checks.backends("cross_attention_score"), "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", FILES)
def test_published_vectors(file, backend):
    want = golden(file)
    (_, R, D), options = want["image"].shape, under(want, "option/")
    module = scorer(file if file == "laps_slim" else file.partition("_")[0], dim=D, regions=R, **options).double()
    after = {name: want.pop(f"after/{name}") for name in under(want, "after/")}  # thresholds, which are no buffers
    more = {"bbox": want["bbox"]} if "bbox" in want else {}
    check(want, module, backend, region_lengths=want.get("image_lengths"), **more)
    for name, value in after.items():
        assert getattr(module, name) == pytest.approx(value.item(), abs=1e-10), name


def test_a_sparse_gsmn_scores_as_a_dense_one():
    want = golden("gsmn_dense")
    check(want, scorer("gsmn", is_sparse=True).double(), "torch", bbox=want["bbox"])


def test_naaf_s_function_moves_the_thresholds_of_opt_as_published():
    want = golden("naaf_train_online")
    given = {name.removeprefix("option/"): value for name, value in want.items() if name.startswith("option/")}
    opt = argparse.Namespace(**given)
    score = xattn_score(want["image"], want["caption"], want["lengths"].tolist(), opt)
    torch.testing.assert_close(score, want["score"], rtol=0, atol=1e-10)
    for name in ("thres", "thres_safe", "mean_pos", "mean_neg", "stnd_pos", "stnd_neg"):
        assert getattr(opt, name) == pytest.approx(want[f"after/{name}"].item(), abs=1e-10), name


def test_a_caption_keeps_the_published_patches():
    want = golden("laps_slim")
    module = scorer("laps_slim", dim=64, **under(want, "option/")).double()
    module.load_state_dict(under(want, "param/"))
    with torch.no_grad():
        for t, length in enumerate(want["lengths"].tolist()):
            for i, image in enumerate(want["image"]):
                found = module.attention(image, want["caption"][t, :length])
                assert torch.equal(found.weights["kept"], want["mask"][t, i])
                assert found.score == pytest.approx(want["score"][i, t].item(), abs=1e-10)


def test_boxes_of_padding_are_not_read():
    torch.manual_seed(0)
    module = scorer("gsmn", num_block=4).double()
    boxes = torch.rand(2, 5, 4, dtype=torch.float64).view(2, 5, 2, 2).sort(2)[0].flatten(2)
    image, words, cu_seqlens = inputs(2, (4, 1, 2), 5, 8, dtype=torch.float64)
    with torch.no_grad():
        alone = module(image[:1, :3], words, cu_seqlens, bbox=boxes[:1, :3])
        image[0, 3:], boxes[0, 3:] = float("nan"), float("nan")
        found = module(image, words, cu_seqlens, torch.tensor([3, 5]), bbox=boxes)
        torch.testing.assert_close(found[:1], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1:], module(image[1:], words, cu_seqlens, bbox=boxes[1:]), rtol=0, atol=1e-12)
        shown = module.attention(image[1], words[:4], boxes[1])
        assert shown.score == pytest.approx(found[1, 0].item(), abs=1e-12)
        first = cu_seqlens[:3]
        pairs = module.matched(image, words[: first[-1]], first, torch.tensor([3, 5]), boxes=boxes)
        torch.testing.assert_close(pairs, found[:, :2].diagonal(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="takes no boxes, got"):
        scorer("bfan", dim=8).matched(image, words[: first[-1]], first, boxes=boxes)
    with pytest.raises(ValueError, match=r"bbox must be \[2, 5, 4\], .*, got none; pass bbox= "):
        module(image, words, cu_seqlens)
    with pytest.raises(ValueError, match="a multiple of num_block = 4"):
        module(image[..., :6], words[:, :6], cu_seqlens, bbox=boxes)


def test_patches_that_do_not_fit_are_refused():
    module = scorer("laps_slim", dim=8, num_patches=16)
    image, words, cu_seqlens = inputs(2, (4, 1), 17, 8)
    with pytest.raises(ValueError, match=r"16 patches and a class token, so \[I, 17, D\], got \[2, 16, 8\]"):
        module(image[:, 1:], words, cu_seqlens)
    with pytest.raises(ValueError, match="region_lengths must be None"):
        module(image, words, cu_seqlens, torch.tensor([17, 4]))
    with pytest.raises(ValueError, match="16 would be kept and 6 tokens be made of them, for embed_size = 8"):
        scorer("laps_slim", dim=8, num_patches=16, sparse_ratio=1.0)


def test_thresholds_follow_a_batch_of_matching_pairs_alone():
    image, words, cu_seqlens = inputs(3, (4, 2), 5, 8)
    module = scorer("naaf", dim=8)
    with pytest.raises(ValueError, match=r"caption t must belong to image t, .* 3 images and 2 captions"):
        module(image, words, cu_seqlens)
    assert module.eval()(image, words, cu_seqlens).shape == (3, 2)
    module.train()(image[:2], words, cu_seqlens)
    assert (module.thres, module.thres_safe) == (0.0, 0.0)  # fewer than 200 words


@needs_cpu
@pytest.mark.parametrize("mode", ["test", "train"])
def test_naaf_s_terms_in_one_pass_are_its_three_scores(mode):
    module = scorer("naaf", mode=mode, thres=0.1, thres_safe=0.1)
    image, words, cu_seqlens = inputs(3, (13, 250, 1, 7), 9, 64)
    given = torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(words, dim=-1), cu_seqlens
    for counts in (None, torch.tensor([9, 2, 5])):
        with itm_fast.use_backend("cpu"):
            found = module(*given, counts)
            parts = [CrossAttentionScore(**term)(*given, counts) for term in module._terms()]
        assert torch.equal(found, parts[0] + parts[1] + parts[2])
    with itm_fast.use_backend("cpu"), pytest.raises(ValueError, match=r"cap_emb must be \[N, D\] with D = 64"):
        module(image, words[:, :5].contiguous(), cu_seqlens)


def test_a_checkpoint_has_the_thresholds_that_training_found(tmp_path, monkeypatch):
    def learned(model):
        return {"thres": model.scorer.thres + 0.25, "thres_safe": model.scorer.thres_safe + 0.125}

    monkeypatch.setattr(NAAF, "learned_options", learned)
    run_tiny(tmp_path / "run", opt=options("naaf", **{**SMALL, "batch_size": 4, "num_epochs": 1}), max_steps=1)
    found = checkpoint.load(tmp_path / "run" / "checkpoint.pth.tar").opt
    assert (found.thres, found.thres_safe) == (0.25, 0.125)


def test_a_resumed_run_has_the_thresholds_that_training_found(tmp_path, monkeypatch):
    chosen = options("naaf", **{**SMALL, "batch_size": 4, "num_epochs": 1})
    restored = []
    with monkeypatch.context() as patch:
        patch.setattr(NAAF, "learned_options", lambda model: {"thres": 0.25, "thres_safe": 0.125})
        run_tiny(tmp_path / "run", opt=chosen, max_steps=1)
    restore = NAAF.restore_learned

    def seen(model, found):
        restore(model, found)
        restored.append((model.scorer.thres, model.scorer.thres_safe))

    monkeypatch.setattr(NAAF, "restore_learned", seen)
    run_tiny(tmp_path / "run", opt=chosen, resuming=True)
    assert restored == [(0.25, 0.125)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_counts_as_zero_in_the_maxima_of_teran_s_training(backend):
    """As in its batches [B, B, R, W], in which the affinities of padding are set to 0."""
    generator = torch.Generator().manual_seed(4)
    image, caption = (torch.randn(3, n, 8, generator=generator, dtype=torch.float64) - 1 for n in (4, 6))
    lengths, counts = [6, 2, 1], torch.tensor([4, 1, 3])
    caption = -caption  # so that most affinities are negative
    real = torch.arange(4)[None, :] < counts[:, None]
    affinity = torch.einsum("ird,twd->itrw", image, caption)
    mask = real[:, None, :, None] & (torch.arange(6) < torch.tensor(lengths)[:, None])[None, :, None, :]
    affinity = affinity.masked_fill(~mask, 0.0)
    want = {"MrSw": affinity.amax(2).sum(2), "MwSr": affinity.amax(3).sum(2)}
    want["symm"] = want["MrSw"] + want["MwSr"]
    for aggregation, total in want.items():
        module = scorer("teran", aggregation=aggregation)
        with itm_fast.use_backend(backend):
            torch.testing.assert_close(module(image, caption, lengths, counts), total, rtol=0, atol=1e-12)
            alone = module.eval()(image[1:2, :1], caption[1:2, :2], [2])
            torch.testing.assert_close(module(image, caption, lengths, counts)[1:2, 1:2], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("file", ["rcar_t2i_rcar2", "rcar_i2t_rcr3", "rcar_i2t_rar2", "cmcan_eval", "cmcan_train"])
def test_a_scorer_takes_the_options_of_the_published_vectors(file):
    want = golden(file)
    options, sim_dim = under(want, "option/"), 32
    module = scorer(file.partition("_")[0], dim=want["image"].shape[2], sim_dim=sim_dim, regions=36, **options)
    assert {name: x.shape for name, x in module.state_dict().items()} == {
        name: x.shape for name, x in under(want, "param/").items()
    }
    assert module.training == (file != "cmcan_eval")
    for name, value in options.items():
        assert getattr(module, name, value) == value


def test_a_scorer_is_asked_for_by_name_and_options():
    assert scorer("sgr", dim=8, sim_dim=4, regions=5, sgr_step=2).training
    assert scorer("scan", dim=8, direction="i2t").options["direction"] == "i2t"
    assert scorer("scan", dim=8, cross_attn="i2t").options["direction"] == "i2t"
    for wrong, sentence in (
        ({"name": "vse"}, "name must be one of sgr, .*, aladin, got 'vse'"),
        ({"name": "bfan", "focal": "prob"}, "bfan has no option focal; it has focal_type, lambda_softmax"),
        ({"name": "bfan", "focal_type": "both"}, "focal_type must be one of equal, prob, got 'both'"),
        ({"name": "bfan", "lambda_softmax": 0.0}, "lambda_softmax must be more than 0, got 0.0"),
        ({"name": "bfan", "direction": "t2i"}, "direction is not an option of bfan, got 't2i'"),
        ({"name": "laps", "direction": "t2i", "scale": 2.0}, "laps has no option scale, direction; it has i2t, scan"),
        ({"name": "teran", "aggregation": "sum"}, "aggregation must be one of MrSw, MwSr, symm, MrAVGw, got 'sum'"),
        ({"name": "laps_slim", "embed_size": 8}, "laps_slim has no option embed_size; it has num_patches, "),
        ({"name": "laps_slim", "dim": 0}, "^dim must be at least 1, got 0"),
        ({"name": "gsmn", "num_block": 0}, "num_block must be at least 1, got 0"),
        ({"name": "cmcan", "smooth": 4.0}, "smooth must be 9, as in the published code, got 4.0"),
        ({"name": "cmcan", "mode": "test"}, "mode must be eval or train, got 'test'"),
        ({"name": "rcar", "step": 0}, "rcar_step must be at least 1, got 0"),
        ({"name": "maxsim", "dim": "a"}, "^dim must be a whole number, got 'a'"),
        ({"name": "sgr", "regions": 0}, "^regions must be at least 1, got 0"),
        ({"name": "rcar", "attn_type": "x2y"}, "scorer: attn_type must be one of t2i, i2t, got 'x2y'"),
        ({"name": "scan", "direction": "both"}, "direction must be one of t2i, i2t, got 'both'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            scorer(**wrong)
