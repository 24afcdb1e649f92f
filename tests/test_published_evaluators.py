"""What the drop-in modules have of the published evaluators: recalls, encoding, shards, meters."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from sgraf_cases import LENGTHS, D, R, features, options
from test_evaluation_report import options as pet_options
from test_evaluation_report import pets

from itm_fast.data import save_splits
from itm_fast.evaluation import evaluate, ranking
from itm_fast.evaluation.counting import count
from itm_fast.models import _evaluator, build, scan, sgraf
from itm_fast.training import checkpoint

OF_SCAN = dict(
    cross_attn="t2i", raw_feature_norm="clipped_l2norm", agg_func="Mean", lambda_softmax=9.0, lambda_lse=6.0,
    precomp_enc_type="basic",
)  # fmt: skip


def published(sims, side):
    """`i2t` and `t2i` of the published evaluators, with a stable sort."""
    table = sims if side == "i2t" else sims.T
    ranks, top = np.zeros(len(table)), np.zeros(len(table))
    for index, row in enumerate(table):
        order = np.argsort(row, kind="stable")[::-1]
        right = range(5 * index, 5 * index + 5) if side == "i2t" else [index // 5]
        ranks[index] = min(np.where(order == item)[0][0] for item in right)
        top[index] = order[0]
    recalls = [100.0 * len(np.where(ranks < k)[0]) / len(ranks) for k in (1, 5, 10)]
    return (*recalls, np.floor(np.median(ranks)) + 1, ranks.mean() + 1), (ranks, top)


@pytest.mark.parametrize("side", ["i2t", "t2i"])
@pytest.mark.parametrize("module", [scan, sgraf], ids=["scan", "sgraf"])
def test_published_evaluators_with_ties(module, side):
    sims = np.random.default_rng(0).integers(0, 4, (13, 65)).astype(np.float64)
    sims[np.arange(65) // 5, np.arange(65)] += np.random.default_rng(1).integers(0, 2, 65)
    summary, (ranks, top) = published(sims, side)
    images = np.zeros((13, 2, 3))
    found = getattr(module, side)(images, None, None, sims, return_ranks=True)
    assert found[0] == pytest.approx(summary, rel=1e-12)
    for mine, theirs in zip(found[1], (ranks, top), strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_array_equal(mine, theirs)
    assert getattr(module, side)(images, None, None, sims) == found[0]


def test_published_evaluators_refuse_what_would_give_a_wrong_number():
    for shape in ((10, 2), (2, 8), (3, 10)):
        with pytest.raises(ValueError, match=r"sims must be \[N, 5 N\] = \[2, 10\] for 2 images, got "):
            scan.i2t(np.zeros((2, 1, 1)), None, None, np.zeros(shape))
    sims = np.zeros((2, 10))
    sims[1, 3] = np.nan
    with pytest.raises(ValueError, match="image 1 and caption 3 is NaN"):
        scan.t2i(np.zeros((2, 1, 1)), None, None, sims)


@pytest.mark.parametrize("side", ["i2t", "t2i"])
def test_scores_are_counted_once(monkeypatch, side):
    counted = []
    monkeypatch.setattr(ranking, "count", lambda *given: counted.append(given) or count(*given))
    getattr(sgraf, side)(np.zeros((4, 2, 3)), None, None, np.eye(20)[:4], return_ranks=True)
    assert len(counted) == 1


class Loader(list):
    """Batches, and the number of rows where a data loader has it."""

    def __init__(self, batches, rows):
        super().__init__(batches)
        self.dataset = range(rows)


def encoder(module):
    torch.manual_seed(0)
    model = module.SGRAF(options()) if module is sgraf else module.SCAN(Namespace(**vars(options()), **OF_SCAN))
    ids, lengths = torch.randint(1, 30, (5, 6)), [3, 6, 1, 4, 4]
    features = torch.randn(5, R, 12)
    rows = [torch.tensor([4, 0]), torch.tensor([2, 1, 3])]  # a shuffled loader
    batches = [(features[at], ids[at], [lengths[n] for n in at.tolist()], at.tolist()) for at in rows]
    return model, batches, lengths


@pytest.mark.parametrize("module", [scan, sgraf], ids=["scan", "sgraf"])
def test_encode_data_collects_what_the_model_embeds(module):
    model, batches, lengths = encoder(module)
    lines = []
    images, captions, found = module.encode_data(model, Loader(batches, 5), log_step=2, logging=lines.append)
    assert found == lengths
    assert images.shape == (5, R, D)
    assert captions.shape == (5, 6, D)
    assert images.dtype == captions.dtype == np.float32
    assert len(lines) == 1
    assert lines[0].startswith("Test: [0/2]")
    with torch.no_grad():
        for features, ids, counts, rows in batches:
            image, caption, _ = model.forward_emb(features, ids, counts)
            np.testing.assert_array_equal(images[rows], image.numpy())
            for row, n, one in zip(rows, counts, caption.numpy(), strict=True):
                np.testing.assert_array_equal(captions[row, :n], one[:n])
                assert not captions[row, n:].any()
    with pytest.raises(ValueError, match=r"left out 3 of 5 rows, the first one 1"):
        module.encode_data(model, Loader(batches[:1], 5), logging=lines.append)
    with pytest.raises(ValueError, match=r"left out 5 of 5 rows, the first one 0"):
        module.encode_data(model, Loader([], 5))


def test_shards_take_tensors_and_lengths_as_the_originals_do():
    image, caption = (x.float() for x in features())
    opt = Namespace(**OF_SCAN)
    want = scan.shard_xattn_t2i(image.numpy(), caption.numpy(), LENGTHS, opt)
    for score in scan.shard_xattn_t2i, scan.xattn_score_t2i:
        np.testing.assert_array_equal(np.asarray(score(image, caption, torch.tensor(LENGTHS).float(), opt)), want)
    longest = caption.shape[1]
    whole = scan.xattn_score_i2t(image, caption, [longest] * 7, opt)
    assert scan.xattn_score_i2t(image, caption, [longest + 9, longest] + [longest + 1] * 5, opt).equal(whole)
    model = sgraf.SGRAF(options(module_name="SAF"))
    model.val_start()
    want = sgraf.shard_attn_scores(model, image.numpy(), caption.numpy(), LENGTHS, None)
    np.testing.assert_array_equal(sgraf.shard_attn_scores(model, image, caption, np.float64(LENGTHS), None), want)
    with pytest.raises(ValueError, match=r"^xattn_score_t2i: cap_lens must be whole numbers, got 2\.5"):
        scan.xattn_score_t2i(image, caption, [2.5] * 7, opt)
    for wrong in ["2"] * 7, None:
        with pytest.raises(TypeError, match=r"^xattn_score_t2i: cap_lens must be integers"):
            scan.xattn_score_t2i(image, caption, wrong, opt)


def test_parts_that_the_published_modules_export():
    query, context = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64)
    affinity = torch.nn.functional.leaky_relu(context @ query.transpose(1, 2), 0.1)
    weights = (9 * sgraf.l2norm(affinity, 2)).softmax(1)
    attended = weights.transpose(1, 2) @ context
    torch.testing.assert_close(sgraf.SCAN_attention(query, context, 9.0), sgraf.l2norm(attended))
    want = torch.nn.functional.cosine_similarity(query, attended, dim=-1)
    torch.testing.assert_close(sgraf.cosine_sim(query, attended), want)
    torch.testing.assert_close(scan.cosine_similarity(query[:1], attended[:1], dim=2), want[0])
    log, written = scan.LogCollector(), []
    for value, n in (0.5, 1), (1.0, 3):
        log.update("Loss", value, n)
    log.update("lr", 2e-4)
    assert str(log) == "Loss 1.0000 (0.8750)  lr 0.0002"
    log.tb_log(Namespace(log_value=lambda *args, **more: written.append((*args, more["step"]))), "train/", 7)
    assert written == [("train/Loss", 1.0, 7), ("train/lr", 2e-4, 7)]


def test_evalrank_prints_what_evaluate_finds(tmp_path, capsys, monkeypatch):
    split, vocabulary = pets()
    save_splits(tmp_path / "pets", {"test": split})
    vocabulary.save(tmp_path / "vocab.json")
    opt = pet_options("SGR", len(vocabulary))
    opt.data_path, opt.data_name = str(tmp_path / "elsewhere"), "pets"
    model = build(opt)
    best = tmp_path / "model_best.pth.tar"
    checkpoint.save(best, epoch=3, model=model.state_dict(), best_rsum=1.0, opt=opt, iterations=7)
    found = sgraf.evalrank(best, tmp_path, "test")
    want = evaluate(model, split, vocabulary, ties="published", progress=False).systems[0].pools[0].metrics
    assert found["rsum"] == pytest.approx(want.rsum)
    assert found["t2i_r5"] == pytest.approx(want.t2i.r5)
    assert f"rsum: {want.rsum:.1f}\n" in capsys.readouterr().out
    monkeypatch.setattr(_evaluator, "FOLDS", 2)
    parts = evaluate(model, split, vocabulary, folds=2, ties="published", progress=False).systems[0].pools[0].metrics
    assert scan.evalrank(tmp_path, tmp_path, "test", fold5=True)["rsum"] == pytest.approx(parts.rsum)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ValueError, match="no vocabulary file was found"):
        sgraf.evalrank(best, tmp_path, "test")
