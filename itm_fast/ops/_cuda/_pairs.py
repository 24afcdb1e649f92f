"""What the kernels of the pair scorers share: their tiles, attention weights, and the nodes of global vectors.

For each window of neighbouring captions and some images, `weights` computes the attention weights, `global_nodes` the
nodes of global vectors, and the head's kernel the other nodes and the scores. Scratch: the results of the first two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._cuda import Kernel, launch
from ..._workspace import scratch_bytes
from ...packing import bounds, checked, kept, node_bounds, node_plan, spans
from .. import _attention

KINDS = {torch.float16: "F16", torch.bfloat16: "BF16"}
THREADS = 256
SIMILARITIES = (64, 128, 256)  # S
REGIONS = 128  # the most regions of an image
SLOTS = (32, 64, 128)  # rows of a tile of nodes
DEPTHS = (64, 32, 16)  # numbers of a row that a stage of a product holds, best first
WORDS, CAPTIONS = 128, 16  # of a tile of `weights`
WINDOW = 1 << 14  # the most nodes of one image in a launch
# The most scratch of a launch: what the first kernels write is then still in the L2 cache when the last one reads it.
LAUNCH_BYTES = 32 << 20
BLOCKS_Y = 65535  # the most blocks of a grid in y


class Weights(ctypes.Structure):
    """The argument of `weights` (csrc/cuda/weights.cu)."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "image", "factor", "unit", "cut", "tile", "count", "weight")),
        ("inverse", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("images", "regions", "dim", "first", "size")),
        ("scale", ctypes.c_float),
    ]


class GlobalNodes(ctypes.Structure):
    """The argument of `global_nodes` (csrc/cuda/global_nodes.cu)."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("image", "caption", "weight", "bias", "result")),
        *((name, ctypes.c_int) for name in ("captions", "dim")),
    ]


class Nodes(ctypes.Structure):
    """What a head's kernel makes the nodes of its tile from (csrc/cuda/nodes.h)."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "image", "weight", "inverse", "overall", "local_weight")),
        *((name, ctypes.c_void_p) for name in ("local_bias", "row", "owner", "start", "count")),
        *((name, ctypes.c_int) for name in ("regions", "dim", "pitch", "first_word", "size")),
        *((name, ctypes.c_int) for name in ("first_caption", "captions")),
    ]


Head = Callable[[str, int, int, int, int], Kernel]  # kind, S, slots, depth, regions -> the head's kernel


