"""Lengths of captions as published modules take them, and the captions that they pack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import traced
from ..packing import bounds, pack_as


def whole_numbers(lengths: Sequence[float] | Tensor, said: str = "lengths") -> Tensor:
    """Lengths as integers; whole numbers of a floating dtype are taken, as published encoders take them.

    Raises:
        ValueError: a length is not a whole number, or has no value; the message begins with `said`.

    >>> whole_numbers([3.0, 5.0])
    tensor([3, 5])
    """
    values = torch.as_tensor(lengths)
    if values.device.type == "meta":
        raise ValueError(f"{said} must hold values, got a tensor on the meta device, which has none")
    if not values.is_floating_point():
        return values
    whole = values.to(torch.int64)
    if (whole != values).any():
        raise ValueError(f"{said} must be whole numbers, got {values[whole != values][0].item()}")
    return whole


def pack_padded(
    op: str, names: tuple[str, str], caption: Tensor, lengths: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor]:
    """`pack_as` with lengths as published modules take them: of any dtype, and longer than the padded captions, where a
    slice `caption[:length]` ends with its caption."""
    try:
        values = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError):
        return pack_as(op, names, caption, lengths)  # type: ignore[arg-type]  # which says what they must be
    values = whole_numbers(values, f"{op}: {names[1]}")
    longest = caption.shape[1] if caption.dim() > 1 else 0
    return pack_as(op, names, caption, values if values.dtype == torch.bool else values.clamp(max=longest))


def packed(op: str, caption: Tensor, lengths: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Padded captions [T, W, D] packed by their lengths [T], and packed ones [N, D] as they are, with their cu_seqlens.

    Args:
        op: the scorer's name in errors, where the arguments are `cap_emb` and `cap_lens`.
        caption: padded or packed.
        lengths: [T], or cu_seqlens [T + 1].

    Raises:
        ValueError: a length or a bound is wrong.
        TypeError: caption is no tensor, or lengths are no numbers.

    >>> packed("Scorer", torch.zeros(5, 8), 2.5)
    Traceback (most recent call last):
    ValueError: Scorer: cap_lens must be the cu_seqlens [T + 1] of packed words, got 2.5
    """
    if not isinstance(caption, Tensor):
        raise TypeError(f"{op}: cap_emb must be a tensor, [T, W, D] or packed [N, D], got {type(caption).__name__}")
    if caption.dim() == 3:
        return pack_padded(op, ("cap_emb", "cap_lens"), caption, lengths)
    wanted = f"{op}: cap_lens must be the cu_seqlens [T + 1] of packed words"
    try:
        edge = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}, got {lengths!r:.60}") from error
    if edge.dim() != 1 or edge.device.type == "meta":
        raise ValueError(f"{wanted}, got {lengths!r:.60}")
    if caption.dim() == 2 and not traced(edge):
        bounds(edge, len(caption), wanted)  # which begins its own sentences with this one
    return caption, edge
