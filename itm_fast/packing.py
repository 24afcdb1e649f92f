"""Packed captions: packing and unpacking, checked bounds, and the plan that packs captions into tiles.

Every op takes packed captions. Captions of equal length form a dense block without padding or masks, so no value of one
caption can affect another.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._checks import dense, layout, refuse_captured

Index = slice | Tensor
Made = TypeVar("Made")
READ_ANEW = ("cpu",)  # device types whose tensors `kept` reads in every call, as reading them does not synchronise
_VALUES = "values"  # the key of a tensor's copy in `_kept`
_kept = WeakTensorKeyDictionary()  # tensor -> (its version counter, {key: what `make` returned})


def pack(caption: Tensor, lengths: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Drop the padding of a batch of captions.

    Args:
        caption: [T, W, D] (or [T, W]); values beyond a caption's length are not used.
        lengths: [T] words per caption, each from 1 to W.

    Returns:
        words [sum of lengths, D] and cu_seqlens [T + 1] int32 on the captions' device: caption t is
        `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.

    Raises:
        ValueError: lengths is not [T], a length lies outside 1..W, or a tensor is on the meta device.
        TypeError: caption is not a dense tensor, or lengths are not integers.

    >>> import torch, itm_fast
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(2, 5, 8), [3, 5])
    >>> words.shape, cu_seqlens.tolist()
    (torch.Size([8, 8]), [0, 3, 8])
    """
    return pack_as("pack", ("caption", "lengths"), caption, lengths)


