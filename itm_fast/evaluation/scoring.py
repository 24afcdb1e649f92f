"""Scores of every image against every caption, block by block, under a memory budget."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._backends import requested
from .._checks import matmul_precision
from .._workspace import GIB, workspace
from .block_scores import BlockScorer, score_blocks
from .distinct import columns, first_of_equal_embeddings
from .encoding import Encoded, encode, evaluation_mode, weights_checksum
from .memory import MemoryPlan, plan
from .score_claim import Claim, kept_block
from .score_file import STRIPE, ScoreFile

if TYPE_CHECKING:
    from ..data import Vocabulary


def score(
    model: Any,
    features: NDArray[np.floating],
    captions: Sequence[str],
    vocab: Vocabulary,
    *,
    region_lengths: NDArray[np.integer] | Sequence[int] | None = None,
    boxes: NDArray[np.floating] | None = None,
    memory_gb: float | None = None,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Score images, given as region features, against captions, given as texts.

    Args:
        model: `itm_fast.models.load(path).model`, or a model of `itm_fast.models.build`.
        features: [I, R, F], float16, float32 or float64; F as the model was trained with.
        captions: T texts.
        vocab: the words that the model was trained with.
        region_lengths: [I] regions of each image; None means R for all.
        boxes: [I, R, 4] as parts of the picture, for models that read them.
        memory_gb: as for `score_all`.
        progress: show bars on standard error.

    Returns:
        float32 [I, T].

    Raises:
        ValueError: features, vocabulary and model do not fit each other, `vocab` is None, or a score is not finite.
        TypeError: a caption is not a string, or `model` no model.

    >>> from itm_fast.data.openclipart import CHECKPOINTS
    >>> from itm_fast.models import load
    >>> loaded = load(CHECKPOINTS["sgr"])
    >>> features = np.ones((2, 36, 128), np.float32)
    >>> score(loaded.model, features, ["a red apple", "a black cat", "two trees"], loaded.vocab).shape
    (2, 3)
    """
    from ..data import Split

    split = Split(features, captions, np.zeros(len(captions), np.int64), region_lengths, boxes, name="score")
    encoded = encode(model, split, vocab, progress=progress)
    return score_all(model.scorer, encoded, memory_gb=memory_gb, progress=progress)


def plan_for(
    scorer: Any,
    encoded: Encoded,
    *,
    memory_gb: float | None = None,
    out: str | os.PathLike[str] | None = None,
) -> MemoryPlan:
    """The memory plan that `score_all` with the same arguments follows.

    Args:
        scorer, encoded, memory_gb, out: as for `score_all`.

    Returns:
        `MemoryPlan`; `print` it.

    Raises:
        ValueError: as `score_all`.
    """
    block = kept_block(out, (len(encoded.image), len(encoded.lengths))) if out else None
    return plan_encoded(scorer, encoded, memory_gb, 0 if out else 1, block)


def plan_encoded(
    scorer: Any, encoded: Encoded, memory_gb: float | None, matrices: int, block: tuple[int, int] | None = None
) -> MemoryPlan:
    """`plan` of an encoded split."""
    images, regions, dim = encoded.image.shape
    order, _ = columns_of(encoded)
    return plan(
        scorer,
        images=images,
        regions=regions,
        dim=dim,
        lengths=encoded.lengths,
        distinct=encoded.lengths[order],
        memory_gb=memory_gb,
        dtype=encoded.image.dtype,
        matrices=matrices,
        encoded=True,
        mapped=encoded.place.folder is not None,
        block=block,
        device=encoded.device,
    )


