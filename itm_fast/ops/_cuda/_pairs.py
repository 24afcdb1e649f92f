"""What the kernels of the pair scorers share: their tiles, attention weights, and the nodes of global vectors.

For each window of neighbouring captions and some images, `weights` computes the attention weights, `global_nodes` the
nodes of global vectors, and the head's kernel the other nodes and the scores. Scratch: the results of the first two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _cuda
from ..._checks import matmul_precision
from ..._cuda import CLUSTERS, GENERAL, GROUPS, Kernel
from ...packing import bounds, checked, kept, node_bounds, node_plan, region_counts, spans
from .. import _attention
from .._attention import TENSOR_FLOAT32
from . import _blocks, _rows
from ._tiles import Pairs, Plan, Tile, _plan, shared_limit, tile_of
from .cross_attention_score import Attention, Grams, aligned, copied_bytes

KINDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F16X3"}
THREADS = 256
SIMILARITIES = (64, 128, 256)  # S
# Rows of a tile of nodes, best first: each tile of each image reads the matrices of weights anew.
SLOTS = (128, 64, 32)
DEPTHS = (64, 32, 16)  # numbers of a row that a stage of a product holds, best first
COMPARED = SIMILARITIES[-1:]  # S of variants for one GPU: what the check of first use compares with the other kernels
# Tiles that two groups of four warps multiply, 64 rows each: slots, and 16-bit numbers of a stage's rows.
GROUPED_SLOTS, GROUPED = 128, 64
WINDOW = 1 << 14  # the most nodes of one image in a launch
# The most scratch of a launch: what the first kernels write is then still in the L2 cache when the last one reads it.
LAUNCH_BYTES = 32 << 20
BLOCKS_Y = 65534  # the most blocks of a grid in y, in whole clusters


class Weights(ctypes.Structure):
    """The argument of `weights` (csrc/cuda/weights.cu)."""

    _fields_ = [
        ("pairs", Pairs),
        ("attention", Attention),
        ("grams", Grams),
        *((name, ctypes.c_void_p) for name in ("weight", "inverse")),
        *((name, ctypes.c_int) for name in ("first", "size")),
    ]


class GlobalNodes(ctypes.Structure):
    """The argument of `global_nodes` (csrc/cuda/global_nodes.cu)."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("image", "caption", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("image_exponent", "caption_exponent", "weight_exponent", "result")),
        *((name, ctypes.c_int) for name in ("captions", "chunks")),
    ]


