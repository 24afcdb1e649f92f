"""What evaluations past the machines at hand need: bytes, seconds and network, by formula.

    python benchmarks/scale_plan.py      # writes benchmarks/results/large_scale.md

Nothing here is measured but the counting on a host (large_pools.json). A pair's time is predicted by the traffic model
(traffic_h100.json), which is a bound: no kernel can be faster, and kernels will be slower.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # from a bare checkout, `benchmarks` lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS
from itm_fast._files import atomic_write
from itm_fast.evaluation import WORKLOADS

REGIONS, DIM, BYTES = 36, 1024, 2  # of an embedding in bfloat16
PCIE, NETWORK, DISK = 50e9, 3e9, 3e9  # bytes/s: to one GPU, of one node (25 Gbit/s), read from one node's disk
PER_NODE = 8  # GPUs
CALLS, CALL = 36, 1e-5  # kernels and copies of PyTorch that count a block on a GPU, and seconds for each
TOUCHED, HBM = 72, 3.35e12  # bytes that these read and write for each pair; bytes/s
BAND = 2500  # images of a block on a GPU
TICKET = 1e-3  # seconds for a process to take the number of its next block from a shared queue
BLOCK = 2500 * 512  # pairs of a block
MODELS = {"scan-t2i": "SCAN", "sgr": "SGR", "saf": "SAF"}
POOLS = [(5_000, 25_000), (100_000, 500_000), (1_000_000, 5_000_000), (10_000_000, 50_000_000)]
GPUS = [1, 8, 64]

HEAD = """\
# Past the machines at hand

Only the cost of counting on a host is measured ([large_pools.json](large_pools.json)). Times of scores are bounds
that the traffic model predicts for an H100 (SXM, 80 GB) in bfloat16: kernels will be slower. A model whose parameters
are float32, as published ones are, is encoded in float32: E and the copies to the GPUs are then twice as large.

With I images, T captions of W = {words:.1f} words, R = {regions} regions, D = {dim}, b = {bytes} bytes a number, G GPUs
({per_node} a node), and F = 1 with folds and 0 without:

    pairs      P = I T
    embeddings E = (I R + T W) D b                          bytes, one copy a node, in a file that its processes map
    counters   C = 24 (1 + F) (I + T) + 4 (2 + F) T             bytes a process and system: a snapshot
                                                            8 k (I + T) more where the k best items are kept
    matrix       = 4 P                                      bytes that are not needed
    scores       = s P / G                                  s seconds a pair, from the traffic model
    counting     = ({calls} x {call:.0f} us / {block:,} + {touched} B / {hbm:.2f} TB/s) P / G    on the GPU that scores;
                   {kept:.1f} ns P / G on one core of the host for each GPU, if the 10 best items are kept,
                   {count:.1f} ns P / G without them and without a GPU
    to the GPU   = (I R / G + ceil(I / (G {band})) T W) D b / {pcie:.0f} GB/s
                                                            {band} images are on a GPU, and all captions pass by them
    queue        = P / ({block:,} G) x {ticket:.0f} ms             numbers of blocks, taken from one store
    network      = ceil(log2(G / {per_node})) C / {network:.0f} GB/s           processes add up counters in pairs, then
                                                            pairs of pairs; each holds those of one other

Copies and the queue overlap with scores, counting follows them on the GPU, after encoding, which is not in this table:
the processes of a node divide it. {pcie:.0f} and {network:.0f} GB/s, {ticket:.0f} ms a number of a block and
{call:.0f} us a call are assumed; calls and bytes are counted in the operations that counting runs. The counters are the
only communication, and parts (`--part`, `--merge`) need none.

