"""Scoring on a GPU, for `gpu_steps.py`: the whole of COCO 5K, and a block beside the paper's loop and its rewrite."""

from __future__ import annotations

import json
import os
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

import itm_fast
from benchmarks import bench_pair_scorers, harness
from benchmarks import shapes as published
from benchmarks.bench_pair_scorers import OTHERS
from benchmarks.shapes import Shape
from itm_fast import _backends
from itm_fast.evaluation.ranking import ranks
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.nn import PairScorer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if DEVICE == "cuda" else "torch"
COCO = "coco-eval-5k"
GIB = 1 << 30
TEMPORARIES = 4 * GIB  # the most bytes of the rewrite's temporaries


class Precision(NamedTuple):
    """dtype of the features and what torch may do with float32 products."""

    dtype: torch.dtype
    matmul: str


PRECISIONS = {
    "float32": Precision(torch.float32, "highest"),
    "bfloat16": Precision(torch.bfloat16, "high"),
    "tf32": Precision(torch.float32, "high"),
    "float16": Precision(torch.float16, "high"),
}
# The op of each model that the backend `cuda` may have.
OPS = {
    "scan-t2i": "cross_attention_score", "scan-i2t": "cross_attention_score", "sgr": "similarity_graph_score",
    "saf": "similarity_filter_score",
}  # fmt: skip
LONG = 10  # seconds: what takes more is measured once
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


def peak(name: str, n: int) -> float:
    """Flops per second of a large matrix product: the best of ten."""
    with precision(name) as dtype:
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        a @ b
        return 2 * n**3 / min(harness.seconds(lambda: a @ b) for _ in range(10))


def features(shape: Shape, lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows drawn on the device: image [I, R, D], words [N, D], cu_seqlens [T + 1]."""
    whole = WORKLOADS[shape.workload]
    torch.manual_seed(0)

    def rows(*size: int) -> Tensor:
        x = torch.randn(*size, whole.dim, device=DEVICE) + torch.randn(whole.dim, device=DEVICE)
        return torch.nn.functional.normalize(x, dim=-1).to(dtype)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return rows(shape.images, whole.regions), rows(sum(lengths)), cu_seqlens


def parts_of(model: str) -> tuple[str, ...]:
    """The models whose scores are added up."""
    return ("sgr", "saf") if model == "sgraf" else (model,)


def backends_of(*ops: str) -> list[str]:
    """The backends to measure: ours, and `cuda` where all these ops have it and it can run."""
    offered = all("cuda" in _backends.OFFERS.get(op, ()) for op in ops)
    return [OURS, "cuda"] if offered and _backends.why_not("cuda", DEVICE) is None else [OURS]


@torch.no_grad()
def evaluate_step(rows: Rows, sizes: Sizes, models: tuple[str, ...], names: Iterable[str] = PRECISIONS) -> None:
    """Whole coco-eval-5k: encoded features on the device -> ranks on the host, in the precisions named; then how many
    ranks are those of float32."""
    for model in models:
        found: dict[str, np.ndarray] = {}  # ranks of the captions' images
        for name in names:
            for backend in backends_of(*(OPS.get(part, "") for part in parts_of(model))):
                row = f"{model} {name} {backend}"
                rows.attempt(row, partial(evaluated, model, name, sizes, backend, found))
        exact = found.get(f"{model} float32 {OURS}")
        if exact is not None:
            rows.put(f"{model} ranks", {row: float((one == exact).mean()) for row, one in found.items()})


def evaluated(model: str, name: str, sizes: Sizes, backend: str, found_ranks: dict[str, np.ndarray]) -> dict:
    """Wall time of one model (for sgraf, two and their mean), its parts, its memory and its share of the peak; the
    captions' ranks go into `found_ranks`."""
    shape, parts = sizes.whole, parts_of(model)
    with precision(name) as dtype, itm_fast.use_backend(backend), torch.no_grad():
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
            if took["all"] > LONG:
                break
        found_ranks[f"{model} {name} {backend}"] = found.t2i
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
        of_ours = {name: f"itm-fast {name}" for name in backends_of(OPS.get(model, ""))}
        calls: dict[str, Callable[[], Tensor]] = {
            name: partial(_in_backend, backend, lambda: scorer(image, words, cu_seqlens))
            for backend, name in of_ours.items()
        }
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
                off = harness.largest_difference(call()[:, :few], exact)
                if not off < ALLOWED[name]:
                    raise ValueError(f"differs from the paper's loop by {off:.2g}")
                times = [harness.seconds(call) for _ in range(3)]
                found[contender] = {"seconds": min(times), "largest_difference": off}
            except Exception as error:
                traceback.print_exc()
                found[contender] = {"error": f"{type(error).__name__}: {error}"[:500]}
        ours = found[of_ours[OURS]].get("seconds")
        for one in found.values():
            if isinstance(one, dict) and ours and "seconds" in one:
                one["times_slower_than_ours"] = one["seconds"] / ours
    return found


def _in_backend(backend: str, call: Callable[[], Tensor]) -> Tensor:
    with itm_fast.use_backend(backend):
        return call()


def _of_dtype(model: str, shape: Shape, dtype: torch.dtype) -> tuple[PairScorer, Callable, Callable]:
    """`bench_pair_scorers.build` with the weights of its loop and rewrite in a dtype too."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        return bench_pair_scorers.build(model, shape, DEVICE)
    finally:
        torch.set_default_dtype(before)
