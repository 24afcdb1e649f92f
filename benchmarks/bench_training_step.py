"""Forward and backward of all pair scorers at the papers' training shape: 128 images x 128 captions, training mode.

bench_whole_step.py measures the whole training step: encoders, clipping and Adam too.

    python benchmarks/bench_training_step.py --threads 2 --rounds 3 --write cpu

A step scores all pairs, takes the papers' loss (margin 0.2, the hardest negative of every row and column) and the
gradients of images, words and all parameters. That loss leaves most pairs without a gradient, so the rows "all
negatives" take its sum over all of them. Scores and gradients of both losses are compared with the paper's loop by
autograd before anything is timed.

The loop keeps every caption's intermediate results until backward: 7 GB for SGR at 128 captions. With
`--loop-captions` it runs on so many captions and on two, and its time and memory at 128 follow on a straight line
through both: each word is one more row of the same operations.
On a processor that multiplies bfloat16 values, the backend `cpu` is also measured at matmul precision "medium": the
rows "bfloat16 products". Rounding may change which negative is the hardest, so their results are compared by all
negatives alone; there they may be off twice as far as float32 results of features and parameters rounded to bfloat16,
as what is computed between them is rounded too, and at most by half of the largest value. Both include that rounding
changes which negatives are within the margin; `bench_gradients.py` measures gradients without that.
Peak memory is what the second step reaches above inputs and parameters, in a fresh process for each contender; in
training_step_hgan, training_step_tshsr and training_step_cpu_intel the loop's is that of the first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks import harness, machine
from benchmarks import shapes as published
from benchmarks.bench_pair_scorers import OTHERS
from benchmarks.harness import BFLOAT16
from benchmarks.shapes import Shape
from itm_fast import _native
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models.sgraf import EncoderSimilarity
from itm_fast.nn import CrossAttentionScore
from itm_fast.testing import scan, sgraf

MODELS = ("scan-t2i", "scan-i2t", "sgr", "saf")  # whose results are kept; the others are run by name
SCALE = {"t2i": 9.0, "i2t": 4.0}
LOOP = "paper's loop"
ALL = ", all negatives"  # ends the name of a row
MARGIN = 0.2
ALLOWED = 1e-3  # of the largest gradient
ALLOWED_BFLOAT16 = 0.5  # however far results of rounded values are off: what is 1 off may be zeros
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def ranking_loss(score: Tensor, hardest: bool, margin: float = MARGIN) -> Tensor:
    """The papers' loss of scores [I, T], T <= I, where caption t belongs to image t."""
    I, T = score.shape
    match = score.diagonal()
    own = torch.eye(I, T, dtype=torch.bool, device=score.device)
    of_captions = (margin + score - match).clamp_min(0).masked_fill(own, 0)
    of_images = (margin + score[:T] - match[:, None]).clamp_min(0).masked_fill(own[:T], 0)
    if hardest:
        return of_captions.amax(0).sum() + of_images.amax(1).sum()
    return of_captions.sum() + of_images.sum()


def build(model: str, contender: str, shape: Shape, device: str) -> tuple[Score, dict[str, Tensor]]:
    """A contender: (function of image, words and cu_seqlens, its parameters). All get the same random numbers."""
    whole = WORKLOADS[shape.workload]
    torch.manual_seed(0)
    if model.startswith("scan"):
        options = {"direction": model[5:], "scale": SCALE[model[5:]]}
        scorer = CrossAttentionScore(**options)
        loop = lambda image, caption, lengths: scan.loop(image, caption, lengths, **options)  # noqa: E731
    elif model in OTHERS:
        scorer, loop = OTHERS[model].build(model, shape, device)
    else:
        scorer = EncoderSimilarity(whole.dim, whole.similarity, model.upper()).to(device).train()
        state = scorer.state_dict(keep_vars=True)
        loop = lambda *args: sgraf.loop(state, *args, training=True)  # noqa: E731

    def score(image: Tensor, words: Tensor, cu_seqlens: Tensor) -> Tensor:
        torch.manual_seed(1)  # of the dropouts
        if contender == LOOP:
            return loop(image, itm_fast.unpack(words, cu_seqlens), cu_seqlens.diff().tolist())
        with itm_fast.use_backend(contender.removesuffix(BFLOAT16)):
            return scorer(image, words, cu_seqlens)

    return score, dict(scorer.named_parameters())


def step_flops(model: str, shape: Shape, hardest: bool) -> float:
    """Operations that a step needs: those of its scores, and twice as many for what has a gradient.

    By hardest negatives that is a match and two more of each row: 3 T pairs at the most; but all pairs of SAF, whose
    BatchNorm in training makes every score depend on the others.
    """
    of = OTHERS.get(model, published)
    share = min(1.0, 3 / shape.images) if hardest and model != "saf" else 1.0
    return (1 + 2 * share) * of.needed_flops(model, shape) + 3 * of.state_flops(model, shape)


