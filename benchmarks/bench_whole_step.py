"""Whole training steps at the papers' batch: encoders, scores, loss, backward, clipping and Adam, 128 pairs a batch.

    python benchmarks/bench_whole_step.py --threads 2 --rounds 2 --write cpu

A run in pieces of a model each, for the same file:

    python benchmarks/bench_whole_step.py --models rcar --loop-captions 8 --threads 2 --rounds 2 --write cpu --add

Each contender starts from the same weights. The loss and the clipped gradients of its first step are compared with
those of the published step before anything is timed. A row says where its seconds go: to the encoders, forward and
backward; to scores and loss, forward and backward; to clipping and Adam.

`--loop-captions N` is for models whose loop does not fit: results are compared on a batch of N, and the published
step's time and memory follow on a straight line through 2 and N captions, as in bench_training_step.py.
Peak memory is what a step reaches above weights, gradients and Adam's moments, in a fresh process for each contender.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_training_step, harness, machine
from benchmarks.bench_training_step import ALLOWED, LOOP, OTHERS, difference, extended, refuse_unlike, step_flops
from benchmarks.shapes import Shape
from benchmarks.whole_step import PARTS, REWRITE, Step, batch, options_of
from itm_fast.evaluation.workloads import WORKLOADS


def encoder_flops(model: str, shape: Shape) -> float:
    """Operations of the image's Linear layers and of the GRU, multiply-add = 2.

    Backward needs as many for the weights' gradients, and as many again for the inputs', which features do not have.
    """
    whole, opt = WORKLOADS[shape.workload], options_of(model, shape, "cpu")
    rows = 2.0 * shape.images * whole.regions
    image, hidden = rows * whole.features * whole.dim, 0.0
    if model == "rcar":  # two more layers, with dim / 2 numbers between them
        image, hidden = 1.5 * image, rows * whole.dim * whole.dim / 2
    gates, directions = 3, 2 if getattr(opt, "bi_gru", True) else 1
    text = 2.0 * sum(shape.lengths) * directions * gates * whole.dim * (opt.word_dim + whole.dim)
    return 2 * image + 3 * (hidden + text)


def compare(model: str, names: list[str], shape: Shape, device: str) -> tuple[dict[str, float], dict[str, str]]:
    """How far the first step of each contender is from the published one, and why some cannot take part."""
    exact, off, left_out = Step(model, LOOP, shape, device).result(), {}, {}
    for name in names:
        try:
            off[name] = difference(Step(model, name, shape, device).result(), exact, apart=exact)
        except NotImplementedError as why:
            left_out[name] = str(why)
    refuse_unlike(model, off, dict.fromkeys(off, ALLOWED))
    return off, left_out


def memory(model: str, contender: str, shapes: list[Shape]) -> list[int | None]:
    """Peak bytes of a step at each shape, above weights, gradients and Adam's moments; for a fresh process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step, found = Step(model, contender, Shape(shapes[0].workload, 2, 2), device), []
    for shape in shapes:
        step()  # libraries load and make their threads, Adam makes its moments
        step.batch = batch(shape, device)
        found.append(machine.peak_memory(step))
    return found


def measure(model: str, shape: Shape, device: str, args: argparse.Namespace) -> dict:
    """All contenders of one model."""
    count = min(args.loop_captions or shape.captions, shape.captions)
    cut, least = (Shape(shape.workload, shape.images, n) for n in (count, 2))
    names = [*([] if model in OTHERS else [REWRITE]), *(args.backends or harness.backends(device))]
    off, left_out = compare(model, names, Shape(shape.workload, count, count), device)
    steps = {LOOP: Step(model, LOOP, cut, device)}
    if cut != shape:
        steps[f"{LOOP}, {least.captions} captions"] = Step(model, LOOP, least, device)
    steps |= {name: Step(model, name, shape, device) for name in off}
    harness.alternate(steps, 1)
    whole = harness.alternate(steps, args.rounds)
    times = {
        name: {"whole": whole[name], **{part: x[-args.rounds :] for part, x in step.parts.items()}}
        for name, step in steps.items()
    }
    if cut != shape:
        few = times.pop(f"{LOOP}, {least.captions} captions")
        loop = times[LOOP]
        for part in ("encoders", "scores_and_loss"):  # what is left of a step does not depend on the words
            longer = [extended(x, y, least, cut, shape) for x, y in zip(few[part], loop[part])]
            loop["whole"] = [w + x - y for w, x, y in zip(loop["whole"], longer, loop[part])]
            loop[part] = longer
    rows, flops = [], encoder_flops(model, shape) + step_flops(model, shape, hardest=True)
    median = {name: {part: statistics.median(x) for part, x in t.items()} for name, t in times.items()}
    base = median[LOOP]
    for name, t in times.items():
        more: dict[str, object] = {f"seconds_{part}": median[name][part] for part in PARTS}
        more["scores_times_faster_than_loop"] = base["scores_and_loss"] / median[name]["scores_and_loss"]
        more["largest_difference"] = off.get(name, 0.0)
        if name == LOOP:
            more["measured_captions"] = cut.captions
        if not args.no_fresh:
            harness.progress(f"{model}: {name}, peak memory in a fresh process")
            shapes = [shape] if name != LOOP or cut == shape else [least, cut]
            peaks = machine.in_fresh_process(memory, model, name, shapes)
            scaled = len(peaks) == 2 and None not in peaks
            more["peak_bytes"] = int(extended(*peaks, least, cut, shape)) if scaled else peaks[0]
        label = name if name in (LOOP, REWRITE) else f"itm-fast {name}"
        rows.append(harness.row(label, t["whole"], shape.pairs, flops, base["whole"], **more))
    size = {"images": shape.images, "captions": shape.captions}
    return {"model": model, **size, "rows": rows, "left_out": left_out}


def main() -> None:
    bench_training_step.main(__doc__, measure, "whole_step", "a whole training step")


if __name__ == "__main__":
    main()
