"""The published pair scorers that `patch` knows: how each is made and called, and the library's scorer for it.

Two published classes are called EncoderSimilarity and take (img_emb, cap_emb, cap_lens): SGRAF's and its forks', and
RCAR's. IMRAM's scorer is two methods of its model SCAN, CMCAN's a method of its model, and GSMN's two classes.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import chan, cmcan, gsmn, imram, rcar
from ..models._boxes import checked
from ..models._lengths import packed
from ..models.sgraf import EncoderSimilarity
from ._proof import Disagrees, constructed, published


class Unlike(Disagrees):
    """The object, or this call of it, is not as the published one: it keeps its own code."""


class Returned(NamedTuple):
    """What SGRAF's forks return, from the library's scorer with this `output`."""

    output: str
    form: Callable[[Tensor], Any]


RETURNS = {
    "scores": Returned("score", lambda score: score),
    "logits": Returned("logit", lambda logit: logit),
    "scores and their diagonal": Returned("score", lambda score: (score, score.detach().diagonal())),
}
Given = dict[str, Any]  # the arguments of a call by their published names


class Family(NamedTuple):
    """One published method that scores.

    Attributes:
        name: of its class.
        method: its name.
        takes: its parameters.
        modes: the kinds of scorer that it can be.
        make: (class, mode, D, S) -> an object.
        example: (mode, images [I, 36, D], captions [T, W, D], lengths) -> arguments on which it is tried.
        mode: (object, given) -> its mode.
        options: (object, given) -> what the library's scorer is built from; if this changes, it is built anew.
        ours: (object, options) -> the library's scorer.
        score: (object, the library's scorer, given, a key of `RETURNS`) -> what the method returns.
        parts: object -> its modules by the names that they have in the library's scorer.
        returns: what its forks return, keys of `RETURNS`.
    """

    name: str
    method: str
    takes: tuple[str, ...]
    modes: tuple[str, ...]
    make: Callable[[Any, str, int, int], Any]
    example: Callable[[str, Tensor, Tensor, list[int]], tuple[Any, ...]]
    mode: Callable[[Any, Given], str]
    options: Callable[[Any, Given], Any]
    ours: Callable[[Any, Any], Any]
    score: Callable[[Any, Any, Given, str], Any]
    parts: Callable[[Any], dict[str, nn.Module]] = lambda module: {"": module}
    returns: tuple[str, ...] = ("scores",)


def _sgraf_scorer(module: Any, options: object) -> EncoderSimilarity:
    if not hasattr(module, "v_global_w"):
        raise Unlike("it has no v_global_w")
    D, S = module.sim_tranloc_w.in_features, module.sim_tranloc_w.out_features
    regions = module.v_global_w.embedding_local[1].num_features
    return EncoderSimilarity(D, S, module.module_name, len(getattr(module, "SGR_module", ())), regions)


def _sgraf_score(module: Any, scorer: Any, given: Given, kind: str) -> Any:
    scorer.output, form = RETURNS[kind]
    return form(scorer(*given.values()))


SGRAF = Family(
    "EncoderSimilarity",
    "forward",
    ("img_emb", "cap_emb", "cap_lens"),
    ("SGR", "SAF"),
    make=lambda cls, mode, D, S: constructed(cls, D, S, mode, 3),
    example=lambda mode, *batch: batch,
    mode=lambda module, given: str(module.module_name),
    options=lambda module, given: None,
    ours=_sgraf_scorer,
    score=_sgraf_score,
    returns=tuple(RETURNS),
)
_RCAR_MODES = {f"{way} {how}": (way, how) for way, how in itertools.product(rcar.DIRECTIONS, rcar.REGULATORS)}
_RCAR_OPTIONS = ("rcar_step", "rar_step", "rcr_step", "t2i_smooth", "i2t_smooth", "attn_type", "self_regulator")


def _rcar_options(mode: str) -> Namespace:
    return Namespace(**dict(zip(_RCAR_OPTIONS, (2, 2, 2, 10.0, 3.0, *_RCAR_MODES[mode]), strict=True)))


RCAR = Family(
    "EncoderSimilarity",
    "forward",
    ("img_emb", "cap_emb", "cap_lens"),
    tuple(_RCAR_MODES),
    make=lambda cls, mode, D, S: constructed(cls, _rcar_options(mode), D, S),
    example=lambda mode, *batch: batch,
    mode=lambda module, given: f"{module.opt.attn_type} {module.opt.self_regulator}",
    options=lambda module, given: [getattr(module.opt, name) for name in _RCAR_OPTIONS],
    ours=lambda module, options: rcar.RCAR.similarity(
        Namespace(**dict(zip(_RCAR_OPTIONS, options, strict=True)), embed_size=module.embed_dim, sim_dim=module.sim_dim)
    ),
    score=lambda module, scorer, given, kind: scorer(*given.values()),
)
_GATES = ("linear_t2i", "gate_t2i", "linear_i2t", "gate_i2t")
_IMRAM_SIZES = {
    "data_name": "f30k_precomp", "precomp_enc_type": "basic", "img_dim": 4, "vocab_size": 4, "word_dim": 4,
    "num_layers": 1, "bi_gru": True, "no_imgnorm": False, "no_txtnorm": False,
}  # fmt: skip


def _imram_example(mode: str, image: Tensor, caption: Tensor, lengths: list[int]) -> tuple[Any, ...]:
    opt = Namespace(
        iteration_step=3, lambda_softmax=9.0, no_IMRAM_norm=mode == "no_IMRAM_norm", raw_feature_norm=imram.NORM
    )
    return image.mean(1), image, caption.mean(1), caption, lengths, opt


def _imram_options(module: Any, given: Given) -> tuple[Any, ...]:
    opt = given["opt"]
    if opt.raw_feature_norm != imram.NORM:
        raise Unlike(f"raw_feature_norm is not {imram.NORM}")
    return opt.iteration_step, opt.lambda_softmax, opt.no_IMRAM_norm


def _imram_score(direction: Any, module: Any, scorer: Any, given: Given, kind: str) -> list[Tensor]:
    image, caption = (given[name].to(module.gate_t2i.weight.dtype) for name in ("images", "captions_all"))
    steps = scorer.steps(direction, image, *packed(type(scorer).__name__, caption, given["cap_lens"]))
    return [(step.t() if module.training else step).double() for step in steps]


def _imram(way: str, direction: str) -> Family:
    return Family(
        "SCAN",
        f"xattn_score_{way}_IMRAM",
        ("images_fc", "images", "caption_ht", "captions_all", "cap_lens", "opt"),
        ("unit queries", "no_IMRAM_norm"),
        make=lambda cls, mode, D, S: constructed(cls, Namespace(**_IMRAM_SIZES, embed_size=D)),
        example=_imram_example,
        mode=lambda module, given: "no_IMRAM_norm" if given["opt"].no_IMRAM_norm else "unit queries",
        options=_imram_options,
        ours=lambda module, options: imram.IterativeMatching(
            module.gate_t2i.out_features, f"{way.lower()}_IMRAM", *options
        ),
        score=partial(_imram_score, direction),
        parts=lambda module: {name: getattr(module, name) for name in _GATES},
    )


def _chan_score(module: Any, scorer: Any, given: Given, kind: str) -> Tensor:
    image, counts = given["img_emb"], given["img_lens"].long()
    regions = None if bool((counts == image.shape[1]).all()) else counts
    return scorer(image, given["cap_emb"], given["cap_lens"], regions)


CHAN = Family(
    "SimsEncoder",
    "forward",
    ("img_emb", "cap_emb", "img_lens", "cap_lens"),
    tuple(map(" ".join, itertools.product(chan.CODINGS, chan.POOLINGS))),
    make=lambda cls, mode, D, S: constructed(cls, *mode.split(), opt=Namespace(alpha=0.1, belta=0.1)),
    example=lambda mode, image, caption, lengths: (
        image,
        caption,
        torch.tensor([36.0 - 8 * (i % 4) for i in range(len(image))]),
        torch.tensor(lengths, dtype=torch.get_default_dtype()),
    ),
    mode=lambda module, given: f"{type(module.coding).__name__} {type(module.pooling).__name__}",
    options=lambda module, given: [getattr(x, "temperature", 0.1) for x in (module.pooling, module.coding)],
    ours=lambda module, options: chan.SimsEncoder(
        type(module.coding).__name__, type(module.pooling).__name__, *options
    ),
    score=_chan_score,
)


def _gsmn_blocks(D: int) -> int:
    """The number of blocks with which GSMN is tried; the published one where vectors are as long as published."""
    return min(16, D // 4)


def _gsmn_options(module: Any, given: Given) -> tuple[int, float]:
    blocks = next(module.children()).conv_weights[0].in_features
    opt = given["opt"]
    if (given["images"].shape[2], opt.num_block) != (opt.embed_size, blocks):
        raise Unlike("its blocks are of another number or size")
    return blocks, opt.lambda_softmax


def _gsmn_example(mode: str, image: Tensor, caption: Tensor, lengths: list[int]) -> tuple[Any, ...]:
    D = image.shape[2]
    opt = Namespace(embed_size=D, num_block=_gsmn_blocks(D), lambda_softmax=20.0, is_sparse=mode == "sparse")
    corner, size = torch.rand(2, *image.shape[:2], 2)
    edges: Any = torch.cat([corner, corner + size], 2) / 2 if mode == "" else [[(0, 0), (0, 1)]] * len(caption)
    return image, caption, edges, lengths, opt


def _gsmn_score(module: Any, scorer: Any, given: Given, kind: str) -> Tensor:
    if "bbox" not in given:
        return scorer(given["images"], given["captions"], given["cap_lens"])
    try:
        checked(gsmn.NAME, given["bbox"], given["images"])
    except ValueError as error:  # the published code scores any boxes
        raise Unlike(str(error)) from error
    return scorer(given["images"], given["captions"], given["cap_lens"], bbox=given["bbox"])


def _gsmn(name: str, direction: Any, third: str, modes: tuple[str, ...]) -> Family:
    boxes = third == "bbox"
    return Family(
        name,
        "forward",
        ("images", "captions", third, "cap_lens", "opt"),
        modes,
        make=lambda cls, mode, D, S: constructed(cls, _gsmn_blocks(D), gsmn.HIDDEN, 1, dropout=0.5),
        example=_gsmn_example,
        mode=lambda module, given: "" if boxes else "sparse" if given["opt"].is_sparse else "dense",
        options=_gsmn_options,
        ours=lambda module, options: gsmn.StructuredMatching(options[0], options[1], sides=(direction,)),
        score=_gsmn_score,
        parts=lambda module: {f"{direction}_match_G": module},
    )


def _cmcan_made(cls: Any, mode: str, D: int, S: int) -> Any:
    """The model without its encoders."""
    made, home = object.__new__(cls), sys.modules[cls.__module__]
    for part, kind in (("sim_embt", "GraphEmbt"), ("sim_embv", "GraphEmbv"), ("sim_enc", "EncoderSimilarity")):
        setattr(made, part, published(partial(getattr(home, kind, Namespace), D, S)))
    return made


def _cmcan_example(mode: str, image: Tensor, caption: Tensor, lengths: list[int]) -> tuple[Any, ...]:
    near = torch.zeros(len(image), 36, 36)
    for step in (0, 1, 5, 11):  # 2 to 4 neighbours a region
        near += torch.diag_embed((torch.rand(len(image), 36) < 1 - step / 20).to(near.dtype)).roll(step, 2)
    return image, caption, lengths, near, None


def _cmcan_options(model: Any, given: Given) -> list[int]:
    if model.sim_embv.num_partial != cmcan.PARTIAL:
        raise Unlike(f"its num_partial is not {cmcan.PARTIAL}")
    first, regions = model.sim_embt.sim_tranloc_wt, model.sim_embv.emb_local_bn.num_features
    return [first.in_features, first.out_features, len(model.sim_enc.module_t), regions]


def _cmcan_score(model: Any, scorer: Any, given: Given, kind: str) -> Tensor:
    image, near = given["img_embs"], given["adjs"]
    if any(x.device != image.device for x in scorer.parameters()):
        raise Unlike("its parts are on several devices")
    if not bool((near.eq(0) | near.eq(1)).all()) or near.sum(2).max() > cmcan.PARTIAL:
        raise Unlike("a region has too many neighbours, among which the order of torch.topk decides")
    return scorer(image, given["cap_embs"], given["cap_lens"], adjacency=near)


CMCAN = Family(
    "CMCAN",
    "forward_sim",
    ("img_embs", "cap_embs", "cap_lens", "adjs", "depends"),
    ("",),
    make=_cmcan_made,
    example=_cmcan_example,
    mode=lambda model, given: "",
    options=_cmcan_options,
    ours=lambda model, options: cmcan.ConfidenceMatching(*options),
    score=_cmcan_score,
    parts=lambda model: {name: getattr(model, name) for name in ("sim_embt", "sim_embv", "sim_enc")},
)
_OTHERS = (
    _imram("Text", "t2i"),
    _imram("Image", "i2t"),
    CHAN,
    CMCAN,
    _gsmn("VisualGraph", "i2t", "bbox", ("",)),
    _gsmn("TextualGraph", "t2i", "depends", ("dense", "sparse")),
)
CLASSES = tuple(dict.fromkeys(family.name for family in (SGRAF, *_OTHERS)))


def families(cls: Any) -> list[Family]:
    """The published methods that a class of a known name has."""
    if cls.__name__ == SGRAF.name:
        takes = inspect.signature(cls).parameters
        return [RCAR if "opt" in takes and "module_name" not in takes else SGRAF]
    return [family for family in _OTHERS if family.name == cls.__name__ and hasattr(cls, family.method)]
