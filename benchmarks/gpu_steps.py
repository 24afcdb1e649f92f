"""The steps of `gpu_suite.py`, each run in a process of its own: `gpu_steps.py NAME FILE [--smoke]`.

A step writes its results after every row, so a step that is stopped or crashes keeps its earlier rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks import bench_maxsim, bench_pair_scorers, bench_training_step, harness, machine
from benchmarks import shapes as published
from benchmarks.bench_pair_scorers import OTHERS
from benchmarks.shapes import Shape
from itm_fast import _backends
from itm_fast.evaluation.ranking import ranks
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.nn import PairScorer
from itm_fast.ops import _examples as examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if DEVICE == "cuda" else "auto"
COCO = "coco-eval-5k"
GIB = 1 << 30
TEMPORARIES = 4 * GIB  # the most bytes of the rewrite's temporaries


class Precision(NamedTuple):
    """dtype of the features and what torch may do with float32 products."""

    dtype: torch.dtype
    matmul: str


PRECISIONS = {
    "tf32": Precision(torch.float32, "high"),
    "bfloat16": Precision(torch.bfloat16, "high"),
    "float16": Precision(torch.float16, "high"),
    "float32": Precision(torch.float32, "highest"),
}
SYSTEMS = ("shan", "shan-vector", "hgan", "tshsr")
# The most that scores may differ from the paper's loop in float32.
ALLOWED = {"tf32": 1e-2, "bfloat16": 1e-1, "float16": 1e-2, "float32": 1e-4}


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Float32 products as a precision has them; gives the dtype of its features."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[name].matmul)
    try:
        yield PRECISIONS[name].dtype
    finally:
        torch.set_float32_matmul_precision(before)


class Sizes(NamedTuple):
    """Of the workloads: the real ones, or tiny ones that only show that everything runs."""

    whole: Shape
    block: Shape  # for the loop and the rewrite
    train: Shape
    large: Shape  # a training batch whose memory is measured
    maxsim: tuple[int, int]
    product: int  # size of the square matrices whose product measures the peak rate


REAL = Sizes(
    Shape(COCO, 5000, 25000), Shape(COCO, 1000, 256), Shape(COCO, 128, 128), Shape(COCO, 1024, 1024), (1000, 5000), 8192
)
SMOKE = Sizes(Shape(COCO, 6, 10), Shape(COCO, 5, 6), Shape(COCO, 3, 3), Shape(COCO, 4, 4), (4, 5), 256)


class Rows:
    """What a step has found so far, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}

    def put(self, name: str, value: Any) -> None:
        self.found[name] = value
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text(json.dumps(self.found, indent=1, default=str))
        os.replace(partial_file, self.path)
        harness.progress(f"{name}: {json.dumps(value, default=str)[:300]}")

    def attempt(self, name: str, call: Callable[[], Any]) -> None:
        """Put what a call returns, or why it failed."""
        start = time.perf_counter()
        try:
            value = call()
        except Exception as error:
            traceback.print_exc()
            value = {"error": f"{type(error).__name__}: {error}"[:2000]}
        self.put(name, value)
        harness.progress(f"{name}: {time.perf_counter() - start:.1f} s in all")
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def machine_step(rows: Rows, sizes: Sizes) -> None:
    """The machine, and how fast it multiplies large matrices in each precision."""
    found = machine.environment()
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / GIB, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = str(error)
    rows.put("environment", found)
    for name in PRECISIONS:
        rows.attempt(f"peak {name}", partial(peak, name, sizes.product))


def peak(name: str, n: int) -> float:
    """Flops per second of a large matrix product: the best of ten."""
    with precision(name) as dtype:
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        a @ b
        return 2 * n**3 / min(harness.seconds(lambda: a @ b) for _ in range(10))


def check_step(rows: Rows, sizes: Sizes, op: str) -> None:
    """One op's kernels against the reference in each precision, as on their first use: needs no pytest."""
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    for name in PRECISIONS:
        with precision(name) as dtype:
            rows.attempt(f"{op} {name}", partial(_checked, op, device, dtype))


