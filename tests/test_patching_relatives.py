"""`itm_fast.patch` on code like RCAR's, BFAN's and NAAF's."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest
import torch
from patching_cases import embeddings, outcome, written

import itm_fast
from itm_fast.patching import _functions
from itm_fast.patching._proof import Disagrees

RELATIVES = """
from argparse import Namespace
import torch
from torch import nn
from itm_fast.models import rcar
from itm_fast.testing import bfan, naaf, rcar as slow

class EncoderSimilarity(nn.Module):
    def __init__(self, opt, embed_dim, sim_dim):
        super().__init__()
        self.opt, self.embed_dim, self.sim_dim = opt, embed_dim, sim_dim
        ours = rcar.RCAR.similarity(Namespace(**vars(opt), embed_size=embed_dim, sim_dim=sim_dim))
        for name, part in ours.named_children():
            self.add_module(name, part)

    def forward(self, img_emb, cap_emb, cap_lens):
        o = self.opt
        step = {"coop_rcar": o.rcar_step, "only_rar": o.rar_step, "only_rcr": o.rcr_step}[o.self_regulator]
        return slow.loop(
            dict(self.named_parameters()), img_emb, cap_emb, cap_lens, attn_type=o.attn_type, training=self.training,
            self_regulator=o.self_regulator, step=step, smooth=getattr(o, o.attn_type + "_smooth"),
        )

def xattn_score(images, captions, cap_lens, opt):
    return bfan.loop(None, images, captions, cap_lens, lambda_softmax=opt.lambda_softmax, focal_type=opt.focal_type)

def xattn_score_test(images, captions, cap_lens, opt):
    return naaf.loop(None, images, captions, cap_lens, threshold=opt.thres_safe, lambda_softmax=opt.lambda_softmax)

class ContrastiveLoss(nn.Module):
    def __init__(self, opt, margin=0, max_violation=False):
        super().__init__()
        self.opt, self.margin, self.max_violation = opt, margin, max_violation

    def forward(self, im, s, s_l):
        scores = xattn_score(im, s, s_l, self.opt)
        right = scores.diagonal()
        cost = torch.stack([self.margin + scores - right[:, None], self.margin + scores - right])
        cost = cost.clamp(min=0).masked_fill(torch.eye(len(scores)).cuda() > 0.5, 0)
        return cost[0].amax(1).sum() + cost[1].amax(0).sum() if self.max_violation else cost.sum()
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    yield from written(tmp_path, monkeypatch)


def test_rcar_bfan_and_naaf_are_known(repository):
    report = itm_fast.patch(repository(model=RELATIVES, evaluation=""))
    modes = [
        f"EncoderSimilarity ({way} {how})" for way in ("t2i", "i2t") for how in ("coop_rcar", "only_rar", "only_rcr")
    ]
    for name in ("xattn_score", "xattn_score_test", "ContrastiveLoss", *modes):
        assert outcome(report, name).outcome == "replaced", report
    model = sys.modules["model"]
    options = {"rcar_step": 2, "rar_step": 2, "rcr_step": 2, "t2i_smooth": 10.0, "i2t_smooth": 3.0}
    scorer = model.EncoderSimilarity(Namespace(**options, attn_type="t2i", self_regulator="coop_rcar"), 16, 8).eval()
    opt = Namespace(focal_type="prob", lambda_softmax=20.0, thres_safe=0.1)

    def found():
        first = scorer(*embeddings())
        scorer.opt.t2i_smooth = 4.0  # read at every call
        second = scorer(*embeddings())
        scorer.opt.t2i_smooth = 10.0
        return [first, second, model.xattn_score(*embeddings(), opt), model.xattn_score_test(*embeddings(), opt)]

    with torch.no_grad():
        fast = found()
        assert scorer.forward.__func__.__module__ == "itm_fast.patching._scorers"
        itm_fast.unpatch()
        for new, old in zip(fast, found(), strict=True):
            torch.testing.assert_close(new, old, check_dtype=False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("o.attn_type + ", "'i2t' + "), "EncoderSimilarity (t2i coop_rcar)"),
        (("focal_type=opt.focal_type", "focal_type='equal'"), "xattn_score"),
        (("threshold=opt.thres_safe", "threshold=0.0"), "xattn_score_test"),
    ],
)
def test_relatives_that_differ_are_refused(repository, change, name):
    row = outcome(itm_fast.patch(repository(change, model=RELATIVES, evaluation="")), name)
    assert (row.outcome, row.detail[:21]) == ("refused", "the results differ by")


def test_the_thresholds_of_training_move_as_published():
    """On the problem by which `patch` proves NAAF's function, thresholds leave both 0 and where they were."""
    [_, known] = _functions.FUNCTIONS["xattn_score"]
    seen = []

    def published_code(images, captions, cap_lens, opt):
        score = known.ours(images, captions, cap_lens, opt)
        seen.append((opt.thres, opt.thres_safe))
        return score

    assert _functions.replacement("xattn_score", published_code)[0] is known.ours
    assert all(0.01 < value < 1 and value not in (0.1, 0.15) for value in seen[0])

    def moves_otherwise(images, captions, cap_lens, opt):
        score = known.ours(images, captions, cap_lens, opt)
        opt.thres_safe += 0.01
        return score

    with pytest.raises(Disagrees, match=r"differ by 1\.0e-02"):
        _functions.replacement("xattn_score", moves_otherwise)
