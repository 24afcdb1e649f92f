"""All models: the paper's loop, the vectorised rewrite, torch.compile of it, and every backend, in one process.

    python benchmarks/bench_pair_scorers.py --threads 2 --precision medium --rounds 3 --write cpu

Results are compared with the loop's before anything is timed; a contender that differs by more than 1e-4 (2e-2 with
bfloat16 products) stops the benchmark. `--write NAME` saves benchmarks/results/pair_scorers_NAME.json.

A row "pairs alone" leaves out what depends on a single image or caption, which an evaluation computes once. Scratch
memory is measured in a new process per backend, for the block and for twice its images and captions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks import harness, machine, reconstructions, relatives, rewrites, shan, shapes
from benchmarks.harness import BFLOAT16
from benchmarks.shapes import SHAPES, Shape
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models.sgraf import EncoderSimilarity
from itm_fast.nn import CrossAttentionScore, PairScorer
from itm_fast.testing import scan, sgraf

MODELS = ("scan-t2i", "scan-i2t", "sgr", "saf")
# Run by name.
OTHERS: dict[str, Any] = {model: part for part in (shan, reconstructions, relatives) for model in part.MODELS}
SCALE = {"t2i": 9.0, "i2t": 4.0}
CHUNK = 32 << 20  # the most bytes of a temporary of the rewrites
ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2}  # of a score, which is about 1; a bfloat16 has 8 bits
LARGER = 2  # factor of images and captions in the second measurement of scratch memory, which must not grow


@dataclass
class Contender:
    """A function to time, the operations it needs at least, and the dtype of the factors of its matrix products."""

    call: Callable[[], Tensor]
    flops: float
    products: str = "float32"


def build(
    model: str, shape: Shape, device: str
) -> tuple[PairScorer, Callable[..., Tensor], Callable[..., Tensor] | None]:
    """The scorer, the paper's loop and, where there is one, the rewrite of a model: the last two as functions of the
    padded captions."""
    whole = WORKLOADS[shape.workload]
    if model.startswith("scan"):
        direction = model[5:]
        scorer = CrossAttentionScore(direction, scale=SCALE[direction])
        loop = lambda image, caption, lengths: scan.loop(  # noqa: E731
            image, caption, lengths.tolist(), direction=direction, scale=SCALE[direction]
        )
        rewrite = lambda image, caption, lengths: rewrites.scan(  # noqa: E731
            image, caption, lengths, direction, SCALE[direction], 6.0
        )
        return scorer, loop, rewrite
    torch.manual_seed(0)
    if model in OTHERS:
        scorer, other_loop = OTHERS[model].build(model, shape, device)
        return scorer.eval(), lambda image, caption, lengths: other_loop(image, caption, lengths.tolist()), None
    encoder = EncoderSimilarity(whole.dim, whole.similarity, model.upper()).to(device).eval()
    weights = encoder.state_dict()
    loop = lambda image, caption, lengths: sgraf.loop(weights, image, caption, lengths.tolist())  # noqa: E731
    return encoder, loop, lambda *args: rewrites.sgraf(weights, *args)


def chunked(
    rewrite: Callable[..., Tensor], model: str, scorer: PairScorer, limit: int = CHUNK
) -> Callable[..., Tensor]:
    """The rewrite over captions sorted by length and cut so that its temporaries fit; padded to each cut's longest."""

    def run(image: Tensor, caption: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort()
        score = image.new_empty(len(image), len(caption))
        globals_ = ()
        if not model.startswith("scan"):
            words, cu_seqlens = itm_fast.pack(caption, lengths)
            globals_ = scorer.image_state(image)[1], scorer.caption_state(words, cu_seqlens)[0]
        per_word = 4 * len(image) * (image.shape[1] if model.startswith("scan") else image.shape[2])
        step = max(1, limit // (per_word * int(lengths.float().mean())))
        for at in order.split(step):
            args = image, caption[at, : int(lengths[at].max())], lengths[at]
            score[:, at] = rewrite(*args, *(g[at] if k else g for k, g in enumerate(globals_)))
        return score

    return run


def scored(backend: str, products: str, call: Callable[..., Tensor], *args: object) -> Tensor:
    """`call` with a backend, whose float32 matrix products are exact or use bfloat16 factors."""
    with harness.products(products), itm_fast.use_backend(backend):
        return call(*args)


def contenders(model: str, shape: Shape, device: str, compile_too: bool, medium: bool) -> dict[str, Contender]:
    """All contenders that score the block, the paper's loop first."""
    image, words, cu_seqlens = shape.features(device)
    caption, lengths = itm_fast.unpack(words, cu_seqlens), cu_seqlens.diff().long()
    scorer, loop, rewrite = build(model, shape, device)
    of = OTHERS.get(model, shapes)
    pairs, states = of.needed_flops(model, shape), of.state_flops(model, shape)
    whole = pairs + states
    found = {"paper's loop": Contender(lambda: loop(image, caption, lengths), whole)}
    if rewrite is not None:
        plain = chunked(rewrite, model, scorer)
        found["vectorised rewrite"] = Contender(lambda: plain(image, caption, lengths), whole)
    if compile_too and rewrite is not None:
        compiled = chunked(torch.compile(rewrite, mode="max-autotune", dynamic=True), model, scorer)
        found["compiled rewrite"] = Contender(lambda: compiled(image, caption, lengths), whole)
    with torch.no_grad():
        given = scorer.image_state(image), words, cu_seqlens, scorer.caption_state(words, cu_seqlens)
    for backend in harness.backends(device):
        for products in ("float32", "bfloat16"):
            if products == "bfloat16" and (not medium or backend == "torch"):
                continue
            name = f"itm-fast {backend}" + (BFLOAT16 if products == "bfloat16" else "")
            alike = backend, products
            found[name] = Contender(
                lambda alike=alike: scored(*alike, scorer, image, words, cu_seqlens), whole, products
            )
            if states and backend != "torch":
                found[f"{name}, pairs alone"] = Contender(
                    lambda alike=alike: scored(*alike, scorer.score, *given), pairs, products
                )
    return found


def scratch(model: str, shapes: list[Shape], backend: str) -> list[int | None]:
    """Scratch bytes, beyond inputs and scores, of scoring each block; must run in a new process."""
    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    for shape in shapes:
        image, words, cu_seqlens = shape.features(device)
        scorer = build(model, shape, device)[0]
        with torch.no_grad(), itm_fast.use_backend(backend):
            if not found:  # libraries load and make their threads
                scorer(image[:2], words[: int(cu_seqlens[2])], cu_seqlens[:3])
            call = partial(scorer, image, words, cu_seqlens)
            peak = machine.peak_memory(call)
        found.append(peak and max(0, peak - 4 * shape.pairs))
    return found


@torch.no_grad()
def measure(model: str, shape: Shape, device: str, medium: bool, args: argparse.Namespace) -> dict:
    """All contenders of one model on one shape."""
    found, left_out = contenders(model, shape, device, not args.no_compile, medium), {}
    exact = found["paper's loop"].call()
    more: dict[str, dict] = {}
    scores: dict[str, Tensor] = {}
    for name, one in list(found.items()):
        harness.progress(f"{model}: {name}, compared and its memory taken")
        try:
            scores[name] = one.call()
            if torch.equal(scores[name], scores.get(name.replace(BFLOAT16, ""), exact)) and BFLOAT16 in name:
                raise NotImplementedError("bfloat16 products are allowed but not used: the scores are the same")
        except NotImplementedError as why:
            left_out[name] = str(why)
            del found[name]
            continue
        off = harness.largest_difference(scores[name], exact)
        if not off < ALLOWED[one.products]:
            raise SystemExit(f"{model}: {name} differs from the paper's loop by {off:.2g}; not timed")
        more[name] = {"largest_difference": off, "peak_bytes": machine.peak_memory(one.call)}
    times = harness.alternate({name: one.call for name, one in found.items()}, args.rounds)
    larger = Shape(shape.workload, LARGER * shape.images, LARGER * shape.captions)
    for backend in harness.backends(device):
        if (name := f"itm-fast {backend}") in found and not args.no_fresh:
            harness.progress(f"{model}: {name}, scratch in a fresh process")
            small, large = machine.in_fresh_process(scratch, model, [shape, larger], backend)
            more[name] |= {"peak_bytes": small, "peak_bytes_of_larger_block": large}
    base = statistics.median(times["paper's loop"])
    rows = [
        harness.row(name, times[name], shape.pairs, one.flops, base, products=one.products, **more[name])
        for name, one in found.items()
    ]
    size = {"images": shape.images, "captions": shape.captions, "larger_block": [larger.images, larger.captions]}
    return {"model": model, **size, "rows": rows, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, *OTHERS), default=MODELS)
    parser.add_argument("--shape", choices=SHAPES, default="coco-eval-5k")
    parser.add_argument("--images", type=int, help="images of the block (default: the shape's)")
    parser.add_argument("--captions", type=int, help="captions of the block (default: the shape's)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default: 5)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument(
        "--precision", choices=("highest", "medium"), default="highest",
        help="of float32 matrix products; medium adds rows with bfloat16 products (default: highest)",
    )  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the rewrite out")
    parser.add_argument("--no-fresh", action="store_true", help="measure scratch in this process only")
    parser.add_argument("--write", metavar="NAME", help="save benchmarks/results/pair_scorers_NAME.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = SHAPES[args.shape]
    shape = Shape(known.workload, args.images or known.images, args.captions or known.captions)
    peak = machine.peaks(device)
    medium = args.precision == "medium" and (device == "cuda" or peak["fma_bfloat16"] is not None)
    results = []
    for model in args.models:
        results.append(measure(model, shape, device, medium, args))
        peak = machine.higher(peak, machine.peaks(device))
        harness.hold_against(peak, results)
        title = f"{model}: {shape.images} images x {shape.captions} captions of {shape.workload}"
        harness.show(title, results[-1]["rows"], results[-1]["left_out"])
    if args.write:
        head = machine.head(args.shape, args.rounds, peak)
        print(harness.write(f"pair_scorers_{args.write}", {**head, "results": results}))


if __name__ == "__main__":
    main()