def score_all(
    scorer: Any,
    encoded: Encoded,
    *,
    memory_gb: float | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Score every image against every caption.

    What depends on one image or one caption alone is computed once. Identical captions are scored once and share
    their scores, bit for bit. Captions are scored in order of length, longest first, so that the captions of a block
    have similar lengths and the first block needs the most memory; the result is in the split's order.

    Args:
        scorer: a pair scorer: `image_state`, `caption_state` and `score`, as `itm_fast.nn` has them.
        encoded: as `encode` returns it.
        memory_gb: memory budget in GB (10^9 bytes); see `plan` for the default and for what it covers.
        out: a .npy file for the scores. Each block is written when it is finished, so that an interrupted run can be
            resumed, and the matrix needs no memory.
        resume: continue an interrupted run into `out`, or reuse `out` if it is finished. It is refused if it was
            computed with another checkpoint, data or precision. Rows of a finished `out` that are damaged on the disk
            are named in a warning and scored again.
        progress: show a bar with pairs/s and the time left on standard error.

    Returns:
        float32 [I, T]; with `out`, the file memory-mapped for reading.

    Raises:
        ValueError: the budget is too small (the message names the smallest that is enough), a score is NaN or infinite
            (the message names the pair), or `out` was computed from other inputs.
        FileExistsError: `out` exists and `resume` is false.
        RuntimeError: another run writes to `out` (the message names its process and host), or the files of this run
            were removed or replaced; nothing more is written then.
        OSError: `out` cannot be written. Whether the disk has room for it is checked before anything is scored.
        KeyboardInterrupt: after Ctrl-C; with `out`, the message says how many blocks are kept.

    >>> from itm_fast.nn import CrossAttentionScore
    >>> image, words = torch.randn(2, 3, 8), torch.randn(5, 8)
    >>> encoded = Encoded(image, None, words, torch.tensor([0, 2, 5], dtype=torch.int32), np.array([0, 1]))
    >>> score_all(CrossAttentionScore(), encoded, progress=False).shape
    (2, 2)
    """
    encoded = with_equal_captions(encoded)
    if out is not None:
        with Claim(out, resume) as claim:
            return score_into(claim, scorer, encoded, memory_gb=memory_gb, progress=progress)
    plan = plan_for(scorer, encoded, memory_gb=memory_gb)
    order, column = columns_of(encoded)
    scores = np.empty((plan.images, plan.captions), np.float32)
    for _, rows, place, block in _blocks(scorer, encoded, plan, order, frozenset(), progress):
        scores[rows, place] = block
    # Contiguous writes above and one gather per row here: scattering each block's columns is ten times slower.
    for start in range(0, plan.images, STRIPE):
        scores[start : start + STRIPE] = np.take(scores[start : start + STRIPE], column, axis=1)
    return scores


def score_into(
    claim: Claim, scorer: Any, encoded: Encoded, *, memory_gb: float | None = None, progress: bool = True
) -> NDArray[np.float32]:
    """As `score_all`, into the score file of a `Claim`; other arguments, result and errors as there."""
    plan = plan_for(scorer, encoded, memory_gb=memory_gb, out=claim.path)
    order, column = columns_of(encoded)
    identity = {**encoded.identity(), "scorer": weights_checksum(scorer), **score_settings(plan.device)}
    block = (plan.image_block, plan.caption_block)
    with ScoreFile(claim, (plan.images, plan.captions), column, block, identity) as file:
        if not file.finished:
            with file.says_what_is_kept():
                for number, _, _, scores in _blocks(scorer, encoded, plan, order, file.done, progress):
                    file.write(number, scores)
                file.finish()
    return np.load(claim.path, mmap_mode="r", allow_pickle=False)


def with_equal_captions(encoded: Encoded) -> Encoded:
    """The same with `first_of_equals`, found by comparing embeddings if it is None."""
    if encoded.first_of_equals is not None:
        return encoded
    equal = first_of_equal_embeddings(encoded.words, encoded.cu_seqlens)
    return dataclasses.replace(encoded, first_of_equals=equal)


def columns_of(encoded: Encoded) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct captions in the order of scoring, and the column of each caption's score; see `columns`."""
    first = with_equal_captions(encoded).first_of_equals
    assert first is not None
    return columns(first, encoded.lengths)


def _blocks(
    scorer: Any, encoded: Encoded, plan: MemoryPlan, order: NDArray[np.int64], done: Collection[int], progress: bool
) -> Iterator[tuple[int, slice, slice, NDArray[np.float32]]]:
    """Yield every block that is not in `done`: its number, rows, columns (positions in `order`) and scores."""
    from tqdm import tqdm

    to_do = [number for number in range(plan.blocks) if number not in done]
    with (
        evaluation_mode(scorer),
        torch.no_grad(),
        workspace(plan.workspace / GIB),
        tqdm(
            total=plan.pairs,
            initial=sum(plan.pairs_of(number) for number in done),
            desc="scores",
            unit="pair",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        if to_do:
            for number, rows, place, (block,) in score_blocks([BlockScorer(scorer, encoded, plan, order)], to_do):
                bar.update(block.size)
                yield number, rows, place, block


def score_settings(device: torch.device) -> dict[str, str]:
    """What scores depend on beside their inputs."""
    return {
        "backend": requested(),
        "device type": device.type,
        "float32 matmul precision": matmul_precision(),
    }
