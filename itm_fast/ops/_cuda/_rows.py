"""What the CUDA kernels read of rows of words and regions: float16 numbers for float32 ones, lengths, and factors of
Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...packing import Run, kept, runs, spans, starts, valid
from ._blocks import room

TOP = 9  # rows are scaled so that their largest number lies in [2^8, 2^9): products of two and their sums fit float32
BLOCK = 32  # numbers of a row whose first halves, and then second halves, lie together
# A row is wide if more than one in EIGHTH of its numbers but zeros lies below LOW, where two float16 numbers have less
# than 21 bits of it: they reach down to 2^-25, whatever the row's largest number.
LOW, EIGHTH = 2.0**-4, 8
PIVOT = 1e-14  # of the largest: a smaller pivot of a Gram matrix is rounding


class Halves(NamedTuple):
    """Rows of float32 numbers as float16 numbers times powers of two.

    Attributes:
        rows: [n, D], or [n, 2 D'] of pairs: `BLOCK` first numbers, then the `BLOCK` second ones, zeros from D on.
        exponent: [n] int32: a row is 2^exponent times what `rows` has of it.
        wide: [n] whether two numbers do not hold a row; None where there are no pairs.
    """

    rows: Tensor
    exponent: Tensor
    wide: Tensor | None


def split_bytes(D: int, pairs: bool) -> int:
    """Bytes of a row [D] that `split_rows` has split."""
    return 4 * BLOCK * -(-D // BLOCK) + 5 if pairs else 2 * D + 5


def split_rows(rows: Tensor, pairs: bool) -> Halves:
    """Rows [n, D] of float32 numbers, each as one float16 number or as the sum of a pair of them.

    The error is at most 2^-22 (a pair) or 2^-12 of a number, or 2^-34 or 2^-23 of the row's largest one, if that is
    more. A row that is not finite stays so.
    """
    n, D = rows.shape
    blocks = -(-D // BLOCK)
    found = rows.new_empty(n, 2 * BLOCK * blocks if pairs else D, dtype=torch.float16)
    exponent = rows.new_empty(n, dtype=torch.int32)
    wide = rows.new_empty(n, dtype=torch.bool)
    for some in spans(n, max(1, room(rows.device) // (28 * max(1, D)))):
        found[some], exponent[some], wide[some] = _split(rows[some], pairs, blocks)
    return Halves(found, exponent, wide if pairs else None)


def stages(rows: Tensor) -> Tensor:
    """The stages of matrices [..., n, D] of 16-bit numbers, as csrc/cuda/stream.h takes them.

    A stage has 64 numbers of each row, in chunks of 8 that are exchanged as `place` of csrc/cuda/tile.h does it.

    Returns:
        [..., stages, n, 8, 8].
    """
    n, D = rows.shape[-2:]
    if D % 64:  # padding by nothing would copy
        rows = torch.nn.functional.pad(rows, (0, -D % 64))
    chunks = rows.unflatten(-1, (-1, 8, 8)).transpose(-4, -3)
    at = torch.arange(8, device=rows.device) ^ torch.arange(n, device=rows.device)[:, None] % 8
    return chunks.gather(-2, at[:, :, None].expand_as(chunks))


def _split(x: Tensor, pairs: bool, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    exponent = torch.frexp(_finite(x.abs().amax(1)))[1] - TOP
    y = x * _power(-exponent)[:, None] * _power(-exponent, second=True)[:, None]
    if not pairs:
        return y.half(), exponent, torch.zeros_like(exponent, dtype=torch.bool)
    small, real = (y.abs() < LOW).logical_and_(y != 0).sum(1), (y != 0).sum(1)
    first = y.half()
    second = y.sub_(first).half()
    both = torch.nn.functional.pad(torch.stack([first, second], 1), (0, blocks * BLOCK - x.shape[1]))
    return both.unflatten(2, (blocks, BLOCK)).transpose(1, 2).flatten(1), exponent, small * EIGHTH > real


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 1.0)


def _power(exponent: Tensor, second: bool = False) -> Tensor:
    """float32 2^h of one of the halves h of exponents, whose own powers may lie beyond float32; made of its bits."""
    half = exponent >> 1
    return ((exponent - half if second else half) + 127 << 23).view(torch.float32)


def lengths(rows: Tensor) -> Tensor:
    """|x| of rows [n, D] in float32; added up in float64, as squares may lie beyond float32."""
    found = rows.new_empty(len(rows), dtype=torch.float32)
    for some in spans(len(rows), max(1, room(rows.device) // (16 * max(1, rows.shape[1])))):
        found[some] = torch.linalg.vector_norm(rows[some], dim=1, dtype=torch.float64).float()
    return found


def near(length: Tensor) -> Tensor:
    """Powers of two at most twice the lengths, and 1 for those that are zero or not finite."""
    exponent = torch.frexp(_finite(length))[1].clamp(-126, 127)
    return (exponent + 127 << 23).view(torch.float32)


def gram_factor(x: Tensor) -> Tensor:
    """F with F^T F = x x^T for sets of rows x [B, n, D] in float64: [B, n, n] upper triangular.

    A sum of squares |F e|^2 cannot cancel as e^T (x x^T) e does. A pivot that is but rounding makes a row of zeros.
    """
    rest = x @ x.transpose(1, 2)
    F = torch.zeros_like(rest)
    least = PIVOT * rest.diagonal(dim1=1, dim2=2).amax(1)
    for k in range(rest.shape[1]):
        pivot = rest[:, k, k]
        inverse = torch.where(pivot > least, pivot, torch.inf).rsqrt()
        F[:, k, k:] = rest[:, k, k:] * inverse[:, None]
        rest[:, k + 1 :, k + 1 :].baddbmm_(F[:, k, k + 1 :, None], F[:, k, None, k + 1 :], alpha=-1)
    return F


class Factors(NamedTuple):
    """What the kernels compute the lengths of attended vectors from; see `attention.h` and `scan_i2t`.

    Attributes:
        factor: of images [I, S, S / 2, 2] int32, pairs of float16 numbers in each, S a multiple of 8; of captions
            float32, one after the other.
        size: float32 powers of two: of images [I, S], zero beyond the regions; of words [N].
        place: [T] int64, where a caption's factor begins, in steps of four numbers; None for images.
    """

    factor: Tensor
    size: Tensor
    place: Tensor | None = None


def image_factors(image: Tensor, count: Tensor | None, S: int) -> Factors:
    """The factors of images [I, R, D] of which image i has count[i] regions, or R."""
    I, R, D = image.shape
    factor = image.new_empty(I, S, S // 2, 2, dtype=torch.int32)
    size = image.new_empty(I, S, dtype=torch.float32)
    for some in spans(I, max(1, room(image.device) // (8 * R * (2 * D + 4 * S) + 20 * S * S))):
        factor[some], size[some] = _image_factors(image[some].double(), None if count is None else count[some], S)
    return Factors(factor, size)


def _image_factors(x: Tensor, count: Tensor | None, S: int) -> tuple[Tensor, Tensor]:
    R = x.shape[1]
    if count is not None:
        beyond = ~valid(count, R)
        x.masked_fill_(beyond[:, :, None], 0.0)
    power = near(torch.linalg.vector_norm(x, dim=2).float())
    F = torch.nn.functional.pad(gram_factor(x.div_(power[:, :, None])), (0, S - R, 0, S - R)) * 2.0**TOP
    first = F.half()
    both = torch.stack([first, (F - first.double()).half()], 2)  # [., S, 2, S]
    if count is not None:
        power.masked_fill_(beyond, 0.0)
    return both.contiguous().view(torch.int32).transpose(2, 3), torch.nn.functional.pad(power, (0, S - R))


def wide_sets(words: Tensor, edge: Tensor, regions: Tensor, count: Tensor | None) -> Tensor:
    """[1 + T + I] int32: whether any row is wide, and which captions and images have one.

    Args:
        words: [N] which rows of words are wide.
        edge: [T + 1] the captions' bounds.
        regions: [I, R] likewise; image i has count[i] of them, or R.
    """
    if count is not None:
        regions = regions & valid(count, regions.shape[1])
    before = starts(words)[edge.long()]
    sets = torch.cat([before.diff() > 0, regions.any(1)])
    return torch.cat([sets.any().view(1), sets]).to(torch.int32)


class CaptionRuns(NamedTuple):
    """Captions of equal length, and where the factor of each begins, in steps of four numbers, [T] int64."""

    runs: list[Run]
    place: Tensor
    total: int


def _caption_runs(edge: Sequence[int], device: torch.device, most: int) -> CaptionRuns:
    place, total = torch.empty(len(edge) - 1, dtype=torch.int64), 0
    for run in runs(edge, place.device, most):
        each = -(-run.length // 4) * run.length
        place[run.captions] = total + each * torch.arange(run.size)
        total += each * run.size
    # A copy from the host waits for itself: the result is kept, and other streams may read it.
    return CaptionRuns(list(runs(edge, device, most)), place.to(device), total)


def caption_factors(words: Tensor, cu_seqlens: Tensor, edge: Sequence[int], longest: int) -> Factors:
    """The factors of captions of at most `longest` words, packed [N, D] with bounds `edge`, those of cu_seqlens."""
    most = max(1, room(words.device) // (32 * words.shape[1] + 32 * longest))
    plan = kept(cu_seqlens, ("factors", most), lambda values: _caption_runs(edge, values.device, most))
    size = near(lengths(words))
    factor = words.new_empty(4 * plan.total, dtype=torch.float32)
    begin = 0
    for run in plan.runs:
        L = run.length
        x = (words[run.rows].double() / size[run.rows, None]).view(run.size, L, -1)
        F = torch.nn.functional.pad(gram_factor(x), (0, 0, 0, -L % 4))
        by_four = F.view(run.size, -1, 4, L).transpose(2, 3).flatten()
        factor[begin : begin + len(by_four)] = by_four
        begin += len(by_four)
    return Factors(factor, size, plan.place)
