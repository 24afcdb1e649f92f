"""Weights, features and options that the tests of SGRAF share."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from itm_fast.models import sgraf
from itm_fast.testing import op_checks

FOLDER = Path(__file__).parent / "golden"
BACKENDS = [*op_checks.backends("similarity_graph_score"), "reference"]
HEADS = ["SGR", "SAF"]
LENGTHS = [2, 7, 5, 1, 7, 3, 5]  # unsorted; 2 is <start> and <end> alone
R, D, S = 6, 16, 8


def golden(head, mode):
    with np.load(FOLDER / f"sgraf_{head.lower()}_{mode}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def under(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def dropout(module, p):
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = p


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def features(I=5, lengths=LENGTHS, D=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(I, R, D, generator=generator, dtype=torch.float64)
    caption = torch.randn(len(lengths), max(lengths) + 1, D, generator=generator, dtype=torch.float64)
    return sgraf.l2norm(image).to(dtype), sgraf.l2norm(caption).to(dtype)


def options(**changes):
    opt = Namespace(
        grad_clip=2.0,
        img_dim=12,
        embed_size=D,
        no_imgnorm=False,
        vocab_size=30,
        word_dim=10,
        num_layers=1,
        bi_gru=True,
        no_txtnorm=False,
        sim_dim=S,
        module_name="SGR",
        sgr_step=3,
        margin=0.2,
        max_violation=True,
        learning_rate=0.002,
        num_region=R,
        device="cpu",
    )
    return Namespace(**{**vars(opt), **changes})
