"""`similarity_nodes` in Triton: equations in `ops/similarity_nodes.py`, kernels in `_attention` and `_projection`.

Backward, some images at a time: the words' nodes by the backward of `cross_attention_similarity`, the global nodes by
torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from itm_fast._workspace import current_gib, scratch_bytes, workspace
from itm_fast.packing import bounds, node_bounds, spans

from . import _graph, _launch
from ._nodes import NORM, Maker, image_bytes, word_bytes

OP = "similarity_nodes"
EPS = 1e-8


def forward(
    image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor,
    local_weight: Tensor, local_bias: Tensor, global_weight: Tensor, global_bias: Tensor,
    cu_seqlens: Tensor, region_lengths: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Nodes [I, M, S], and an empty tensor: this backend saves no statistics for backward."""
    (I, R, _), M = image.shape, len(words) + len(caption_global)
    nodes = image.new_empty(I, M, len(local_weight))
    with _launch.on(image.device):
        make = Maker(
            OP, image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias,
            cu_seqlens, region_lengths, scale,
        )  # fmt: skip
        edge = node_bounds(cu_seqlens)
        for first, block in _graph.blocks(I, edge, M, OP, (), word_bytes(R), image_bytes(R)):
            make(slice(first, first + block.images), block.window.captions, nodes, first, 0)
    return nodes, image.new_empty(0, dtype=torch.float32)


def backward(grad: Tensor, needs: list[bool], *args, results: Sequence[Tensor] = ()) -> list[Tensor]:
    tensors, (cu_seqlens, region_lengths, scale) = args[:8], args[8:]
    image, image_global, words, caption_global, *_ = tensors
    (I, _, D), T, N, S = image.shape, len(caption_global), len(words), grad.shape[2]
    total = [torch.zeros_like(x, dtype=torch.float32) if n else None for x, n in zip(tensors, needs)]
    # Half of the scratch is for this function, the other half for the backward of the words' nodes.
    limit = scratch_bytes(grad.device) // 2
    with _launch.on(image.device), workspace(current_gib() / 2):
        edge = node_bounds(cu_seqlens)
        first = edge[:-1].long()
        inside = _launch.captions(words, cu_seqlens, bounds(cu_seqlens, N, OP)).owner.long() + 1
        inside += torch.arange(N, device=grad.device)
        each = N * S * grad.element_size() + 16 * T * D
        for images in spans(I, max(1, limit // max(1, each))):
            d_nodes = grad[images]
            local = [k for k in (0, 2, 4, 5) if needs[k]]
            if local:
                counts = None if region_lengths is None else region_lengths[images]
                found = torch.ops.itm_fast.cross_attention_similarity_backward.default(
                    d_nodes[:, inside], [needs[k] for k in (0, 2, 4, 5)], image[images], words, *tensors[4:6],
                    cu_seqlens, counts, "t2i", NORM, scale, "triton",
                )  # fmt: skip
                for k, d in zip(local, found, strict=True):
                    if (whole := total[k]) is not None:
                        (whole[images] if k == 0 else whole).add_(d)
            d_image = total[1]
            overall = [None if d_image is None else d_image[images], total[3], *total[6:]]
            _overall(d_nodes[:, first], overall, image_global[images], caption_global, *tensors[6:8])
    return [x for x in total if x is not None]


def _overall(
    grad: Tensor, total: Sequence[Tensor | None], image: Tensor, caption: Tensor, weight: Tensor, bias: Tensor
) -> None:
    """Add the gradients of (image_global, caption_global, W_g, b_g) to those of `total` that are not None."""
    if all(x is None for x in total):
        return
    grad, image, caption, weight, bias = (x.float() for x in (grad, image, caption, weight, bias))
    difference = image[:, None] - caption
    square = difference.square().flatten(0, 1)
    y = torch.addmm(bias, square, weight.t())
    length = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    grad = grad.flatten(0, 1)
    along = (grad * y).sum(1, keepdim=True) / (length * (length + EPS))
    dy = (grad - along.where(length > 0, 0) * y) / (length + EPS)
    d_image, d_caption, d_weight, d_bias = total
    if d_weight is not None:
        d_weight.addmm_(dy.t(), square)
    if d_bias is not None:
        d_bias += dy.sum(0)
    if d_image is not None or d_caption is not None:
        difference *= 2 * (dy @ weight).view(difference.shape)
        if d_image is not None:
            d_image += difference.sum(1)
        if d_caption is not None:
            d_caption -= difference.sum(0)
