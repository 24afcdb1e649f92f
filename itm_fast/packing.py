"""Padded captions to packed words and back, and captions of one length together.

Packed is the form every op takes. Captions of one length need no padding and no mask, so a block of them is dense
however ragged the captions are, and what lies in one caption can never touch another.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Index = slice | Tensor
Made = TypeVar("Made")
READ_ANEW = ("cpu",)  # device types whose tensors are read in every call: reading them waits for nothing
_VALUES = "values"
_kept = WeakTensorKeyDictionary()  # tensor -> (its version, what was made of it)


def pack(caption: Tensor, lengths: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Drop the padding of a batch of captions.

    Args:
        caption: [T, W, D] (or [T, W]), whatever lies beyond a caption's length is never read.
        lengths: [T] words per caption, each from 1 to W.

    Returns:
        words [sum of lengths, D] and cu_seqlens [T + 1] int32 on the captions' device: caption t is
        `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.

    Raises:
        ValueError: one length per caption is missing, a length lies outside 1..W, or a tensor is on the meta device.
        TypeError: caption is no dense tensor, or lengths are not integers.

    >>> import torch, itm_fast
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(2, 5, 8), [3, 5])
    >>> words.shape, cu_seqlens.tolist()
    (torch.Size([8, 8]), [0, 3, 8])
    """
    _values("pack", "caption", caption)
    if caption.dim() < 2:
        raise ValueError(f"pack: caption must be [T, W, D], got {list(caption.shape)}")
    length = _integers("pack", "lengths", lengths)
    length = length.to(torch.int64)
    T, W = caption.shape[:2]
    if length.shape != (T,):
        raise ValueError(f"pack: lengths must be [T] with T = {T} captions, got {list(length.shape)}")
    if T and not (int(length.min()) >= 1 and int(length.max()) <= W):
        raise ValueError(f"pack: lengths must lie in 1..{W} (W), got {int(length.min())}..{int(length.max())}")
    real = (torch.arange(W, device=length.device)[None, :] < length[:, None]).to(caption.device)
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
        TypeError: words is no dense tensor, or cu_seqlens are not integers.

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
    real = (torch.arange(W)[None, :] < length[:, None]).to(words.device)
    caption = words.new_zeros(len(length), W, *words.shape[1:])
    caption[real] = words
    return caption


def _values(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        what = f"a tensor of layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a dense tensor, got {what}")
    if tensor.is_meta:
        raise ValueError(f"{op}: {name} must hold values, got a tensor on the meta device, which has none")


def _integers(op: str, name: str, values: Sequence[int] | Tensor) -> Tensor:
    """These integers in host memory; an empty list is as good as one of integers."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{op}: {name} must be integers, got {values!r:.60}") from error
    _values(op, name, tensor)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{op}: {name} must be integers, got {tensor.dtype}")
    return tensor.detach().cpu()


def node_bounds(cu_seqlens: Tensor) -> Tensor:
    """Bounds [T + 1] of the captions' nodes, one more than their words, of those of the words; see `kept`.

    >>> node_bounds(torch.tensor([0, 2, 3])).tolist()
    [0, 3, 5]
    """

    def make(edge: Tensor) -> Tensor:
        return edge + torch.arange(len(edge), dtype=edge.dtype, device=edge.device)

    if torch.compiler.is_compiling():
        return make(cu_seqlens)
    with torch.inference_mode(False):  # whose tensors do not tell when they are written to
        found = kept(cu_seqlens, "node_bounds", make)
        # `similarity_nodes` gives them to its caller, who may have written to them.
        return make(checked(cu_seqlens)) if found._version else found


def bounds(cu_seqlens: Tensor, rows: int, op: str) -> list[int]:
    """cu_seqlens as Python integers, checked against the number of packed rows; not to be changed.

    On a CPU they are read and checked in every call; on a device only the first call waits for it, see `kept`.

    Raises:
        ValueError: it does not start at 0, end at `rows`, or give every caption at least one row.
    """
    return kept(cu_seqlens, ("bounds", rows), lambda values: _bounds(values, rows, op))


def _bounds(cu_seqlens: Tensor, rows: int, op: str) -> list[int]:
    edge = cu_seqlens.tolist()
    if not edge or edge[0] != 0 or edge[-1] != rows:
        raise ValueError(
            f"{op}: cu_seqlens must start at 0 and end at the {rows} packed rows, "
            f"got {f'{edge[0]}..{edge[-1]}' if edge else 'no elements'}"
        )
    if any(map(operator.ge, edge, edge[1:])):  # in C, for this is done in every call
        t = next(t for t in range(len(edge) - 1) if edge[t] >= edge[t + 1])
        start, stop = edge[t : t + 2]
        raise ValueError(f"{op}: caption {t} is empty (cu_seqlens {start} then {stop}); every caption needs a word")
    return edge


def kept(tensor: Tensor, key: Hashable, make: Callable[[Tensor], Made]) -> Made:
    """What `make` gives of a small tensor of lengths or bounds, without a wait for the device in every call.

    On a CPU it is made anew in every call, of the values that the tensor has then, however they got there.

    Reading from another device waits until that has done all before, so there it is made once for a tensor object and
    kept until the object dies or torch counts a write to it: an operation in place, `copy_`, an assignment to elements,
    also through a view. Writes that torch does not count are not seen: through `tensor.data`, through memory shared
    by DLPack or `__cuda_array_interface__`, by a kernel of somebody else's, or by a CUDA graph that is replayed. After
    one of these hand over `tensor.clone()`. Until then everything is made of the copy of the values that was
    checked, so an op gives the result of the former lengths and reads nothing out of bounds. Tensors of inference mode
    count no writes: theirs are read in every call.
    """
    if tensor.device.type in READ_ANEW or tensor.is_inference():
        return make(tensor)
    version, found = _kept.get(tensor, (None, {}))
    if version != tensor._version:
        found = {_VALUES: tensor.clone()}
        _kept[tensor] = tensor._version, found
    if key not in found:
        found[key] = make(found[_VALUES])
    return found[key]


def checked(tensor: Tensor) -> Tensor:
    """The values that `kept` makes everything of: what kernels read in place of the tensor itself."""
    return kept(tensor, _VALUES, lambda values: values)


class Tiles(NamedTuple):
    """`number` tiles of `size` slots, from slot `first` of a plan's tables on."""

    size: int
    first: int
    number: int