"""


class Row(NamedTuple):
    """What one pool on some GPUs needs, bytes and seconds."""

    embeddings: float
    counters: float
    matrix: float
    scores: dict[str, float]
    counting: float
    to_gpu: float
    queue: float
    network: float


def pair_seconds() -> dict[str, float]:
    """Seconds of a pair by model, from the traffic model."""
    found = json.loads((RESULTS / "traffic_h100.json").read_text())
    pairs = WORKLOADS[found["workload"]].images * len(WORKLOADS[found["workload"]].lengths)
    return {
        one["model"]: min(backend["bound"] for backend in one["backends"].values()) / pairs
        for one in found["results"]
        if one["precision"] == "bfloat16" and one["model"] in MODELS
    }


def counting_seconds(best: int = 0) -> float:
    """Seconds that counting a pair took, as measured on the largest pool with so many best items kept."""
    pools = json.loads((RESULTS / "large_pools.json").read_text())["pools"]
    largest = max((one for one in pools if (one["best"] or 0) == best), key=lambda one: one["images"])
    return largest["overhead_ns_per_pair"] * 1e-9


def counting_on_gpu() -> float:
    """Seconds that counting a pair on a GPU takes, from the number of calls and bytes."""
    return CALLS * CALL / BLOCK + TOUCHED / HBM


def row(images: int, captions: int, gpus: int, best: int = 0, folds: int = 0) -> Row:
    """The formula of the page."""
    words = float(WORKLOADS["coco-eval-5k"].lengths.mean())
    pairs = images * captions
    number = DIM * BYTES
    counters = (24 * (1 + folds) + 8 * best) * (images + captions) + 4 * (2 + folds) * captions
    bands = -(-images // (gpus * BAND))
    return Row(
        embeddings=(images * REGIONS + captions * words) * number,
        counters=counters,
        matrix=4 * pairs,
        scores={model: seconds * pairs / gpus for model, seconds in pair_seconds().items()},
        counting=(counting_seconds(best) if best else counting_on_gpu()) * pairs / gpus,
        to_gpu=(images / gpus * REGIONS + bands * captions * words) * number / PCIE,
        queue=pairs / BLOCK / gpus * TICKET,
        network=max(0, math.ceil(math.log2(gpus / PER_NODE))) * counters / NETWORK,
    )


def page() -> str:
    """The whole page."""
    words = float(WORKLOADS["coco-eval-5k"].lengths.mean())
    head = HEAD.format(
        words=words, regions=REGIONS, dim=DIM, bytes=BYTES, per_node=PER_NODE, band=BAND, block=BLOCK,
        count=counting_seconds() * 1e9, kept=counting_seconds(10) * 1e9, pcie=PCIE / 1e9, ticket=TICKET * 1e3,
        network=NETWORK / 1e9, calls=CALLS, call=CALL * 1e6, touched=TOUCHED, hbm=HBM / 1e12,
    )  # fmt: skip
    names = [MODELS[model] for model in pair_seconds()]
    lines = [
        f"| pool | GPUs | embeddings | counters | matrix | {' | '.join(names)} | counting | "
        "to the GPU | queue | network |",
        "|---|---:|---:|---:|---:" + "|---:" * (len(names) + 4) + "|",
    ]
    for images, captions in POOLS:
        for gpus in GPUS:
            one = row(images, captions, gpus)
            scores = " | ".join(span(seconds) for seconds in one.scores.values())
            sizes = " | ".join(size(value) for value in (one.embeddings, one.counters, one.matrix))
            rest = " | ".join(span(value) for value in (one.counting, one.to_gpu, one.queue, one.network))
            lines.append(f"| {images:,} x {captions:,} | {gpus} | {sizes} | {scores} | {rest} |")
    return head + "\n".join(lines) + "\n\n" + _reading()


def _reading() -> str:
    """What follows from the table."""
    eight, most = row(100_000, 500_000, 8), row(10_000_000, 50_000_000, 64)
    kept = row(100_000, 500_000, 8, best=10)
    words = size(50_000_000 * float(WORKLOADS["coco-eval-5k"].lengths.mean()) * DIM * BYTES)
    disk = span(PER_NODE * most.to_gpu * PCIE / DISK)
    scan, sgr = (span(most.scores[name] + most.counting) for name in ("scan-t2i", "sgr"))
    return (
        f"Eight GPUs rank 100,000 x 500,000 by SGR in {span(eight.scores['sgr'] + eight.counting)} and by SCAN in "
        f"{span(eight.scores['scan-t2i'] + eight.counting)}, with {size(eight.embeddings)} of embeddings in the node's "
        f"memory and no matrix of {size(eight.matrix)}. With the ten best items of every query a core a GPU counts for "
        f"{span(kept.counting)}, longer than SCAN's scores take.\n\n"
        f"Ten million images are {size(most.embeddings)} of embeddings on each node's disk. All captions, {words}, "
        f"pass by every {BAND:,} images: if the node's memory holds them, 64 GPUs take {scan} by SCAN and {sgr} by SGR "
        f"for exact ranks; a disk of {DISK / 1e9:.0f} GB/s alone would take {disk} to bring them to its {PER_NODE} "
        f"GPUs. The counters are {size(most.counters)} a process; with the ten best items "
        f"{size(row(10_000_000, 50_000_000, 64, best=10).counters)}.\n"
    )


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.1f} KB"


def span(seconds: float) -> str:
    """Seconds in the unit that fits."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds:,.1f} s" if seconds >= 0.1 else "< 0.1 s"


def main() -> None:
    """Write the page."""
    with atomic_write(RESULTS / "large_scale.md") as file:
        file.write(page())


if __name__ == "__main__":
    main()
