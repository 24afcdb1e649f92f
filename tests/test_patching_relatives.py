"""`itm_fast.patch` on code like RCAR's, BFAN's and NAAF's."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest
import torch
from patching_cases import embeddings, outcome, written

import itm_fast
from itm_fast.models import naaf
from itm_fast.models.rcar import RegulatedMatching
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
    opt.using_intra_info = True
    return naaf.loop(None, images, captions, cap_lens, threshold=opt.thres_safe, lambda_softmax=opt.lambda_softmax)

class ContrastiveLoss(nn.Module):
    def __init__(self, opt, margin=0, max_violation=False):
        super().__init__()
        self.opt, self.margin, self.max_violation = opt, margin, max_violation

    def forward(self, im, s, s_l):
        scores = xattn_score(im, s, s_l, self.opt)
        right = scores.diagonal()
        cost = torch.stack([self.margin + scores - right[:, None], self.margin + scores - right])
        cost = cost.clamp(min=0).masked_fill(torch.eye(len(scores)) > 0.5, 0)
        return cost[0].amax(1).sum() + cost[1].amax(0).sum() if self.max_violation else cost.sum()
"""


OPTIONS = Namespace(
    attn_type="t2i", self_regulator="coop_rcar", rcar_step=2, rar_step=2, rcr_step=2, t2i_smooth=10.0, i2t_smooth=3.0
)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    yield from written(tmp_path, monkeypatch)


def test_rcar_bfan_and_naaf_are_known(repository, monkeypatch):
    report = itm_fast.patch(repository(model=RELATIVES, evaluation=""))
    modes = [
        f"EncoderSimilarity ({way} {how})" for way in ("t2i", "i2t") for how in ("coop_rcar", "only_rar", "only_rcr")
    ]
    for name in ("xattn_score", "xattn_score_test", "ContrastiveLoss", *modes):
        assert outcome(report, name).outcome == "replaced", report
    model = sys.modules["model"]
    scorer = model.EncoderSimilarity(OPTIONS, 16, 8).eval()
    opt = Namespace(focal_type="prob", lambda_softmax=20.0, thres_safe=0.1)

    def found():
        first = scorer(*embeddings())
        scorer.opt.t2i_smooth = 4.0  # read at every call
        second = scorer(*embeddings())
        scorer.opt.t2i_smooth = 10.0
        return [first, second, model.xattn_score(*embeddings(), opt), model.xattn_score_test(*embeddings(), opt)]

    calls, count = [], RegulatedMatching.score
    monkeypatch.setattr(RegulatedMatching, "score", lambda *args: calls.append(1) or count(*args))
    with torch.no_grad():
        fast = found()
        assert len(calls) == 2
        itm_fast.unpatch()
        for new, old in zip(fast[:3], found()[:3], strict=True):
            torch.testing.assert_close(new, old)
        torch.testing.assert_close(fast[3], found()[3].double())  # as the published function, in float64


def test_training_of_rcar_is_the_same_with_and_without(repository, monkeypatch):
    """Four steps with dropout, whose rate is then changed: the module's own code runs."""
    report = itm_fast.patch(repository(model=RELATIVES, evaluation=""))
    model, calls, count = sys.modules["model"], [], RegulatedMatching.score
    monkeypatch.setattr(RegulatedMatching, "score", lambda *args: calls.append(1) or count(*args))
    assert outcome(report, "EncoderSimilarity (t2i coop_rcar)").outcome == "replaced"

    def steps():
        torch.manual_seed(0)
        scorer = model.EncoderSimilarity(OPTIONS, 16, 8).double().train()
        optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-2)
        image, caption, lengths = embeddings()
        found = []
        for step in range(4):
            if step == 3:
                for part in scorer.modules():
                    if isinstance(part, torch.nn.Dropout):
                        part.p = 0.1
            optimizer.zero_grad()
            loss = scorer(image.double(), caption.double(), lengths).square().sum()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    fast = steps()
    assert len(calls) == 3
    itm_fast.unpatch()
    slow = steps()
    assert fast[:3] == pytest.approx(slow[:3], rel=1e-10)


def test_calls_that_the_proof_did_not_cover_stay_with_the_repository(repository):
    changes = (
        (
            "def xattn_score(images, captions, cap_lens, opt):",
            "def xattn_score(images, captions, cap_lens, opt, half=0):",
        ),
        ("    return bfan.loop(", "    return 'half' if half else bfan.loop("),
    )
    itm_fast.patch(repository(*changes, model=RELATIVES, evaluation=""))
    model, opt = sys.modules["model"], Namespace(focal_type="prob", lambda_softmax=20.0)
    assert model.xattn_score(*embeddings(), opt, True) == "half"
    assert model.xattn_score(*embeddings(), opt, half=0).shape == (3, 4)

    class Own(model.ContrastiveLoss):
        def forward(self, *args):
            return super().forward(*args) + 1

    image, caption, lengths = embeddings()
    given = {"s_l": lengths[:3], "im": image, "s": caption[:3]}
    value = model.ContrastiveLoss(opt, margin=0.2)(**given)
    assert Own(opt, margin=0.2)(image, caption[:3], lengths[:3]) == pytest.approx(value.item() + 1, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (("self.opt, self.margin, ", "self.opt, self.gap, "), "ContrastiveLoss", "its own code fails here"),
        (
            ("(self, opt, embed_dim,", "(self, opt, size, embed_dim,"),
            "EncoderSimilarity (i2t only_rcr)",
            "its constructor takes (opt, size, embed_dim",
        ),
        (("s_l, self.opt)", "s_l, self.__dict__.pop('opt'))"), "ContrastiveLoss", "the replacement cannot take it"),
    ],
)
def test_what_cannot_be_tried_is_refused(repository, change, name, reason):
    row = outcome(itm_fast.patch(repository(change, model=RELATIVES, evaluation="")), name)
    assert row.outcome == "refused"
    assert row.detail.startswith(reason)


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


def test_a_function_that_moves_thresholds_otherwise_is_refused():
    """On the problem by which `patch` proves NAAF's function, thresholds leave both 0 and where they were."""
    seen = []

    def moves_otherwise(images, captions, cap_lens, opt):
        score = naaf.xattn_score(images, captions, cap_lens, opt)
        seen.append((opt.thres, opt.thres_safe))
        opt.thres_safe += 0.01
        return score

    with pytest.raises(Disagrees, match=r"differ by 1\.0e-02"):
        _functions.replacement("xattn_score", moves_otherwise)
    assert all(0.01 < value < 1 and value not in (0.1, 0.15) for value in seen[0])
