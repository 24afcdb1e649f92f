"""The backward pass of the pair scorers in `similarity_score` by those of `similarity_nodes` and of the head.

Numbers of equations are those of `similarity_score`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._checks import work_dtype
from .._workspace import current_gib, scratch_bytes, workspace
from ..packing import node_bounds, spans, starts
from . import _recompute
from ._cpu_calls import implementation
from ._declare import Counts, Floats, Given, Integers, Result, cpu_only
from ._kept import Keeping, free
from ._score_heads import GRAPH, OUTPUT, SCORE, Head, scored
from ._torch.similarity_nodes import nodes_of_pairs, numbers_of_pair
from .similarity_graph import PARAMETERS
from .similarity_nodes import OF_PAIRS

CPU_NODES = 64 << 20  # bytes of what the `cpu` backend holds of some pairs' nodes, and of gradients not in their place
MOST_KEPT = 232 << 20  # bytes of the nodes that `cpu` keeps for the backward pass, at most 1 / SHARE of the scratch
SHARE = 4
# Pairs without a gradient are left out where at most one in so many has one. In C++ a pair takes as long alone as among
# all; in PyTorch on a GPU it takes longer alone.
FEW_NODES = {"cpu": _recompute.FEW_ALONE, "triton": _recompute.FEW}
# By W_l, whether the last backward pass took the nodes of all pairs. The forward pass does not know the loss: one of
# few pairs, as by hardest negatives, has no use for kept nodes; their room is then left unwritten: it takes no memory.
_took_all = WeakTensorKeyDictionary()


def _kept_rows(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return given["kept"][1], size["N"] + size["T"]


def _kept_nodes(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return (*_kept_rows(size, given), size["S"])


# The backward pass of (2), with the graph as head, and of (3): from nodes on, and through their norm. The gradient of y
# takes the nodes' place: with node = y / (|y| + 1e-8) and `inverse` = 1 / (|y| + 1e-8).
GRAPH_HEAD = cpu_only(
    "similarity_graph_head",
    [
        *(Floats("nodes", "I M S"), *PARAMETERS, *SCORE),
        *(Floats("inverse", "I M", fixed=True), Integers("cu_seqlens", "T+1"), *OUTPUT),
    ],
    [Result("score", "I T")],
)
# Forward, which keeps the nodes of the first `kept[0]` images, and what their backward pass needs beside them, where
# there is room for `kept[1]`.
KEPT = cpu_only(
    "similarity_graph_score_kept",
    [*(argument for group in GRAPH.groups for argument in group), Counts("kept")],
    [Result("score", "I T"), Result("nodes", _kept_nodes, wide=True), Result("inverse", _kept_rows, wide=True)],
    backward="torch",
)


_Back = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]  # of a `_Part`


class _Part(NamedTuple):
    """Some pairs, as images [I] that are all paired with captions [T], in the backward pass.

    Attributes:
        images: where the gradients of their image and image_global belong.
        nodes: [I, M, S], computed again, and in the cpu backend `inverse` [I, M].
        bounds: [T + 1] of the captions' nodes.
        grad: [I, T], the gradient of their results.
        back: (gradient, known) -> the gradients of the inputs that need one. The gradient is that of the nodes, and
            `known` the nodes and `inverse`; or, in the cpu backend, it is that of y, and `known` is empty.
    """

    images: slice
    nodes: Sequence[Tensor]
    bounds: Tensor
    grad: Tensor
    back: _Back


def _some_images(
    backend: str,
    grad: Tensor,
    needs: Sequence[bool],
    inputs: Sequence[Tensor],
    rest: Sequence[Any],
    most: int,
    held: Sequence[Tensor],
) -> Iterator[_Part]:
    """All pairs: as many images at a time as have at most `most` nodes, one at the least. What is held changes neither
    the parts nor the order of sums."""
    cu_seqlens, region_lengths, scale = rest
    size, known = max(1, most // max(1, len(inputs[2]) + len(inputs[3]))), len(held[0]) if held else 0
    parts = max(1, -(-len(grad) // size))
    for images in spans(len(grad), max(1, -(-len(grad) // parts))):
        part: list[Any] = [inputs[0][images], inputs[1][images], *inputs[2:]]
        part += [cu_seqlens, None if region_lengths is None else region_lengths[images], scale]
        if images.stop <= known:
            nodes = [x[images] for x in held]
        else:
            nodes = torch.ops.itm_fast.similarity_nodes.default(*part, backend)

        def back(gradient, known, part=part):
            return torch.ops.itm_fast.similarity_nodes_backward.default(gradient, needs, *part, list(known), backend)

        yield _Part(images, nodes, node_bounds(cu_seqlens), grad[images], back)


def _single_pairs(
    backend: str, grad: Tensor, needs: Sequence[bool], inputs: Sequence[Tensor], rest: Sequence[Any], most: int
) -> Iterator[_Part]:
    """The pairs that have a gradient, as one image with as many captions: as many at a time as take at most `most`
    numbers, one at the least."""
    (_, R, D), S = inputs[0].shape, len(inputs[4])
    all_images, all_captions = grad.nonzero(as_tuple=True)
    lengths = rest[0].diff().long()[all_captions]
    if backend == "cpu":
        size = (lengths + 1) * (2 * S + D)
    else:
        size = torch.full_like(lengths, numbers_of_pair(R, D, S, int(lengths.max()) if len(lengths) else 0))
    edge, until, start = starts(lengths + 1), starts(size), 0
    while start < len(all_images):
        stop = max(start + 1, int(torch.searchsorted(until, until[start] + most, right=True)) - 1)
        image, caption, bounds = all_images[start:stop], all_captions[start:stop], edge[start : stop + 1] - edge[start]
        nodes, back = _NODES_OF_PAIRS[backend](needs, *inputs, *rest, image, caption, bounds)
        yield _Part(slice(None), [x[None] for x in nodes], bounds, grad[image, caption][None], back)
        start = stop


def _nodes_by_cpu(needs: Sequence[bool], *args: Any) -> tuple[Sequence[Tensor], _Back]:
    """The nodes of single pairs in C++ and `inverse`, and what a `_Part` has as `back`."""
    run = implementation(OF_PAIRS.name)

    def back(gradient: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
        return run.backward(gradient[0], needs, *args, results=[x[0] for x in known])

    return run.forward(*args), back


def _nodes_by_torch(needs: Sequence[bool], *args: Any) -> tuple[Sequence[Tensor], _Back]:
    """The same in batched PyTorch."""
    work = work_dtype(args[0])  # also of what the pairs that share a feature add to its gradient
    leaves = [x.detach().to(work).requires_grad_(need) for x, need in zip(args, needs)]
    with torch.enable_grad():
        nodes = nodes_of_pairs(*leaves, *args[len(leaves) :])
    wanted = [x for x in leaves if x.requires_grad]

    def back(d_nodes: Tensor, _: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(nodes, wanted, d_nodes[0].to(work)))

    return [nodes.detach().to(args[0].dtype)], back


# Triton's kernels take all pairs of some images and captions. Few single pairs are little work, however it is done.
_NODES_OF_PAIRS = {"cpu": _nodes_by_cpu, "triton": _nodes_by_torch}


def backward(
    head: Head, backend: str, grad: Tensor, needs: Sequence[bool], *args: Any, kept: list[Tensor] | None = None
) -> list[Tensor]:
    """(4) to (6) by the backward passes of `similarity_nodes` and of the head in `backend`, some pairs at a time.

    The nodes of these pairs are computed again first, unless they are in `kept`, as `_keep` returns it. With the graph
    in the cpu backend, gradients are written over the nodes.
    """
    few = _recompute.few_pairs(grad, FEW_NODES[backend])
    if kept is not None:
        _took_all[args[4]] = not few
        if few:
            free(kept)  # before the gradients take memory
    inputs, parameters, score, statistics, rest, options, (output,) = head.split(args)
    n, work = len(inputs), work_dtype(grad)
    # Triton's kernels multiply what the inputs' dtype holds; the C++ ones widen all they read.
    made = grad.dtype if backend == "triton" else work
    tensors = [x.detach().to(made) for x in (*inputs, *parameters, *score)]
    total = [torch.zeros_like(x, dtype=work) if need else None for x, need in zip(tensors, needs, strict=True)]
    inputs, S = tensors[:n], len(tensors[4])
    grad = grad.to(made)
    # The nodes and their gradients take half of the scratch, and the ops that run on them the other.
    room, wanted = scratch_bytes(grad.device) // 2, needs[:n]
    if backend == "cpu":
        room = min(room, CPU_NODES)
    if few:
        parts = _single_pairs(backend, grad, wanted, inputs, rest, room // work.itemsize)
    else:
        held = [x[: int(kept[-1])] for x in kept[:-1]] if kept else []  # of the images that have been written
        row = (1 if _in_cpp(head, backend) else 2) * S * made.itemsize  # nodes, and their gradients elsewhere
        parts = _some_images(backend, grad, wanted, inputs, rest, room // (row or 1), held)
    with workspace(current_gib() / 2):
        for part in parts:
            of_head = [any(wanted), *needs[n:]]
            found = _through_head(head, backend, part, of_head, tensors[n:], statistics, options, output)
            known = [] if _in_cpp(head, backend) else part.nodes
            d_inputs = part.back(found.pop(0), known) if any(wanted) else []
            added = iter([*d_inputs, *found])
            for k, whole in enumerate(total):
                if whole is not None:
                    (whole[part.images] if k < 2 else whole).add_(next(added))
    return [x for x in total if x is not None]


def _in_cpp(head: Head, backend: str) -> bool:
    """Whether `GRAPH_HEAD` is the head's backward pass."""
    return backend == "cpu" and head is GRAPH


