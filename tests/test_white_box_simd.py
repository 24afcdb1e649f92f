"""simd.h and shuffle.h on their own: functions of vectors, their errors in units of the last place.

exp() splits x = n ln 2 + r and takes p, the Taylor polynomial of e^r, times 2^n, which is exact. The error of p is at
most the sum that `bound` makes, R = ln 2 / 2 being the largest |r| (to five digits, for n may be rounded wrong):
- the terms that the polynomial of degree d leaves out: at most a geometric series from R^(d + 1) / (d + 1)! on;
- what moves r: its own rounding, that of n times the low part of ln 2, and that of the low part. n times the high part
  is exact, and so is its difference from x;
- Horner's rule p_k = p_{k+1} r + 1 / k!: without a fused instruction its product and its sum round, and the coefficient
  1 / k! has been rounded k - 2 times.
Each rounding is off by half a unit in the last place of the largest number that it can give.
"""

import math

import numpy as np
import pytest
from white_box import blocks, box, draws, whole_numbers

__all__ = ["blocks", "box"]  # fixtures

DEGREE = {"float32": 7, "float64": 13}
RANGE = {"float32": 87.33, "float64": 708.39}  # beyond it, e^x is taken for 0 or for its value at the end
LOW = {"float32": 2.12194440e-4, "float64": 1.90821492927058770002e-10}  # of ln 2, in exp()


def half_place(dtype, size):
    """Half of a unit in the last place of the largest number up to `size`."""
    return float(np.finfo(dtype).eps) / 2 * 2.0 ** math.floor(math.log2(size))


def bound(dtype):
    """The largest error of exp() in units of the result's last place."""
    degree, R, largest = DEGREE[dtype], math.log(2) / 2, 0.0
    steps = RANGE[dtype] / math.log(2)
    for sign in (-1, 1):
        value = [math.fsum((sign * R) ** (j - k) / math.factorial(j) for j in range(k, 30)) for k in range(degree + 1)]
        top = [max(value[k], 1 / math.factorial(k)) for k in range(degree + 1)]  # r = 0 gives the other end
        error = degree * half_place(dtype, top[degree])
        for k in range(degree - 1, -1, -1):
            coefficient = k * half_place(dtype, 1 / math.factorial(k)) if k > 2 else 0.0
            error = error * R + half_place(dtype, top[k + 1] * R) + half_place(dtype, top[k]) + coefficient
        reduced = half_place(dtype, R) + 2 * steps * half_place(dtype, LOW[dtype])
        left_out = R ** (degree + 1) / math.factorial(degree + 1) / (1 - R / (degree + 2))
        place = 2 * half_place(dtype, min(value[0], 1 - 1e-9) if sign < 0 else 1.0)
        largest = max(largest, (error + reduced * top[0] + left_out) / place)
    return largest


def exact(function, x):
    """In float64 for float32, in long double for float64."""
    return function(x.astype(np.float64 if x.dtype == np.float32 else np.longdouble))


def places(result, wanted):
    """Distance in units of the wanted number's last place."""
    unit = np.spacing(np.abs(wanted).astype(result.dtype)).astype(wanted.dtype)
    return float((np.abs(result.astype(wanted.dtype) - wanted) / unit).max())


def everywhere(blocks):
    """Numbers over the whole range of exp(), close to its ends, around 0 and half way between multiples of ln 2."""
    end = RANGE[blocks.dtype]
    halves = (np.arange(-125, 125) + 0.5) * math.log(2)
    tiny = np.geomspace(np.finfo(blocks.dtype).smallest_subnormal, 1, 3000)
    near_ends = end - np.geomspace(1e-4, 1, 100)
    x = [np.linspace(-end, end, 200_001), tiny, -tiny, near_ends, -near_ends, halves]
    for sign in (-1, 1):
        x.append(np.nextafter(halves.astype(blocks.dtype), sign * np.inf))
    return np.concatenate(x).astype(blocks.dtype).clip(*(np.asarray([-end, end], blocks.dtype)))


def test_exp_is_within_its_polynomial_s_bound(blocks):
    x = everywhere(blocks)
    assert places(blocks.exp(x), exact(np.exp, x)) <= bound(blocks.dtype)


def test_exp_of_zeros_denormals_infinities_and_nan(blocks):
    info = np.finfo(blocks.dtype)
    small = np.asarray(
        [0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, info.tiny, -info.tiny], blocks.dtype
    )
    assert (blocks.exp(small) == 1).all()
    end = np.asarray(RANGE[blocks.dtype], blocks.dtype)
    below = np.asarray([-np.inf, info.min, -1000, np.nextafter(-end, -np.inf, dtype=blocks.dtype)], blocks.dtype)
    assert (blocks.exp(below) == 0).all()
    above = np.asarray([np.inf, info.max, 1000, end], blocks.dtype)
    assert (blocks.exp(above) == blocks.exp(above[-1:])).all()  # large and finite
    assert np.isfinite(blocks.exp(above)).all()
    assert np.isnan(blocks.exp(np.asarray([np.nan, -np.nan], blocks.dtype))).all()
    assert blocks.exp(-np.asarray([end], blocks.dtype))[0] >= info.tiny  # so no result is a denormal number


