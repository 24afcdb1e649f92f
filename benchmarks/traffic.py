"""Predict what bounds the pair scorers' kernels on a GPU: memory, L2, shared memory or operations. Nothing is measured.

    python -m benchmarks.traffic --workload coco-eval-5k --card h100
    python -m benchmarks.traffic --workload coco-eval-5k --card h100 --json benchmarks/results/traffic_h100.json

`traffic_triton` counts each launch from the arguments that the launchers really give; `traffic_cuda` counts CUDA
kernels from the sizes of their tiles. What is assumed:

- Kernels run one after the other, and a launch takes the longest of: its bytes of memory at the memory's bandwidth, its
  bytes through L2 at L2's, its bytes through shared memory at 128 a clock and multiprocessor, its matrix products at
  their kinds' peaks, its vector instructions at theirs. Within a launch the five overlap perfectly. So a prediction is
  a bound: a real launch takes longer. Pipelines that drain at a barrier and the issue of instructions take no time.
- The bytes through shared memory are those of `traffic_shared`; of Triton's kernels they are not counted, as its
  compiler decides on them.
- L2 holds the parts of tensors that were used last, as far as its size goes; a part that does not fit whole is not
  held. A launch reads from memory each distinct byte that is not held, once: programs that share rows run near each
  other. What it writes goes to memory, whether the next launch finds it in L2 or not.
- L1 holds nothing: all loads and stores of all programs go through L2.
- A launch's own overhead, a last wave of programs that fills the card in part, and in an evaluation torch's own kernels
  (products of weights, once a call) take no time. `waves` is the share of a card's places that programs take, when each
  multiprocessor has one program at a time.

A training step's launches are those of `traffic_training`, at batch 128: of Triton's kernels, forward and backward, and
of PyTorch's operations between them. Where launches are many, starting them takes longer than the bound.

The floor is what no kernel can beat: the operations that the scores need (`shapes.needed_flops`) at the peak of the
kind of products, or inputs and scores through memory once. That of a backward pass: the operations that the pairs with
a gradient need, or features, and their gradients, through memory once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import shapes, traffic_cuda, traffic_page, traffic_training, traffic_triton
from benchmarks.cards import CARDS, Card
from benchmarks.traffic_counts import Count, Use
from itm_fast._files import atomic_write
from itm_fast.evaluation.workloads import WORKLOADS

STEPS = 3  # of SGR
SCAN = dict(affinity_norm="clipped_l2norm", scale=9.0, pool="lse", pool_scale=6.0)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name in `shapes.needed_flops` -> (op, its options)
    "scan-t2i": ("cross_attention_score", dict(SCAN, direction="t2i")),
    "scan-i2t": ("cross_attention_score", dict(SCAN, direction="i2t")),
    "sgr": ("similarity_graph_score", dict(scale=9.0)),
    "saf": ("similarity_filter_score", dict(scale=9.0, eps=1e-5)),
}


class Precision(NamedTuple):
    """dtype of the features, what torch may do with float32 products, and the kinds of products that give it."""

    dtype: torch.dtype
    matmul: str
    kinds: tuple[str, ...]


PRECISIONS = {  # by the names of `gpu_steps.PRECISIONS`
    "bfloat16": Precision(torch.bfloat16, "highest", ("bfloat16",)),
    "tf32": Precision(torch.float32, "high", ("tf32", "float16")),
    "float32": Precision(torch.float32, "highest", ("tf32x3", "float16x3")),
}
TRAINING = "coco-train-b128"  # of shapes.SHAPES, and the precisions that gpu_suite.py trains in
TRAINED = ("tf32", "float32")
SHOWN_SHARE = 0.01  # kernels that take a smaller share of a part of a training step are counted together
PARTS = "memory", "L2", "shared memory", "products", "vector"  # each of which a launch takes at least
BACKENDS = {"triton": 0, "cuda": -1}  # which of a precision's kinds a backend's products are of


class Cache:
    """Which parts of tensors L2 holds: those that were used last, as far as they fit."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.held: OrderedDict[tuple[Any, ...], int] = OrderedDict()

    def memory(self, uses: Iterable[Use]) -> tuple[int, int]:
        """Bytes that a launch with these uses reads from memory and writes to it."""
        read = written = 0
        for use in uses:
            if use.written:
                written += use.distinct
            elif use.place not in self.held:
                read += use.distinct
            self._hold(use)
        return read, written

    def _hold(self, use: Use) -> None:
        before = self.held.pop(use.place, 0)
        self.held[use.place] = use.distinct if use.written else max(use.distinct, before)
        self.used += self.held[use.place] - before
        while self.used > self.size:
            self.used -= self.held.popitem(last=False)[1]


