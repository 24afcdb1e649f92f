"""Jit mathematics that two kernels share."""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)  # as published; stands outside the root
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
