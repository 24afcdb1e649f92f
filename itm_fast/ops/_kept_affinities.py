"""`cross_attention_score` in C++ where a gradient may be asked for: affinities are kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import work_dtype
from .._workspace import current_gib, scratch_bytes, workspace
from ._cpu_calls import implementation
from ._recompute import SPARSE
from ._register import refuse_second

NAME = "cross_attention_score"
SHARE = 8  # of the scratch memory: the affinities are kept if they take at most an eighth


class Keeping(torch.autograd.Function):
    """The op's arguments -> score. The first backward pass frees the affinities; a second one computes them again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        image, words = args[:2]
        bytes_of_all = image.shape[0] * image.shape[1] * len(words) * work_dtype(image).itemsize
        if bytes_of_all * SHARE <= scratch_bytes(image.device):
            score, *ctx.kept = implementation(NAME).forward_trained(*args)
        else:
            score, ctx.kept = implementation(NAME).forward(*args), []
        ctx.scratch, ctx.is_tensor = current_gib(), [isinstance(a, Tensor) for a in args]
        ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))
        ctx.rest = [a for a in args if not isinstance(a, Tensor)]
        return score

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second(NAME)
        tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
        args = [next(tensors) if t else next(rest) for t in ctx.is_tensor]
        kept, ctx.kept = ctx.kept, []
        if grads[0].count_nonzero() * SPARSE <= grads[0].numel():
            kept.clear()  # C++ takes only the pairs that have a gradient, and needs the room for gradients
        with workspace(ctx.scratch):
            needs = list(ctx.needs_input_grad[:2])
            found = iter(implementation(NAME).backward(grads[0], needs, *args, results=kept))
        return (*(next(found).to(x.dtype) if n else None for x, n in zip(args, ctx.needs_input_grad)),)