class Nodes(ctypes.Structure):
    """What a head's kernel makes the nodes of its tile from (csrc/cuda/nodes.h)."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "image", "weight", "inverse", "overall", "local_weight")),
        *((name, ctypes.c_void_p) for name in ("local_bias", "word_exponent", "weight_exponent")),
        *((name, ctypes.c_void_p) for name in ("row", "owner", "start", "count")),
        *((name, ctypes.c_int) for name in ("regions", "pitch", "chunks", "first_word", "size")),
        *((name, ctypes.c_int) for name in ("first_caption", "captions", "images", "stages")),
        *((name, ctypes.c_void_p) for name in ("stream", "failed")),
    ]


class Kind(NamedTuple):
    """How numbers are stored and multiplied: the name in C++, whether rows have exponents, and halves of a number."""

    name: str
    scaled: bool
    halves: int

    def arguments(self, *sizes: int, longest: int = 0) -> str:
        """Template arguments; `longest`: slots of the longest caption, 0 if GENERAL (LONGEST in csrc/cuda/nodes.h)."""
        flags = [str(self.scaled).lower()] * (longest > 0 or (self.scaled and self.halves == 1))
        return ", ".join([self.name, *map(str, sizes), *flags, *[str(longest)] * (longest > 0)])

    @property
    def squared(self) -> bool:
        """Whether squares of differences need exponents: `SQUARED` in nodes.h."""
        return self.name != "BF16"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "BF16" else torch.float16


def kind_of(dtype: torch.dtype) -> Kind:
    """The kind for inputs of a dtype."""
    if dtype != torch.float32:
        return Kind(KINDS[dtype], False, 1)
    return Kind(KINDS[dtype], True, 2) if matmul_precision() == "highest" else Kind("F16", True, 1)


class Rows(NamedTuple):
    """Rows [..., n, D] as the kernels read them, and their exponents; see `_rows.split_rows` and `compared_rows`."""

    data: Tensor
    exponent: Tensor | None

    def part(self, some: slice) -> Rows:
        return Rows(self.data[some], None if self.exponent is None else self.exponent[some])

    @property
    def addresses(self) -> tuple[int, int | None]:
        return self.data.data_ptr(), None if self.exponent is None else self.exponent.data_ptr()


def rows_of(x: Tensor, kind: Kind) -> Rows:
    """The rows of x [..., D] for products of a kind."""
    if not kind.scaled:
        return Rows(aligned(x), None)
    found = _rows.split_rows(aligned(x).view(-1, x.shape[-1]), kind.halves == 2)
    return Rows(found.rows.view(*x.shape[:-1], -1), found.exponent.view(x.shape[:-1]))


def compared_rows(x: Tensor, kind: Kind) -> Rows:
    """`rows_of` x [n, D], and exponents in float16 too, beyond whose range squares of differences may lie.

    All numbers of a row are below 2^(exponent + 9), as those of `_rows.split_rows` are.
    """
    found = rows_of(x, kind)
    if kind.scaled or not kind.squared:
        return found
    largest = torch.linalg.vector_norm(found.data, torch.inf, dim=1).float()
    return Rows(found.data, (largest.frexp().exponent - 9).clamp(-9, 7))  # of infinity and NaN: any number


# Kind, S, slots, regions, depth, variant, slots of the longest caption, 0 if GENERAL -> the head's kernel.
Head = Callable[[Kind, int, int, int, int, int, int], Kernel]


def rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def weight_kernel(kind: Kind, tile: Tile) -> Kernel:
    name = f"weights<{kind.name}, {tile.columns}, {tile.slots}, {tile.side}>"
    return Kernel("weights.cu", name, Weights, tile.threads, tile.shared)


def tile_bytes(kind: Kind, S: int, slots: int, depth: int, variant: int = GENERAL, places: int = 2) -> int:
    """Shared memory of `NodeTile::Shared`; `places`: stages of S rows that it holds."""
    rows = 12 * slots + 20 * (slots // 16) + 4 + (4 * slots if kind.squared else 4)
    parts = 4 * slots * 4 if variant == GENERAL else 4  # of four warps that share rows
    own = 2 * places * S * depth * kind.halves + rows + parts
    return rounded_up(own, 8) + 16 * places + 8 if variant == CLUSTERS else own


def making_bytes(kind: Kind, slots: int, depth: int, regions: int, variant: int = GENERAL) -> int:
    """Shared memory of `NodeTile::Making`."""
    few = next(n for n in (16, 32, 64, 128)[2 * (variant != GENERAL) :] if regions <= n)
    return kind.halves * (4 * (slots + regions) * depth + 2 * slots * few)


def global_kernel(kind: Kind, S: int, slots: int, depth: int) -> Kernel:
    shared = 4 * slots * depth * kind.halves + tile_bytes(kind, S, slots, depth)
    return Kernel("global_nodes.cu", f"global_nodes<{kind.arguments(S, slots, depth)}>", GlobalNodes, THREADS, shared)


def node_tiles(slots: Iterable[int], kind: Kind) -> Iterator[tuple[int, int]]:
    """Slots and depths of tiles of nodes, best first. Pairs of halves lie in blocks of 32 numbers."""
    return ((n, depth) for n in slots for depth in DEPTHS if depth % 32 == 0 or kind.halves == 1)


def fitting(
    make: Callable[[int, int], Kernel], tiles: Iterable[tuple[int, int]], limit: int
) -> tuple[Kernel, int] | None:
    """The kernel of the first of `tiles` (slots, depth) that fits, and its slots."""
    made = ((make(*tile), tile[0]) for tile in tiles)
    return next(((kernel, n) for kernel, n in made if kernel.shared <= limit), None)


class Kernels(NamedTuple):
    """The kernels of a call: those that make what the head reads, and the head's; with the slots of their tiles."""

    tile: Tile
    weights: Kernel
    overall: Kernel
    overall_slots: int
    head: Kernel
    head_slots: int
    words: int  # the most of a caption


def kernels(
    head: Head, kind: Kind, R: int, S: int, capability: tuple[int, int], variant: int = GENERAL
) -> Kernels | None:
    """The kernels that fit a GPU of a compute capability, None if there are none.

    Args:
        head: the head's kernel.
        kind: of the numbers.
        R, S: sizes.
        capability: of the GPU.
        variant: the best one of the head's kernel to take; see `_cuda.variant`.
    """
    limit, tile = shared_limit(capability), tile_of(R, capability)
    weights, regions = weight_kernel(kind, tile), rounded_up(pitch_of(tile), 16)
    tiles = node_tiles(SLOTS, kind)
    found = fitting(lambda slots, depth: head(kind, S, slots, regions, depth, GENERAL, 0), tiles, limit)
    longest = found[1] if found else 0  # slots of a caption, of all variants
    words = min(longest - 1, tile.slots)
    if S in COMPARED and found:
        slots, depth = GROUPED_SLOTS, GROUPED // kind.halves
        for better in range(variant, GENERAL, -1):
            # What does not fit at the published S is never compared at first use, so that no S takes it.
            made = [head(kind, s, slots, regions, depth, better, longest) for s in (S, SIMILARITIES[-1])]
            if all(kernel.shared <= limit for kernel in made):
                found = made[0], slots
                break
    # The nodes leave through the stages of the matrix. 128 rows of pairs of halves do not fit the registers.
    fewer = node_tiles(SLOTS[kind.halves == 2 :], kind)
    overall = fitting(partial(global_kernel, kind, S), (tile for tile in fewer if tile[0] <= 2 * tile[1]), limit)
    if weights.shared > limit or not found or not overall:
        return None
    return Kernels(tile, weights, *overall, *found, words)


