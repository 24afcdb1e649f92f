"""Evaluate without a score matrix: encode all models, count the blocks of their scores, report what they add up to."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import __version__
from .._ranks import Ranks
from .encoding import encode, weights_checksum
from .kept_ranks import texts_checksum
from .many_right import pairs_of
from .mapped import place_of
from .matrix_free import Blocks, blocks_of
from .memory import MemoryPlan
from .rankings import rankings_of
from .relevance import ties_of_relevance, why_no_relevance
from .report import Report, System, backend_names, pools
from .scoring import score_settings
from .snapshots import Snapshots
from .tally import Asked, Tally
from .together import count_together, process_folder
from .worst import rows_of_mean, rows_of_scorer, worst_queries

if TYPE_CHECKING:
    from ..data import Split, Vocabulary
    from .encoding import CaptionBatches, Encoded

MEAN = "mean of the scores"  # the name of the ensemble
_ALONE = Ranks()


def count_blocks(
    models: Sequence[Any],
    split: Split,
    vocab: Vocabulary,
    plans: Sequence[MemoryPlan],
    captions: CaptionBatches,
    settings: dict[str, Any],
    names: Sequence[str],
    asked: Asked,
    *,
    ties: str,
    batch_size: int,
    memory_gb: float | None,
    state: str | os.PathLike[str] | None,
    part: tuple[int, int] | None,
    progress: bool,
    worst: int = 0,
    ranks: Ranks = _ALONE,
) -> Tally | None:
    """Encode, and count all blocks or those of one part; None in all processes but that of rank 0.

    Args:
        ranks: the processes that count together.
        models, split, vocab, names, ties, batch_size, memory_gb, state, part, progress, worst: as for `evaluate`.
        plans: one per model.
        captions: `list(caption_batches(split.captions, vocab, batch_size))`.
        settings: for the report.
        asked: what is to be found.
    """
    with contextlib.ExitStack() as stack:
        snapshots = None if state is None else stack.enter_context(Snapshots(process_folder(state, ranks)))
        progress = progress and ranks.first
        node = ranks.node or _ALONE
        # The folder of several machines is on a network; each machine has its own copy in its folder for such files.
        one_machine = node.world == ranks.world
        place = place_of(plans[0].on_disk, state if one_machine else None, node, by_state=one_machine)
        encoded = [
            encode(model, split, vocab, batch_size=batch_size, progress=progress, captions=captions, place=place)
            for model in models
        ]
        about: dict[str, Any] = {
            "names": list(names),
            "ties": ties,
            "settings": settings,
            "part": part and list(part),
            "relevance_missing": why_no_relevance(split.image_ids, split.caption_ids),
            "texts": texts_checksum(split.captions),
            "resumed": False,
        }
        scorers = [model.scorer for model in models]
        tally = _counted(scorers, encoded, asked, about, memory_gb, snapshots, progress, ranks)
        if tally is not None and worst and tally.done.all():
            rows = rows_of_mean([rows_of_scorer(*one, memory_gb) for one in zip(scorers, encoded, strict=True)])
            counts = rankings_of(tally)[-1].counts
            tally.about["worst"] = worst_queries(counts, pairs_of(tally.owner), ties, worst, rows)
    return tally


def _counted(
    scorers: Sequence[Any],
    encoded: Sequence[Encoded],
    asked: Asked,
    about: dict[str, Any],
    memory_gb: float | None,
    snapshots: Snapshots | None,
    progress: bool,
    ranks: Ranks,
) -> Tally | None:
    start = time.perf_counter()
    with blocks_of(scorers, encoded, memory_gb) as blocks:
        about["backends"] = [member.ran for member in blocks.members]  # filled while blocks are scored
        identity = _identity(scorers, encoded, blocks, asked, about["ties"])
        for name, value in identity.items():
            ranks.same(name, value)
        begun = None
        if ranks.first and snapshots is not None:
            snapshots.begin(lambda: blocks.begin(asked, identity, about), identity, about)
            begun = snapshots.collect()
            begun.about["resumed"] |= bool(begun.done.any())
        elif ranks.first:
            begun = blocks.begin(asked, identity, about)
        numbers = part_of(blocks.plan.blocks, about["part"])
        tally = count_together(blocks, begun, ranks, numbers, snapshots=snapshots, progress=progress)
        seconds = time.perf_counter() - start
        own = [member.seconds for member in blocks.members]
    if tally is None:
        return None
    shared = (seconds - sum(own)) / len(own)  # what is not the scoring of one model's blocks
    tally.about["seconds"] = [
        {"encode": one.seconds, "score": mine + shared} for one, mine in zip(encoded, own, strict=True)
    ]
    return tally


def part_of(blocks: int, part: Sequence[int] | None) -> range:
    """The numbers of the blocks of part (k, n), the k-th of n, counted from 1; of all for None.

    >>> part_of(10, (1, 3)), part_of(10, (3, 3)), part_of(10, None)
    (range(0, 3), range(6, 10), range(0, 10))
    """
    k, n = part or (1, 1)
    return range(blocks * (k - 1) // n, blocks * k // n)


def report_of(tally: Tally) -> Report:
    """The report of a tally that has every block.

    Raises:
        ValueError: a block is missing.
    """
    about, settings = tally.about, dict(tally.about["settings"])
    ties, missing = about["ties"], about["relevance_missing"]
    rule = ties_of_relevance(ties)
    found = rankings_of(tally)
    settled = max(int(counters.outside().sum()) for counters in tally.counters)
    if settled:
        one = settled == 1
        warnings.warn(
            f"{settled:,} right {'pair has' if one else 'pairs have'} scores that differ by more than {tally.band:.3g} "
            "between the first pass, which every part makes over all right pairs, and the block of a part; the former "
            f"is ranked. So the rank of up to {settled:,} {'query' if one else 'queries'} in each direction may not be "
            "that of an evaluation without parts (one process, or torchrun). How scores are rounded depends on the "
            "block, and between parts on their processors and --memory-gb",
            stacklevel=2,
        )
    names = [*about["names"], MEAN][: len(found)]
    systems = []
    for number, (name, ranking) in enumerate(zip(names, found, strict=True)):
        member = number < len(about["names"])
        seconds = about["seconds"][number] if member and "seconds" in about else {}
        pairs = settings["images"] * settings["distinct_captions"]
        by_ties = ranking.relevance_by_ties
        systems.append(
            System(
                name,
                pools(ranking.metrics(ties=ties), ranking.fold_metrics(ties=ties)),
                by_ties.get(rule),
                seconds,
                None if about["resumed"] or not seconds else pairs / seconds["score"],
                about["backends"][number] if member else {},
                by_ties,
                ranking.counts,
            )
        )
    settings["backend"] = backend_names(systems) or "torch"  # a dual encoder runs no itm-fast op
    if not missing:
        settings["relevance_ties"] = rule
    if "worst" in about:
        systems[-1] = replace(systems[-1], worst=about["worst"])
    best, pairs = found[-1].best or None, pairs_of(tally.owner)
    return Report(tuple(systems), settings, missing, None, pairs, best=best, texts=about["texts"])


def _identity(
    scorers: Sequence[Any], encoded: Sequence[Encoded], blocks: Blocks, asked: Asked, ties: str
) -> dict[str, str]:
    """What tallies that are added up, and a run that goes on, must share."""
    plan = blocks.plan
    found = {
        "itm-fast version": __version__,
        "images of captions": f"{zlib.crc32(encoded[0].caption_to_image.tobytes()):08x}",
        "sizes of blocks": f"{plan.image_block} x {plan.caption_block}",
        "--folds": str(asked.folds),
        "--ties": ties,
        "--trec": str(asked.best),
        **score_settings(plan.device),
    }
    for name, ids in (("image ids", asked.image_ids), ("caption ids", asked.caption_ids)):
        found[name] = "none" if ids is None else f"{zlib.crc32(ids.tobytes()):08x}"
    for number, (scorer, one) in enumerate(zip(scorers, encoded, strict=True), 1):
        of = f" of model {number}" if len(scorers) > 1 else ""
        for name, value in {**one.identity(), "scorer": weights_checksum(scorer)}.items():
            found[name + of] = value
    return found
