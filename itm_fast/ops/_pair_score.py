"""What SGRAF's two pair scorers share around their heads: a pair's nodes, its score and its backward (section 3.2).

With z what the head makes of the nodes X [L + 1, S] of `similarity_nodes`:

    score = sigmoid(w_e . z + b_e)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._checks import work_dtype
from .._workspace import current_gib, scratch_bytes, workspace
from ..packing import node_bounds, spans
from ._declare import Floats, Integers, Positive

NORM = "clipped_l2norm"
INPUTS = (
    Floats("image", "I R D"),
    Floats("image_global", "I D"),
    Floats("words", "N D"),
    Floats("caption_global", "T D"),
    Floats("local_weight", "S D"),
    Floats("local_bias", "S"),
    Floats("global_weight", "S D"),
    Floats("global_bias", "S"),
)
SCORE = Floats("score_weight", "S"), Floats("score_bias", "1")
REST = Integers("cu_seqlens", "T+1"), Integers("region_lengths", "I", optional=True), Positive("scale")
CPU_NODES = 256 << 20  # bytes of the nodes and of their gradients, of the images that the `cpu` backend takes at a time


def score(z: Tensor, score_weight: Tensor, score_bias: Tensor) -> Tensor:
    """sigmoid(w_e . z + b_e) of z [I, T, S] -> [I, T]."""
    return (z @ score_weight + score_bias).sigmoid()


def backward(
    backend: str,
    head: Callable[..., Tensor],
    grad: Tensor,
    needs: Sequence[bool],
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of `tensors`, the differentiable arguments in the op's order, in `backend`, which has all the ops that
    a score is made of: some images at a time, the nodes are made again, and those ops' gradients are put together.

    `head(nodes, bounds, *parameters)` makes z [I, T, S] of nodes [I, M, S] by a differentiable op.
    """
    work = work_dtype(grad)
    # Triton's kernels multiply what the inputs' dtype holds; the C++ ones widen all they read.
    made = grad.dtype if backend == "triton" else work
    tensors = [x.detach().to(made) for x in tensors]
    total = [torch.zeros_like(x, dtype=work) if n else None for x, n in zip(tensors, needs, strict=True)]
    I, M, S = len(tensors[0]), len(tensors[2]) + len(tensors[3]), len(tensors[4])
    # The nodes and their gradients take half of the scratch, and the ops that run on them the other.
    room = scratch_bytes(grad.device) // 2
    most = (min(room, CPU_NODES) if backend == "cpu" else room) // max(2 * M * S * made.itemsize, 1)
    with workspace(current_gib() / 2):
        for images in spans(I, max(1, most)):
            inputs = [tensors[0][images], tensors[1][images], *tensors[2:8]]
            rest = cu_seqlens, None if region_lengths is None else region_lengths[images], scale
            nodes, kept = torch.ops.itm_fast.similarity_nodes.default(*inputs, *rest, backend)
            with torch.enable_grad():
                leaf = nodes.detach().requires_grad_()
                parameters = [x.detach().requires_grad_(n) for x, n in zip(tensors[8:], needs[8:], strict=True)]
                result = score(head(leaf, node_bounds(cu_seqlens), *parameters[:-2]), *parameters[-2:])
            leaves = [leaf, *(x for x in parameters if x.requires_grad)]
            d_nodes, *d_head = torch.autograd.grad(result, leaves, grad[images].to(made))
            del result
            d_inputs = []
            if any(needs[:8]):
                d_inputs = torch.ops.itm_fast.similarity_nodes_backward.default(
                    d_nodes, needs[:8], *inputs, *rest, [nodes, kept], backend
                )
            found = iter([*d_inputs, *d_head])
            for k, whole in enumerate(total):
                if whole is not None:
                    (whole[images] if k < 2 else whole).add_(next(found))
    return [x for x in total if x is not None]
