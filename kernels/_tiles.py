"""The block sizes of all kernels, by dtype and architecture (80, 90, 100).

Each function serves the kernel that its docstring names and returns block sizes, `num_warps` and `num_stages`. The
comment after each row is the GPU and the date it was tuned on. "untuned": it has only been compiled, without register
spills and within shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from itm_fast._checks import matmul_precision

Tile = dict[str, int]  # a kernel's block sizes and Triton's launch options

# dtype -> Triton's name for it. float64 is left to other backends: the kernels multiply on tensor cores in float32.
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Compilation(NamedTuple):
    """One specialisation of a kernel; `compilations(arch)` of each file yields those that tests compile.

    Attributes:
        kernel: the jit function.
        types: Triton types of its run-time arguments in their order, as in "*fp16 *fp32 i32 fp32".
        constants: its constexpr arguments.
        tile: the row of this file that it runs with: further constexpr arguments, num_warps and num_stages.
        products: whether matrix products dominate its time, so that its sm_90 code must contain wgmma.
    """

    kernel: Callable[..., Any]
    types: str
    constants: dict[str, Any]
    tile: Tile
    products: bool = False


def products(dtype: torch.dtype) -> str:
    """Triton's input_precision for matrix products of `dtype`, by torch.get_float32_matmul_precision().

    Half-precision operands are multiplied as they are, whatever this says.
    """
    if dtype != torch.float32 or matmul_precision() != "highest":
        return "tf32"
    return "tf32x3"


def exact(dtype: torch.dtype) -> str:
    """Triton's input_precision for products whose terms cancel: no less than the inputs' own precision."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """All values that `products` may return for `dtype`."""
    return ("tf32", "tf32x3") if dtype == torch.float32 else ("tf32",)


MAXNREG = 255  # registers per thread, the hardware's most: without it ptxas stops at 128 and spills the rest


def _row(num_warps: int, num_stages: int, **constants: int) -> Tile:
    # enable_fp_fusion is stated because Triton 3.9 warns if it is not: 3.10 changes its default.
    return dict(constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def affinity(dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """kernels/_affinity.py: _affinity."""
    if dtype == torch.float32:
        if arch == 80 and precision == "tf32x3":
            return _row(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, GROUP=8)  # untuned
        return _row(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP=8)  # untuned
    if arch == 80:
        return _row(4, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP=8)  # untuned
    return _row(8, 3, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP=8)  # untuned


def gram(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_affinity.py: _gram."""
    return _row(4, 3, BLOCK_X=64, BLOCK_K=32 if dtype == torch.float32 else 64)  # untuned


