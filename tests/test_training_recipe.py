"""The published options, schedule, loss and log, each by itself."""

from __future__ import annotations

import csv
import sys
import types

import numpy as np
import pytest
import torch

from itm_fast.data import Batch
from itm_fast.models import build
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.training import learning_rate, options
from itm_fast.training.log import COLUMNS, Log
from itm_fast.training.losses import batch_loss

SCHEDULES = [
    ("sgr", "f30k", 40, 30, 2e-4),
    ("saf", "f30k", 30, 20, 2e-4),
    ("scan", "f30k", 30, 15, 2e-4),
    ("sgr", "coco", 20, 10, 2e-4),
    ("saf", "coco", 20, 10, 2e-4),
    ("scan", "coco", 20, 10, 5e-4),
]


@pytest.mark.parametrize("model, recipe, epochs, update, rate", SCHEDULES)
def test_published_schedules(model, recipe, epochs, update, rate):
    opt = options(model, recipe=recipe)
    assert (opt.num_epochs, opt.lr_update, opt.learning_rate) == (epochs, update, rate)
    assert (opt.batch_size, opt.margin, opt.grad_clip) == (128, 0.2, 2.0)
    assert (opt.embed_size, opt.word_dim, opt.num_layers) == (1024, 300, 1)
    assert opt.max_violation is True
    assert opt.bi_gru is True
    assert opt.no_imgnorm is False
    assert opt.no_txtnorm is False
    rates = [learning_rate(opt, epoch) for epoch in range(epochs)]
    assert rates == [rate] * update + [rate * 0.1] * (epochs - update)
    assert learning_rate(opt, 2 * update) == rate * 0.1**2


@pytest.mark.parametrize(
    "direction, recipe, softmax, lse",
    [("t2i", "f30k", 9, 6), ("t2i", "coco", 9, 6), ("i2t", "f30k", 4, 5), ("i2t", "coco", 4, 20)],
)
def test_published_temperatures_of_scan(direction, recipe, softmax, lse):
    opt = options("scan", recipe=recipe, direction=direction)
    assert (opt.cross_attn, opt.lambda_softmax, opt.lambda_lse) == (direction, softmax, lse)
    assert (opt.agg_func, opt.raw_feature_norm, opt.precomp_enc_type) == ("LogSumExp", "clipped_l2norm", "basic")


def test_sgraf_options_and_changes():
    opt = options("sgr", sim_dim=64, bi_gru=None, num_epochs=3)
    assert (opt.module_name, opt.sgr_step, opt.sim_dim, opt.bi_gru, opt.num_epochs) == ("SGR", 3, 64, True, 3)
    assert options("saf").module_name == "SAF"
    assert not hasattr(opt, "cross_attn")


