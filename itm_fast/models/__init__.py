"""Models under the names, arguments and state_dict keys of their papers: `scan`, `sgraf` and those built upon them."""

from __future__ import annotations

from argparse import Namespace

from ._common import Matcher
from .dual_encoder import DualEncoder
from .hgan import HGAN
from .scan import SCAN
from .sgraf import SGRAF
from .shan import SHAN
from .tshsr import TSHSR

__all__ = ["HGAN", "SCAN", "SGRAF", "SHAN", "TSHSR", "DualEncoder", "build", "model_class"]

# opt.system -> class
SYSTEMS: dict[str, type[SGRAF]] = {"DualEncoder": DualEncoder, "HGAN": HGAN, "SHAN": SHAN, "TSHSR": TSHSR}


def model_class(opt: Namespace) -> type[Matcher]:
    """The class of the model that these options describe.

    Args:
        opt: SGRAF's options have `module_name`, SCAN's have `cross_attn`, those of other models `system`.

    Raises:
        ValueError: they have none of these, or `system` is unknown.

    >>> model_class(Namespace(system="DualEncoder")).__name__
    'DualEncoder'
    """
    if hasattr(opt, "system"):
        if opt.system not in SYSTEMS:
            raise ValueError(f"build: opt.system must be one of {', '.join(SYSTEMS)}, got {opt.system!r}")
        return SYSTEMS[opt.system]
    if hasattr(opt, "module_name"):
        return SGRAF
    if hasattr(opt, "cross_attn"):
        return SCAN
    raise ValueError(
        "build: opt has neither module_name (SGRAF) nor cross_attn (SCAN) nor system (the others), so no model fits it"
    )


def build(opt: Namespace) -> Matcher:
    """Build the model that the options of a checkpoint describe.

    Args:
        opt: as for `model_class`, with what the model reads.

    Raises:
        ValueError: no model fits the options, they lack one, or one has an unknown value.

    >>> opt = Namespace(grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5,
    ...                 num_layers=1, bi_gru=True, no_txtnorm=False, sim_dim=4, module_name="SAF", sgr_step=3,
    ...                 margin=0.2, max_violation=True, learning_rate=2e-4)
    >>> type(build(opt)).__name__
    'SGRAF'
    """
    return model_class(opt)(opt)
