"""Time and memory of ranks without the score matrix, on pools whose matrix would not fit in memory.

    python benchmarks/large_pools.py [--quick]

The scorer is one product of 16 numbers, so that nearly all of the time is the evaluation's own: counting both
directions under every rule for ties and, in some rows, keeping the ten best items of every query. The last row holds
what ranking adds to a SCAN evaluation of COCO 5K's sizes against the time that SCAN itself takes for it. Pools that
the file of results holds already are not measured again.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

if __name__ == "__main__":  # from a bare checkout, `benchmarks` lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import progress, write
from benchmarks.machine import environment, in_fresh_process
from itm_fast.evaluation import WORKLOADS, Encoded, rank_all, score_all
from itm_fast.evaluation.block_scores import score_blocks
from itm_fast.evaluation.counted import part_of
from itm_fast.evaluation.matrix_free import blocks_of
from itm_fast.evaluation.tally import Asked
from itm_fast.nn import CrossAttentionScore, PairScorer

DIM = 16
POOLS = [(31_000, 155_000, None, 1), (31_000, 155_000, 10, 8), (100_000, 500_000, None, 1)]  # best items, parts
QUICK = [(60, 300, None, 1), (60, 300, 10, 2)]
COCO, QUICK_COCO = (5000, 25_000), (60, 300)


class Dot(PairScorer):
    """The product of an image's only region and a caption's only word."""

    def score(self, image_state, words, cu_seqlens, caption_state, region_lengths=None):
        """[I, T]."""
        return image_state[0][:, 0] @ words.T


def pool(images: int, captions: int) -> Encoded:
    """Random images and captions."""
    normal = torch.Generator().manual_seed(0)
    image, words = torch.randn(images, 1, DIM, generator=normal), torch.randn(captions, DIM, generator=normal)
    edges = torch.arange(captions + 1, dtype=torch.int32)
    owner = np.arange(captions) * images // captions
    return Encoded(image, None, words, edges, owner, first_of_equals=np.arange(captions))


def measure(images: int, captions: int, best: int | None, parts: int) -> dict:
    """Rank one part of a pool; run in a process of its own, for the peak of its memory."""
    encoded = pool(images, captions)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    with blocks_of([Dot()], [encoded], None) as blocks:
        tally = blocks.begin(Asked(best=best))
        numbers = part_of(blocks.plan.blocks, (1, parts))
        tally = blocks.all(tally, numbers, progress=False)
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
        pairs = sum(blocks.plan.pairs_of(number) for number in numbers)
        some = numbers[: max(1, len(numbers) // 20)]
        alone = time.process_time()
        for _ in score_blocks(blocks.members, some):
            pass
        alone = (time.process_time() - alone) / sum(blocks.plan.pairs_of(number) for number in some)
    return {
        "images": images,
        "captions": captions,
        "best": best,
        "part": f"1/{parts}",
        "pairs": pairs,
        "seconds": elapsed,
        "cpu_seconds": cpu,  # of one thread: what a machine that does other work as well would take alone
        "overhead_ns_per_pair": (cpu / pairs - alone) * 1e9,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "before_gb": held * 1024 / 1e9,
        "matrix_gb": 4 * images * captions / 1e9,
    }


def against_scan(images: int, captions: int, rounds: int, block: tuple[int, int] = (500, 256)) -> dict:
    """What ranking adds to scores alone and to their matrix, and what SCAN's scores take."""
    encoded, scorer = pool(images, captions), Dot()

    def alone() -> None:
        with blocks_of([scorer], [encoded], None) as blocks:
            for _ in score_blocks(blocks.members, range(blocks.plan.blocks)):
                pass

    calls = {
        "alone": alone,
        "matrix": lambda: score_all(scorer, encoded, progress=False),
        "ranks": lambda: rank_all(scorer, encoded, progress=False),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    found = {name: statistics.median(values) for name, values in times.items()}
    pair, right = scan_seconds(rounds, block)
    scan, first_pass = pair * images * captions, right * 16 * captions  # a caption is scored with 16 images
    return {
        "images": images,
        "captions": captions,
        "cpu_seconds": times,
        "right_pairs_seconds": first_pass,
        "scan_seconds": scan,
        "share": (found["ranks"] - found["alone"] + first_pass) / scan,
        "share_above_matrix": (found["ranks"] - found["matrix"] + first_pass) / scan,
    }


def scan_seconds(rounds: int, block: tuple[int, int]) -> tuple[float, float]:
    """Seconds of SCAN (t2i, D 1024, COCO's lengths) per pair of a whole block, and per pair of a block of right pairs.

    Medians, alternating. One of right pairs has 16 images and their 80 captions.
    """
    images, captions = block
    size = WORKLOADS["coco-eval-5k"]
    lengths = np.random.default_rng(0).choice(size.lengths, captions)
    edges = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).int()
    normal = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(images, size.regions, size.dim, generator=normal), dim=-1)
    words = normalize(torch.randn(int(edges[-1]), size.dim, generator=normal), dim=-1)
    encoded = Encoded(image, None, words, edges, np.arange(captions) % images, first_of_equals=np.arange(captions))
    found: tuple[list[float], list[float]] = ([], [])
    with blocks_of([CrossAttentionScore("t2i")], [encoded], None) as blocks:
        (member,) = blocks.members
        for _ in range(rounds + 1):
            for times, rows, columns in ((found[0], images, captions), (found[1], 16, 80)):
                start = time.process_time()
                member.score(slice(0, rows), np.arange(columns)).on_host()
                times.append((time.process_time() - start) / (rows * columns))
    return statistics.median(found[0][1:]), statistics.median(found[1][1:])


def table(result: dict) -> str:
    """The tables of the page of results."""
    environment, coco = result["environment"], result["coco"]
    lines = [
        f"A scorer of {2 * DIM} operations a pair, {environment['threads']} thread of {environment['device']}; "
        f"{environment['date']}; commit {environment['commit']}. The "
        "overhead is the processor's time beyond that of the scores.",
        "",
        "| pool | best kept | part | pairs | processor, s | overhead, ns a pair | peak, GB | its matrix, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in result["pools"]:
        sizes = f"{one['images']:,} x {one['captions']:,} | {one['best'] or '-'} | {one['part']} | {one['pairs']:,}"
        memory = f"{one['peak_gb']:.2f} | {one['matrix_gb']:.1f}"
        cost = f"{one['cpu_seconds']:.0f} | {one['overhead_ns_per_pair']:.1f} | {memory}"
        lines.append(f"| {sizes} | {cost} |")
    lines += [
        "",
        f"At COCO 5K's sizes, {coco['images']:,} x {coco['captions']:,}, ranking and the right pairs add "
        f"{100 * coco['share']:.2f} % to the {coco['scan_seconds']:.0f} s of SCAN's scores (t2i, D 1024), and "
        f"{100 * coco['share_above_matrix']:.2f} % to these scores and their matrix, which is then not ranked yet.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure and write benchmarks/results/large_pools.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny pools, as the tests run it")
    parser.add_argument("--name", default="large_pools", help="of the file in benchmarks/results")
    args = parser.parse_args(argv)
    pools, coco, more = (QUICK, QUICK_COCO, (1, (16, 80))) if args.quick else (POOLS, COCO, (3, (500, 256)))
    run = measure if args.quick else functools.partial(in_fresh_process, measure)
    found = []
    for images, captions, best, parts in pools:
        row = run(images, captions, best, parts)
        found.append(row)
        progress(str(row))
    result = {"environment": environment(), "pools": found, "coco": against_scan(*coco, *more)}
    write(args.name, result)
    print(table(result))


if __name__ == "__main__":
    main()
