"""The steps of `gpu_suite.py`, each run in a process of its own: `gpu_steps.py NAME FILE [--smoke]`.

A step writes its results after every row, so a step that is stopped or crashes keeps its earlier rows.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_maxsim, bench_training_step, harness, machine
from benchmarks.gpu_scoring import (
    DEVICE,
    GIB,
    OPS,
    PRECISIONS,
    REAL,
    SMOKE,
    Rows,
    Sizes,
    against_step,
    backends_of,
    evaluate_step,
    peak,
    precision,
)
from benchmarks.shapes import Shape
from itm_fast import _backends, _cuda
from itm_fast.ops import _examples as examples

ROOT = Path(__file__).resolve().parents[1]
# op -> options of other models: of BFAN and of NAAF's three terms, the first of which is CHAN's and MaxSim's too. The
# kernels in CUDA C++ have none of them.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "cross_attention_score": {
        "bfan equal": dict(weights="focal_equal", pool="mean"),
        "bfan prob": dict(weights="focal_prob", similarity="projection", pool="mean", direction="i2t"),
        "maxima": dict(weights="hard", similarity="product", affinity_norm="none", pool="smoothed_negative"),
        # Not the projection, in which the reference in float16 divides by 0 where no region passes the threshold.
        "threshold": dict(weights="threshold", similarity="product", affinity_norm="none", pool="mean"),
        "products": dict(similarity="product", pool="negative", direction="i2t"),
    },
}
SYSTEMS = ("shan", "shan-vector", "hgan", "tshsr")


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
    found["cuda backend"] = _backends.why_not("cuda", DEVICE) or f"NVRTC {_cuda.nvrtc.library().version}"
    rows.put("environment", found)
    for name in PRECISIONS:
        rows.attempt(f"peak {name}", partial(peak, name, sizes.product))


def check_step(rows: Rows, sizes: Sizes, op: str) -> None:
    """One op's kernels against the reference in each precision, as on their first use: needs no pytest."""
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    for name in PRECISIONS:
        for backend in backends_of(op):
            with precision(name) as dtype:
                for way in examples.ways(op):
                    said = " ".join((op, name, backend, *way.values()))
                    rows.attempt(said, partial(_checked, op, backend, device, dtype, **way))
                for way, options in WAYS.get(op, {}).items() if backend != "cuda" else ():
                    said = f"{op} {name} {backend} {way}"
                    rows.attempt(said, partial(_checked, op, backend, device, dtype, **options))


def _checked(op: str, backend: str, device: torch.device, dtype: torch.dtype, **options: Any) -> dict:
    start = time.perf_counter()
    wrong = examples.problem(op, backend, device, dtype, True, **options)
    return {"problem": wrong, "seconds_with_compiling": time.perf_counter() - start}


def train_step(rows: Rows, sizes: Sizes) -> None:
    """A training step: time and peak memory at batch 128 beside the loop's, and memory at batch 1,024."""
    for model in ("scan-t2i", "sgr", "saf"):
        for name in ("tf32", "float32"):
            # "auto" is what is chosen when nothing is asked for. SAF trains by ops that have no kernels in CUDA C++.
            of_cuda = [name for name in backends_of(OPS[model]) if name == "cuda" and model != "saf"]
            for contender in ("auto", *of_cuda, bench_training_step.LOOP):
                if contender != bench_training_step.LOOP or name == "tf32":
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
            **{
                f"itm-fast {backend}": partial(bench_maxsim.ours, block, task, backend)
                for backend in backends_of("cross_attention_score")
            },
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


@contextlib.contextmanager
def emulated_gpu(step: str) -> Iterator[None]:
    """In a step, run CUDA kernels emulated on CPU tensors, if the tests that can do so and a compiler are there."""
    sys.path.insert(0, str(ROOT / "tests"))
    with contextlib.ExitStack() as stack:
        with mock.patch.dict(os.environ):
            os.environ.pop("CXX", None)  # "none", so that the steps compile no kernels of the CPU
            with contextlib.suppress(ImportError):
                import cuda_emulated
                import cuda_stub

                module = cuda_emulated.load()
                if not isinstance(module, str):
                    stack.enter_context(cuda_stub.installed(module.run))
                    # What is checked on first use must have sizes that CUDA kernels take.
                    stack.enter_context(mock.patch.object(examples, "SMALL", examples.Size(3, (13, 2), 36, 64, 64, 2)))
                    # At the papers' sizes SGR and SAF take a minute emulated: only their checks run so.
                    stack.enter_context(mock.patch.dict(_backends.OFFERS))
                    for op in () if step.startswith("check-") else (OPS["sgr"], OPS["saf"]):
                        _backends.OFFERS[op] = tuple(name for name in _backends.OFFERS[op] if name != "cuda")
        yield


if __name__ == "__main__":
    smoke = "--smoke" in sys.argv
    with emulated_gpu(sys.argv[1]) if smoke and DEVICE == "cpu" else contextlib.nullcontext():
        STEPS[sys.argv[1]](Rows(Path(sys.argv[2])), SMOKE if smoke else REAL)
