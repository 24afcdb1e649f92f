"""The pair scorers of all models, each with its slow loop: what the tests that hold for every model run on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from sgraf_cases import LENGTHS, D, R, S
from torch import Tensor, nn

from itm_fast.models import bfan, chan, cmcan, hgan, imram, naaf, rcar, sgraf, shan, tshsr
from itm_fast.testing import bfan as bfan_loop
from itm_fast.testing import chan as chan_loop
from itm_fast.testing import cmcan as cmcan_loop
from itm_fast.testing import hgan as hgan_loop
from itm_fast.testing import imram as imram_loop
from itm_fast.testing import naaf as naaf_loop
from itm_fast.testing import op_checks
from itm_fast.testing import rcar as rcar_loop
from itm_fast.testing import sgraf as sgraf_loop
from itm_fast.testing import shan as shan_loop
from itm_fast.testing import tshsr as tshsr_loop


class Model(NamedTuple):
    """A pair scorer of one set of options.

    `make(D, S)` builds it, with enlarged weights of those in `enlarge`: with others nodes and weights become so equal
    that no test sees them. `run(module)` gives the loop's function and its options. `silent` are parameters whose
    gradient is zero, as a softmax drops them.
    """

    op: str
    make: Callable[[int, int], nn.Module]
    enlarge: dict[str, float]
    run: Callable[[Any], tuple[Callable[..., Tensor], dict[str, Any]]]
    silent: tuple[str, ...] = ("embedding_common.0.bias",)
    trains: bool = True  # whether it has another mode for training

    def scorer(self, dtype: torch.dtype = torch.float64, D: int = D, S: int = S) -> Any:
        """Random weights and small biases."""
        torch.manual_seed(1)
        module = self.make(D, S)
        with torch.no_grad():
            for name, x in module.state_dict().items():
                if name.endswith("running_var"):
                    x.uniform_(0.5, 1.5)
                elif "bias" in name or name.endswith("running_mean") or ".1.weight" in name:
                    x.add_(0.1 * torch.randn(x.shape))
                for part, factor in self.enlarge.items():
                    if part in name and "bias" not in name:
                        x.mul_(factor)
        return module.to(dtype).eval()

    def looped(self, module: Any, image: Tensor, caption: Tensor, lengths=LENGTHS, state=None, **more: Any) -> Tensor:
        loop, options = self.run(module)
        return loop(state or module.state_dict(keep_vars=True), image, caption, lengths, **options, **more)


def _sgraf(head: str) -> Model:
    def make(D: int, S: int) -> nn.Module:
        return sgraf.EncoderSimilarity(D, S, head, num_region=R)

    enlarge = {"query": 6.0, "key": 6.0, "sim_eval_w": 4.0}
    silent = ("embedding_common.0.bias", "graph_key_w.bias")
    return Model("similarity_graph_score", make, enlarge, lambda module: (sgraf_loop.loop, {}), silent)


def of_hgan(**options: Any) -> Model:
    names = ("levels", "scale_t2i", "scale_i2t", "scale_global", "share_local", "share_global")

    def make(D: int, S: int) -> nn.Module:
        return hgan.HierarchicalAlignment(D, num_region=R, **options)

    def run(module: Any) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        return hgan_loop.loop, {name: getattr(module, name) for name in names}

    return Model("cross_attention_score", make, {"query": 4.0, "key": 4.0}, run)


def of_tshsr(**options: Any) -> Model:
    def make(D: int, S: int) -> nn.Module:
        return tshsr.TwoStreamReasoning(D, S, num_region=R, **options)

    def run(module: Any) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        return tshsr_loop.loop, {"scale_t2i": module.scale_t2i, "scale_i2t": module.scale_i2t}

    enlarge = {"query": 6.0, "key": 6.0, "context": 6.0, "sim_eval_w": 4.0}
    silent = ("embedding_common.0.bias", "graph_key_w.bias")
    return Model("cross_attention_similarity", make, enlarge, run, silent)


def _shan(**options: Any) -> Model:
    def make(D: int, S: int) -> nn.Module:
        return shan.EncoderSimilarity(D, **options)

    return Model(
        "hierarchical_alignment_score", make, {"pool": 8.0}, lambda _: (shan_loop.loop, as_loop(options)), (), False
    )


def of_imram(**options: Any) -> Model:
    def make(D: int, S: int) -> nn.Module:
        return imram.IterativeMatching(D, **options)

    # With larger weights the refined queries lie apart from the first ones.
    enlarge = {"linear": 3.0, "gate": 3.0}
    return Model("attended_vectors", make, enlarge, lambda _: (imram_loop.loop, options), silent_ways(options), False)


def of_rcar(**options: Any) -> Model:
    def make(D: int, S: int) -> nn.Module:
        return rcar.RegulatedMatching(D, S, **options)

    def run(module: Any) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        names = "attn_type", "self_regulator", "step", "smooth"
        return rcar_loop.loop, {name: getattr(module, name) for name in names}

    silent = ("rar_v_w.0.bias", *(("sim_eval_w",) if options.get("self_regulator") == "only_rcr" else ()))
    return Model("attended_vectors", make, {"rcr": 2.0, "rar": 3.0, "sim_eval_w": 4.0}, run, silent)


def of_cmcan(**options: Any) -> Model:
    def make(D: int, S: int) -> nn.Module:
        return cmcan.ConfidenceMatching(D, S, num_region=R, **options)

    enlarge = {"query": 6.0, "key": 6.0, "sim_eval_w": 4.0, "emb_similarity": 4.0, "emb_common": 4.0}
    # A softmax, or the LayerNorm, drops these.
    silent = ("embedding_common.0.bias", "emb_common.bias", "emb_similarity.bias", "graph_key_w.bias")
    return Model("attended_vectors", make, enlarge, lambda _: (cmcan_loop.loop, options), silent)


def silent_ways(options: dict[str, Any]) -> tuple[str, ...]:
    """The weights of the direction that a mode does not use."""
    return {"text_IMRAM": ("i2t",), "image_IMRAM": ("t2i",)}.get(options.get("model_mode", ""), ())


def _without_weights(scorer: Callable[..., nn.Module], loop: Callable[..., Tensor], **options: Any) -> Model:
    def make(D: int, S: int) -> nn.Module:
        return scorer(**options)

    return Model("cross_attention_score", make, {}, lambda _: (loop, options), (), False)


def _naaf(training: bool) -> Model:
    def make(D: int, S: int) -> nn.Module:
        return naaf.NegativeAware(thres=0.1, thres_safe=0.1, mode="train" if training else "test")

    options = {"threshold": 0.1, "training": training}
    return Model("cross_attention_score", make, {}, lambda _: (naaf_loop.loop, options), (), False)


def as_loop(options: dict[str, Any]) -> dict[str, Any]:
    """SHAN's options in the words of its loop."""
    names = {"alignment": "direction", "lambda_softmax": "scale", "pooling": "pool", "affinity": "affinity"}
    names |= {"mu1": "local_mix", "mu2": "global_mix"}
    found = {names[key]: value for key, value in options.items() if key in names}
    return found | {"direction": shan.ALIGNMENTS[options.get("alignment", "full")]}