def why_not(
    head: Head, dtype: torch.dtype, size: Mapping[str, int], words: int, capability: tuple[int, int]
) -> str | None:
    """Why the kernels cannot score captions of up to `words` words, one sentence; None if they can.

    Args:
        head: the head's kernel.
        dtype: of the inputs.
        size: R, D and S.
        words: the most words of a caption.
        capability: of the GPU.
    """
    R, D, S = size["R"], size["D"], size["S"]
    if problem := _attention.beyond_cuda(R, D, words, capability < TENSOR_FLOAT32):
        return problem
    if S not in SIMILARITIES:
        return f"CUDA kernels need S to be {', '.join(map(str, SIMILARITIES[:-1]))} or {SIMILARITIES[-1]}, got {S}"
    fit, what = kernels(head, kind_of(dtype), R, S, capability), f"R = {R}, S = {S} and {str(dtype)[6:]}"
    if fit is None:
        return f"CUDA kernels need more shared memory than this GPU has for {what}"
    if words > fit.words:
        most = f"captions of at most {fit.words} words for {what}"
        return f"CUDA kernels take {most}, as this GPU has too little shared memory for more, got {words}"
    return None


def pitch_of(tile: Tile) -> int:
    """Numbers in a row of attention weights."""
    return rounded_up(tile.columns, 8)


def weight_plans(cu_seqlens: Tensor, edge: list[int], windows: Sequence[slice], slots: int) -> list[Plan]:
    """The tiles of `weights` for each window of captions; see `kept`."""
    key = "weight tiles", slots, tuple((w.start, w.stop) for w in windows)
    return kept(
        cu_seqlens, key, lambda values: [_plan(edge[w.start : w.stop + 1], slots, values.device) for w in windows]
    )


def compilations(head: Head, capability: tuple[int, int]) -> Iterator[Kernel]:
    """The kernels of a scorer that may run on a GPU of a compute capability, for the published sizes; and those that
    multiply by groups of warps in bfloat16 for the 100 regions that detectors are often asked for."""
    kinds = [Kind("F16", False, 1), Kind("F16", True, 1), Kind("F16X3", True, 2)]
    kinds += [Kind("BF16", False, 1)] * (capability >= TENSOR_FLOAT32)
    for kind in kinds:
        for variant in range(CLUSTERS + 1 if capability == _cuda.SPECIFIC else 1):
            if fit := kernels(head, kind, 36, SIMILARITIES[-1], capability, variant):
                yield from (fit.weights, fit.overall, fit.head)
    if capability == _cuda.SPECIFIC and (fit := kernels(head, kinds[-1], 100, SIMILARITIES[-1], capability, GROUPS)):
        yield from (fit.weights, fit.overall, fit.head)