def shared_limit(device: torch.device) -> int:
    """The most bytes of shared memory that a block can have."""
    properties = torch.cuda.get_device_properties(device)
    kept_back = 1024 if properties.major >= 8 else 0
    return properties.shared_memory_per_multiprocessor - kept_back


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless it is contiguous and starts at a multiple of 16 bytes, as kernels copy 16 at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def weight_images(pitch: int) -> int:
    """Images of a tile of `weights`, whose regions take `pitch` columns each."""
    return 2 * (4 if pitch <= 20 else 80 // pitch) if pitch <= 80 else 1


def weight_kernel(kind: str, pitch: int, depth: int) -> Kernel:
    warps, images = 2 if pitch <= 80 else 1, weight_images(pitch)
    squares = warps * WORDS * (pitch if pitch % 16 else pitch + 8) * 4
    stages = 2 * (WORDS + images * pitch) * depth * 2
    shared = max(squares, stages) + 4 * (CAPTIONS * images * pitch + WORDS + images)
    return Kernel("weights.cu", f"weights<{kind}, {pitch}, {depth}>", Weights, THREADS, shared)


def tile_bytes(S: int, slots: int, depth: int) -> int:
    """Shared memory of `NodeTile::Shared`."""
    return 4 * S * depth + 28 * slots + 20 * (slots // 16) + 4


def making_bytes(slots: int, depth: int, regions: int) -> int:
    """Shared memory of `NodeTile::Making`."""
    few = next(n for n in (16, 32, 64, 128) if regions <= n)
    return 4 * (slots + regions) * depth + 2 * slots * few


def global_kernel(kind: str, S: int, slots: int, depth: int) -> Kernel:
    shared = 4 * slots * depth + tile_bytes(S, slots, depth)
    return Kernel("global_nodes.cu", f"global_nodes<{kind}, {S}, {slots}, {depth}>", GlobalNodes, THREADS, shared)


def fitting(make: Callable[[int], Kernel], limit: int) -> Kernel | None:
    """The kernel of the greatest depth that fits."""
    return next((kernel for kernel in map(make, DEPTHS) if kernel.shared <= limit), None)


class Tiles(NamedTuple):
    """The kernels of a call: those that make what the head reads, and the head's by the slots of its tile."""

    weights: Kernel
    overall: Kernel
    overall_slots: int
    head: dict[int, Kernel]


def tiles(head: Head, dtype: torch.dtype, R: int, S: int, limit: int) -> Tiles | None:
    """The kernels that fit a GPU whose blocks have `limit` bytes of shared memory, None if there are none."""
    kind, pitch, regions = KINDS[dtype], rounded_up(R, 8), rounded_up(R, 16)
    weights = fitting(lambda depth: weight_kernel(kind, pitch, depth), limit)
    found = {n: fitting(lambda depth, n=n: head(kind, S, n, depth, regions), limit) for n in SLOTS}  # type: ignore
    heads = {n: kernel for n, kernel in found.items() if kernel}
    for slots in (64, 32):
        overall = fitting(lambda depth, n=slots: global_kernel(kind, S, n, depth), limit)  # type: ignore
        if weights and heads and overall:
            if 64 in heads:  # a tile of 32 reads the weights twice as often
                heads.pop(32, None)
            return Tiles(weights, overall, slots, heads)
    return None


def why_not(
    head: Head, dtype: torch.dtype, D: int, R: int, S: int, nodes: int, device: torch.device
) -> str | None:
    """Why the kernels cannot score captions of up to `nodes` nodes, None if they can.

    The answer for nodes = 0 holds for captions of any length.
    """
    if dtype not in KINDS:
        return f"the cuda backend has no kernels for {str(dtype).removeprefix('torch.')}"
    if D % 8:
        return f"the cuda backend needs D to be a multiple of 8, got {D}"
    if not 1 <= R <= REGIONS:
        return f"the cuda backend takes 1 to {REGIONS} regions, got R = {R}"
    if S not in SIMILARITIES:
        return f"the cuda backend needs S to be {', '.join(map(str, SIMILARITIES))}, got {S}"
    fit = tiles(head, dtype, R, S, shared_limit(device))
    if fit is None:
        return f"the cuda backend needs more shared memory than this GPU has for R = {R} and S = {S}"
    if nodes > max(fit.head):
        return f"the cuda backend takes captions of up to {max(fit.head) - 1} words on this GPU, got {nodes - 1}"
    return None


class Plan(NamedTuple):
    """Tiles of `weights`: `first` [tiles + windows] int32, the first caption of each tile of a window and the window's
    end; and where each window begins in it."""

    first: Tensor
    begin: list[int]


def weight_plan(cu_seqlens: Tensor, rows: int, op: str, windows: Sequence[slice]) -> Plan:
    """Cut each window into tiles of at most 128 words and 16 captions; see `kept`."""
    key = "weight tiles", rows, tuple((w.start, w.stop) for w in windows)
    return kept(cu_seqlens, key, lambda values: _weight_plan(values, windows))


def _weight_plan(values: Tensor, windows: Sequence[slice]) -> Plan:
    edge, first, begin = values.tolist(), list[int](), list[int]()
    for window in windows:
        begin.append(len(first))
        first.append(window.start)
        for t in range(window.start, window.stop):
            if edge[t + 1] - edge[first[-1]] > WORDS or t - first[-1] == CAPTIONS:
                first.append(t)
        first.append(window.stop)
    begin.append(len(first))
    return Plan(torch.tensor(first, dtype=torch.int32).to(values.device), begin)


def region_counts(op: str, image: Tensor, region_lengths: Tensor | None) -> Tensor:
    """Regions of each image, [I] int32.

    Raises:
        ValueError: a count lies outside 1..R.
    """
    I, R = image.shape[:2]
    if region_lengths is None:
        return torch.full((I,), R, dtype=torch.int32, device=image.device)
    kept(region_lengths, ("regions", R), lambda values: _attention.region_counts(values, image, op))
    return aligned(checked(region_lengths).to(torch.int32))


def factors(image: Tensor, count: Tensor, pitch: int) -> tuple[Tensor, Tensor]:
    """F with F^T F = x x^T for each image's regions x, upper triangular.

    Returns:
        [I, 2, pitch, pitch] float16, whose sum over the second dimension is F divided by the second result; that is
        [I] float32, powers of two. A pivot that is rounding only gives a row of zeros.
    """
    I, R, D = image.shape
    result = image.new_zeros(I, 2, pitch, pitch, dtype=torch.float16)
    unit = image.new_ones(I, dtype=torch.float32)
    size = 8 * (R * D + 4 * R * R)
    for images in spans(I, max(1, scratch_bytes(image.device) // size)):
        beyond = torch.arange(R, device=image.device)[None, :] >= count[images, None]
        x = image[images].double().masked_fill(beyond[:, :, None], 0.0)
        rest = x @ x.transpose(1, 2)
        least = 1e-14 * rest.diagonal(dim1=1, dim2=2).amax(1)
        F = torch.zeros_like(rest)
        for r in range(R):
            pivot = rest[:, r, r]
            row = torch.where((pivot > least)[:, None], rest[:, r] / pivot.clamp_min(1e-300).sqrt()[:, None], 0.0)
            F[:, r, r:] = row[:, r:]
            rest -= F[:, r, :, None] * F[:, r, None, :]
        largest = F.abs().amax((1, 2))
        exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0))[1] - 9  # F is below 512 units
        power = torch.ldexp(torch.ones_like(largest), exponent)
        high = (F / power[:, None, None]).half()
        low = (F / power[:, None, None] - high.double()).half()
        result[images, 0, :R, :R], result[images, 1, :R, :R] = high, low
        unit[images] = power.float()
    return result, unit


def scores(op: str, given: Sequence[Any], head: Head, problem: Callable[[Nodes, int, int], ctypes.Structure]) -> Tensor:
    """Scores [I, T] of a pair scorer.

    Args:
        op: what errors name.
        given: the arguments of `similarity_nodes`.
        head: the head's kernel.
        problem: the head's argument for some nodes, the address of the scores of its first image, and T.

    Raises:
        NotImplementedError: the kernels cannot score these shapes on this device; the message says why.
    """
    *tensors, cu_seqlens, region_lengths, scale = given
    image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias = tensors
    (I, R, D), (N, T, S), device = image.shape, (len(words), len(caption_global), len(local_weight)), image.device
    edge, nodes = bounds(cu_seqlens, N, op), node_bounds(cu_seqlens)
    count = region_counts(op, image, region_lengths)
    score = image.new_empty(I, T)
    if not score.numel():
        return score
    longest = max(b - a for a, b in zip(edge, edge[1:])) + 1
    if problem_ := why_not(head, image.dtype, D, R, S, longest, device):
        raise NotImplementedError(f"{op}: {problem_}")
    fit = tiles(head, image.dtype, R, S, shared_limit(device))
    assert fit is not None
    pitch = rounded_up(R, 8)
    image, image_global, words, caption_global, local_weight, global_weight = map(
        aligned, (image, image_global, words, caption_global, local_weight, global_weight)
    )
    local_bias, global_bias = aligned(local_bias.float()), aligned(global_bias.float())
    factor, unit = factors(image, count, pitch)
    plan = node_plan(nodes, N + T, op, sorted(fit.head), WINDOW)
    cut = aligned(checked(cu_seqlens).to(torch.int32))
    tile = weight_plan(cu_seqlens, N, op, [w.captions for w in plan.windows])
    itemsize = image.dtype.itemsize
    for n, window in enumerate(plan.windows):
        captions = window.captions
        first_word, first, size = edge[captions.start], captions.start, captions.stop - captions.start
        many = edge[captions.stop] - first_word
        each = many * (pitch * itemsize + 4) + size * S * itemsize
        room = min(scratch_bytes(device), LAUNCH_BYTES)
        for images in spans(I, min(BLOCKS_Y, max(1, room // each))):
            some = images.stop - images.start
            weight = image.new_empty(some, many, pitch)
            inverse = image.new_empty(some, many, dtype=torch.float32)
            overall = image.new_empty(some, size, S)
            regions = image.data_ptr() + images.start * R * D * itemsize
            launch(
                fit.weights,
                Weights(
                    words.data_ptr(), regions, factor[images].data_ptr(), unit[images].data_ptr(), cut.data_ptr(),
                    tile.first[tile.begin[n] :].data_ptr(), count[images].data_ptr(), weight.data_ptr(),
                    inverse.data_ptr(), some, R, D, first_word, many, scale,
                ),
                (tile.begin[n + 1] - tile.begin[n] - 1, -(-some // weight_images(pitch))),
                device,
            )  # fmt: skip
            launch(
                fit.overall,
                GlobalNodes(
                    image_global[images].data_ptr(), caption_global[captions].data_ptr(), global_weight.data_ptr(),
                    global_bias.data_ptr(), overall.data_ptr(), size, D,
                ),
                (-(-size // fit.overall_slots), some),
                device,
            )  # fmt: skip
            for group in window.tiles:
                part = Nodes(
                    words.data_ptr(), regions, weight.data_ptr(), inverse.data_ptr(), overall.data_ptr(),
                    local_weight.data_ptr(), local_bias.data_ptr(), plan.row[group.first :].data_ptr(),
                    plan.owner[group.first :].data_ptr(), plan.start.data_ptr(), count[images].data_ptr(), R, D, pitch,
                    first_word, many, first, size,
                )  # fmt: skip
                to = score[images].data_ptr()
                launch(fit.head[group.size], problem(part, to, T), (group.number, some), device)
    return score