def counts(backend: str, model: str, workload: str, card: Card, precision: str) -> Iterator[tuple[str, Count]] | str:
    """Every launch of a model on a workload, as its kernel's name and its count; or why there is none."""
    op, options = MODELS[model]
    whole, asked = WORKLOADS[workload], PRECISIONS[precision]
    # Captions stand longest first, as the library's evaluation orders them.
    lengths = np.sort(whole.lengths)[::-1].tolist()
    if backend == "cuda":
        edge = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
        sizes = whole.images, whole.regions, whole.dim, whole.similarity, STEPS
        direction = options.get("direction", "t2i")
        return traffic_cuda.counts(traffic_cuda.Problem(op, *sizes, edge, card, precision, direction))
    if card.arch is None:
        return "Triton's kernels need compute capability 8.0"
    sizes_ = dict(I=whole.images, R=whole.regions, D=whole.dim, S=whole.similarity, K=STEPS)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked.matmul)
    try:
        given = traffic_triton.arguments(op, sizes_, asked.dtype, lengths, **options)
        return traffic_triton.launches(op, card.arch, given)
    finally:
        torch.set_float32_matmul_precision(before)


def kernels(launches: Iterable[tuple[str, Count]], card: Card) -> list[dict]:
    """A row for each kernel: what all its launches move, compute and take on the card at least."""
    cache, rows = Cache(card.cache), {}
    for name, count in launches:
        row = rows.setdefault(name, {
            "kernel": name, "launches": 0, "programs": 0, "memory_bytes": 0, "cache_bytes": 0, "shared_bytes": 0,
            "operations": {}, "vector": 0.0, "seconds": dict.fromkeys(PARTS, 0.0), "bound": 0.0,
            "bound_without_cache": 0.0, "places": 0,
        })  # fmt: skip
        memory, through = sum(cache.memory(count.uses)), count.requested(False) + count.requested(True)
        seconds = {
            "memory": memory / card.memory,
            "L2": through / card.cache_rate,
            "shared memory": (count.shared + count.plain) / card.shared,
            "products": count.seconds(card),
            "vector": count.vector / card.vector,
        }
        row["launches"] += count.launches
        row["programs"] += count.programs
        row["places"] += math.ceil(count.programs / count.launches / card.processors) * card.processors * count.launches
        row["memory_bytes"] += memory
        row["cache_bytes"] += through
        row["shared_bytes"] += count.shared + count.plain
        row["vector"] += count.vector
        for kind, n in count.products.items():
            row["operations"][kind] = row["operations"].get(kind, 0.0) + n
        for part, n in seconds.items():
            row["seconds"][part] += n
        row["bound"] += max(seconds.values())
        row["bound_without_cache"] += max(n for part, n in seconds.items() if part != "L2")
    for row in rows.values():
        row["limited_by"] = max(row["seconds"], key=row["seconds"].__getitem__)
        row["waves"] = row["programs"] / row.pop("places")
    return list(rows.values())