def test_a_nan_stays_in_its_lane(blocks):
    x = np.zeros(4 * blocks.LANES, blocks.dtype)
    x[5] = np.nan
    assert np.array_equal(np.isnan(blocks.exp(x)), np.isnan(x))


def test_sigmoid_is_within_the_bound_of_exp_and_two_roundings(blocks):
    """1 / (1 + e): e's relative error times e / (1 + e) <= 1, and half a place for the sum and for the quotient.

    A relative error of half a place may be a whole one where the quotient has the longer mantissa."""
    x = everywhere(blocks)
    x = x[np.abs(x) < RANGE[blocks.dtype] - 1]
    wanted = exact(lambda v: 1 / (1 + np.exp(-v)), x)
    assert places(blocks.sigmoid(x), wanted) <= 2 * bound(blocks.dtype) + 1 + 0.5
    ends = blocks.sigmoid(np.asarray([-np.inf, -1000, 1000, np.inf], blocks.dtype))
    assert 0 < ends[0] == ends[1] <= 2 / blocks.exp(np.asarray([RANGE[blocks.dtype]], blocks.dtype))[0]
    assert np.array_equal(ends[2:], [1, 1])
    assert np.isnan(blocks.sigmoid(np.asarray([np.nan, -np.nan], blocks.dtype))).all()


def test_rough_sigmoid_is_within_the_bound_of_its_polynomial(box):
    """1 / (1 + 2^t): the polynomial for 2^t is off by at most 7.5e-5, of which e / (1 + e) <= 1 is left.

    t = -x / ln 2, up to 2^7, rounds twice, with its constant: by 2^-17 at most, or 5.3e-6 of 2^t. The other roundings,
    six of half a place, are 3.6e-7."""
    if not hasattr(box, "rough_sigmoid"):
        pytest.skip("no products of bfloat16 values at this level")
    x = np.linspace(-87, 87, 200_001, dtype=np.float32)
    wanted = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(box.rough_sigmoid(x) / wanted - 1).max() <= 7.5e-5 + 5.3e-6 + 3.6e-7
    assert box.rough_sigmoid(np.asarray([-np.inf, -1000, 1000, np.inf], np.float32)).tolist() == [0, 0, 1, 1]
    assert np.isnan(box.rough_sigmoid(np.asarray([np.nan, -np.nan], np.float32))).all()


def test_tanh_is_within_the_bound_of_exp_and_its_roundings(blocks):
    """e / (e + 2) with e = q 2^n + (2^n - 1) and q = e^r - 1, |r| <= ln 2 / 2.

    q has exp()'s absolute error, but |q| may be small: q's own relative error is at most that of exp() over the least
    of e^r, sqrt(1/2), plus a rounding of its last product. |q| 2^n <= 1.42 e for every n >= 0. Rounding 2^n - 1, the
    sum, e + 2 and the quotient each add half a place, or a whole one of the result's."""
    x = everywhere(blocks)
    assert places(blocks.tanh(x), exact(np.tanh, x)) <= 1.42 * (2 * math.sqrt(2) * bound(blocks.dtype) + 1) + 4
    near = x[np.abs(x) < 20]
    assert np.array_equal(blocks.tanh(-near), -blocks.tanh(near))
    assert np.array_equal(blocks.tanh(np.asarray([0, np.inf, -np.inf], blocks.dtype)), [0, 1, -1])
    assert np.isnan(blocks.tanh(np.asarray([np.nan, -np.nan], blocks.dtype))).all()


def test_roots_are_rounded_right(blocks):
    x = np.abs(np.concatenate([draws(blocks, 1000), np.finfo(blocks.dtype).smallest_subnormal * np.arange(9)]))
    x = x.astype(blocks.dtype)
    assert np.array_equal(blocks.root(x), np.sqrt(x))
    assert np.isnan(blocks.root(-np.ones(1, blocks.dtype))).all()


def test_lanes_are_added_and_compared(blocks):
    for seed in range(5):
        v = np.roll(whole_numbers(blocks.LANES), seed).astype(blocks.dtype)
        assert blocks.sum_of_lanes(v) == v.sum()
        for k in range(blocks.LANES):  # the largest in every lane
            raised = v.copy()
            raised[k] = 100
            assert blocks.largest_lane(raised) == 100
            assert blocks.sum_of_lanes(raised) == raised.sum()


def test_lanes_inside_a_row(blocks):
    for first in (0, 3, 64):
        for begin in (0, 2, 65):
            for end in (0, 3, 4, 70, 200):
                lane = first + np.arange(blocks.LANES)
                wanted = np.where((lane >= begin) & (lane < end), -1, 0)
                assert blocks.inside(first, begin, end) == wanted.tolist()


def test_many_vectors_are_added_along_their_lanes_at_once(blocks):
    rows = whole_numbers(blocks.LANES, blocks.LANES).astype(blocks.dtype)
    assert np.array_equal(blocks.sums(rows), rows.sum(1))
    alike = np.tile(draws(blocks, 1, blocks.LANES), (blocks.LANES, 1))
    assert len(set(blocks.sums(alike).tolist())) == 1  # in the same order for every vector
