"""Jit mathematics that two kernels share."""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)  # as published; stands outside the root
CANCELLED = tl.constexpr(1e-3)  # of `ops/_attention.py`, which says why
SLOPE = tl.constexpr(0.1)  # of the LeakyReLU that the published code clips with
NEVER = tl.constexpr(float("-inf"))  # logit of what takes no part


@triton.jit
def leaky(x):
    """LeakyReLU with the published slope."""
    return tl.where(x > 0, x, SLOPE * x)


@triton.jit
def leaky_slope(x):
    """Derivative of `leaky`, at 0 as in PyTorch."""
    return tl.where(x > 0, 1.0, SLOPE)


@triton.jit
def swizzled(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of program `pid`: GROUP tiles of m walk along n together, so that both operands stay in L2."""
    wide = GROUP * tiles_n
    first = (pid // wide) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + (pid % wide) % height, (pid % wide) // height


@triton.jit
def normalised(s, norm, NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr):
    """The affinity norm of s; `norm` is its norm over the queries (INVERSE: 1 / (norm + eps)), or their logsumexp; or
    the product of both rows' lengths."""
    if NORM == "softmax":
        return tl.exp(s - norm)
    if NORM == "cosine":
        return s / tl.maximum(norm, EPS)
    if CLIP:
        s = leaky(s)
    if NORM == "none":
        return s
    if INVERSE:
        return s * norm
    return s / (norm + EPS)


@triton.jit
def rows_of(pointer, row, column, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """[rows, columns] of a matrix with COLUMNS columns that is read STEP columns at a time."""
    at = pointer + row[:, None] * COLUMNS + column[None, :]
    if COLUMNS % STEP == 0:
        return tl.load(at)
    return tl.load(at, mask=(column < COLUMNS)[None, :], other=0.0)


@triton.jit
def relu(x):
    """As in PyTorch: what is no number stays so, which tl.maximum would not do."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def finite(x):
    """0 in place of what is no number or infinite."""
    return tl.where(x - x == 0, x, 0.0).to(x.dtype)
