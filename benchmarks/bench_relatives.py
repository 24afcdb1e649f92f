"""Relatives of SCAN and SGRAF against their own loops: python benchmarks/bench_relatives.py --output results/FILE.json

The loops are those of `itm_fast.testing`, one caption an iteration, as the published code. Both score the same pairs,
in turns and in one process, and the first pass checks that the scores agree.

Fractions of peak count the multiply-adds of the products that a score needs, as 2 each, in this library's form (two
weights of graph reasoning folded into one); with fewer the score is not to be had, and at the peak the library would be
`most_times_as_fast` as fast as the loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import itm_fast
from benchmarks import machine
from itm_fast.models.cmcan import ConfidenceMatching
from itm_fast.models.imram import IterativeMatching
from itm_fast.models.rcar import RegulatedMatching
from itm_fast.testing import cmcan, imram, rcar

D, S, R = 1024, 256, 36
LENGTHS = sorted([9, 10, 10, 11, 11, 12, 12, 12, 13, 13, 14, 15, 15, 16, 18, 22] * 4)  # as COCO's, with both marks


def needed(scorer: torch.nn.Module) -> float | None:
    """Operations of a pair, with captions of average length; None: not counted."""
    W = sum(LENGTHS) / len(LENGTHS)

    def aligned(queries: float, contexts: float) -> float:  # affinities, attended vectors, projection
        return queries * (4 * contexts * D + 2 * D * S)

    def graph(nodes: float) -> float:  # three steps, the last one at the global node alone
        return 2 * nodes * (4 * S * S + 4 * nodes * S) + 4 * S * S + 4 * nodes * S

    if isinstance(scorer, ConfidenceMatching):
        vectors = aligned(W, R) + aligned(R, W) + 2 * (R + 1) * D * S  # and those of confidences, and the global one
        return vectors + graph(W + 1) + graph(R + 1)
    if isinstance(scorer, RegulatedMatching):  # coop_rcar, two steps
        queries, contexts = (W, R) if scorer.attn_type == "t2i" else (R, W)
        regulated = 2 * S * 2 * S + 2 * 2 * S * D + 2 * S * (S // 2)
        return 2 * aligned(queries, contexts) + queries * (regulated + 2 * 2 * S * S) + 2 * 2 * S * S
    return None


def models() -> dict:
    """Title -> scorer, loop, the loop's options."""
    found = {}
    for mode, steps in (("text_IMRAM", 3), ("image_IMRAM", 3), ("image_IMRAM", 1)):
        options = dict(model_mode=mode, iteration_step=steps, no_IMRAM_norm=True)
        found[f"IMRAM {mode.partition('_')[0]} K={steps}"] = IterativeMatching(D, **options), imram.loop, options
    for way in ("t2i", "i2t"):
        scorer = RegulatedMatching(D, S, way)
        names = "attn_type", "self_regulator", "step", "smooth"
        found[f"RCAR {way}"] = scorer, rcar.loop, {name: getattr(scorer, name) for name in names}
    found["CMCAN"] = ConfidenceMatching(D, S), cmcan.loop, {}
    return found


@torch.no_grad()
def measure(scorer, loop, options, images: int, repeats: int) -> dict:
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    image, caption = (unit(torch.randn(*n, D), dim=-1) for n in ((images, R), (len(LENGTHS), max(LENGTHS))))
    words, edge = itm_fast.pack(caption, LENGTHS)
    state = scorer.eval().state_dict()
    run = {
        "loop": lambda: loop(state, image, caption, LENGTHS, **options),
        "itm-fast": lambda: scorer(image, words, edge),
    }
    off = (run["loop"]() - run["itm-fast"]()).abs().max().item()
    seconds: dict = {name: [] for name in run}
    processor: dict = {name: [] for name in run}  # seconds, which other work on the machine changes less
    for _ in range(repeats):
        for name, call in run.items():
            start, busy = time.perf_counter(), time.process_time()
            call()
            processor[name].append(time.process_time() - busy)
            seconds[name].append(time.perf_counter() - start)
    pairs, operations = images * len(LENGTHS), needed(scorer)
    wall, cpu = ({name: statistics.median(x) for name, x in times.items()} for times in (seconds, processor))
    return {
        "pairs": pairs,
        "pairs_per_second": {name: pairs / x for name, x in wall.items()},
        "seconds": seconds,
        "processor_seconds": processor,
        "times_as_fast": wall["loop"] / wall["itm-fast"],
        "times_as_fast_by_processor_time": cpu["loop"] / cpu["itm-fast"],
        "largest_difference": off,
    } | ({} if operations is None else of_peak(pairs * operations, wall))


def of_peak(operations: float, seconds: dict[str, float]) -> dict:
    """The fractions of peak, the peak, and how many times as fast as the loop the peak would be."""
    peak = machine.fma_peak()
    return {
        "operations": operations,
        "fma_peak_gflops": peak / 1e9,
        "fraction_of_peak": {name: operations / peak / x for name, x in seconds.items()},
        "most_times_as_fast": seconds["loop"] * peak / operations,
    }


def table(result: dict) -> str:
    """The results page's table."""
    e = result["environment"]
    lines = [
        f"{e['device']}; {result['threads']} thread; torch {e['torch']}; {e['date']}; commit {e['commit']}. D {D}, "
        f"S {S}, R {R}; itm-fast by its backend `cpu` against one caption an iteration, alternating, medians.",
        "",
        "| model | loop, pairs/s | itm-fast, pairs/s | x loop | by processor time | of FMA peak, loop | itm-fast | "
        "x loop at the peak | largest difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for title, one in result["models"].items():
        rate, part = one["pairs_per_second"], one.get("fraction_of_peak")
        shown = f"{part['loop']:.0%} | {part['itm-fast']:.0%} | {one['most_times_as_fast']:.1f}" if part else " | |"
        lines.append(
            f"| {title} | {rate['loop']:,.0f} | {rate['itm-fast']:,.0f} | {one['times_as_fast']:.1f} | "
            f"{one['times_as_fast_by_processor_time']:.1f} | {shown} | "
            f"{one['largest_difference']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="*", help="titles, or their beginnings")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for title, (scorer, loop, options) in models().items():
        if args.models and not any(title.startswith(name) for name in args.models):
            continue
        with itm_fast.use_backend("cpu"):
            results[title] = measure(scorer, loop, options, args.images, args.repeats)
        found = results[title]
        rate, cpu = found["pairs_per_second"], found["times_as_fast_by_processor_time"]
        line = f"{title:20} loop {rate['loop']:9,.0f}  itm-fast {rate['itm-fast']:9,.0f} pairs/s"
        line += f"  {found['times_as_fast']:.1f} x ({cpu:.1f} x by processor time)"
        print(f"{line}  off {found['largest_difference']:.1e}", flush=True)
    if args.output:
        found = {"environment": machine.environment(), "threads": args.threads, "models": results}
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
