"""Time and memory of ranks without the score matrix, on pools whose matrix would not fit in memory.

    python benchmarks/large_pools.py [--quick]

The scorer is one product of 16 numbers, so that nearly all of the time is the evaluation's own: counting both
directions under every rule for ties and, in some rows, keeping the ten best items of every query. One row is of two
processes that torchrun starts. The last line holds what ranking adds to a SCAN evaluation of COCO 5K's sizes against
the time that SCAN itself takes for it. What the file of results holds already is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

if __name__ == "__main__":  # from a bare checkout, `benchmarks` lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS, progress, write
from benchmarks.machine import environment, in_fresh_process
from itm_fast._ranks import joined
from itm_fast.evaluation import WORKLOADS, Encoded, rank_all, score_all
from itm_fast.evaluation.block_scores import score_blocks
from itm_fast.evaluation.counted import part_of
from itm_fast.evaluation.matrix_free import Blocks, blocks_of
from itm_fast.evaluation.tally import Asked
from itm_fast.evaluation.together import count_together
from itm_fast.nn import CrossAttentionScore, PairScorer

DIM = 16
POOLS = [(31_000, 155_000, None, 1), (31_000, 155_000, 10, 8), (100_000, 500_000, None, 1)]  # best items, parts
QUICK = [(60, 300, None, 1), (60, 300, 10, 2)]
TOGETHER, QUICK_TOGETHER = (100_000, 500_000, 1), (60, 300, 1)  # by two processes; the last number: parts
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
        alone = scores_alone(blocks, numbers)
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


def scores_alone(blocks: Blocks, numbers: range) -> float:
    """Seconds of the processor that the scores of a pair take without counting, on a twentieth of these blocks."""
    some = numbers[: max(1, len(numbers) // 20)]
    start = time.process_time()
    for _ in score_blocks(blocks.members, some):
        pass
    return (time.process_time() - start) / sum(blocks.plan.pairs_of(number) for number in some)


def measure_together(images: int, captions: int, parts: int, processes: int = 2) -> dict:
    """Rank a pool by processes of torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [__file__, "--process", str(images), str(captions), str(parts)]
    load = os.getloadavg()[0]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {**json.loads(done.stdout.splitlines()[-1]), "load_before": load, "environment": environment()}


def one_of_several(images: int, captions: int, parts: int) -> None:
    """What a process of `measure_together` does; that of rank 0 prints the result."""
    encoded = pool(images, captions)
    with joined(torch.device("cpu")) as ranks:
        start, cpu = time.perf_counter(), time.process_time()
        with blocks_of([Dot()], [encoded], None) as blocks:
            numbers = part_of(blocks.plan.blocks, (1, parts))
            begun = blocks.begin() if ranks.first else None
            count_together(blocks, begun, ranks, numbers, progress=False)
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
            alone = scores_alone(blocks, numbers)
            pairs = sum(blocks.plan.pairs_of(number) for number in numbers)
        each = ranks.each((cpu, alone, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))
    if ranks.first:
        total = sum(cpu for cpu, _, _ in each)
        scores = statistics.mean(alone for _, alone, _ in each)
        found = {"images": images, "captions": captions, "best": None, "part": f"1/{parts}", "processes": len(each)}
        found |= {"pairs": pairs, "seconds": elapsed, "cpu_seconds": total}
        found |= {"overhead_ns_per_pair": (total / pairs - scores) * 1e9, "peak_gb": max(peak for _, _, peak in each)}
        print(json.dumps({**found, "matrix_gb": 4 * images * captions / 1e9}))


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


def _key(row: dict) -> tuple:
    return row["images"], row["captions"], row["best"], row["part"], row.get("processes", 1)


def table(result: dict) -> str:
    """The tables of the page of results."""
    environment, coco = result["environment"], result["coco"]
    lines = [
        f"A scorer of {2 * DIM} operations a pair, {environment['threads']} thread a process of "
        f"{environment['device']}; {environment['date']}; commit {environment['commit']}. The "
        "overhead is the processor's time beyond that of the scores.",
        "",
        "| pool | best kept | part | processes | pairs | time, s | processor, s | overhead, ns a pair | peak, GB each "
        "| its matrix, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in result["pools"]:
        sizes = f"{one['images']:,} x {one['captions']:,} | {one['best'] or '-'} | {one['part']} | "
        sizes += f"{one.get('processes', 1)} | {one['pairs']:,} | {one['seconds']:.0f}"
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
    parser.add_argument("--process", type=int, nargs=3, help=argparse.SUPPRESS)  # one of those that torchrun starts
    args = parser.parse_args(argv)
    if args.process:
        one_of_several(*args.process)
        return
    pools, coco, more = (QUICK, QUICK_COCO, (1, (16, 80))) if args.quick else (POOLS, COCO, (3, (500, 256)))
    run = measure if args.quick else functools.partial(in_fresh_process, measure)
    *pool_together, parts_together = QUICK_TOGETHER if args.quick else TOGETHER
    path = RESULTS / f"{args.name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"pools": []}
    known = {_key(row): row for row in kept["pools"]}
    found = []
    for images, captions, best, parts in pools:
        row = known.get((images, captions, best, f"1/{parts}", 1)) or run(images, captions, best, parts)
        found.append(row)
        progress(str(row))
    asked = (*pool_together, None, f"1/{parts_together}", 2)
    found.append(known.get(asked) or measure_together(*pool_together, parts_together))
    progress(str(found[-1]))
    result = {
        "environment": kept.get("environment") or environment(),
        "pools": found,
        "coco": kept.get("coco") or against_scan(*coco, *more),
    }
    write(args.name, result)
    print(table(result))


if __name__ == "__main__":
    main()
