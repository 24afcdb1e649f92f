"""Drop-in models with the published names, arguments and state_dict keys: `scan` and `sgraf`."""

from __future__ import annotations

from argparse import Namespace

from .scan import SCAN
from .sgraf import SGRAF

__all__ = ["SCAN", "SGRAF", "build"]


def build(opt: Namespace) -> SCAN | SGRAF:
    """Build the model that the options of a published checkpoint describe.

    Args:
        opt: SGRAF's options have `module_name`, SCAN's have `cross_attn`.

    Raises:
        ValueError: they have neither, lack an option, or one has an unknown value.

    >>> from argparse import Namespace
    >>> opt = Namespace(grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5,
    ...                 num_layers=1, bi_gru=True, no_txtnorm=False, sim_dim=4, module_name="SAF", sgr_step=3,
    ...                 margin=0.2, max_violation=True, learning_rate=2e-4)
    >>> type(build(opt)).__name__
    'SGRAF'
    """
    if hasattr(opt, "module_name"):
        return SGRAF(opt)
    if hasattr(opt, "cross_attn"):
        return SCAN(opt)
    raise ValueError("build: opt has neither module_name (SGRAF) nor cross_attn (SCAN), so no model fits it")
