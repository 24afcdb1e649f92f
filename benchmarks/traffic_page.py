"""The tables of `benchmarks/traffic.py`'s predictions, in Markdown."""

from __future__ import annotations

import json
from pathlib import Path


def tables(found: dict, measured: Path | None = None) -> str:
    """A table of bounds against their floors, then one of all kernels.

    Args:
        found: a result of `traffic.predicted`.
        measured: a result file of `gpu_suite.py` on the same card and workload; seconds of the whole scores, by Triton.
    """
    head = (
        f"**Predicted, not measured.** Workload `{found['workload']}` on the {found['card']}. "
        f"Peaks: {found['source']}. L2's rate: {found['cache_source']}. A launch takes at least the longest of its "
        "memory, its L2, its shared memory, its products and its vector instructions, and launches follow one "
        "another. Not modelled: pipelines that drain at a barrier, the issue of instructions, and the shared memory of "
        "Triton's kernels. `benchmarks/traffic.py` says what is assumed.\n\n"
        "- x floor: the bound over the floor with the same products; x least floor: with the precision's fastest ones; "
        "x floor without L2: were L2 endlessly fast, whose rate is the least certain.\n"
        "- waves: the share of the card that programs fill when each multiprocessor runs one at a time. An uneven last "
        "wave lowers it. The bound does not count it."
    )
    return "\n\n".join([head, _summary(found, measured), _kernels(found), _training(found["training"])])


def _training(found: dict) -> str:
    """A training step: bounds of its parts, and what takes most of each."""
    if not found["results"]:
        return "**A training step**: none, as Triton does not run on this card."
    head = (
        f"**A training step by `triton`, predicted, not measured**: `{found['workload']}`, in the precisions that "
        "`gpu_suite.py` trains in, without encoders and loss. Backward with the gradient that hardest negatives leave, "
        "and with one for every pair. PyTorch's operations between the kernels are counted with each tensor read or "
        "written once.\n\n"
        "- floor: the operations of the pairs that have a gradient, at the peak of the kernels' products, or features "
        "and their gradients through memory once, whichever takes longer. By hardest negatives about 3 of the 128 "
        "pairs of a row have a gradient. SGR computes these alone, their nodes in batched PyTorch; SCAN's kernels take "
        "64 images at a time with every caption that one of them has a gradient with, which are most pairs, so that x "
        "floor tells there what leaving the others out could save.\n"
        "- The bound does not count waits for sizes that the CPU has to know, as of the pairs with a gradient, nor the "
        "time to start a launch. At 5 microseconds each that is more than the bound of SGR's backward pass by hardest "
        "negatives, and of SGR's and SAF's forward parts, most of whose launches draw dropout, caption by caption in "
        "the order of the published loop.\n"
        "- The JSON file has the kernels of each part, under `training`."
    )
    lines = [
        "| model | precision | part | launches | bound, ms | floor, ms | x floor | takes most |",
        f"|---|---|---|{'---:|' * 4}---|",
    ]
    for one in found["results"]:
        for part in one["parts"]:
            name, bound = f"| {one['model']} | {one['precision']} | {part['part']}", part["bound"]
            most = part["kernels"][0]
            lines.append(
                f"{name} | {part['launches']:,} | {bound * 1e3:.3f} | {part['floor'] * 1e3:.3f} | "
                f"{bound / part['floor']:.2f} | `{most['kernel']}`, {most['bound'] / bound:.0%}, by "
                f"{most['limited_by']} |"
            )
    return "\n\n".join([head, "\n".join(lines)])


def _summary(found: dict, measured: Path | None) -> str:
    lines = [
        "| model | precision | backend | products | bound, s | floor, s | x floor | x least floor | x floor without "
        "L2 | takes most | measured, s |",
        f"|---|---|---|---|{'---:|' * 5}---|---:|",
    ]
    for one in found["results"]:
        floors = {kind: s for kind, s in one["floors"].items() if s is not None}
        for backend, value in one["backends"].items():
            name = f"| {one['model']} | {one['precision']} | {backend}"
            if "left_out" in value:
                lines.append(f"{name} | | | | | | | {value['left_out']} | |")
                continue
            own, bound = floors[value["products"]], value["bound"]
            most = max(value["kernels"], key=lambda row: row["bound"])
            cells = (
                value["products"], f"{bound:.3f}", f"{own:.3f}", f"{bound / own:.2f}",
                f"{bound / min(floors.values()):.2f}", f"{value['bound_without_cache'] / own:.2f}",
                f"`{most['kernel']}`, {most['bound'] / bound:.0%}, by {most['limited_by']}",
                _measured(measured, one, backend),
            )  # fmt: skip
            lines.append(f"{name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _measured(path: Path | None, one: dict, backend: str) -> str:
    """Seconds that `gpu_suite.py` measured for a model's scores in a precision."""
    if path is None or not path.exists() or backend != "triton":
        return ""
    for step in json.loads(path.read_text())["steps"].values():
        for name, row in step.get("result", {}).items():
            parts = row.get("parts", {}) if isinstance(row, dict) else {}
            if name.split()[-1] == one["precision"] and f"score {one['model']}" in parts:
                return f"{parts['score ' + one['model']]:.3f}"
    return ""


def _kernels(found: dict) -> str:
    lines = [
        "| model | precision | backend | kernel | launches | waves | memory, GB | s | L2, GB | s | shared memory, s | "
        "products, T | s | vector, s | bound, s | limited by |",
        f"|---|---|---|---|{'---:|' * 11}---|",
    ]
    for one in found["results"]:
        for backend, value in one["backends"].items():
            for row in value.get("kernels", ()):
                seconds = row["seconds"]
                products = ", ".join(f"{n / 1e12:,.1f} {kind}" for kind, n in row["operations"].items())
                cells = (
                    backend, f"`{row['kernel']}`", f"{row['launches']:,}", f"{row['waves']:.0%}",
                    f"{row['memory_bytes'] / 1e9:,.1f}", f"{seconds['memory']:.3f}",
                    f"{row['cache_bytes'] / 1e9:,.0f}", f"{seconds['L2']:.3f}",
                    f"{seconds['shared memory']:.3f}" if seconds["shared memory"] else "",
                    products, f"{seconds['products']:.3f}",
                    f"{seconds['vector']:.3f}", f"{row['bound']:.3f}", row["limited_by"],
                )  # fmt: skip
                lines.append(f"| {one['model']} | {one['precision']} | {' | '.join(cells)} |")
    return "\n".join(lines)
