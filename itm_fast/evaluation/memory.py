"""The memory plan of a scoring run, made before it starts.

The user gives a budget in GB (1 GB = 10^9 bytes). On the CPU it bounds the whole process: Python, torch, the model,
the encoded split, the score matrix and the scratch. On another device it bounds the memory of that device; the score
matrix and the encoded split are then also in host memory, outside the budget.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._ranks import local_world
from .._text import several
from .._workspace import scratch_bytes
from ..nn import image_state
from .encoding import device_of, evaluation_mode

GB = 10**9
SHARE = {"cpu": 0.7, "cuda": 0.8}  # of the available memory, used if no budget is given
LEAST_WORKSPACE = 64 << 20
_SPLIT = ("encoded images", "encoded captions", "states computed once")  # names of rows of the plan
_OTHERS = "the same of the other models"
GROWTH = 32 << 20  # what Python and torch still load and allocate for themselves while scores are computed
ENCODING = 128 << 20  # memory that the allocator keeps after encoding in batches
CHUNK = 256  # images, or captions, whose state is computed at once
# Images and captions of a block, which is one step of the progress bar and of resuming. The size hardly matters to
# memory, as the scorer cuts a block further to fit its workspace.
_BLOCK = {"cpu": (500, 256), "cuda": (2500, 512)}
_CGROUPS = (  # a container's limit and what it uses: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """A memory plan; `print(plan)` shows it as a table.

    Attributes:
        images, captions, words: sizes of the split: I, T and N.
        distinct: number of distinct captions; identical ones are scored once.
        device: where the scores are computed.
        budget: the budget in bytes; `source` says how it was chosen.
        held: bytes of everything that must be in memory, by name.
        workspace: bytes of scratch that the scorer may use.
        resident: whether the whole encoded split is kept on the device; if not, each block of it is copied there, or
            on the CPU read from files.
        on_disk: bytes of the encoded split and its states that are in files, of all models together.
        image_block, caption_block: size of a block; `blocks` is their number.
        pairs: images times distinct captions.
    """

    images: int
    captions: int
    words: int
    distinct: int
    device: torch.device
    budget: int
    source: str
    held: dict[str, int]
    workspace: int
    resident: bool
    image_block: int
    caption_block: int
    on_disk: int = 0

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.images // self.image_block) * -(-self.distinct // self.caption_block)

    @property
    def pairs(self) -> int:
        """Number of pairs that are scored."""
        return self.images * self.distinct

    def block(self, number: int) -> tuple[slice, slice]:
        """The images and the distinct captions of a block; blocks are numbered row by row."""
        row, column = divmod(number, -(-self.distinct // self.caption_block))
        image, caption = row * self.image_block, column * self.caption_block
        return (
            slice(image, min(image + self.image_block, self.images)),
            slice(caption, min(caption + self.caption_block, self.distinct)),
        )

    def pairs_of(self, number: int) -> int:
        """Number of pairs of a block."""
        rows, columns = self.block(number)
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    @property
    def split_bytes(self) -> int:
        """Bytes of the encoded split and its states, if they are in memory."""
        return sum(self.held.get(name, 0) for name in _SPLIT)

    @property
    def total(self) -> int:
        """Bytes held at the peak."""
        return sum(self.held.values()) + self.workspace

    def rows(self) -> list[tuple[str, int]]:
        """The table's rows: names and bytes."""
        return [
            *self.held.items(),
            ("scratch of the scorer", self.workspace),
            ("peak", self.total),
            (f"budget: {self.source}", self.budget),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        cpu = self.device.type == "cpu"
        width = max(len(name) for name, _ in rows)
        distinct = "" if self.distinct == self.captions else f", {self.distinct:,} distinct"
        size = f"{several(self.images, 'image')} x {several(self.captions, 'caption')}{distinct} ({self.words:,} words)"
        lines = [f"{size} = {self.pairs:,} pairs on {self.device}"]
        lines += [f"  {name:<{width}}  {size / GB:8.3f} GB" for name, size in rows]
        lines.append(
            f"  {several(self.blocks, 'block')} of up to {several(self.image_block, 'image')} x "
            + several(self.caption_block, "caption")
            + ("" if self.resident or cpu else "; encoded images and captions are copied to the device block by block")
        )
        if self.on_disk:
            lines.append(f"  {self.on_disk / GB:.3f} GB of embeddings and states in temporary files")
        return "\n".join(lines)


def plan(
    scorer: Any,
    *,
    images: int,
    regions: int,
    dim: int,
    lengths: NDArray[np.integer],
    distinct: NDArray[np.integer] | None = None,
    memory_gb: float | None = None,
    dtype: torch.dtype = torch.float32,
    matrices: int = 1,
    encoded: bool = False,
    others: int = 0,
    mapped: bool | None = False,
    block: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> MemoryPlan:
    """Plan what is kept in memory and how large blocks and scratch are, so that the budget is not exceeded.

    Args:
        scorer: a pair scorer; it computes the state of two images and two captions, to learn their sizes.
        images: I.
        regions: R.
        dim: D.
        lengths: [T] words per caption.
        distinct: words of each distinct caption; None: all captions are distinct.
        memory_gb: the budget in GB; None takes 70 % of the memory now available to the process on the CPU (beyond
            what it already holds), 80 % of a CUDA device's.
        dtype: of the embeddings.
        matrices: how many float32 [I, T] matrices will be allocated; 0 if the scores go to a file or
            are ranked without a matrix.
        encoded: whether the process already holds the encoded split.
        others: bytes of the encoded splits and states of other models, which are kept at the same time.
        mapped: whether these and those of this model are in files on the host; None: on the CPU, if memory is too small
            for them.
        block: (images, captions) of a block, if an interrupted run has fixed it.
        device: where the scores are computed; None: the device of the scorer's parameters.

    Returns:
        `MemoryPlan`.

    Raises:
        ValueError: the budget is too small; the message names the smallest that is enough. Or the scorer gives vectors.

    >>> from itm_fast.nn import CrossAttentionScore
    >>> found = plan(CrossAttentionScore(), images=1000, regions=36, dim=1024, lengths=np.full(5000, 13), memory_gb=8)
    >>> found.blocks, found.held["encoded images"]
    (40, 147456000)
    """
    if getattr(scorer, "output", None) == "z":  # as `itm_fast.models.sgraf.EncoderSimilarity` has it
        raise ValueError("scorer.output is 'z', vectors and not scores; set it to 'score' to evaluate")
    device = device or device_of(scorer)
    cpu = device.type == "cpu"
    captions, words, item = len(lengths), int(np.sum(lengths)), torch.finfo(dtype).bits // 8
    lengths = np.sort(np.asarray(lengths if distinct is None else distinct, np.int64))[::-1]
    image_block, caption_block = block or _blocks(images, len(lengths), device)
    of_image, of_caption, of_word = _state_bytes(scorer, regions, dim, lengths, dtype, device)
    longest = int(lengths[:caption_block].sum())
    embeddings = dict(zip(_SPLIT, (images * regions * dim * item, words * dim * item), strict=False))
    states = images * of_image + len(lengths) * of_caption + int(lengths.sum()) * of_word
    # Each word of a block also has an int64 index; each score exists three times: on the device, on the host, permuted.
    one_block = longest * (dim * item + of_word + 8) + caption_block * (of_caption + image_block * 12)
    in_memory = encoded and cpu and not mapped
    process = _process_bytes(device) - (sum(embeddings.values()) if in_memory else 0)
    held = {
        "Python, torch and the model" if cpu else "already on the device": (
            max(process, 0) + GROWTH + (0 if encoded else ENCODING)
        ),
        **embeddings,
        _SPLIT[2]: states,
        **({_OTHERS: others} if others else {}),
        "one block": one_block,
    }
    if cpu and matrices:
        held["score matrix" if matrices == 1 else f"{matrices} score matrices"] = matrices * images * captions * 4
    elsewhere = (*_SPLIT, _OTHERS)
    streamed = {name: size for name, size in held.items() if name not in elsewhere}
    if not cpu or mapped is not False:
        chunk = max(image_block, CHUNK) * (regions * dim * item + of_image)
        more = max(CHUNK - caption_block, 0) * int(lengths[0])
        streamed["one block"] += chunk + more * (dim * item + of_word)
    budget, source = _budget(memory_gb, device, process, held, in_memory)
    resident = sum(held.values()) + LEAST_WORKSPACE <= budget
    if cpu and mapped is not None:
        resident = not mapped
    chosen = held if resident else streamed
    needed = sum(chosen.values())
    if needed + LEAST_WORKSPACE > budget:
        what = ", ".join(f"{name} {size / GB:.3f}" for name, size in chosen.items())
        hint = "; scores kept in a file (--scores) need no memory" if cpu and matrices else ""
        raise ValueError(
            f"a memory budget of {budget / GB:.3g} GB cannot hold {images:,} images x {captions:,} captions; "
            f"the least that can is {_round_up(needed + LEAST_WORKSPACE):.2f} GB "
            f"({what}, scratch {LEAST_WORKSPACE / GB:.3f}){hint}"
        )
    files = (*_SPLIT[:2], _OTHERS) if resident else elsewhere  # a device that has room for the states holds them
    return MemoryPlan(
        images=images,
        captions=captions,
        words=words,
        distinct=len(lengths),
        device=device,
        budget=budget,
        source=source,
        held=chosen,
        workspace=min(scratch_bytes(device), budget - needed),
        resident=resident,
        image_block=image_block,
        caption_block=caption_block,
        on_disk=sum(held.get(name, 0) for name in files) if mapped or (cpu and not resident) else 0,
    )


def available_bytes(device: torch.device) -> int:
    """Memory that this process can still allocate on a device, within the limits of its container.

    Host memory is shared out equally among the processes of this run on this machine.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo()]
    for limit, used in _CGROUPS:
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such limit: absent, or the word "max"
            continue
    return max(min(found), 0) // local_world()


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # macOS reports the installed memory, not the free one
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return 4 * GB


def _process_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return GB // 2


def _budget(
    memory_gb: float | None, device: torch.device, process: int, held: dict[str, int], in_memory: bool
) -> tuple[int, str]:
    if memory_gb is not None:
        # Also refuses infinity, and sizes that overflow an integer.
        if not hasattr(memory_gb, "__float__") or not 0 < memory_gb <= GB:
            raise ValueError(
                f"the memory budget must be a number more than 0 GB and at most {GB:,} GB, got {memory_gb!r:.60}"
            )
        return round(memory_gb * GB), "as given"
    available = available_bytes(device)
    share = SHARE.get(device.type, SHARE["cpu"])
    mine = process + (held["encoded images"] + held["encoded captions"] if in_memory else 0)
    return mine + int(share * available), f"{share:.0%} of the {available / GB:.1f} GB available"


def _blocks(images: int, captions: int, device: torch.device) -> tuple[int, int]:
    most_images, most_captions = _BLOCK.get(device.type, _BLOCK["cuda"])
    rows = -(-images // most_images)
    return -(-images // rows), min(captions, most_captions)


def _state_bytes(
    scorer: Any, regions: int, dim: int, lengths: NDArray[np.int64], dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int]:
    """Bytes of state per image, per caption and per word, without the embeddings themselves."""
    two = [int(lengths[0]), int(lengths[-1])]
    image = torch.zeros(2, regions, dim, dtype=dtype, device=device)
    words = torch.zeros(sum(two), dim, dtype=dtype, device=device)
    cu_seqlens = torch.tensor([0, two[0], sum(two)], dtype=torch.int32, device=device)
    with evaluation_mode(scorer), torch.no_grad():
        of_image = image_state(scorer, image, None, torch.ones(2, regions, 4, device=device))[1:]
        of_caption = scorer.caption_state(words, cu_seqlens)
    per_word = getattr(scorer, "per_word", 0)
    of_word = sum(t.nbytes for t in of_caption[:per_word]) // sum(two)
    return sum(t.nbytes for t in of_image) // 2, sum(t.nbytes for t in of_caption[per_word:]) // 2, of_word


def _round_up(size: int) -> float:
    return -(-size // (GB // 100)) / 100
