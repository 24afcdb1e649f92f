"""Every block size: plain Python, by dtype and architecture (80, 90, 100).

A function names the kernel it serves and returns its constants, `num_warps` and `num_stages` among them. Beside each
row stand the GPU and the date it was tuned on; "untuned" rows compile without spills and within shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from itm_fast._checks import matmul_precision

Tile = dict[str, int]  # a kernel's constants and Triton's options

# dtype -> Triton's name of it. float64 has no tensor-core path and is left to the other backends.
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Compilation(NamedTuple):
    """One way a kernel is compiled; `kernels/<file>.py: compilations(arch)` yields those that can occur.

    Attributes:
        kernel: the jit function.
        types: Triton types of its run-time arguments in their order, as in "*fp16 *fp32 i32 fp32".
        constants: its constexpr arguments.
        tile: the row of this file that it runs with: further constexpr arguments, num_warps and num_stages.
        products: whether its time is matrix products, so that on sm_90 it must hold wgmma instructions.
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
    """Triton's input_precision where a product cancels: never less than the inputs' own precision."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """All that `products` may answer for `dtype`."""
    return ("tf32", "tf32x3") if dtype == torch.float32 else ("tf32",)


MAXNREG = 255  # where a kernel needs a few registers more than 128, ptxas spills them unless it is told to take more


def _row(num_warps: int, num_stages: int, **constants: int) -> Tile:
    # Triton 3.9 warns where fusion of a product and a sum is left to its default, which 3.10 changes.
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
    """kernels/_attention.py: _query_norms."""
    return _row(4, 2, SETS=4, BLOCK_Q=16, BLOCK_X=64)  # untuned


def attend(dtype: torch.dtype, arch: int, backward: bool, whole: bool, cosine: bool) -> Tile:
    """kernels/_attention.py: _attend. whole: whether every set of contexts fits a tile; cosine: whether the norm is."""
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


PIECE = 32 << 20  # pairs of rows whose affinities lie in the workspace at a time; untuned


def project(dtype: torch.dtype, arch: int, precision: str, backward: bool, overall: bool, S: int) -> Tile:
    """kernels/_projection.py: _project. CHUNK: rows of contexts whose weights each step reads; 0: all are held."""
    if backward:
        return _row(8, 2, BLOCK_Q=32, BLOCK_K=32, BLOCK_S=256, CHUNK=0)  # untuned
    if precision == "tf32x3":
        return _row(8, 1, BLOCK_Q=64, BLOCK_K=16, BLOCK_S=256, CHUNK=16)  # untuned
    if arch == 80 or S > 256 or (dtype == torch.float32 and overall):
        return _row(8, 2, BLOCK_Q=64, BLOCK_K=32, BLOCK_S=256, CHUNK=0)  # untuned
    if arch == 90 and dtype == torch.float32:
        return _row(8, 2, BLOCK_Q=128, BLOCK_K=32, BLOCK_S=256, CHUNK=32)  # untuned
    return _row(8, 2, BLOCK_Q=128, BLOCK_K=32, BLOCK_S=256, CHUNK=0)  # untuned


def node_tiles(dtype: torch.dtype, arch: int) -> tuple[int, ...]:
    """Rows of a tile of nodes, ascending: the first holds most captions, the others those that do not fit."""
    return 64, 128


def graph_step(dtype: torch.dtype, arch: int, nodes: int) -> Tile:
    """kernels/_graph.py: _step, for one of `node_tiles`."""
    if dtype != torch.float32:
        warps = 4 if arch == 90 else 8
        return _row(warps, 3, BLOCK_Q=64, BLOCK_N=nodes, BLOCK_C=32, BLOCK_K=64, BLOCK_O=256)  # untuned
    if nodes == 64:
        return _row(8, 2, BLOCK_Q=64, BLOCK_N=64, BLOCK_C=16, BLOCK_K=32, BLOCK_O=128)  # untuned
    # Captions of more than 63 words are rare: 64 queries, which wgmma takes, spill with Triton 3.6.
    return _row(8, 1, BLOCK_Q=32, BLOCK_N=nodes, BLOCK_C=16, BLOCK_K=32, BLOCK_O=64)  # untuned


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


def logit_gradient(dtype: torch.dtype, arch: int) -> Tile:
    """kernels/_attention_backward.py: _logit_gradient."""
    return _row(8, 1, SETS=2, BLOCK_Q=16, BLOCK_X=32)  # untuned


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
    """kernels/_projection_backward.py: _context_products."""
    return _row(8, 2, BLOCK_Q=32 if precision == "tf32x3" else 64, BLOCK_K=32)  # untuned


def weighted_sum(dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """kernels/_projection_backward.py: _weighted_sum."""
    return _row(8, 2, BLOCK_X=64, BLOCK_Q=32, BLOCK_K=64)  # untuned


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


CAPTION_TILES = 16, 32, 64, 128  # words of a caption that a tile of kernels/_alignment_vectors.py holds; ascending


def coefficients(dtype: torch.dtype, arch: int) -> tuple[int, int]:
    """Regions and words of the largest pairs that kernels/_alignment.py takes; others have their vectors formed."""
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
