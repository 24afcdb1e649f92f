"""A small repository like the published ones, for the tests of `itm_fast.patch`."""

from __future__ import annotations

import sys

import torch

import itm_fast

MODEL = """
import torch
from torch import nn
from itm_fast.models import sgraf
from itm_fast.testing import scan, sgraf as slow

NORMS = {"no_norm": "none"}
POOLS = {"LogSumExp": "lse", "Max": "max", "Sum": "sum", "Mean": "mean"}

class EncoderSimilarity(nn.Module):
    def __init__(self, embed_size, sim_dim, module_name="AVE", sgr_step=3):
        super().__init__()
        self.module_name = module_name
        for name, part in sgraf.EncoderSimilarity(embed_size, sim_dim, module_name, sgr_step).named_children():
            self.add_module(name, part)

    def forward(self, img_emb, cap_emb, cap_lens):
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return slow.loop(state, img_emb, cap_emb, cap_lens, training=self.training)

    def own_method(self):
        return self.module_name

def scores(direction, images, captions, cap_lens, opt):
    return scan.loop(
        images, captions, cap_lens, direction=direction,
        affinity_norm=NORMS.get(opt.raw_feature_norm, opt.raw_feature_norm),
        scale=opt.lambda_softmax, pool=POOLS[opt.agg_func], pool_scale=opt.lambda_lse,
    )

def xattn_score_t2i(images, captions, cap_lens, opt):
    return scores("t2i", images, captions, cap_lens, opt)

def xattn_score_i2t(images, captions, cap_lens, opt):
    if opt.raw_feature_norm.endswith("l1norm"):
        raise NameError("name 'l1norm_d' is not defined")
    return scores("i2t", images, captions, cap_lens, opt)

def func_attention(query, context, opt, smooth, eps=1e-8):
    pass

class ContrastiveLoss(nn.Module):
    def __init__(self, margin=0, max_violation=False):
        super().__init__()
        self.margin, self.max_violation = margin, max_violation

    def forward(self, scores):
        right = scores.diagonal()
        cost = torch.stack([self.margin + scores - right[:, None], self.margin + scores - right])
        cost = cost.clamp(min=0).masked_fill(torch.eye(len(scores)).cuda() > 0.5, 0)
        return cost[0].amax(1).sum() + cost[1].amax(0).sum() if self.max_violation else cost.sum()
"""
EVALUATION = """
import numpy as np
import torch
import model
from model import xattn_score_t2i
from test_published_evaluators import published

def shard_xattn_t2i(images, captions, caplens, opt, shard_size=128):
    print("shard")
    score = xattn_score_t2i(torch.from_numpy(images).cuda(), torch.from_numpy(captions).cuda(), caplens, opt)
    return score.numpy()

def shard_attn_scores(model, img_embs, cap_embs, cap_lens, opt, shard_size=100):
    pass

def i2t(images, captions, caplens, sims, npts=None, return_ranks=False):
    found = published(sims, "i2t")
    return found if return_ranks else found[0]

def t2i(npts, sims, per_captions=1, return_ranks=False):
    found = published(sims, "t2i")
    return (found[0], (*found[1], "order")) if return_ranks else found[0]
"""
NAMES = ("model", "evaluation")


def written(tmp_path, monkeypatch):
    """For a fixture: writes the two files with changes, (old, new) for each; `patch` imports them."""

    def write(*changes, evaluation=EVALUATION, model=MODEL):
        text = model
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "model.py").write_text(text)
        (tmp_path / "evaluation.py").write_text(evaluation)
        return tmp_path

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    itm_fast.unpatch()
    for name in NAMES:
        sys.modules.pop(name, None)


def outcome(report, name):
    [row] = [row for row in report if row.name == name]
    return row


def embeddings():
    generator = torch.Generator().manual_seed(0)
    unit = [
        torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=2)
        for shape in ((3, 36, 16), (4, 6, 16))
    ]
    return *unit, [6, 4, 3, 2]
