"""One whole training step of a model, and where its seconds go: encoders, scores and loss, clipping and Adam.

Ours is `train_emb` of the drop-in model. The baselines take the same weights through what the papers' code does: its
encoders, its loop over captions (or the vectorised rewrite in the loop's place), its loss, `clip_grad_norm_` and Adam.
The other models' encoders are the package's in all contenders.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import itm_fast
from benchmarks import harness, rewrites, shan
from benchmarks.bench_pair_scorers import OTHERS, chunked
from benchmarks.bench_training_step import LOOP, ranking_loss
from benchmarks.shapes import Shape
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models import build
from itm_fast.models._common import Matcher
from itm_fast.testing import scan, sgraf
from itm_fast.training import options

REWRITE = "vectorised rewrite"
PARTS = ("encoders", "scores_and_loss", "clipping_and_adam")
VOCABULARY = 11353  # words of COCO's published vocabulary


class Batch(NamedTuple):
    """What a published data loader gives: features [I, R, F], word ids [T, W], T lengths from the longest down."""

    features: Tensor
    ids: Tensor
    lengths: list[int]


def batch(shape: Shape, device: str) -> Batch:
    """Random features, alike within an image, and random words."""
    whole, generator = WORKLOADS[shape.workload], torch.Generator().manual_seed(0)
    features = torch.randn(shape.images, whole.regions, whole.features, generator=generator)
    features += torch.randn(shape.images, 1, whole.features, generator=generator)
    lengths = sorted(shape.lengths, reverse=True)
    ids = torch.randint(4, VOCABULARY, (shape.captions, lengths[0]), generator=generator)
    return Batch(features.to(device), ids.to(device), lengths)


def options_of(model: str, shape: Shape, device: str) -> Namespace:
    """The published recipe for COCO, in the sizes of the workload."""
    whole = WORKLOADS[shape.workload]
    sizes = {"img_dim": whole.features, "embed_size": whole.dim}
    if model in ("sgr", "saf", "tshsr", "rcar", "cmcan"):
        sizes["sim_dim"] = whole.similarity
    if model in shan.MODELS:
        alignment, gate = shan.MODELS[model]
        opt = options("shan", recipe="coco", direction=alignment, gate=gate, **sizes)
    else:
        name, _, direction = model.partition("-")
        opt = options(name, recipe="coco", direction=direction or None, **sizes)
    opt.vocab_size, opt.device = VOCABULARY, device
    return opt


def published_encoders(model: Matcher, features: Tensor, ids: Tensor, lengths: list[int]) -> tuple:
    """The operations of SCAN's and SGRAF's published encoders, in their order, over the weights of ours."""
    image = scan.l2norm(model.img_enc.fc(features), 2)
    text = model.txt_enc
    embedded = text.dropout(text.embed(ids)) if hasattr(text, "dropout") else text.embed(ids)
    packed = pack_padded_sequence(embedded, lengths, batch_first=True)
    rnn = text.cap_rnn if hasattr(text, "cap_rnn") else text.rnn
    caption, _ = pad_packed_sequence(rnn(packed)[0], batch_first=True)
    half = caption.size(2) // 2
    return image, scan.l2norm((caption[:, :, :half] + caption[:, :, half:]) / 2, 2), lengths


def scores_of(model: str, contender: str, matcher: Matcher, opt: Namespace) -> Callable[..., Tensor]:
    """The loop of the paper, or the rewrite, as a function of image, padded captions and their lengths."""
    if model in OTHERS:
        return OTHERS[model].loop_of(model, matcher.scorer)
    state = matcher.scorer.state_dict(keep_vars=True)
    if model.startswith("scan"):
        direction, scale, pool_scale = opt.cross_attn, opt.lambda_softmax, opt.lambda_lse
        loop = partial(scan.loop, direction=direction, scale=scale, pool_scale=pool_scale)
        rewrite = partial(rewrites.scan, direction=direction, scale=scale, pool_scale=pool_scale)
    else:
        loop = partial(sgraf.loop, state, training=True)
        rewrite = partial(rewrites.sgraf, state, training=True)
    if contender == LOOP:
        return loop
    run = chunked(rewrite, model, matcher.scorer)
    return lambda image, caption, lengths: run(image, caption, torch.tensor(lengths, device=image.device))


class Step:
    """One training step of a contender; every call is the next step on the same batch.

    Args:
        model: one of the benchmarks' models.
        contender: `LOOP`, `REWRITE` or a backend.
        shape: of the batch; of an `LOOP` it may have fewer captions than images.
        device: where it runs.

    Attributes:
        batch: what the next call trains on.
        parts: seconds of every call so far, by the names of `PARTS`.
    """

    def __init__(self, model: str, contender: str, shape: Shape, device: str) -> None:
        opt = options_of(model, shape, device)
        torch.manual_seed(0)
        self.matcher, self.batch = build(opt), batch(shape, device)
        self.matcher.train_start()
        self._margin = opt.margin
        self.parts: dict[str, list[float]] = {name: [] for name in PARTS}
        self._marks: dict[str, float] = {}
        self._encode = self.matcher.forward_emb
        if contender in (LOOP, REWRITE):
            self._train, self._score = self._as_published, scores_of(model, contender, self.matcher, opt)
            if model not in OTHERS:
                self._encode = partial(published_encoders, self.matcher)
        else:
            self._backend, self._train = contender, self._as_ours
        self.matcher.forward_emb = self._encoded  # type: ignore[method-assign]
        for part in (self.matcher.img_enc, self.matcher.txt_enc):
            for parameter in part.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: self._mark("last gradient"))

    def __call__(self) -> Tensor:
        """Train on the batch and return the loss; the same dropouts in every call."""
        torch.manual_seed(1)
        self._marks = {}
        self._mark("start")
        loss = self._train()
        self._mark("end")
        at = self._marks
        # Autograd runs first what was made last: all of the scores' backward comes before the encoders'.
        encoders = at["encoded"] - at["encoding"] + at["last gradient"] - at["encoders' backward"]
        scores = at["encoders' backward"] - at["encoded"]
        for name, value in zip(PARTS, (encoders, scores, at["end"] - at["start"] - encoders - scores)):
            self.parts[name].append(value)
        return loss

    def result(self) -> dict[str, Tensor]:
        """A step's loss, and the gradients of each module as clipped."""
        found = {"loss": self()}
        for name, module in zip(self.matcher.parts, self.matcher.modules):
            if parameters := list(module.parameters()):
                flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
                found[name] = torch.cat(flat)
        return found

    def _mark(self, name: str) -> None:
        harness.synchronise()
        self._marks[name] = time.perf_counter()

    def _encoded(self, *args) -> tuple:
        self._mark("encoding")
        found = self._encode(*args)
        self._mark("encoded")
        for x in found[:2]:
            x.register_hook(self._reached)
        return found

    def _reached(self, gradient: Tensor) -> None:
        """Note the time when backward first reaches an encoder's output."""
        if "encoders' backward" not in self._marks:
            self._mark("encoders' backward")

    def _as_ours(self) -> Tensor:
        with itm_fast.use_backend(self._backend):
            return self.matcher.train_emb(*self.batch)

    def _as_published(self) -> Tensor:
        model = self.matcher
        model.optimizer.zero_grad()
        loss = ranking_loss(self._score(*model.forward_emb(*self.batch)), hardest=True, margin=self._margin)
        loss.backward()
        clip_grad_norm_(model.params, model.grad_clip)
        model.optimizer.step()
        return loss.detach()