def lengths(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_affinity.py: _lengths."""
    return _row(4, 2, BLOCK_M=16, BLOCK_K=256)  # untuned


def query_norms(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_norms.py: _query_norms."""
    return _row(4, 2, SETS=4, BLOCK_Q=16, BLOCK_X=64)  # untuned


def attend(dtype: torch.dtype, arch: int, backward: bool, whole: bool, cosine: bool, fused: bool = True) -> Tile:
    """kernels/_attention.py: _attend.

    whole: every context set fits a tile; cosine: the norm is "cosine"; fused: whether a product and a sum may be
    rounded together.
    """
    return dict(_attend(dtype, arch, backward, whole, cosine), enable_fp_fusion=fused)


def _attend(dtype: torch.dtype, arch: int, backward: bool, whole: bool, cosine: bool) -> Tile:
    if arch == 80 and dtype != torch.float32 and cosine:
        return _row(4, 1, BLOCK_Q=32, BLOCK_D=16)  # untuned
    if dtype == torch.float32 and backward and not whole:
        return _row(8, 1, BLOCK_Q=16, BLOCK_D=16)  # untuned
    if arch == 80 or (dtype == torch.float32 and (backward or not whole)):
        return _row(8, 1, BLOCK_Q=32, BLOCK_D=16)  # untuned
    return _row(8, 1, BLOCK_Q=64, BLOCK_D=32)  # untuned


def pool(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_pooling.py: _pool."""
    return _row(4, 1, SETS=8, BLOCK_Q=16, BLOCK_B=16)  # untuned


def smooth(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_pooling.py: _smooth."""
    return _row(4, 1, BLOCK_Q=32, BLOCK_B=64)  # untuned


PIECE = 32 << 20  # the most affinities (query rows x context rows) computed at a time; untuned


def project(
    dtype: torch.dtype, arch: int, precision: str, backward: bool, overall: bool, S: int, whole: bool
) -> Tile:  # fmt: skip
    """kernels/_projection.py: _project. CHUNK: context rows whose weights a product loads; 0: all are kept.

    whole: every context set fits a tile.
    """
    if backward:
        return _row(8, 2, BLOCK_Q=32, BLOCK_K=32, BLOCK_S=256, CHUNK=0)  # untuned
    if precision == "tf32x3":
        # For sm_100 Triton 3.6 takes 528 or 640 of the 512 columns of tensor memory for this, and refuses the
        # launch; later versions take 512. BLOCK_S 128 would fit, but computes all products twice.
        return _row(8, 3, BLOCK_Q=64, BLOCK_K=16, BLOCK_S=256, CHUNK=16)  # untuned
    if arch == 80 or S > 256 or (dtype == torch.float32 and overall):
        return _row(8, 2, BLOCK_Q=64, BLOCK_K=32, BLOCK_S=256, CHUNK=0)  # untuned
    if dtype != torch.float32:
        return _row(8, 4 if whole else 2, BLOCK_Q=128, BLOCK_K=32, BLOCK_S=256, CHUNK=0)  # untuned
    stages = 2 if arch == 100 else 3 if whole else 1
    return _row(8, stages, BLOCK_Q=128, BLOCK_K=32, BLOCK_S=256, CHUNK=0)  # untuned


def node_tiles(dtype: torch.dtype, arch: int, S: int, backward: bool) -> tuple[int, ...]:
    """Rows of tiles of nodes, ascending; a caption goes into the smallest tile that holds it."""
    return (64, 128) if backward or arch == 80 or dtype == torch.float32 or S > 256 else (128,)


def graph_step(dtype: torch.dtype, arch: int, precision: str, nodes: int, S: int) -> Tile:
    """kernels/_graph.py: _step, for one of `node_tiles`. BLOCK_K of 256 keeps a tile's rows in shared memory."""
    if dtype != torch.float32:
        rows, k = (64, 64) if S > 256 else (64 if arch == 80 else nodes, 256)
        return _row(8, 2, BLOCK_Q=rows, BLOCK_N=nodes, BLOCK_Y=64, BLOCK_K=k, BLOCK_C=32, BLOCK_O=256)  # untuned
    if nodes == 64 and precision == "tf32x3":
        stages = 4 if arch == 100 else 2
        return _row(8, stages, BLOCK_Q=64, BLOCK_N=64, BLOCK_Y=64, BLOCK_K=16, BLOCK_C=16, BLOCK_O=128)  # untuned
    if nodes == 64:
        wide, stages = (128, 2) if arch == 80 or S > 256 else (256, 4)
        return _row(8, stages, BLOCK_Q=64, BLOCK_N=64, BLOCK_Y=wide, BLOCK_K=32, BLOCK_C=32, BLOCK_O=wide)  # untuned
    # wgmma needs BLOCK_Q = 64, which spills here with Triton 3.6. Captions of more than 63 words are rare.
    return _row(8, 1, BLOCK_Q=32, BLOCK_N=nodes, BLOCK_Y=32, BLOCK_K=32, BLOCK_C=16, BLOCK_O=64)  # untuned


def graph_read(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_graph.py: _read; kernels/_graph_backward.py: _read_back."""
    return _row(8 if arch == 80 else 4, 2, CAPTIONS=8, BLOCK_R=8)  # untuned


def graph_dense(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_graph.py: _dense."""
    depth = 32 if dtype == torch.float32 else 64
    return _row(8, 3, BLOCK_P=128 if arch == 90 else 64, BLOCK_K=depth, BLOCK_O=128)  # untuned


def graph_step_back(dtype: torch.dtype, arch: int, nodes: int) -> Tile:
    """kernels/_graph_backward.py: _step_back_queries and _step_back_keys, for one of `node_tiles`."""
    if dtype != torch.float32:
        warps = 8 if arch == 80 or (arch == 100 and nodes > 64) else 4
        return _row(warps, 2, BLOCK_M=64, BLOCK_N=nodes, BLOCK_C=32)  # untuned
    if nodes == 64:
        return _row(8, 2, BLOCK_M=32 if arch == 80 else 64, BLOCK_N=64, BLOCK_C=32 if arch == 90 else 16)  # untuned
    return _row(8, 1, BLOCK_M=32, BLOCK_N=nodes, BLOCK_C=16)  # untuned


def filtered(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_filter.py: _filter."""
    return _row(4, 2, CAPTIONS=8, BLOCK_R=8)  # untuned


def filter_significances(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_filter.py: _significances."""
    return _row(4, 2, BLOCK_R=32)  # untuned


def filter_moments(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_filter.py: _moments."""
    return _row(4, 2, BLOCK_I=64, BLOCK_R=16)  # untuned


def filter_back(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_filter.py: _filter_back."""
    return _row(8 if arch == 80 else 4, 2, CAPTIONS=8, BLOCK_R=8)  # untuned


def pool_backward(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_pooling.py: _pool_backward."""
    return _row(8, 1, SETS=8, BLOCK_Q=16, BLOCK_B=16)  # untuned


def logit_gradient(dtype: torch.dtype, arch: int, gram: bool) -> Tile:
    """kernels/_attention_backward.py: _logit_gradient. gram: whether there is |P|^2.

    Without it Triton 3.6 spills registers with 32 columns, as ptxas then fits three blocks on a processor.
    """
    return _row(8, 1, SETS=2, BLOCK_Q=16, BLOCK_X=32 if gram else 16)  # untuned


def gram_gradient(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_attention_backward.py: _gram_gradient."""
    return _row(8, 2, BLOCK_Q=32, BLOCK_X=64)  # untuned


def product_gradient(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/global_local_score.py: _product_gradient."""
    return _row(4, 1, BLOCK_Q=16, BLOCK_X=64)  # untuned


def apply(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_attention_backward.py: _apply."""
    return _row(8, 1, BLOCK_X=32 if dtype == torch.float32 else 64, BLOCK_K=64)  # untuned


def difference_gradient(dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """kernels/_projection_backward.py: _difference_gradient."""
    return _row(8, 2, BLOCK_Q=64, BLOCK_K=32, BLOCK_S=32)  # untuned


def context_products(dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """kernels/_pair_rows.py: _context_products."""
    return _row(8, 2, BLOCK_Q=32 if precision == "tf32x3" else 64, BLOCK_K=32)  # untuned


def weighted_sum(dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """kernels/_pair_rows.py: _weighted_sum."""
    return _row(8, 2, BLOCK_X=64, BLOCK_Q=32, BLOCK_K=64)  # untuned


def combine(dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """kernels/_pair_rows.py: _combine."""
    rows = 32 if precision == "tf32x3" else 64
    return _row(8, 2, BLOCK_Q=rows, BLOCK_K=32 if arch == 100 else rows)  # untuned


def through_scale(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/attended_vectors.py: _through_scale."""
    return _row(4, 1, BLOCK_Q=32)  # untuned


def context(dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """kernels/similarity_context.py: _level."""
    rows = 32 if dtype == torch.float32 and precision == "tf32" else 16
    return _row(4, 2, CAPTIONS=8, BLOCK_R=rows, BLOCK_S=32 if dtype == torch.float32 else 64)  # untuned


def context_back(dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """kernels/similarity_context.py: _level_back."""
    stages = 3 if arch == 90 and dtype != torch.float32 else 2
    return _row(4, stages, CAPTIONS=8, BLOCK_R=16, BLOCK_S=32)  # untuned


def alignment_numbers(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_alignment.py: _numbers."""
    return _row(4, 2, BLOCK_M=16, BLOCK_K=128)  # untuned


CAPTION_TILES = 16, 32, 64, 128  # words that a caption's tile in kernels/_alignment*.py may hold, ascending


def coefficients(dtype: torch.dtype, arch: int) -> tuple[int, int]:
    """The most regions and words that kernels/_alignment.py takes; larger pairs go to kernels/_alignment_vectors.py."""
    return 64, 16 if dtype == torch.float32 and arch == 80 else 32  # 32 words spill there with Triton 3.6


def alignment(dtype: torch.dtype, arch: int, words: int) -> Tile:
    """kernels/_alignment.py: _align. words: of a caption."""
    if dtype == torch.float32 and arch != 90:
        return _row(8, 1, maxnreg=MAXNREG, CAPTIONS=1)  # untuned
    return _row(8, 1, maxnreg=MAXNREG, CAPTIONS=32 // words)  # untuned


def alignment_vectors(dtype: torch.dtype, arch: int, regions: int, words: int) -> Tile:
    """kernels/_alignment_vectors.py: _align_vectors. regions, words: of a tile."""
    D, chunk = 32 if regions <= 64 else 16, 16
    if dtype != torch.float32 and regions * words <= 64 * 16:
        chunk = 0
    return _row(8, 1, maxnreg=MAXNREG, BLOCK_D=D, CHUNK=chunk)  # untuned
