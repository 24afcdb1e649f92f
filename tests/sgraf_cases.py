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


def scorer(head, dtype=torch.float64, D=D, S=S):
    """Random weights with small biases and enlarged queries and keys: with others, reasoning makes all nodes equal
    and no test sees the edges or which node is read."""
    torch.manual_seed(1)
    model = sgraf.EncoderSimilarity(D, S, head, num_region=R)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")) or ".1.weight" in name:
                x.add_(0.1 * torch.randn(x.shape))
            elif "query" in name or "key" in name:
                x.mul_(6)
        model.sim_eval_w.weight.mul_(4)
    return model.to(dtype).eval()


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
