"""Try other rows of kernels/_tiles.py on the GPU that is here, and print the better ones with its name and the date.

    python benchmarks/tune.py --minutes 8
    python benchmarks/tune.py --ops similarity_graph_score --dtypes bfloat16 --backward

Every row that a call uses is varied one number at a time: a block size halved or doubled, another number of warps or
stages. A variant that is 2 % faster is kept, until there is none or the time is over. Variants that do not compile, do
not fit or change the result beyond rounding are skipped. The best row may depend on the other rows, so the most
important calls come first. Copy the printed lines into kernels/_tiles.py by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks import harness
from benchmarks.shapes import Shape
from itm_fast.ops import _examples as examples
from itm_fast.ops._declare import DECLARED

OPS = (
    "similarity_graph_score", "similarity_filter_score", "cross_attention_score", "cross_attention_similarity",
    "global_local_score", "similarity_context", "attended_vectors",
)  # fmt: skip
FEW = 128  # images and captions where the backward pass is timed, or a result has D numbers for each word of a pair
GAIN = 0.98  # a variant is kept if it takes at most this share of the time
WARPS, STAGES = (4, 8), (1, 2, 3, 4)
LEAST, MOST = 16, 512  # range of block sizes to try
Row = dict[str, Any]
Key = tuple[str, tuple]  # a function of _tiles and its arguments


def variants(row: Row) -> Iterator[Row]:
    """Rows that differ from one in one number."""
    for name, value in row.items():
        if name in ("enable_fp_fusion", "maxnreg"):
            continue
        if isinstance(value, bool):
            yield row | {name: not value}
            continue
        if name == "num_warps":
            others = [n for n in WARPS if n != value]
        elif name == "num_stages":
            others = [n for n in STAGES if n != value]
        else:
            least = LEAST if name.startswith("BLOCK") else 1
            others = [n for n in (value // 2, value * 2) if least <= n <= MOST]
        for other in others:
            yield row | {name: other}


@contextlib.contextmanager
def rows_of(tiles: Any, chosen: dict[Key, Row], used: dict[Key, Row]) -> Iterator[None]:
    """`_tiles` answers with the chosen rows, and what it is asked for is noted in `used`."""
    functions = {
        name: function
        for name, function in vars(tiles).items()
        if inspect.isfunction(function) and function.__annotations__.get("return") == "Tile" and name[0] != "_"
    }

    def answering(name: str, function: Callable[..., Row]) -> Callable[..., Row]:
        def answer(*args: Any) -> Row:
            used[name, args] = chosen.get((name, args)) or function(*args)
            return dict(used[name, args])

        return answer

    try:
        for name, function in functions.items():
            setattr(tiles, name, answering(name, function))
        yield
    finally:
        for name, function in functions.items():
            setattr(tiles, name, function)


def search(
    tiles: Any, call: Callable[[], Tensor], seconds: Callable[[Callable[[], Tensor]], float], deadline: float
) -> dict[Key, tuple[Row, float, float]]:
    """Better rows for a call: each with the seconds before and after it."""
    chosen: dict[Key, Row] = {}
    used: dict[Key, Row] = {}
    gains: dict[Key, tuple[Row, float, float]] = {}

    def tried() -> tuple[Tensor, float]:
        with rows_of(tiles, chosen, used):
            return call(), seconds(call)

    exact, best = tried()
    allowed = 16 * torch.finfo(exact.dtype).eps * exact.abs().max().item() + 1e-3 * exact.abs().max().item()
    improved = True
    while improved and time.monotonic() < deadline:
        improved = False
        for key in list(used):
            for row in list(variants(used[key])):
                if time.monotonic() > deadline:
                    return gains
                before = chosen.get(key)
                chosen[key] = row
                try:
                    found, took = tried()
                    good = took < GAIN * best and harness.largest_difference(found, exact) <= allowed
                except Exception as why:  # a compiler or a launch that refuses may raise anything
                    harness.progress(f"{key[0]} {row}: {type(why).__name__}: {str(why).splitlines()[0][:100]}")
                    good = False
                if good:
                    harness.progress(f"{key[0]} {row}: {1e3 * best:.2f} -> {1e3 * took:.2f} ms")
                    first = gains[key][1] if key in gains else best
                    gains[key] = row, first, took
                    best, improved = took, True
                elif before is None:
                    del chosen[key]
                else:
                    chosen[key] = before
                used[key] = chosen.get(key) or used[key]
    return gains


def line(key: Key, row: Row, before: float, after: float) -> str:
    """A row as kernels/_tiles.py has it."""
    name, args = key
    blocks = ", ".join(
        f"{k}={v}" for k, v in row.items() if k not in ("num_warps", "num_stages", "enable_fp_fusion")
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    asked = ", ".join(str(a).removeprefix("torch.") for a in args)
    return (
        f"{name}({asked}): _row({row['num_warps']}, {row['num_stages']}, {blocks})  # {gpu}, {date}: "
        f"{1e3 * before:.2f} -> {1e3 * after:.2f} ms"
    )


def problem(op: str, dtype: torch.dtype, device: str, backward: bool, images: int, captions: int):
    """A call of an op on a block of COCO, forward or with its backward pass."""
    shape = Shape("coco-eval-5k", images, captions)
    size = examples.PUBLISHED._replace(images=images, lengths=tuple(shape.lengths))
    args = [a.to(device) if isinstance(a, Tensor) else a for a in examples.example(op, size)]
    args = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    leaves = [a.requires_grad_(backward) for a in args if isinstance(a, Tensor) and a.is_floating_point()][:4]

    def call() -> Tensor:
        with torch.set_grad_enabled(backward):
            result = getattr(itm_fast, op)(*args, backend="triton" if device == "cuda" else None)
            result = result[0] if isinstance(result, tuple) else result
            if not backward:
                return result
            grad = torch.autograd.grad(result.float().sin().sum(), leaves)
            return grad[0]

    return call


def best_of(call: Callable[[], Tensor]) -> float:
    """The best of five."""
    return min(harness.seconds(call) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=sorted(DECLARED), default=list(OPS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--matmul", default="high", choices=("highest", "high"), help="of float32 (default: high)")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--backward", action="store_true", help="time the backward pass too, on 128 x 128 pairs")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: 8)")
    args = parser.parse_args()
    from itm_fast.kernels import _tiles

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision(args.matmul)
    jobs = [(op, dtype) for dtype in args.dtypes for op in args.ops]
    end = time.monotonic() + 60 * args.minutes
    for k, (op, dtype) in enumerate(jobs):
        start = time.monotonic()
        few = args.backward or op == "attended_vectors"
        sizes = (min(args.images, FEW), min(args.captions, FEW)) if few else (args.images, args.captions)
        call = problem(op, getattr(torch, dtype), device, args.backward, *sizes)
        found = search(_tiles, call, best_of, start + (end - start) / (len(jobs) - k))
        print(f"{op} {dtype}{' backward' if args.backward else ''}: {len(found)} better rows")
        for key, (row, before, after) in found.items():
            print("  " + line(key, row, before, after), flush=True)


if __name__ == "__main__":
    main()
