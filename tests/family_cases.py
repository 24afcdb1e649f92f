"""Vectors of the published code of SCAN's and SGRAF's relatives, and how a scorer is held against them."""

from pathlib import Path

import numpy as np
import torch
from sgraf_cases import under

import itm_fast

FOLDER = Path(__file__).parent / "golden" / "family"


def golden(name):
    """A file's tensors; texts and numbers of one element as Python values."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {
            key: file[key].item() if file[key].ndim == 0 and key.startswith("option/") else torch.from_numpy(file[key])
            for key in file
        }


def check(want, scorer, backend, **more):
    """A float64 scorer gives a file's scores, gradients and buffers."""
    state = under(want, "param/")
    assert set(scorer.state_dict()) == set(state)
    scorer.load_state_dict(state)
    image, caption = (want[name].clone().requires_grad_() for name in ("image", "caption"))
    with itm_fast.use_backend(backend):
        score = scorer(image, caption, want["lengths"].tolist(), **more)
        score.backward(want["d_score"])
    torch.testing.assert_close(score, want["score"], rtol=0, atol=1e-10)
    torch.testing.assert_close(image.grad, want["d_image"], rtol=0, atol=1e-8)
    torch.testing.assert_close(caption.grad, want["d_caption"], rtol=0, atol=1e-8)
    gradients = under(want, "grad/")
    for name, parameter in scorer.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradients[name], rtol=0, atol=1e-8, msg=name)
    for name, buffer in under(want, "after/").items():
        torch.testing.assert_close(scorer.state_dict()[name], buffer, rtol=0, atol=1e-10, msg=name)
