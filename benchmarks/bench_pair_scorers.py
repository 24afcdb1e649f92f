"""SCAN, SGR and SAF: the paper's loop, the vectorised rewrite, torch.compile of it, and every backend, in one process.

    python benchmarks/bench_pair_scorers.py --models scan-t2i sgr --rounds 5 --write cpu

Results are compared with the loop's before anything is timed; a contender that differs by more than 1e-4 stops the
benchmark. `--write NAME` saves benchmarks/results/pair_scorers_NAME.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks import harness, rewrites
from benchmarks.shapes import SHAPES, Shape, needed_flops
from itm_fast import _backends
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models.sgraf import EncoderSimilarity
from itm_fast.nn import CrossAttentionScore, PairScorer
from itm_fast.testing import scan, sgraf

MODELS = ("scan-t2i", "scan-i2t", "sgr", "saf")
SCALE = {"t2i": 9.0, "i2t": 4.0}
CHUNK = 32 << 20  # bytes of the largest temporary that the rewrites may hold at once


def build(model: str, shape: Shape, device: str) -> tuple[PairScorer, Callable[..., Tensor], Callable[..., Tensor]]:
    """The scorer, the paper's loop and the rewrite of a model: the last two as functions of the padded captions."""
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
    encoder = EncoderSimilarity(whole.dim, whole.similarity, model.upper()).to(device).eval()
    weights = encoder.state_dict()
    loop = lambda image, caption, lengths: sgraf.loop(weights, image, caption, lengths.tolist())  # noqa: E731
    return encoder, loop, lambda *args: rewrites.sgraf(weights, *args)


def chunked(rewrite: Callable[..., Tensor], model: str, scorer: PairScorer) -> Callable[..., Tensor]:
    """The rewrite over captions sorted by length and cut so that its temporaries fit; padded to each cut's longest."""

    def run(image: Tensor, caption: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort()
        score = image.new_empty(len(image), len(caption))
        globals_ = ()
        if not model.startswith("scan"):
            words, cu_seqlens = itm_fast.pack(caption, lengths)
            globals_ = scorer.image_state(image)[1], scorer.caption_state(words, cu_seqlens)[0]
        per_word = 4 * len(image) * (image.shape[1] if model.startswith("scan") else image.shape[2])
        step = max(1, CHUNK // (per_word * int(lengths.float().mean())))
        for at in order.split(step):
            args = image, caption[at, : int(lengths[at].max())], lengths[at]
            score[:, at] = rewrite(*args, *(g[at] if k else g for k, g in enumerate(globals_)))
        return score

    return run


def measure(model: str, shape: Shape, rounds: int, device: str, compile_too: bool, peak: float) -> dict:
    """All contenders of one model on one shape."""
    image, words, cu_seqlens = shape.features(device)
    caption, lengths = itm_fast.unpack(words, cu_seqlens), cu_seqlens.diff().long()
    scorer, loop, rewrite = build(model, shape, device)
    calls: dict[str, Callable[[], Tensor]] = {"paper's loop": lambda: loop(image, caption, lengths)}
    plain = chunked(rewrite, model, scorer)
    calls["vectorised rewrite"] = lambda: plain(image, caption, lengths)
    if compile_too:
        compiled = chunked(torch.compile(rewrite, mode="max-autotune", dynamic=True), model, scorer)
        calls["compiled rewrite"] = lambda: compiled(image, caption, lengths)
    for name in _backends.NAMES:
        if name != "reference" and _backends.why_not(name, device) is None:
            calls[f"itm-fast {name}"] = lambda name=name: _scored(scorer, image, words, cu_seqlens, name)
    with torch.no_grad():
        exact = calls["paper's loop"]()
        difference = {name: harness.largest_difference(call(), exact) for name, call in calls.items()}
        for name, off in difference.items():
            if not off < 1e-4:
                raise SystemExit(f"{model}: {name} differs from the paper's loop by {off:.2g}; not timed")
        memory = {name: harness.peak_memory(call) for name, call in calls.items()}
        times = harness.alternate(calls, rounds)
    base, flops = statistics.median(times["paper's loop"]), needed_flops(model, shape)
    rows = [
        harness.row(n, t, shape.pairs, flops, peak, base, largest_difference=difference[n], peak_bytes=memory[n])
        for n, t in times.items()
    ]
    return {"model": model, "images": shape.images, "captions": shape.captions, "rows": rows}


def _scored(scorer: PairScorer, image: Tensor, words: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    with itm_fast.use_backend(backend):
        return scorer(image, words, cu_seqlens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--shape", choices=SHAPES, default="coco-eval-5k")
    parser.add_argument("--images", type=int, help="images of the block (default: the shape's)")
    parser.add_argument("--captions", type=int, help="captions of the block (default: the shape's)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default: 5)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the rewrite out")
    parser.add_argument("--write", metavar="NAME", help="save benchmarks/results/pair_scorers_NAME.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = SHAPES[args.shape]
    shape = Shape(known.workload, args.images or known.images, args.captions or known.captions)
    peak = harness.peak_flops(device)
    results = []
    for model in args.models:
        results.append(measure(model, shape, args.rounds, device, not args.no_compile, peak))
        title = f"{model}: {shape.images} images x {shape.captions} captions of {shape.workload}"
        harness.show(title, results[-1]["rows"])
    if args.write:
        head = {"environment": harness.environment(), "shape": args.shape, "rounds": args.rounds}
        head["matmul_peak_gflops"] = peak / 1e9
        print(harness.write(f"pair_scorers_{args.write}", {**head, "results": results}))


if __name__ == "__main__":
    main()