def _through_head(
    head: Head, backend: str, part: _Part, needs: Sequence[bool], tensors, statistics, options, output: str
) -> list[Tensor]:
    """(4) and (5): the gradients of the nodes, of the head's parameters and of the score's that `needs` marks; by
    `GRAPH_HEAD` those of y instead of those of the nodes."""
    nodes, *inverse = part.nodes
    if _in_cpp(head, backend):
        run = implementation(GRAPH_HEAD.name)
        return run.backward(part.grad, needs, nodes, *tensors, *inverse, part.bounds, output)
    op = partial(getattr(torch.ops.itm_fast, head.op).default, backend=backend)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(need) for x, need in zip((nodes, *tensors), needs, strict=True)]
        z = head.vectors(op, leaves[0], part.bounds, leaves[1:-2], statistics, options)
        scores = scored(output, z, *leaves[-2:])
    return list(torch.autograd.grad(scores, [x for x in leaves if x.requires_grad], part.grad))


def _keep(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """`similarity_graph_score` in C++ where a gradient may be asked for, the first images' nodes, and of how many.

    None are kept of half inputs: forward multiplies these in their dtype and backward in float32, whose nodes differ.
    """
    image, _, words, caption_global, weight = args[:5]
    work = work_dtype(image)
    row = (len(words) + len(caption_global)) * (len(weight) + 1) * work.itemsize
    room = min(MOST_KEPT, scratch_bytes(image.device) // SHARE) if image.dtype == work else 0
    images = min(len(image), room // (row or 1))
    written = images if _took_all.get(weight) else 0
    score, *kept = implementation(KEPT.name).forward(*args, [written, images])
    return score, [*kept, torch.tensor(written, device="cpu")]


def _with_kept(grad: Tensor, needs: Sequence[bool], *args: Any, kept: list[Tensor]) -> list[Tensor]:
    with workspace(current_gib() * (SHARE - 1) / SHARE):
        return backward(GRAPH, "cpu", grad, needs, *args, kept=kept)


KEEPING = Keeping("similarity_graph_score", _keep, _with_kept)