def scores(
    op: str, arguments: Sequence[Any], head: Head, argument_of: Callable[[Nodes, int, int], ctypes.Structure],
    matrices: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """Scores [I, T] of a pair scorer.

    Args:
        op: what errors name.
        arguments: those of `similarity_nodes`.
        head: the head's kernel.
        argument_of: the head's argument for some nodes, the address of the scores of its first image, and T.
        matrices: what the head multiplies nodes with, each [S, S] as products read it, in this order.

    Raises:
        NotImplementedError: the kernels cannot score these shapes on this device; the message says why.
    """
    *tensors, cu_seqlens, region_lengths, scale = arguments
    image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias = tensors
    (I, R, D), (N, T, S), device = image.shape, (len(words), len(caption_global), len(local_weight)), image.device
    edge = bounds(cu_seqlens, N, op)
    count = None
    if region_lengths is not None:
        region_counts(region_lengths, image, op)
        count = aligned(checked(region_lengths).to(torch.int32))
    score = image.new_empty(I, T)
    if not score.numel():
        return score
    capability = torch.cuda.get_device_capability(device)
    longest = max(b - a for a, b in zip(edge, edge[1:]))
    if problem := why_not(head, image.dtype, dict(R=R, D=D, S=S), longest, capability):
        raise NotImplementedError(f"{op}: {problem}")
    kind = kind_of(image.dtype)
    fit = kernels(head, kind, R, S, capability, _cuda.variant(op, device, image.dtype))
    assert fit is not None
    tile, pitch, itemsize = fit.tile, pitch_of(fit.tile), 2 * kind.halves
    rows = _rows.split_bytes(D, kind.halves == 2) if kind.scaled else 16 * kind.squared  # or of making an exponent
    image_bytes = (R + 1) * rows + 4 * pitch * (pitch + 1) + R * copied_bytes(image)
    needed = image_bytes, 2 * rows + copied_bytes(words)  # a caption of one word has two rows
    cut = _blocks.blocks(I, edge, *needed, 0, _blocks.room(device) - 2 * S * rows)
    if len(cut) > 1:
        weights = local_weight, local_bias, global_weight, global_bias
        for images, captions in cut:
            given = image[images], image_global[images], words[edge[captions.start] : edge[captions.stop]]
            lengths = _blocks.part(cu_seqlens, region_lengths, images, captions)
            some = *given, caption_global[captions], *weights, *lengths, scale
            score[images, captions] = scores(op, some, head, argument_of, matrices)
        return score
    factors = _rows.image_factors(image, count, pitch)
    regions, local, overall_weight = (rows_of(x, kind) for x in (image, local_weight, global_weight))
    query, v, t = (compared_rows(x, kind) for x in (words, image_global, caption_global))
    stream = None
    if fit.head.cluster > 1:
        stream = torch.cat([_rows.stages(x.to(kind.dtype)) for x in (local.data, *matrices)])
    shared = (0, None, None) if stream is None else (len(stream), stream.data_ptr(), _cuda.fault_address(device))
    local_bias, global_bias = aligned(local_bias.float()), aligned(global_bias.float())
    chunks = query.data.shape[1] // 8
    attention = Attention.of("clipped_l2norm", scale)
    room = _blocks.room(device)
    most = max(1, room // (pitch * itemsize + 4 + S * itemsize))  # nodes of one image
    plan = node_plan(node_bounds(cu_seqlens), N + T, op, [fit.head_slots], min(WINDOW, 1 << most.bit_length() - 1))
    plans = weight_plans(cu_seqlens, edge, [window.captions for window in plan.windows], tile.slots)
    for window, tiles in zip(plan.windows, plans, strict=True):
        captions, first_word = window.captions, edge[window.captions.start]
        size, many = captions.stop - captions.start, edge[captions.stop] - first_word
        each = many * (pitch * itemsize + 4) + size * S * itemsize
        for images in spans(I, min(BLOCKS_Y, max(1, min(room, LAUNCH_BYTES) // each))):
            some = images.stop - images.start
            weight = image.new_empty(some, many, kind.halves, pitch, dtype=kind.dtype)
            inverse = image.new_empty(some, many, dtype=torch.float32)
            overall = image.new_empty(some, size, kind.halves * S, dtype=kind.dtype)
            x, counts = regions.part(images), None if count is None else count[images].data_ptr()
            pairs = Pairs(
                query.addresses[0], x.addresses[0], query.addresses[1] if kind.scaled else None, x.addresses[1], counts,
                *(y.data_ptr() for y in (tiles.first, tiles.caption, tiles.begin, tiles.end, tiles.row, tiles.owner)),
                None, some, R, size, chunks, tiles.tiles, False, None,
            )  # fmt: skip
            grams = Grams(factors.factor[images].data_ptr(), factors.size[images].data_ptr(), None)
            _cuda.launch(
                fit.weights,
                Weights(pairs, attention, grams, weight.data_ptr(), inverse.data_ptr(), first_word, many),
                (tiles.tiles * -(-some // tile.images), 1),
                device,
            )
            given = v.part(images).addresses, t.part(captions).addresses, overall_weight.addresses
            _cuda.launch(
                fit.overall,
                GlobalNodes(
                    *(rows for rows, _ in given), global_bias.data_ptr(), *(exponent for _, exponent in given),
                    overall.data_ptr(), size, chunks,
                ),
                (-(-size // fit.overall_slots), some),
                device,
            )  # fmt: skip
            for group in window.tiles:
                part = Nodes(
                    query.addresses[0], x.addresses[0], weight.data_ptr(), inverse.data_ptr(), overall.data_ptr(),
                    local.addresses[0], local_bias.data_ptr(), query.addresses[1], local.addresses[1],
                    plan.row[group.first :].data_ptr(), plan.owner[group.first :].data_ptr(), plan.start.data_ptr(),
                    counts, R, pitch, chunks, first_word, many, captions.start, size, some,
                    *shared,
                )  # fmt: skip
                argument = argument_of(part, score[images].data_ptr(), T)
                _cuda.launch(fit.head, argument, (group.number, rounded_up(some, fit.head.cluster)), device)
    return score