def _checked(op: str, device: torch.device, dtype: torch.dtype) -> dict:
    start = time.perf_counter()
    wrong = examples.problem(op, OURS, device, dtype, True)
    return {"problem": wrong, "seconds_with_compiling": time.perf_counter() - start}


def features(shape: Shape, lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows drawn on the device: image [I, R, D], words [N, D], cu_seqlens [T + 1]."""
    whole = WORKLOADS[shape.workload]
    torch.manual_seed(0)

    def rows(*size: int) -> Tensor:
        x = torch.randn(*size, whole.dim, device=DEVICE) + torch.randn(whole.dim, device=DEVICE)
        return torch.nn.functional.normalize(x, dim=-1).to(dtype)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return rows(shape.images, whole.regions), rows(sum(lengths)), cu_seqlens


@torch.no_grad()
def evaluate_step(rows: Rows, sizes: Sizes, models: tuple[str, ...], names: Iterable[str] = PRECISIONS) -> None:
    """Whole coco-eval-5k: encoded features on the device -> ranks on the host, in the precisions named."""
    for name in names:
        for model in models:
            rows.attempt(f"{model} {name}", partial(evaluated, model, name, sizes))


def evaluated(model: str, name: str, sizes: Sizes) -> dict:
    """Wall time of one model (for sgraf, two and their mean), its parts, its memory and its share of the peak."""
    shape, parts = sizes.whole, ("sgr", "saf") if model == "sgraf" else (model,)
    with precision(name) as dtype, itm_fast.use_backend(OURS), torch.no_grad():
        # Captions of one length stand together, longest first, as the library's evaluation orders them.
        lengths = np.sort(shape.lengths)[::-1].tolist()
        image, words, cu_seqlens = features(shape, lengths, dtype)
        owner = np.arange(shape.captions) % shape.images
        scorers = {part: bench_pair_scorers.build(part, shape, DEVICE)[0].to(dtype) for part in parts}
        start = time.perf_counter()
        for scorer in scorers.values():  # first call: compile the kernels
            scored(scorer, image[:9], words[: int(cu_seqlens[7])], cu_seqlens[:8])
        harness.synchronise()
        warm = time.perf_counter() - start
        best: dict[str, float] = {}
        memory = 0
        for _ in range(2):
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            took, total = {}, None
            start = time.perf_counter()
            for part, scorer in scorers.items():
                before = time.perf_counter()
                score = scored(scorer, image, words, cu_seqlens)
                total = score.float() if total is None else total.add_(score)
                harness.synchronise()
                took[f"score {part}"] = time.perf_counter() - before
            before = time.perf_counter()
            found = ranks(total, owner)
            took["rank"] = time.perf_counter() - before
            took["all"] = time.perf_counter() - start
            if DEVICE == "cuda":
                memory = torch.cuda.max_memory_allocated() - held
            if not best or took["all"] < best["all"]:
                best = took
            del total, score
            if took["all"] > 40:
                break
        flops = sum(OTHERS.get(part, published).needed_flops(part, shape) for part in parts)
        rate = peak(name, sizes.product)
    return {
        "seconds": best["all"],
        "parts": best,
        "compiling": warm,
        "pairs_per_second": shape.pairs / best["all"],
        "needed_flops": flops,
        "matmul_peak": rate,
        "floor_seconds": flops / rate,
        "fraction_of_matmul_peak": flops / rate / sum(v for k, v in best.items() if k.startswith("score")),
        "bytes_above_inputs": memory,
        "score_bytes": shape.pairs * torch.finfo(dtype).bits // 8,
        "median_rank": float(np.median(found.t2i)),
    }


def scored(scorer: PairScorer, image: Tensor, words: Tensor, cu_seqlens: Tensor) -> Tensor:
    """All pairs on the device; what depends on one item alone in chunks, as the library's evaluation does."""
    parts = [scorer.image_state(chunk)[1:] for chunk in image.split(512)]
    state = tuple(torch.cat(one) for one in zip(*parts)) if parts[0] else ()
    edge, captions = cu_seqlens.tolist(), []
    for first in range(0, len(edge) - 1, 512):
        last = min(first + 512, len(edge) - 1)
        part = words[edge[first] : edge[last]], cu_seqlens[first : last + 1] - edge[first]
        captions.append(scorer.caption_state(*part))
    caption_state = tuple(torch.cat(one) for one in zip(*captions)) if captions[0] else ()
    return scorer.score((image, *state), words, cu_seqlens, caption_state)


@torch.no_grad()
def against_step(
    rows: Rows,
    sizes: Sizes,
    compiled: bool = False,
    models: tuple[str, ...] = ("scan-t2i", "sgr", "saf"),
    names: tuple[str, ...] = ("tf32", "bfloat16"),
) -> None:
    """A block by the paper's loop, by the vectorised rewrite, plain or compiled, and by us, in the same precision."""
    for model in models:
        for name in names:
            rows.attempt(f"{model} {name}", partial(against, model, name, sizes, compiled))


@torch.no_grad()
def against(model: str, name: str, sizes: Sizes, compiled: bool) -> dict:
    """Seconds of each contender on one block, and how far its scores are from the loop's in float32."""
    shape = sizes.block
    with precision("float32"):
        image, words, cu_seqlens = features(shape, shape.lengths, torch.float32)
        caption, lengths = itm_fast.unpack(words, cu_seqlens), cu_seqlens.diff().long()
        few = min(16, shape.captions)
        exact = bench_pair_scorers.build(model, shape, DEVICE)[1](image, caption[:few], lengths[:few])
    with precision(name) as dtype, torch.no_grad():
        image, words, caption = image.to(dtype), words.to(dtype), caption.to(dtype)
        scorer, loop, rewrite = _of_dtype(model, shape, dtype)
        calls: dict[str, Callable[[], Tensor]] = {"itm-fast": lambda: scorer(image, words, cu_seqlens)}
        if compiled:
            how = {"mode": "max-autotune"} if DEVICE == "cuda" else {"backend": "eager"}
            fast = torch.compile(rewrite, dynamic=True, **how)
            run = bench_pair_scorers.chunked(fast, model, scorer, TEMPORARIES)
            calls["compiled rewrite"] = lambda: run(image, caption, lengths)
        else:
            calls["paper's loop"] = lambda: loop(image, caption, lengths)
            if rewrite is not None:
                plain = bench_pair_scorers.chunked(rewrite, model, scorer, TEMPORARIES)
                calls["vectorised rewrite"] = lambda: plain(image, caption, lengths)
        found: dict[str, Any] = {"images": shape.images, "captions": shape.captions}
        for contender, call in calls.items():
            try:
                with itm_fast.use_backend(OURS):
                    off = harness.largest_difference(call()[:, :few], exact)
                    if not off < ALLOWED[name]:
                        raise ValueError(f"differs from the paper's loop by {off:.2g}")
                    times = [harness.seconds(call) for _ in range(3)]
                found[contender] = {"seconds": min(times), "largest_difference": off}
            except Exception as error:
                traceback.print_exc()
                found[contender] = {"error": f"{type(error).__name__}: {error}"[:500]}
        ours = found["itm-fast"].get("seconds")
        for one in found.values():
            if isinstance(one, dict) and ours and "seconds" in one:
                one["times_slower_than_ours"] = one["seconds"] / ours
    return found


def _of_dtype(model: str, shape: Shape, dtype: torch.dtype) -> tuple[PairScorer, Callable, Callable]:
    """`bench_pair_scorers.build` with the weights of its loop and rewrite in a dtype too."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        return bench_pair_scorers.build(model, shape, DEVICE)
    finally:
        torch.set_default_dtype(before)


def train_step(rows: Rows, sizes: Sizes) -> None:
    """A training step: time and peak memory at batch 128 beside the loop's, and memory at batch 1,024."""
    for model in ("scan-t2i", "sgr", "saf"):
        for name in ("tf32", "float32"):
            # What is chosen when nothing is asked for: not every op of a training step has kernels of its own.
            for contender in ("auto", bench_training_step.LOOP):
                if contender == "auto" or name == "tf32":
                    rows.attempt(f"{model} {name} {contender}", partial(trained, model, name, contender, sizes.train))
        rows.attempt(f"{model} tf32 auto, large", partial(trained, model, "tf32", "auto", sizes.large))


def trained(model: str, name: str, contender: str, shape: Shape) -> dict:
    """Seconds and peak bytes of one step, forward and backward."""
    with precision(name):
        bench_training_step.step(model, contender, Shape(shape.workload, 2, 2), DEVICE)()
        step = bench_training_step.step(model, contender, shape, DEVICE)
        peak_bytes = machine.peak_memory(step)
        seconds = min(harness.seconds(step) for _ in range(3))
    return {"seconds": seconds, "peak_bytes": peak_bytes, "batch": shape.images}


def maxsim_step(rows: Rows, sizes: Sizes) -> None:
    """MaxSim with late-interaction-kernels and flash-maxsim where they are installed, one product, and ours."""
    for D in (128, 1024):
        rows.attempt(f"maxsim-d{D}", partial(maxsim, D, sizes))


@torch.no_grad()
def maxsim(D: int, sizes: Sizes) -> dict:
    """Seconds of each contender, float16 features."""
    task, found = f"maxsim-d{D}", {}
    with precision("float16") as dtype:
        block = bench_maxsim.Block(*sizes.maxsim, D, DEVICE)
        block.image, block.words, block.caption = (x.to(dtype) for x in (block.image, block.words, block.caption))
        exact = bench_maxsim.one_product(block, task)
        calls: dict[str, Callable[[], Callable[[], Tensor]]] = {
            "one matrix product": lambda: exact,
            "itm-fast": lambda: bench_maxsim.ours(block, task, OURS),
            "late-interaction-kernels": lambda: bench_maxsim.late_interaction(block),
            "flash-maxsim": lambda: bench_maxsim.flash_maxsim(block),
        }
        few = min(64, block.captions)
        want = bench_maxsim.Block(block.images, few, D, DEVICE)
        want.image, want.words = block.image.float(), block.words[: int(block.cu_seqlens[few])].float()
        want.cu_seqlens = block.cu_seqlens[: few + 1]
        want.owner = torch.arange(few, device=DEVICE).repeat_interleave(want.cu_seqlens.diff().long())
        judge = bench_maxsim.one_product(want, task)()
        for name, make in calls.items():
            try:
                call = make()
                off = harness.largest_difference(call()[:, :few], judge)
                found[name] = {"seconds": min(harness.seconds(call) for _ in range(3)), "largest_difference": off}
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"images": block.images, "captions": block.captions, "needed_flops": block.flops(task), "rows": found}


