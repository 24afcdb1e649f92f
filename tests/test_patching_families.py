"""`itm_fast.patch` on code like that of IMRAM, CHAN, CMCAN and GSMN."""

from __future__ import annotations

import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from patching_cases import EVALUATION, embeddings, outcome, written
from test_published_evaluators import published

import itm_fast
from itm_fast.models.chan import SimsEncoder
from itm_fast.models.cmcan import ConfidenceMatching
from itm_fast.models.gsmn import StructuredMatching
from itm_fast.models.imram import IterativeMatching

IMRAM = """
import torch
from torch import nn
from itm_fast.testing import imram

class SCAN(nn.Module):
    def __init__(self, opt):
        super().__init__()
        for name in ("linear_t2i", "gate_t2i", "linear_i2t", "gate_i2t"):
            setattr(self, name, nn.Linear(2 * opt.embed_size, opt.embed_size))

    def terms(self, mode, images, captions, lengths, opt):
        sums = [torch.zeros(len(images), len(captions))]
        for step in range(opt.iteration_step):
            sums.append(imram.loop(
                dict(self.named_parameters()), images.float(), captions.float(), lengths, model_mode=mode,
                iteration_step=step + 1, lambda_softmax=opt.lambda_softmax, no_IMRAM_norm=opt.no_IMRAM_norm,
            ))
        found = [(after - before).double() for before, after in zip(sums, sums[1:])]
        return [x.transpose(0, 1) for x in found] if self.training else found

    def xattn_score_Text_IMRAM(self, images_fc, images, caption_ht, captions_all, cap_lens, opt):
        return self.terms("text_IMRAM", images, captions_all, cap_lens, opt)

    def xattn_score_Image_IMRAM(self, images_fc, images, caption_ht, captions_all, cap_lens, opt):
        return self.terms("image_IMRAM", images, captions_all, cap_lens, opt)

def shard_xattn(model, images_fc, images, caption_ht, captions, caplens, opt, shard_size=128):
    pass
"""
CHAN = """
from torch import nn
from itm_fast.testing import chan

class VHACoding(nn.Module):
    pass

class THACoding(nn.Module):
    pass

class LSEPooling(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

class MeanPooling(nn.Module):
    def __init__(self, temperature):
        super().__init__()

class SimsEncoder(nn.Module):
    def __init__(self, coding_type, pooling_type, **args):
        super().__init__()
        self.coding, self.pooling = globals()[coding_type](), globals()[pooling_type](args["opt"].belta)

    def forward(self, img_emb, cap_emb, img_lens, cap_lens):
        return chan.loop(
            None, img_emb, cap_emb, cap_lens, img_lens, coding_type=type(self.coding).__name__,
            pooling_type=type(self.pooling).__name__, belta=getattr(self.pooling, "temperature", 0.1),
        )
"""
CMCAN = """
from itm_fast.models import cmcan
from itm_fast.testing import cmcan as slow

class GraphEmbt(cmcan.GraphEmbt):
    pass

class GraphEmbv(cmcan.GraphEmbv):
    def __init__(self, embed_dim, sim_dim):
        super().__init__(embed_dim, sim_dim, 36, 0.4)
        self.num_partial = 5

class EncoderSimilarity(cmcan.GraphReasoner):
    def __init__(self, embed_size, sim_dim, self_layers=3):
        super().__init__(sim_dim, self_layers)

    def forward(self, sim_emb_t_list, sim_emb_v_list):
        pass

class CMCAN(object):
    def forward_sim(self, img_embs, cap_embs, cap_lens, adjs, depends):
        img_embs = img_embs.to("cuda:1")
        state = {}
        for name in ("sim_embt", "sim_embv", "sim_enc"):
            part = getattr(self, name)
            found = {**dict(part.named_parameters()), **dict(part.named_buffers())}
            state.update({f"{name}.{key}": value for key, value in found.items()})
        return slow.loop(
            state, img_embs, cap_embs, cap_lens, adjs.to("cuda:1"), num_partial=self.sim_embv.num_partial,
            training=self.sim_embv.training,
        )
"""
GSMN = """
import math
import torch
from torch import nn
from itm_fast.models import gsmn
from itm_fast.testing.scan import attend, cosine

def blocks(query, context, opt):
    width = opt.embed_size // opt.num_block
    attended = attend(query, context, "clipped_l2norm", opt.lambda_softmax)
    return cosine(torch.stack(query.split(width, 2), 2), torch.stack(attended.split(width, 2), 2), -1)

class Graph(nn.Module):
    def __init__(self, feat_dim, hid_dim, out_dim, dropout, n_kernels=8):
        super().__init__()
        self.add_module(*self.kernels(feat_dim))
        self.out_1 = nn.utils.weight_norm(nn.Linear(hid_dim, hid_dim))
        self.out_2 = nn.utils.weight_norm(nn.Linear(hid_dim, out_dim))

    def read(self, x, share=None):
        layers = next(self.children()).conv_weights
        y = [layer(x if share is None else x * share[..., k, None]) for k, layer in enumerate(layers)]
        return self.out_2(self.out_1(torch.cat(y, -1)).tanh()).mean(1)

class VisualGraph(Graph):
    def kernels(self, width):
        return "graph_convolution_1", gsmn._RegionKernels(width)

    def forward(self, images, captions, bbox, cap_lens, opt):
        own, centre = self.graph_convolution_1, (bbox[..., :2] + bbox[..., 2:]) / 2
        apart = centre[:, :, None] - centre[:, None]
        rho, theta = apart.pow(2).sum(-1).sqrt(), torch.atan2(apart[..., 0], apart[..., 1])
        near = torch.exp(-0.5 * (rho[..., None] - own.mean_rho[:, 0]) ** 2 / (1e-14 + own.precision_rho[:, 0] ** 2))
        turn = (theta[..., None] - own.mean_theta[:, 0]).abs()
        turn = torch.min(turn, (2 * math.pi - turn).abs())
        near = near * torch.exp(-0.5 * turn ** 2 / (1e-14 + own.precision_theta[:, 0] ** 2))
        share = (near / near.sum(-1, keepdim=True)).sum(2).cuda()
        found = []
        for caption, length in zip(captions, cap_lens):
            words = caption[:length].repeat(len(images), 1, 1)
            found.append(self.read(blocks(images, words, opt), share))
        return torch.cat(found, 1)

class TextualGraph(Graph):
    def kernels(self, width):
        return "graph_convolution_3", gsmn._WordKernels(width)

    def forward(self, images, captions, depends, cap_lens, opt):
        found = []
        for caption, length in zip(captions, cap_lens):
            words = caption[:length].repeat(len(images), 1, 1)
            found.append(self.read(blocks(words, images, opt)))
        if opt.is_sparse:
            raise AttributeError("module 'numpy' has no attribute 'int'")
        return torch.cat(found, 1)
"""
STEPS = Namespace(iteration_step=2, lambda_softmax=9.0, no_IMRAM_norm=True, raw_feature_norm="clipped_l2norm")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    yield from written(tmp_path, monkeypatch)