@pytest.mark.parametrize(
    "arguments, changes, sentence",
    [
        (("sgraf",), {}, f"model must be one of {', '.join(CATALOGUE)}, got 'sgraf'"),
        (("sgr",), {"recipe": "vg"}, "recipe must be one of f30k, coco, got 'vg'"),
        (("scan",), {"direction": "both"}, "direction must be one of t2i, i2t"),
        (("scan",), {"sim_dim": 8}, "scan has no option sim_dim; its options are agg_func"),
        (("sgr",), {"batch_size": 1}, "batch_size must be at least 2, got 1"),
        (("sgr",), {"lr_update": 0}, "lr_update must be at least 1, got 0"),
        (("sgr",), {"learning_rate": 0.0}, "learning_rate must be more than 0"),
        (("sgr",), {"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        (("sgr",), {"margin": -0.1}, "margin must be at least 0"),
    ],
)
def test_refuses(arguments, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        options(*arguments, **changes)


def _batch(region_lengths=None):
    torch.manual_seed(3)
    lengths = [5, 4, 4, 3]
    ids = torch.zeros(4, 5, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, 9, (length,))
    features = torch.randn(4, 36, 6)
    features[2] = features[0]
    return Batch(features, ids, lengths, torch.arange(4), torch.tensor([5, 1, 5, 0]), region_lengths)


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("exclude", [True, False])
def test_loss_is_the_hinge_on_the_scores(hardest, exclude):
    opt = options(
        "scan", img_dim=6, embed_size=8, word_dim=4, max_violation=hardest, exclude_same_image=exclude, margin=0.7
    )
    opt.vocab_size, opt.device = 9, "cpu"
    torch.manual_seed(0)
    model, batch = build(opt), _batch()
    model.val_start()
    image, caption, lengths = model.forward_emb(batch.features, batch.ids, batch.lengths)
    score = [
        [
            model.scorer(image[i : i + 1], caption[t, : lengths[t]], torch.tensor([0, lengths[t]])).item()
            for t in range(4)
        ]
        for i in range(4)
    ]
    score = np.array(score)
    same = batch.image_index[:, None] == batch.image_index[None] if exclude else torch.eye(4, dtype=torch.bool)
    match = np.diag(score)
    by_caption = np.where(same, 0, np.maximum(0, 0.7 + score - match[:, None]))
    by_image = np.where(same, 0, np.maximum(0, 0.7 + score - match[None]))
    wanted = by_caption.max(1).sum() + by_image.max(0).sum() if hardest else by_caption.sum() + by_image.sum()
    assert wanted > 0.5
    assert batch_loss(model, batch, opt).item() == pytest.approx(wanted, abs=1e-5)


def test_padding_regions_do_not_change_the_loss():
    opt = options("scan", img_dim=6, embed_size=8, word_dim=4)
    opt.vocab_size, opt.device = 9, "cpu"
    model = build(opt)
    batch = _batch(torch.tensor([36, 7, 36, 1], dtype=torch.int32))
    loss = batch_loss(model, batch, opt)
    batch.features[1, 7:] = 100.0
    batch.features[3, 1:] = -100.0
    assert batch_loss(model, batch, opt).item() == loss.item()


def _log(folder, steps, validate_at=(), **options):
    log = Log(folder, **options)
    for iteration in steps:
        log.add(1, iteration, {"loss": iteration / 2, "learning_rate": 2e-4, "grad_norm": 1.0})
        if iteration in validate_at:
            log.add(1, iteration, {"rsum": 100.0 + iteration})
    log.close()
    with open(folder / "log.csv", newline="") as file:
        return [(int(row["iteration"]), row["loss"], row["rsum"]) for row in csv.DictReader(file)]


def test_log_keeps_what_a_resumed_run_has_done_and_drops_the_rest(tmp_path):
    first = _log(tmp_path, range(1, 6), validate_at=(3,), iterations=0)
    assert first == [(1, "0.5", ""), (2, "1", ""), (3, "1.5", ""), (3, "", "103"), (4, "2", ""), (5, "2.5", "")]
    assert _log(tmp_path, (), iterations=4) == first[:5]
    assert _log(tmp_path, (4,), iterations=3, validated=True) == first[:5]
    assert _log(tmp_path, (), iterations=3, validated=False) == first[:3]
    assert _log(tmp_path, (1,), iterations=0) == first[:1]
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_damaged_last_line_of_the_log_is_dropped(tmp_path):
    _log(tmp_path, (1, 2), iterations=0)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("1,")
    assert [row[0] for row in _log(tmp_path, (), iterations=2)] == [1, 2]


def test_tensorboard_when_asked_for(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    log = Log(tmp_path, 3, tensorboard=True)
    log.add(1, 4, {"loss": 1.0})
    log.add(1, 4, {"rsum": 9.0})
    log.close()
    assert written == [(tmp_path / "tensorboard", 4), ("train/loss", 1.0, 4), ("dev/rsum", 9.0, 4), "closed"]


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Log(tmp_path, 0, tensorboard=True)