SHAN_VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "t2i": {"alignment": "t2i"},
    "i2t": {"alignment": "i2t"},
    "full-vector": {"gate": "vector"},
    "t2i-vector-shared": {"alignment": "t2i", "gate": "vector", "gate_sharing": True},
    "i2t-vector": {"alignment": "i2t", "gate": "vector"},
    "full-shared": {"gate_sharing": True},
    "full-vector-shared": {"gate": "vector", "gate_sharing": True},
    "dot-sum-biased": {"affinity": "dot", "pooling": "sum", "projection_bias": True, "lambda_softmax": 2.0},
    "mixed": {"mu1": 0.9, "mu2": 0.2, "lambda_softmax": 4.0},
}
HGAN_OTHERS = {
    "graph_layers": 1,
    "granularities": (2, 8),
    "levels": (0.5, 2.0, 1.5),
    "scale_t2i": 5.0,
    "scale_i2t": 7.0,
    "scale_global": 6.0,
    "share_local": 0.3,
    "share_global": 0.8,
}
HGAN_BARE = {"graph_layers": 0, "granularities": (), "levels": (1.0, 0.0, 0.0), "share_local": 1.0}
MODELS = {
    "SGR": _sgraf("SGR"),
    "SAF": _sgraf("SAF"),
    "HGAN": of_hgan(),
    "HGAN-others": of_hgan(**HGAN_OTHERS),
    "HGAN-bare": of_hgan(**HGAN_BARE)._replace(silent=("_global_w", "mfar")),
    "HGAN-global": of_hgan(granularities=(1,), levels=(0.0, 0.0, 1.0)),
    "TSHSR": of_tshsr(),
    "TSHSR-others": of_tshsr(context_nodes=(3, 2, 1), steps=2, scale_t2i=5.0, scale_i2t=7.0),
    "TSHSR-one-level": of_tshsr(context_nodes=(2,), steps=1),
    "IMRAM": of_imram(),
    "IMRAM-text": of_imram(model_mode="text_IMRAM", iteration_step=2, no_IMRAM_norm=True),
    "RCAR": of_rcar(),
    "RCAR-i2t": of_rcar(attn_type="i2t", step=3),
    "CMCAN": of_cmcan(),
    "BFAN": _without_weights(bfan.FocalAttention, bfan_loop.loop),
    "BFAN-prob": _without_weights(bfan.FocalAttention, bfan_loop.loop, focal_type="prob", lambda_softmax=9.0),
    "CHAN": _without_weights(chan.SimsEncoder, chan_loop.loop, belta=0.3),
    "CHAN-regions": _without_weights(
        chan.SimsEncoder, chan_loop.loop, coding_type="THACoding", pooling_type="MeanPooling"
    ),
    "NAAF": _naaf(False),
    "NAAF-training": _naaf(True),
    **{f"SHAN-{name}": _shan(**options) for name, options in SHAN_VARIANTS.items()},
}
PUBLISHED = ("SGR", "SAF", "HGAN", "TSHSR", "SHAN-full", "IMRAM", "RCAR", "CMCAN")


def over(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", [pytest.param(MODELS[name], id=name) for name in names])


def over_backends(*names: str) -> pytest.MarkDecorator:
    """Each model on each backend of its main op."""
    each = [(name, b) for name in names for b in [*op_checks.backends(MODELS[name].op), "reference"]]
    return pytest.mark.parametrize("model,backend", [pytest.param(MODELS[n], b, id=f"{n}-{b}") for n, b in each])
