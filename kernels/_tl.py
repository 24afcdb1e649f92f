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
    return tl.where(x > 0, x, x * SLOPE)


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


@triton.jit
def scaled(
    logits, norms, length, x, size, scale, NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr
):
    """A and the logits scale * A' of a tile; context rows beyond the set have A = 0 and logit -inf."""
    inside = (x < size)[None, :]
    s = tl.load(logits + x[None, :], mask=inside, other=0.0)
    norm = 0.0
    if NORM == "cosine":
        norm = length[:, None] * tl.load(norms + x, mask=x < size, other=0.0)[None, :]
    elif NORM != "none":
        norm = tl.load(norms + x[None, :], mask=inside, other=0.0)
    return s, tl.where(inside, scale * normalised(s, norm, NORM, CLIP, INVERSE), NEVER)


@triton.jit
def average(e, inside, WEIGHTS: tl.constexpr):
    """Sums over a tile whose quotient, over the set, is what focal weights compare e with: (mean e, or that by sqrt e).

    `inside`: [1, BLOCK_X], which columns are rows of the set.
    """
    if WEIGHTS == "focal_equal":
        return tl.sum(e, 1), tl.sum(tl.where(inside, 1.0, tl.zeros_like(e)), 1)
    root = tl.sqrt(e)
    return tl.sum(e * root, 1), tl.sum(root, 1)


@triton.jit
def cut_of(above, below):
    """What e of a kept context exceeds, from `average`. Where all e are 1 none exceeds their mean; all are kept."""
    cut = tl.div_rn(above, below)
    return tl.where(cut < 1, cut, 0.0)


@triton.jit
def kept(a, m, cut, bound, WEIGHTS: tl.constexpr):
    """e = exp(a - m) of the contexts that WEIGHTS keep, 0 of the others, from the logits a; "hard": 1 of the largest.

    m is the maximum over the whole set and cut that of `cut_of`. The comparisons are such that NaN is kept.
    """
    if WEIGHTS == "hard":
        return tl.where(a < m[:, None], 0.0, 1.0)
    e = tl.exp(a - m[:, None])
    if WEIGHTS == "threshold":
        e = tl.where(a <= bound, 0.0, e)
    elif WEIGHTS != "softmax":
        e = tl.where(e <= cut[:, None], 0.0, e)
    return e


@triton.jit
def denominator(z, WEIGHTS: tl.constexpr):
    """z, the sum of all e; 1 where a threshold keeps no context, so that alpha = 0."""
    if WEIGHTS == "threshold":
        return tl.where(z == 0, 1.0, z)
    return z


@triton.jit
def query_lanes(start_ptr, size_ptr, set_first, group, sets, SETS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """For SETS sets of queries, BLOCK_Q lanes each: every lane's place among its set's, the set's first row and size.

    The group's first set is `set_first` + `group` * SETS; sets from `sets` on have no queries.
    """
    lane = tl.arange(0, SETS * BLOCK_Q)
    c = group * SETS + lane // BLOCK_Q
    start = tl.load(start_ptr + set_first + c, mask=c < sets, other=0)
    return lane % BLOCK_Q, start, tl.load(size_ptr + set_first + c, mask=c < sets, other=0)


@triton.jit
def norms_of(norm_ptr, owner_ptr, row, owner_first, ld, column):
    """Pointers [rows, 1] to where the norms of the sets of queries `row` begin, for the context row `column`."""
    owner = tl.load(owner_ptr + row)
    low = tl.min(owner, 0)
    return norm_ptr + (low - owner_first).to(tl.int64) * ld + column + (owner - low)[:, None] * ld


@triton.jit
def scale_of(scale_ptr, scale, place_ptr, row, b, part, SCALE: tl.constexpr):
    """What the logits of queries `row` with set b are A' times: the argument, a number in memory or one for each pair.

    "pairs": [rows, 1], from place[row] + b * part of `scale_ptr`.
    """
    if SCALE == "argument":
        return scale
    elif SCALE == "number":
        return tl.load(scale_ptr).to(tl.float32)
    else:
        at = tl.load(place_ptr + row) + b.to(tl.int64) * part
        return tl.load(scale_ptr + at).to(tl.float32)[:, None]