def counted(monkeypatch, cls, name):
    """A list that grows by one with each call of the method."""
    calls, own = [], getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    return calls


def test_imram_is_known_step_by_step(repository, monkeypatch):
    report = itm_fast.patch(repository(model=IMRAM, evaluation=""))
    for way in ("Text", "Image"):
        for mode in ("unit queries", "no_IMRAM_norm"):
            assert outcome(report, f"SCAN.xattn_score_{way}_IMRAM ({mode})").outcome == "replaced", str(report)
    assert outcome(report, "shard_xattn").detail == "calls methods of the model"
    assert itm_fast.patch(sys.modules["model"]).outcomes("replaced") == []
    image, caption, lengths = embeddings()
    model = sys.modules["model"].SCAN(Namespace(embed_size=16))
    given = None, image.double(), None, caption.double(), lengths  # as the published evaluator's arrays
    calls = counted(monkeypatch, IterativeMatching, "steps")

    def found(training, opt):
        model.train(training)
        return [*model.xattn_score_Text_IMRAM(*given, opt), *model.xattn_score_Image_IMRAM(*given, opt)]

    other = Namespace(**{**vars(STEPS), "raw_feature_norm": "l2norm"})  # which our copy does not read
    with torch.no_grad():
        fast = found(False, STEPS), found(True, STEPS)
        assert len(calls) == 4
        slow = found(False, other)
        assert len(calls) == 4
        itm_fast.unpatch()
        assert not hasattr(type(model).xattn_score_Text_IMRAM, "_itm_fast_patched")
    torch.testing.assert_close(fast[0], slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(fast[1], [x.t() for x in slow], rtol=0, atol=1e-5)


def test_chan_is_known_with_its_region_lengths(repository, monkeypatch):
    report = itm_fast.patch(repository(model=CHAN, evaluation=""))
    assert sorted(report.outcomes("replaced")) == [
        f"SimsEncoder ({coding} {pooling})"
        for coding in ("THACoding", "VHACoding")
        for pooling in ("LSEPooling", "MeanPooling")
    ]
    assert (
        outcome(report, "SimsEncoder (VSACoding LSEPooling)").detail == "its own code fails here: KeyError: 'VSACoding'"
    )
    image, caption, lengths = embeddings()
    given = image, caption, torch.tensor([36.0, 7.0, 20.0]), torch.tensor(lengths).float()
    calls = counted(monkeypatch, SimsEncoder, "score")
    scorer = sys.modules["model"].SimsEncoder("VHACoding", "LSEPooling", opt=Namespace(belta=0.2))
    fast = scorer(*given)
    assert len(calls) == 1
    itm_fast.unpatch()
    torch.testing.assert_close(fast, scorer(*given), rtol=0, atol=1e-5)


def test_cmcan_is_known_with_its_neighbours(repository, monkeypatch):
    report = itm_fast.patch(repository(model=CMCAN, evaluation=""))
    assert outcome(report, "CMCAN.forward_sim").outcome == "replaced", str(report)
    assert outcome(report, "EncoderSimilarity").detail == "called by CMCAN.forward_sim, which is replaced"
    model = sys.modules["model"]
    made = model.CMCAN()
    made.sim_embt, made.sim_embv, made.sim_enc = (
        model.GraphEmbt(16, 8),
        model.GraphEmbv(16, 8),
        model.EncoderSimilarity(16, 8),
    )
    made.sim_embv.eval()
    near = torch.eye(36).expand(3, 36, 36).clone()
    near[:, :, 3] = 1
    calls = counted(monkeypatch, ConfidenceMatching, "score")
    with torch.no_grad():
        fast = made.forward_sim(*embeddings(), near, None)
        assert len(calls) == 1
        with pytest.raises((AssertionError, RuntimeError)):  # its own code asks for a second GPU
            made.forward_sim(*embeddings(), torch.ones_like(near), None)
        made.sim_embv.num_partial = 12
        with pytest.raises((AssertionError, RuntimeError)):
            made.forward_sim(*embeddings(), near, None)
        assert len(calls) == 1
        made.sim_embv.num_partial = 5
        own = {f"{name}.{key}": x for name in vars(made) for key, x in getattr(made, name).state_dict().items()}
        torch.testing.assert_close(fast, model.slow.loop(own, *embeddings(), near), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_gsmn_is_known_side_by_side(repository, monkeypatch):
    report = itm_fast.patch(repository(model=GSMN, evaluation=""))
    assert report.outcomes("replaced") == ["VisualGraph", "TextualGraph (dense)"], str(report)
    assert outcome(report, "TextualGraph (sparse)").detail.startswith("its own code fails here: AttributeError")
    model, (image, caption, lengths) = sys.modules["model"], embeddings()
    boxes = torch.cat([corner := torch.rand(3, 36, 2) / 2, corner + 0.5], 2)
    opt = Namespace(embed_size=16, num_block=4, lambda_softmax=20.0, is_sparse=False)
    sides = model.VisualGraph(4, 32, 1, 0.5), model.TextualGraph(4, 32, 1, 0.5)
    calls = counted(monkeypatch, StructuredMatching, "score")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)

    def found(opt):
        return [side(image, caption, third, lengths, opt) for side, third in zip(sides, (boxes, None), strict=True)]

    with torch.no_grad():
        fast = found(opt)
        assert len(calls) == 2
        pixels = sides[0](image, caption, boxes * 1.2, lengths, opt)  # outside the picture, which its own code scores
        assert len(calls) == 2
        sides[0](image, caption, boxes, lengths, Namespace(**{**vars(opt), "num_block": 4.0}))
        with pytest.raises(AttributeError):
            sides[1](image, caption, None, lengths, Namespace(**{**vars(opt), "is_sparse": True}))
        itm_fast.unpatch()
        torch.testing.assert_close(fast, found(opt), rtol=0, atol=1e-5)
        assert torch.equal(pixels, sides[0](image, caption, boxes * 1.2, lengths, opt))


def test_recalls_of_a_number_of_images_are_known(repository):
    text = EVALUATION.replace("(images, captions, caplens, sims, npts=None,", "(im_len, sims, npts=None,")
    text = text.replace("from model import xattn_score_t2i\n", "")
    report = itm_fast.patch(repository(model="", evaluation=text))
    assert outcome(report, "i2t").outcome == "replaced", str(report)
    sims = np.random.default_rng(0).random((6, 30))
    assert sys.modules["evaluation"].i2t(6, sims=sims) == pytest.approx(published(sims, "i2t")[0])


@pytest.mark.parametrize(
    ("model", "change", "name"),
    [
        (
            IMRAM,
            ("lambda_softmax=opt.lambda_softmax", "lambda_softmax=4.0"),
            "SCAN.xattn_score_Text_IMRAM (unit queries)",
        ),
        (
            IMRAM,
            ("if self.training else found", "if not self.training else found"),
            "SCAN.xattn_score_Image_IMRAM (no_IMRAM_norm)",
        ),
        (CHAN, ("cap_lens, img_lens,", "cap_lens, img_lens.mean().expand(4),"), "SimsEncoder (THACoding MeanPooling)"),
        (CMCAN, ('adjs.to("cuda:1")', "None"), "CMCAN.forward_sim"),
        (GSMN, ("* share[..., k, None]", "* share[..., 0, None]"), "VisualGraph"),
    ],
)
def test_what_differs_is_refused(repository, model, change, name):
    row = outcome(itm_fast.patch(repository(change, model=model, evaluation="")), name)
    assert (row.outcome, row.detail[:21]) == ("refused", "the results differ by")


@pytest.mark.parametrize(
    ("model", "change", "refused"),
    [
        (IMRAM, ("xattn_score_", "score_"), []),  # a class called SCAN without these methods, as SCAN's own
        (GSMN, ("captions, bbox,", "captions, boxes, bbox,"), ["VisualGraph", "TextualGraph (sparse)"]),
        (CMCAN, ("class GraphEmbt", "class Other"), ["CMCAN.forward_sim"]),
    ],
)
def test_known_names_of_other_kinds(repository, model, change, refused):
    assert itm_fast.patch(repository(change, model=model, evaluation="")).outcomes("refused") == refused
