"""Time and memory of a training step in large batches, encoded at once and in parts (`itm-fast train --chunk`).

    python benchmarks/large_batches.py --threads 1 --write cpu
    python benchmarks/large_batches.py --models scan --batches 256

A step is what training does, from features and word ids to gradients: encoders, scores of all B x B pairs, the loss
over the hardest negatives, backward. Sizes are small, so that batches of 4,096 take seconds on a CPU, and of SGR two
minutes. Each row is measured in a process of its own; its loss and gradients are first compared with those of the batch
encoded at once. Time is the processor's, not the clock's. Memory is what a step reaches above features, parameters and
gradients.
`--write NAME` saves benchmarks/results/large_batches_NAME.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, machine
from itm_fast.data import Batch
from itm_fast.models import build
from itm_fast.training import options
from itm_fast.training.losses import batch_loss

SIZES = {"img_dim": 512, "embed_size": 64, "word_dim": 64}
REGIONS, VOCABULARY, ROUNDS = 36, 10_000, 3
CHUNK = 128
BATCHES = (256, 1024, 4096)
MODELS = ("scan", "dual", "sgr")


def step(model: str, size: int, chunk: int | None) -> dict[str, object]:
    """One step's processor time and bytes, and its loss and the norm of its gradient."""
    more = {"sim_dim": 32} if model == "sgr" else {}
    opt = options(model, batch_size=size, **SIZES, **more)
    opt.vocab_size, opt.device = VOCABULARY, "cpu"
    torch.manual_seed(0)
    net = build(opt)
    lengths = torch.randint(8, 19, (size,)).sort(descending=True).values.tolist()
    ids = torch.randint(1, VOCABULARY, (size, lengths[0]))
    images = torch.arange(size)
    batch = Batch(torch.randn(size, REGIONS, SIZES["img_dim"]), ids, lengths, images, images, None)
    net.train_start()
    found: dict[str, object] = {}

    def once() -> None:
        torch.manual_seed(1)
        for parameter in net.params:
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss = batch_loss(net, batch, opt, chunk=chunk)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in net.params]).norm()
        found.update(loss=loss.item(), gradient=norm.item())

    batch_loss(net, Batch(batch.features[:4], ids[:4], lengths[:4], images[:4], images[:4], None), opt).backward()
    peak = machine.peak_memory(once)
    times = [_cpu_seconds(once) for _ in range(1 if size > 1024 else ROUNDS)]
    return {**found, "cpu_seconds": statistics.median(times), "peak_bytes": peak}


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(models: list[str], batches: list[int]) -> list[dict]:
    rows = []
    for model in models:
        for size in batches:
            at_once = None
            for chunk in (None, CHUNK):
                row = machine.in_fresh_process(step, model, size, chunk)
                at_once = at_once or row
                for name in ("loss", "gradient"):
                    if abs(row[name] - at_once[name]) > 1e-4 * at_once[name]:
                        raise SystemExit(f"{model}, batch {size}: {name} {row[name]} in parts, {at_once[name]} at once")
                rows.append({"model": model, "batch": size, "chunk": chunk, **row})
                memory = harness.mebibytes(row["peak_bytes"])
                harness.progress(f"{model} {size} chunk {chunk}: {row['cpu_seconds']:.2f} s, {memory} MiB")
    return rows


def table(result: dict) -> str:
    """A Markdown row per model and batch."""
    e, sizes = result["environment"], result["sizes"]
    lines = [
        f"{e['device']}; threads: {e['threads']}; torch {e['torch']}; {e['date']}; commit {e['commit']}. A step from "
        f"features [B, {result['regions']}, {sizes['img_dim']}] to gradients, D {sizes['embed_size']}, float32; in "
        f"parts: `--chunk {result['chunk']}`, with the same loss and gradients. Memory above features, parameters and "
        "gradients.\n",
        "| model | batch | CPU s/step at once | in parts | MiB at once | in parts |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = result["results"]
    for whole, parts in zip(rows[::2], rows[1::2], strict=True):
        seconds = f"{whole['cpu_seconds']:.2f} | {parts['cpu_seconds']:.2f}"
        memory = " | ".join(harness.mebibytes(row["peak_bytes"]) for row in (whole, parts))
        lines.append(f"| {whole['model']} | {whole['batch']:,} | {seconds} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args.models, args.batches)
    result = {
        "environment": machine.environment(),
        "sizes": SIZES,
        "regions": REGIONS,
        "chunk": CHUNK,
        "results": rows,
    }
    print(table(result))
    if args.write:
        print(harness.write(f"large_batches_{args.write}", result))


if __name__ == "__main__":
    main()