class Window(NamedTuple):
    """Neighbouring captions, their nodes, and the tiles that these are packed in."""

    captions: slice
    rows: slice
    tiles: tuple[Tiles, ...]


class NodePlan(NamedTuple):
    """The nodes of whole captions packed in tiles.

    `row` and `owner` [slots] int32: the packed row that lies in a slot, and its caption; both -1 where none does.
    `start` [T + 1] int32: `edge` on the device.
    """

    edge: list[int]
    start: Tensor
    row: Tensor
    owner: Tensor
    windows: list[Window]


NODE_SLOTS = 16  # the least rows of a tile that a caption takes


def node_plan(cu_seqlens: Tensor, rows: int, op: str, sizes: Sequence[int], window: int) -> NodePlan:
    """Pack captions into tiles of `sizes` rows (powers of 2), each into the least that holds it; see `kept`.

    A caption takes a power of 2 of slots, 16 at the least, at a multiple of that number: so that what a reduction
    over a tile's rows adds up, and in which order, does not depend on what lies beside it.

    Args:
        cu_seqlens: [T + 1] bounds of the captions' nodes.
        rows: how many nodes there are.
        op: for messages.
        sizes: of tiles, ascending; the first one takes most captions. None: no tiles are made.
        window: nodes in a window, which holds one caption at the least.

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
            _fits(op, t, n, "nodes", sizes[-1])
            slots = max(NODE_SLOTS, 1 << (n - 1).bit_length())
            places[next(size for size in sizes if slots <= size)].append((slots, t))
        tiles = []
        for size, members in places.items():
            first = len(row)
            # The largest first: then every caption lies at a multiple of its slots.
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


def _fits(op: str, caption: int, n: int, rows: str, most: int) -> None:
    if n > most:
        raise ValueError(
            f'{op}: caption {caption} has {n} {rows}, and the triton backend takes at most {most}; use backend="torch"'
        )


class Group(NamedTuple):
    """`captions` captions of at most `size` words, from place `first` of a plan's order on."""

    size: int
    first: int
    captions: int


class Stretch(NamedTuple):
    """Neighbouring captions, their words, and the groups by length that they fall in."""

    captions: slice
    rows: slice
    groups: tuple[Group, ...]


class LengthPlan(NamedTuple):
    """Captions by classes of length. `order` [T] int32: the captions, group by group."""

    order: Tensor
    windows: list[Stretch]


def length_plan(cu_seqlens: Tensor, rows: int, op: str, sizes: Sequence[int], window: int) -> LengthPlan:
    """Group captions by the least of `sizes` that holds them; see `kept`.

    Args:
        cu_seqlens: [T + 1].
        rows: how many words there are.
        op: for messages.
        sizes: words that a tile takes of a caption, ascending.
        window: words in a window, which holds one caption at the least.

    Raises:
        ValueError: as `bounds` does, or a caption has more words than the largest tile.
    """
    key = "lengths", rows, tuple(sizes), window
    return kept(cu_seqlens, key, lambda values: _length_plan(values, rows, op, sizes, window))


def _length_plan(values: Tensor, rows: int, op: str, sizes: Sequence[int], window: int) -> LengthPlan:
    edge = _bounds(values, rows, op)
    order: list[int] = []
    windows = []
    for captions in stretches(edge, window):
        members: dict[int, list[int]] = {size: [] for size in sizes}
        for t in range(captions.start, captions.stop):
            n = edge[t + 1] - edge[t]
            _fits(op, t, n, "words", sizes[-1])
            members[next(size for size in sizes if n <= size)].append(t)
        groups = []
        for size, found in members.items():
            if found:
                groups.append(Group(size, len(order), len(found)))
                order += found
        windows.append(Stretch(captions, slice(edge[captions.start], edge[captions.stop]), tuple(groups)))
    return LengthPlan(torch.tensor(order, dtype=torch.int32).to(values.device), windows)


def stretches(edge: Sequence[int], rows: int) -> Iterator[slice]:
    """Cut sets of rows into neighbours of at most `rows` rows together, one set at the least."""
    start = 0
    while start < len(edge) - 1:
        stop = max(start + 1, bisect.bisect_right(edge, edge[start] + rows) - 1)
        yield slice(start, stop)
        start = stop


class Run(NamedTuple):
    """`size` captions of one length: `length` rows each; `captions` and `rows` index [T] and [N]."""

    length: int
    captions: Index
    rows: Index
    size: int


def runs(edge: Sequence[int], device: torch.device, most: int) -> Iterator[Run]:
    """Group captions by length, at most `most` rows a run (one caption at the least).

    Neighbours of equal length are indexed by slices, so captions sorted by length are never copied.
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
    """Cut 0..total into slices of `size`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
