"""The memory plans of an evaluation, made before anything is encoded, and the conditions that its report names."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import __version__
from .._backends import requested
from .._checks import matmul_precision
from .distinct import columns, first_of_equals
from .encoding import device_of, embed, evaluation_mode, packed_ids
from .memory import GB, MemoryPlan, plan

if TYPE_CHECKING:
    from ..data import Split
    from .encoding import CaptionBatches


def memory_plans(
    models: Sequence[Any],
    split: Split,
    captions: CaptionBatches,
    memory_gb: float | None = None,
    shared: bool = False,
) -> list[MemoryPlan]:
    """The plan of each model where all are scored at the same time, without a matrix; see `memory_plan`.

    The encoded splits and states of all models are in memory or, if they do not fit or processes share them, all in
    files.
    """
    alone = [memory_plan(model, split, captions, 1, GB, True) for model in models] if len(models) > 1 else []
    kept = [found.split_bytes for found in alone] or [0]

    def plans(mapped: bool) -> list[MemoryPlan]:
        return [
            memory_plan(model, split, captions, 1, memory_gb, True, sum(kept) - mine, mapped)
            for model, mine in zip(models, kept, strict=True)
        ]

    if shared:
        return plans(True)
    found = plans(False)
    return plans(True) if any(one.on_disk for one in found) else found


def memory_plan(
    model: Any,
    split: Split,
    captions: CaptionBatches,
    models: int = 1,
    memory_gb: float | None = None,
    in_file: bool = False,
    others: int = 0,
    mapped: bool = False,
) -> MemoryPlan:
    """The memory plan for scoring a split that is not encoded yet.

    Args:
        model: as for `evaluate`; it encodes one image, which also checks that the features fit it.
        split: as for `evaluate`.
        captions: `list(caption_batches(split.captions, vocab, batch_size))`.
        models: how many models are averaged.
        memory_gb: as for `score_all`.
        in_file: whether there is no matrix in memory: scores go to a file, or are ranked without it.
        others: as for `plan`.
        mapped: with `in_file`, whether embeddings are in files even if there is memory for them.

    Raises:
        ValueError: as `plan`, and when the features do not fit the model.
    """
    device = device_of(model.img_enc)
    with evaluation_mode(model.img_enc), torch.no_grad():
        embedded = embed(model.img_enc, split.features[0:1])
    ids, edges = packed_ids(captions)
    lengths = edges[1:] - edges[:-1]
    distinct, _ = columns(first_of_equals(ids, edges), lengths)
    return plan(
        model.scorer,
        images=len(split.features),
        regions=embedded.shape[1],
        dim=embedded.shape[2],
        lengths=lengths,
        distinct=lengths[distinct],
        memory_gb=memory_gb,
        dtype=embedded.dtype,
        matrices=0 if in_file else min(models, 2),
        others=others,
        mapped=(mapped or None) if in_file else False,
        device=device,
    )


def settings_of(
    plans: Sequence[MemoryPlan], folds: int | None, ties: str, batch_size: int, memory_gb: float | None
) -> dict[str, Any]:
    """Versions, device, backend, sizes and plans, as plain values."""
    device = plans[0].device
    return {
        "itm_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "backend_asked": requested(),
        "float32_matmul_precision": matmul_precision(),
        "images": plans[0].images,
        "captions": plans[0].captions,
        "distinct_captions": plans[0].distinct,
        "folds": folds,
        "ties": ties,
        "batch_size": batch_size,
        "memory_gb": memory_gb,
        "memory_plan_gb": [{name: size / GB for name, size in found.rows()} for found in plans],
    }