def step(
    model: str, contender: str, shape: Shape, device: str, hardest: bool = True, rounded: bool = False
) -> Callable[[], dict[str, Tensor]]:
    """A function that does one training step and returns its scores and, by name, its gradients.

    Matrix products are as torch is set now, or of bfloat16 values where the contender's name says so.
    `rounded`: features and parameters are rounded to bfloat16, and all else is as without.
    """
    image, words, cu_seqlens = shape.features(device)
    score, parameters = build(model, contender, shape, device)
    if rounded:
        image, words = (x.bfloat16().float() for x in (image, words))
        for x in parameters.values():
            x.data = x.data.bfloat16().float()
    leaves = {"image": image.requires_grad_(), "words": words.requires_grad_(), **parameters}

    def run() -> dict[str, Tensor]:
        with harness.products("bfloat16") if contender.endswith(BFLOAT16) else nullcontext():
            result = score(image, words, cu_seqlens)
            loss = ranking_loss(result, hardest)
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return {"score": result.detach(), **dict(zip(leaves, found))}

    return run


def memory(model: str, contender: str, shapes: list[Shape], hardest: bool = True) -> list[int | None]:
    """Peak bytes of a step above inputs and parameters at each shape; for a fresh process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step(model, contender, Shape(shapes[0].workload, 2, 2), device)()  # libraries load and make their threads
    peaks = []
    for shape in shapes:
        run = step(model, contender, shape, device, hardest)
        run()  # a step may keep more where the one before it had a use for that
        peaks.append(machine.peak_memory(run))
    return peaks


def difference(
    found: dict[str, Tensor], exact: dict[str, Tensor], apart: Collection[str] = ("score", "image", "words")
) -> float:
    """The largest deviation of a tensor as a share of its largest value, or of the largest value of its kind.

    A bias that shifts all keys alike has a gradient of rounding errors only, so tensors that are not named in `apart`,
    the gradients of parameters, share one measure.
    """
    kinds = {name: name if name in apart else "parameter" for name in exact}
    largest = {kind: max(exact[n].abs().max().item() for n in exact if kinds[n] == kind) for kind in kinds.values()}
    return max(harness.largest_difference(found[n], exact[n]) / largest[kinds[n]] for n in exact)


def compare(
    model: str, names: list[str], shape: Shape, device: str
) -> tuple[dict[str, float], dict[str, str], dict[str, float]]:
    """How far each backend is from the loop under both losses, why some cannot take part, and what is allowed."""
    off, left_out, allowed = dict.fromkeys(names, 0.0), {}, dict.fromkeys(names, ALLOWED)
    for hardest in (True, False):
        found: dict[str, dict[str, Tensor]] = {}
        exact = step(model, LOOP, shape, device, hardest)()
        for name in names:
            if hardest and name.endswith(BFLOAT16):
                continue
            try:
                found[name] = step(model, name, shape, device, hardest)()
            except NotImplementedError as why:
                left_out[name] = str(why)
                continue
            if name.endswith(BFLOAT16):
                float32 = name.removesuffix(BFLOAT16)
                rounded = step(model, float32, shape, device, hardest, rounded=True)()
                allowed[name] = min(ALLOWED + 2 * difference(rounded, exact), ALLOWED_BFLOAT16)
                unrounded = found.get(float32, {})
                if unrounded and all(torch.equal(found[name][key], x) for key, x in unrounded.items()):
                    left_out[name] = "bfloat16 products are allowed but not used: all results are the same"
            off[name] = max(off[name], difference(found[name], exact))
    for name in left_out:
        del off[name]
    refuse_unlike(model, off, allowed)
    return off, left_out, allowed


def refuse_unlike(model: str, off: dict[str, float], allowed: dict[str, float]) -> None:
    """Stop the benchmark if a contender's results differ from the loop's by more than is allowed."""
    for name, value in off.items():
        harness.progress(f"{model}: {name} is within {value:.1e} of the loop's results, {allowed[name]:.1e} allowed")
        if not value < allowed[name]:
            raise SystemExit(f"{model}: {name} differs from the paper's loop by {value:.2g} of its values; not timed")


def contenders(backends: list[str]) -> list[str]:
    """The backends, and after `cpu` the same with bfloat16 products if the processor has them."""
    rounded = ["cpu" + BFLOAT16] if _native.bfloat16_products()[0] else []
    return [name for backend in backends for name in (backend, *(rounded if backend == "cpu" else []))]


def measure(model: str, shape: Shape, device: str, args: argparse.Namespace) -> dict:
    """All contenders of one model."""
    whole = args.loop_captions or shape.captions
    cut, least = (Shape(shape.workload, shape.images, min(n, shape.captions)) for n in (whole, 2))
    off, left_out, allowed = compare(model, contenders(args.backends or harness.backends(device)), cut, device)
    calls = {LOOP: step(model, LOOP, cut, device)}
    if cut != shape:
        calls[f"{LOOP}, {least.captions} captions"] = step(model, LOOP, least, device)
    for name in off:
        calls[name] = step(model, name, shape, device)
        if name != "torch":
            calls[name + ALL] = step(model, name, shape, device, hardest=False)
    harness.alternate(calls, 1)
    times = harness.alternate(calls, args.rounds)
    if cut != shape:
        few = times.pop(f"{LOOP}, {least.captions} captions")
        times[LOOP] = [extended(x, y, least, cut, shape) for x, y in zip(few, times[LOOP])]
    base = statistics.median(times[LOOP])
    rows = []
    for name, t in times.items():
        contender, label = name.removesuffix(ALL), name if name == LOOP else f"itm-fast {name}"
        hardest = name in (LOOP, *off)
        flops = step_flops(model, shape, hardest)
        more: dict[str, float | str | None] = {"largest_difference": off.get(contender, 0.0)}
        if BFLOAT16 in name:
            more["products"], more["allowed_difference"] = "bfloat16", allowed[contender]
            float32_seconds = statistics.median(times[name.replace(BFLOAT16, "")])
            more["times_faster_than_float32"] = float32_seconds / statistics.median(t)
        if name == LOOP:
            more["measured_captions"] = cut.captions
        if not args.no_fresh:
            harness.progress(f"{model}: {name}, peak memory in a fresh process")
            shapes = [shape] if name != LOOP or cut == shape else [least, cut]
            peaks = machine.in_fresh_process(memory, model, contender, shapes, hardest)
            scaled = len(peaks) == 2 and None not in peaks
            more["peak_bytes"] = int(extended(*peaks, least, cut, shape)) if scaled else peaks[0]
        rows.append(harness.row(label, t, shape.pairs, flops, base, **more))
    size = {"images": shape.images, "captions": shape.captions}
    return {"model": model, **size, "rows": rows, "left_out": left_out}


def extended(few: float, many: float, least: Shape, cut: Shape, shape: Shape) -> float:
    """The value at `shape` on a straight line over words through those at `least` and `cut`."""
    a, b, c = (sum(one.lengths) for one in (least, cut, shape))
    return few + (many - few) * (c - a) / (b - a)


def main(doc=__doc__, measure=measure, stem="training_step", what="a training step") -> None:
    """The command line of a benchmark of steps: `measure` gives the rows of a model, `stem` names the result files."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, *OTHERS), default=MODELS)
    parser.add_argument("--batch", type=int, default=128, help="images, and captions (default: 128)")
    parser.add_argument("--loop-captions", type=int, metavar="N", help="captions of the loop's steps (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default: 3)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="measure these alone (default: all that can run)")
    parser.add_argument("--no-fresh", action="store_true", help="leave peak memory out")
    parser.add_argument("--write", metavar="NAME", help=f"save benchmarks/results/{stem}_NAME.json, after each model")
    parser.add_argument("--add", action="store_true", help="keep the other models of that file: a long run in pieces")
    args = parser.parse_args()
    if args.add and not args.write:
        parser.error("--add adds to a file: give --write NAME")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, peak, results = Shape("coco-eval-5k", args.batch, args.batch), machine.peaks(device), []
    block, kept = f"coco-train-b{args.batch}", []
    if args.add:
        kept, before = harness.earlier(f"{stem}_{args.write}", machine.head(block, args.rounds, peak))
        peak = machine.higher(peak, before or peak)
    for model in args.models:
        results.append(measure(model, shape, device, args))
        peak = machine.higher(peak, machine.peaks(device))
        harness.hold_against(peak, results)
        title = f"{model}: {what} of {shape.images} images x {shape.captions} captions"
        harness.show(title, results[-1]["rows"], results[-1]["left_out"])
        if args.write:
            new = {one["model"]: one for one in (*kept, *results)}
            harness.hold_against(peak, list(new.values()))
            together = [new[name] for name in (*MODELS, *OTHERS) if name in new]
            head = machine.head(block, args.rounds, peak)
            print(harness.write(f"{stem}_{args.write}", {**head, "results": together}))


if __name__ == "__main__":
    main()