def floor(model: str, workload: str, card: Card, precision: str, kind: str) -> float | None:
    """Seconds that no kernel can beat, with products of a kind; None where the card has none."""
    whole, dtype, rate = WORKLOADS[workload], PRECISIONS[precision].dtype, card.rate(kind)
    if rate is None:
        return None
    T, N = len(whole.lengths), int(whole.lengths.sum())
    rows = whole.images * whole.regions + N + (0 if model.startswith("scan") else whole.images + T)
    moved = dtype.itemsize * (rows * whole.dim + whole.images * T)
    needed = shapes.needed_flops(model, shapes.Shape(workload, whole.images, T))
    return max(needed / rate, moved / card.memory)


def training_floor(part: traffic_training.Part, kind: str, card: Card) -> float:
    """Seconds that no kernel can beat in a part of a training step, with products of a kind."""
    shape = shapes.SHAPES[TRAINING]
    whole = WORKLOADS[shape.workload]
    features = (shape.images * whole.regions + sum(shape.lengths)) * whole.dim
    moved = features if part.name == "forward" else 2 * features  # float32; backward writes as many gradients
    return max(part.needed / (card.rate(kind) or math.inf), 4 * moved / card.memory)


def training(model: str, precision: str, card: Card) -> list[dict]:
    """A training step's parts by Triton: bound and floor in seconds, launches, and the kernels that take most."""
    asked, found = PRECISIONS[precision], []
    for part in traffic_training.parts(model, shapes.SHAPES[TRAINING], card.arch, asked.matmul):
        rows = kernels(part.launches, card)
        # fsum, as sum of floats has other last bits since Python 3.12, and the numbers are compared with result files.
        bound = math.fsum(row["bound"] for row in rows)
        less = [row for row in rows if row["bound"] < SHOWN_SHARE * bound]
        found.append({
            "part": part.name, "bound": bound, "floor": training_floor(part, asked.kinds[0], card),
            "launches": sum(row["launches"] for row in rows), "others": math.fsum(row["bound"] for row in less),
            "other_launches": sum(row["launches"] for row in less),
            "kernels": sorted((row for row in rows if row not in less), key=lambda row: -row["bound"]),
        })  # fmt: skip
    return found


def predicted(workload: str, card: Card, backends: Iterable[str] = BACKENDS) -> dict:
    """Every model, precision and backend on a workload: kernels, bound and floors, as the results' page shows them."""
    results = []
    for model in MODELS:
        for precision, asked in PRECISIONS.items():
            floors = {kind: floor(model, workload, card, precision, kind) for kind in asked.kinds}
            one: dict[str, Any] = {"model": model, "precision": precision, "floors": floors, "backends": {}}
            for backend in backends:
                found = counts(backend, model, workload, card, precision)
                if isinstance(found, str):
                    one["backends"][backend] = {"left_out": found}
                    continue
                rows = kernels(found, card)
                one["backends"][backend] = {
                    "products": asked.kinds[BACKENDS[backend]],
                    "bound": math.fsum(row["bound"] for row in rows),
                    "bound_without_cache": math.fsum(row["bound_without_cache"] for row in rows),
                    "kernels": rows,
                }
            results.append(one)
    steps = [
        {"model": model, "precision": precision, "parts": training(model, precision, card)}
        for model in MODELS
        for precision in TRAINED
        if card.arch is not None
    ]
    return {
        "predicted": True,
        "workload": workload,
        "card": card.name,
        "source": card.source,
        "cache_source": card.cache_source,
        "results": results,
        "training": {"workload": TRAINING, "results": steps},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workload", choices=WORKLOADS, default="coco-eval-5k",
        help=f"of the scores (default: %(default)s); training steps are of {TRAINING}",
    )  # fmt: skip
    parser.add_argument("--card", choices=CARDS, default="h100", help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file to write, for benchmarks/page.py")
    args = parser.parse_args()
    found = predicted(args.workload, CARDS[args.card])
    print(traffic_page.tables(found))
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
