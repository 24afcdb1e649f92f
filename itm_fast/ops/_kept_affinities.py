"""What `cross_attention_score` keeps where a gradient may be asked for: in C++ the affinities; see `_kept`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._checks import work_dtype
from .._workspace import scratch_bytes
from . import _recompute
from ._cpu_calls import implementation
from ._kept import Keeping, Recording, free

NAME = "cross_attention_score"
SHARE = 8  # of the scratch memory: the affinities are kept if they take at most an eighth


def _bytes(image: Tensor, words: Tensor, *rest: Any) -> int:
    """Of the affinities of all pairs."""
    return image.shape[0] * image.shape[1] * len(words) * work_dtype(image).itemsize


def _forward(*args: Any) -> tuple[Tensor, list[Tensor]]:
    if _bytes(*args) * SHARE <= scratch_bytes(args[0].device):
        score, affinity = implementation(NAME).forward_trained(*args)
        return score, [affinity]
    return implementation(NAME).forward(*args), []


def _backward(grad: Tensor, needs: Sequence[bool], *args: Any, kept: list[Tensor]) -> list[Tensor]:
    if _recompute.few_pairs(grad):
        free(kept)  # C++ takes only the pairs that have a gradient, and needs the room for gradients
    return implementation(NAME).backward(grad, needs, *args, results=kept)


KEEPING: dict[str, Callable[..., Tensor]] = {
    "cpu": Keeping(NAME, _forward, _backward),
    "torch": Recording(NAME, lambda size, _: 12 * size["I"] * size["R"] * size["N"]),
}
