"""Small @triton.jit functions that several kernels share."""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)  # SCAN's and SGRAF's; added to a length, not to its square: x / (|x| + eps)
CANCELLED = tl.constexpr(1e-3)  # the constant of `itm_fast/ops/_attention.py`, which explains it
SLOPE = tl.constexpr(0.1)  # of the LeakyReLU in SCAN's clipped norms
NEVER = tl.constexpr(float("-inf"))  # logit of a masked element: its softmax weight is 0


@triton.jit
def leaky(x):
    """LeakyReLU with the published slope."""
    return tl.where(x > 0, x, SLOPE * x)


@triton.jit
def leaky_slope(x):
    """Derivative of `leaky`; the slope at 0, as in PyTorch."""
    return tl.where(x > 0, 1.0, SLOPE)


@triton.jit
def swizzled(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of program `pid`. Programs take GROUP rows of tiles column by column, so both operands stay in L2."""
    wide = GROUP * tiles_n
    first = (pid // wide) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + (pid % wide) % height, (pid % wide) // height


@triton.jit
def normalised(s, norm, NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr):
    """A', the affinities s after the norm NORM.

    `norm` is, for "l1norm" and "l2norm", the norm over the queries of a set, or 1 / (norm + eps) when INVERSE; for
    "softmax", the logsumexp over them; for "cosine", the product of both rows' lengths.
    """
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
    """Load rows `row` and columns `column` of a matrix with COLUMNS columns, which is read STEP columns at a time."""
    at = pointer + row[:, None] * COLUMNS + column[None, :]
    if COLUMNS % STEP == 0:
        return tl.load(at)
    return tl.load(at, mask=(column < COLUMNS)[None, :], other=0.0)


@triton.jit
def relu(x):
    """ReLU that keeps NaN, as PyTorch's does and tl.maximum does not."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def finite(x):
    """x with 0 in place of NaN and infinities."""
    return tl.where(x - x == 0, x, 0.0).to(x.dtype)
