"""`cross_attention_score` in C++ where a gradient may be asked for: affinities are kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._checks import work_dtype
from .._workspace import scratch_bytes
from . import _recompute
from ._cpu_calls import implementation
from ._kept import Keeping, free

NAME = "cross_attention_score"
SHARE = 8  # of the scratch memory: the affinities are kept if they take at most an eighth


def _forward(*args: Any) -> tuple[Tensor, list[Tensor]]:
    image, words = args[:2]
    bytes_of_all = image.shape[0] * image.shape[1] * len(words) * work_dtype(image).itemsize
    if bytes_of_all * SHARE <= scratch_bytes(image.device):
        score, affinity = implementation(NAME).forward_trained(*args)
        return score, [affinity]
    return implementation(NAME).forward(*args), []


def _backward(grad: Tensor, needs: Sequence[bool], *args: Any, kept: list[Tensor]) -> list[Tensor]:
    if _recompute.few(grad):
        free(kept)  # C++ takes only the pairs that have a gradient, and needs the room for gradients
    return implementation(NAME).backward(grad, needs, *args, results=kept)


KEEPING = Keeping(NAME, _forward, _backward)
