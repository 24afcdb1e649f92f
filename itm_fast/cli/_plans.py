"""What `itm-fast evaluate --dry-run` prints: memory, disk and time."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from ._checkpoints import member_names, members

if TYPE_CHECKING:
    import torch

    from ..data import Split, Vocabulary
    from ..evaluation import MemoryPlan, Workload


def plan_evaluation(args: Namespace, names: list[str], models: list[Any], split: Split, vocab: Vocabulary) -> None:
    """Print the plan for these models and data, with the time that a small block takes here."""
    from ..data import caption_batches
    from ..evaluation import memory_plan
    from ..evaluation.calibration import calibrate_on, disk_line, time_line, torchrun_line
    from ..evaluation.memory import GB
    from ..evaluation.planning import memory_plans
    from ..evaluation.unknown_words import unknown_words, unknown_words_line

    captions = list(caption_batches(split.captions, vocab, args.batch_size))
    if args.scores:
        plans = [memory_plan(model, split, captions, len(models), args.memory_gb, True) for model in models]
    else:
        plans = memory_plans(models, split, captions, args.memory_gb)
    for name, model, found in zip(names, models, plans, strict=True):
        print(f"{name}: {found}")
        print(time_line(calibrate_on(model, split, vocab, captions, args.batch_size), found.pairs))
    if room := disk_line(plans[0], args.state):
        print(room)
    if not args.scores and not args.part:  # which torchrun refuses
        # On the CPU everything is in the file, whatever the budget, which is another one for each process.
        budget = GB if plans[0].device.type == "cpu" else args.memory_gb
        print(torchrun_line(memory_plans(models, split, captions, budget, shared=True)[0], args.state))
    if args.scores:
        print(_room(args.scores, len(models), len(split.features), len(split.captions)))
    if words := unknown_words_line(unknown_words(captions, vocab)):
        print(words)


def plan_workload(args: Namespace) -> int:
    """Print the plan of each model for the sizes of a published test set."""
    from ..evaluation import WORKLOADS
    from ..evaluation.calibration import calibrate, disk_line, time_line, torchrun_line
    from ..evaluation.memory import GB
    from ..models import build
    from ..models._building import rebuild
    from ..models._catalogue import CATALOGUE
    from ..models._common import usable_device

    size = WORKLOADS[args.workload]
    device = usable_device(args.device)
    loaded = members(args.checkpoint)
    if loaded:
        models: list[Any] = [rebuild(found, device) for found in loaded]
        names, dims = member_names(loaded), [found.opt.embed_size for found in loaded]
    else:
        models = [build(_published(name, size, device)) for name in CATALOGUE]
        names, dims = list(CATALOGUE), [size.dim] * len(models)
    alone = [_workload_plan(size, model, dim, GB, device) for model, dim in zip(models, dims, strict=True)]
    together = sum(found.split_bytes for found in alone) if loaded and not args.scores else 0
    for name, model, dim, mine in zip(names, models, dims, alone, strict=True):
        others = max(together - mine.split_bytes, 0)
        found = _workload_plan(size, model, dim, args.memory_gb, device, others)
        print(f"{args.workload}, {name}: {found}")
        if room := disk_line(found):
            print(room)
        if not args.scores:
            budget = GB if device.type == "cpu" else args.memory_gb
            print(torchrun_line(_workload_plan(size, model, dim, budget, device, others, True)))
        print(time_line(calibrate(model.scorer, size.regions, dim, size.lengths, device), found.pairs))
    if args.scores:
        print(_room(args.scores, len(loaded) or 1, size.images, len(size.lengths)))
    return 0


def _workload_plan(
    size: Workload,
    model: Any,
    dim: int,
    memory_gb: float | None,
    device: torch.device,
    others: int = 0,
    mapped: bool | None = None,
) -> MemoryPlan:
    from ..evaluation import plan

    return plan(
        model.scorer,
        images=size.images,
        regions=size.regions,
        dim=dim,
        lengths=size.lengths,
        memory_gb=memory_gb,
        matrices=0,
        others=others,
        mapped=mapped,
        device=device,
    )


def _room(scores: str, models: int, images: int, captions: int) -> str:
    from ..evaluation.pipeline import score_files
    from ..evaluation.score_claim import check_room

    return check_room(score_files(scores, models), (images, captions))


def _published(name: str, size: Any, device: Any) -> Namespace:
    """Published options of a model at this size; vocab_size is arbitrary, as the encoders are not run."""
    from ..models._catalogue import CATALOGUE
    from ..training import options

    changes = {"img_dim": size.features, "embed_size": size.dim}
    if "sim_dim" in CATALOGUE[name].options:
        changes["sim_dim"] = size.similarity
    return Namespace(**vars(options(name, **changes)), vocab_size=4, device=str(device))