def precision_step(rows: Rows, sizes: Sizes) -> None:
    """What each precision does to the ranking of the package's trained models."""
    from benchmarks import bench_precision

    rows.attempt("precision", lambda: bench_precision.measure(DEVICE, None if sizes is REAL else 8))


def _offered(op: str) -> bool:
    return "triton" in _backends.OFFERS[op] or DEVICE == "cpu"


STEPS: dict[str, Callable[[Rows, Sizes], None]] = {
    "machine": machine_step,
    **{f"check-{op}": partial(check_step, op=op) for op in sorted(_backends.OFFERS) if _offered(op)},
    "evaluate-scan": partial(evaluate_step, models=("scan-t2i",)),
    "evaluate-sgraf": partial(evaluate_step, models=("sgraf",)),
    "against-loop": against_step,
    "train": train_step,
    "evaluate-systems": partial(evaluate_step, models=SYSTEMS, names=("tf32",)),
    "systems-against-loop": partial(against_step, models=SYSTEMS, names=("tf32",)),
    "maxsim": maxsim_step,
    "precision": precision_step,
    "against-compiled": partial(against_step, compiled=True),
}


if __name__ == "__main__":
    STEPS[sys.argv[1]](Rows(Path(sys.argv[2])), SMOKE if "--smoke" in sys.argv else REAL)
