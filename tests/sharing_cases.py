"""What the four processes of `test_sharing.py` do together."""

from __future__ import annotations

import errno
import os
import signal
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from ranks_cases import RAGGED, after_blocks, caught, evaluated, evaluations
from training_cases import WORDS, tiny_options

from itm_fast import _ranks
from itm_fast._ranks import Ranks, joined
from itm_fast.evaluation import encode, mapped, memory
from itm_fast.evaluation.block_scores import BlockScorer
from itm_fast.evaluation.mapped import place_of
from itm_fast.evaluation.scoring import columns_of, plan_encoded
from itm_fast.models import build

PROCESSES = 4
CPU = torch.device("cpu")


def maps_of(tensor: torch.Tensor) -> tuple[str, str]:
    """The permissions and the inode of the file that a tensor is mapped from."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, permissions, _, _, inode, *_ = line.split()
        first, last = (int(edge, 16) for edge in place.split("-"))
        if first <= tensor.data_ptr() < last:
            return permissions, inode
    raise AssertionError("mapped from nothing")


def encoded(folder: Path | None, ranks: Ranks) -> dict:
    """An encoded split and its states, by the processes of this machine, and what this process's encoders have seen."""
    opt = tiny_options("saf")
    opt.vocab_size, opt.device = len(WORDS), "cpu"
    torch.manual_seed(0)
    model = build(opt)
    seen, left = {"img_enc": 0, "txt_enc": 0}, set()

    def see(name):
        def hook(module, given):
            seen[name] += len(given[0])
            if folder is not None:
                left.update(os.listdir(folder))

        return hook

    for name in seen:
        getattr(model, name).register_forward_pre_hook(see(name))
    node = ranks.node or Ranks()
    place = place_of(0, folder, node) if folder is not None else mapped.Place()
    with mock.patch("itm_fast.evaluation.block_scores.CHUNK", 3), torch.no_grad():
        split = encode(model, RAGGED, WORDS, batch_size=4, progress=False, place=place)
        # 64 GB: what a pytest worker holds by then counts, and may be more than one GB.
        plan = plan_encoded(model.scorer, split, 64.0, 0)
        scorer = BlockScorer(model.scorer.eval(), split, plan, columns_of(split)[0])
    states = [*scorer._image_state[1:], *scorer._caption_state]
    found = {"seen": seen, "left": left, "node": node.world, "identity": split.identity()}
    found["tensors"] = [x.clone() for x in (split.image, split.words, *states)]
    if folder is not None:
        found["maps"] = [maps_of(x) for x in (split.image, split.words, *states)]
    return found


def share(folder: Path) -> dict:
    """As `encoded`, and what of the machine is this process's."""
    machine = {"_meminfo": mock.Mock(return_value=10**9), "_CGROUPS": ()}
    with joined(CPU) as ranks, mock.patch.multiple(memory, **machine):
        found = encoded(folder, ranks)
        found["memory"], found["threads"] = memory.available_bytes(CPU), torch.get_num_threads()
    return found


def full_disk(folder: Path) -> str:
    """What each process says when the disk has no room for the file that they share."""

    def reserve(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with joined(CPU) as ranks, mock.patch.object(mapped, "reserve", reserve):
        return caught(lambda: encoded(folder, ranks))


def too_small_disk(folder: Path) -> str:
    """What each process says when that is known before anything is encoded."""
    with joined(CPU) as ranks, mock.patch.object(mapped.shutil, "disk_usage", return_value=mock.Mock(free=0)):
        return caught(lambda: place_of(1, folder, ranks.node or Ranks()))


def killed(folder: Path, rank: int) -> None:
    """An evaluation whose processes are all killed, each after it has counted some more blocks."""
    with after_blocks(1 + rank % 2, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        evaluated(state=folder / "killed")


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(3)
    group = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": PROCESSES}
    dist.init_process_group("gloo", **group)
    ranks = Ranks(rank, PROCESSES)
    try:
        places = [folder / name for name in ("one", "first", "second")]
        found = {"one machine": share(places[0])}
        with mock.patch.object(_ranks, "_machine_name", return_value=f"machine {rank % 2}"):
            found["two machines"] = share(places[1 + rank % 2])
        found |= {"threads": torch.get_num_threads(), "full": full_disk(places[0])}
        found["too small"] = too_small_disk(places[0])
        torch.set_num_threads(1)
        found["evaluations"], found["report"] = evaluations(ranks), evaluated()
        torch.save(found, folder / f"found{rank}")
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise
    ranks.most(0)
    killed(folder, rank)