def pack_as(
    op: str, names: tuple[str, str], caption: Tensor, lengths: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """`pack` in messages with the names of another function and of its two arguments."""
    of_caption, of_lengths = names
    _values(op, of_caption, caption)
    if caption.dim() < 2:
        raise ValueError(f"{op}: {of_caption} must be [T, W, D], got {list(caption.shape)}")
    length = _integers(op, of_lengths, lengths)
    length = length.to(torch.int64)
    T, W = caption.shape[:2]
    if length.shape != (T,):
        raise ValueError(f"{op}: {of_lengths} must be [T] with T = {T} as in {of_caption}, got {list(length.shape)}")
    if T and not (int(length.min()) >= 1 and int(length.max()) <= W):
        raise ValueError(f"{op}: {of_lengths} must lie in 1..{W} (W), got {int(length.min())}..{int(length.max())}")
    real = valid(length, W).to(caption.device)
    cu_seqlens = torch.zeros(T + 1, dtype=torch.int32, device=length.device)
    cu_seqlens[1:] = length.cumsum(0)
    return caption[real], cu_seqlens.to(caption.device)


def unpack(words: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pad packed words with zeros to the longest caption: the inverse of `pack`.

    Args:
        words: [N, D].
        cu_seqlens: [T + 1].

    Returns:
        [T, W, D] with W the largest length.

    Raises:
        ValueError: cu_seqlens does not start at 0, end at N, or give every caption a word, or a tensor is on the meta
            device.
        TypeError: words is not a dense tensor, or cu_seqlens are not integers.

    >>> import torch, itm_fast
    >>> itm_fast.unpack(torch.ones(8, 4), torch.tensor([0, 3, 8]))[0, :, 0].tolist()
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    _values("unpack", "words", words)
    edge = _integers("unpack", "cu_seqlens", cu_seqlens)
    if not words.dim() or edge.dim() != 1:
        raise ValueError(
            f"unpack: words must be [N, D] and cu_seqlens [T + 1], got {list(words.shape)} and {list(edge.shape)}"
        )
    _bounds(edge, len(words), "unpack")
    length = edge[1:] - edge[:-1]
    W = int(length.max()) if len(length) else 0
    real = valid(length, W).to(words.device)
    caption = words.new_zeros(len(length), W, *words.shape[1:])
    caption[real] = words
    return caption


def _values(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a dense tensor that holds values."""
    if not dense(tensor):
        what = layout(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a dense tensor, got {what}")
    if tensor.is_meta:
        raise ValueError(f"{op}: {name} must hold values, got a tensor on the meta device, which has none")


def _integers(op: str, name: str, values: Sequence[int] | Tensor) -> Tensor:
    """The integers as a CPU tensor; an empty list counts as integers."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{op}: {name} must be integers, got {values!r:.60}") from error
    _values(op, name, tensor)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{op}: {name} must be integers, got {tensor.dtype}")
    return tensor.detach().cpu()


def valid(lengths: Tensor, n: int) -> Tensor:
    """[B, n] mask of the real rows of sets of these lengths that are padded to n rows."""
    return torch.arange(n, device=lengths.device)[None, :] < lengths[:, None]


def starts(lengths: Tensor) -> Tensor:
    """Bounds [n + 1] int64 of n sets of these lengths (integers or bool) that follow one another.

    >>> starts(torch.tensor([2, 1])).tolist()
    [0, 2, 3]
    """
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def node_bounds(cu_seqlens: Tensor) -> Tensor:
    """Bounds [T + 1] of the captions' nodes (one more than words in each caption), from the words' bounds; see `kept`.

    >>> node_bounds(torch.tensor([0, 2, 3])).tolist()
    [0, 3, 5]
    """

    def make(edge: Tensor) -> Tensor:
        return edge + torch.arange(len(edge), dtype=edge.dtype, device=edge.device)

    if torch.compiler.is_compiling():
        return make(cu_seqlens)
    with torch.inference_mode(False):  # tensors of inference mode have no version counter
        found = kept(cu_seqlens, "node_bounds", make)
        # `similarity_nodes` returns this tensor. If its caller has written to it, compute it again.
        return make(checked(cu_seqlens)) if found._version else found


def bounds(cu_seqlens: Tensor, rows: int, op: str) -> list[int]:
    """cu_seqlens as Python integers, checked against the number of packed rows. Callers must not change the list.

    CPU tensors are read and checked in every call; for a GPU tensor only the first call synchronises, see `kept`.

    Raises:
        ValueError: cu_seqlens does not start at 0, end at `rows`, or give every caption at least one row.
    """
    return kept(cu_seqlens, ("bounds", rows), lambda values: _bounds(values, rows, op))


def _bounds(cu_seqlens: Tensor, rows: int, op: str) -> list[int]:
    edge = cu_seqlens.tolist()
    if not edge or edge[0] != 0 or edge[-1] != rows:
        raise ValueError(
            f"{op}: cu_seqlens must start at 0 and end at the {rows} packed rows, "
            f"got {f'{edge[0]}..{edge[-1]}' if edge else 'no elements'}"
        )
    if any(map(operator.ge, edge, edge[1:])):  # a loop in C, as every call runs it
        t = next(t for t in range(len(edge) - 1) if edge[t] >= edge[t + 1])
        start, stop = edge[t : t + 2]
        raise ValueError(f"{op}: caption {t} is empty (cu_seqlens {start} then {stop}); every caption needs a word")
    return edge


def region_counts(region_lengths: Tensor | None, image: Tensor, op: str) -> list[int]:
    """Regions of each image [R, D] of `image` [I, R, D] as Python integers, checked. Callers must not change the list.

    Read as `bounds` reads; without region_lengths every image has R.

    Raises:
        ValueError: a count lies outside 1..R.
    """
    I, R = image.shape[:2]
    if region_lengths is None:
        return [R] * I
    return kept(region_lengths, ("regions", R), lambda values: _region_counts(values, R, op))


def _region_counts(region_lengths: Tensor, R: int, op: str) -> list[int]:
    counts = region_lengths.tolist()
    for i, n in enumerate(counts):
        if not 1 <= n <= R:
            raise ValueError(f"{op}: region_lengths must lie in 1..{R} (R), got {n} for image {i}")
    return counts


def kept(tensor: Tensor, key: Hashable, make: Callable[[Tensor], Made]) -> Made:
    """Return make(tensor) for a small tensor of lengths or bounds; cached for a GPU tensor, to avoid synchronising.

    For a CPU tensor `make` runs in every call, on the current values.

    Reading a GPU tensor waits for all earlier work of the device. So the result is computed once per tensor object and
    kept until the object dies or torch's version counter says that it was written to: by an in-place operation, `copy_`
    or an assignment, also through a view. Some writes do not change the counter: through `tensor.data`, DLPack,
    `__cuda_array_interface__`, a custom kernel, or the replay of a CUDA graph. After one of these, pass
    `tensor.clone()`; otherwise ops go on using a copy of the values that were checked, so their results are those of
    the old lengths, and they read nothing out of bounds. Tensors of inference mode have no counter and are read in
    every call. While a CUDA graph is captured nothing can be read: what is not kept then raises a RuntimeError.
    """
    if tensor.device.type in READ_ANEW or tensor.is_inference():
        return make(tensor)
    version, found = _kept.get(tensor, (None, {}))
    if version != tensor._version or key not in found:
        refuse_captured(tensor)
        if version != tensor._version:
            found = {_VALUES: tensor.clone()}
            _kept[tensor] = tensor._version, found
        found[key] = make(found[_VALUES])
    return found[key]


def checked(tensor: Tensor) -> Tensor:
    """The copy of the values that `kept` passes to `make`. Kernels read it instead of the tensor itself."""
    return kept(tensor, _VALUES, lambda values: values)


class Tiles(NamedTuple):
    """`number` tiles of `size` slots each; the first begins at slot `first` of `NodePlan`'s tables."""

    size: int
    first: int
    number: int


class Window(NamedTuple):
    """Consecutive captions, their nodes (packed rows), and the tiles that hold these nodes."""

    captions: slice
    rows: slice
    tiles: tuple[Tiles, ...]


class NodePlan(NamedTuple):
    """How the nodes of whole captions are packed into tiles.

    `edge`: the nodes' bounds as Python integers; `start` [T + 1] int32: the same on the device.
    `row` and `owner` [slots] int32: the packed row in each slot, and its caption; both -1 for an empty slot.
    """

    edge: list[int]
    start: Tensor
    row: Tensor
    owner: Tensor
    windows: list[Window]


NODE_SLOTS = 16  # the fewest slots that a caption takes in a tile: the least dimension of tl.dot


def node_plan(cu_seqlens: Tensor, rows: int, op: str, sizes: Sequence[int], window: int) -> NodePlan:
    """Pack each caption into a tile of the smallest of `sizes` that holds it; see `kept`.

    A caption takes a power of two of slots, at least 16, beginning at a multiple of that number. So a reduction over a
    tile's rows adds a caption's values in an order that does not depend on the captions beside it.

    Args:
        cu_seqlens: [T + 1] bounds of the captions' nodes.
        rows: number of nodes.
        op: name for messages.
        sizes: tile sizes, ascending powers of two. Empty: no tiles are made.
        window: the most nodes in a window; a larger caption has a window to itself.

    Raises:
        ValueError: as `bounds` does, or a caption has more nodes than the largest tile.
    """
    key = "nodes", rows, tuple(sizes), window
    return kept(cu_seqlens, key, lambda values: _node_plan(values, rows, op, sizes, window))


def _node_plan(values: Tensor, rows: int, op: str, sizes: Sequence[int], window: int) -> NodePlan:
    edge = _bounds(values, rows, op)
    row: list[int] = []
    owner: list[int] = []
    windows = []
    for captions in stretches(edge, window):
        places: dict[int, list[tuple[int, int]]] = {size: [] for size in sizes}  # (slots, caption)
        for t in range(captions.start, captions.stop):
            n = edge[t + 1] - edge[t]
            if not sizes:
                continue
            refuse_long(op, t, n, "nodes", sizes[-1])
            slots = max(NODE_SLOTS, 1 << (n - 1).bit_length())
            places[next(size for size in sizes if slots <= size)].append((slots, t))
        tiles = []
        for size, members in places.items():
            first = len(row)
            # Largest captions first: then each begins at a multiple of its number of slots.
            for slots, t in sorted(members, key=lambda m: (-m[0], m[1])):
                n = edge[t + 1] - edge[t]
                row += [*range(edge[t], edge[t + 1]), *[-1] * (slots - n)]
                owner += [t] * n + [-1] * (slots - n)
            empty = -len(row) % size if members else 0
            row += [-1] * empty
            owner += [-1] * empty
            if members:
                tiles.append(Tiles(size, first, (len(row) - first) // size))
        windows.append(Window(captions, slice(edge[captions.start], edge[captions.stop]), tuple(tiles)))
    start, *tables = (torch.tensor(x, dtype=torch.int32).to(values.device) for x in (edge, row, owner))
    return NodePlan(edge, start, tables[0], tables[1], windows)


def refuse_long(op: str, caption: int, n: int, rows: str, most: int) -> None:
    """Raise a ValueError if a caption's n rows, "words" or "nodes", are more than the largest tile holds."""
    if n > most:
        raise ValueError(
            f'{op}: caption {caption} has {n} {rows}, and the triton backend takes at most {most}; use backend="torch"'
        )


def stretches(edge: Sequence[int], rows: int) -> Iterator[slice]:
    """Cut consecutive sets, with bounds `edge`, into slices of sets with at most `rows` rows, but at least one set."""
    start = 0
    while start < len(edge) - 1:
        stop = max(start + 1, bisect.bisect_right(edge, edge[start] + rows) - 1)
        yield slice(start, stop)
        start = stop


class Run(NamedTuple):
    """`size` captions of `length` rows each. `captions` indexes a tensor [T, ...], `rows` a packed one [N, ...]."""

    length: int
    captions: Index
    rows: Index
    size: int


def runs(edge: Sequence[int], device: torch.device, most: int) -> Iterator[Run]:
    """Group captions of equal length, at most `most` rows (but at least one caption) per run.

    Neighbouring captions are indexed by slices, so captions that are sorted by length are not copied.
    """
    length = [b - a for a, b in zip(edge, edge[1:], strict=False)]
    order = sorted(range(len(length)), key=length.__getitem__)
    start = 0
    while start < len(order):
        L = length[order[start]]
        stop = start + 1
        while stop < len(order) and length[order[stop]] == L and (stop - start + 1) * L <= most:
            stop += 1
        members = order[start:stop]
        if members[-1] - members[0] == stop - start - 1:
            first, last = members[0], members[-1] + 1
            yield Run(L, slice(first, last), slice(edge[first], edge[last]), len(members))
        else:
            captions = torch.tensor(members)
            rows = torch.tensor([edge[t] for t in members])[:, None] + torch.arange(L)
            yield Run(L, captions.to(device), rows.flatten().to(device), len(members))
        start = stop


def spans(total: int, size: int) -> Iterator[slice]:
    """Cut range(total) into slices of `size`; the last may be shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
