"""Turn benchmarks/results/*.json into a page of tables and plots, and into the README's table.

    python benchmarks/page.py

The README's table, the backend `cpu` against the papers' loops, stands between `<!-- headline -->` and `<!-- end -->`.
The same benchmark on another make of processor is NAME_intel.json or NAME_amd.json
beside NAME.json; the page sets them side by side.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from html import escape
from pathlib import Path

if __name__ == "__main__":  # from a bare checkout, `benchmarks` lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    bench_gradients,
    bench_precision,
    bench_relatives,
    large_batches,
    large_pools,
    repositories,
    scale_plan,
    search,
    traffic_page,
)  # fmt: skip

IN_FLOAT64 = ("bfan", "chan", "naaf")  # what bench_maxsim.py compares in float64
RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("pair_scorers", "whole_step", "training_step", "maxsim")
MAKERS = ("AMD", "Intel")  # a result file's name may end in one, in small letters
BASES = ("paper's loop", "loop over captions")
PLAIN = {"vectorised rewrite": "#7aa6c2", "compiled rewrite": "#3f7fa6", "one matrix product": "#7aa6c2"}
BASE, PACKAGE, OURS = "#9aa0a6", "#3f7fa6", "#d1622b"
HEAD = """# Measured

Each contender's results are compared with the loop's before it is timed.

- x loop: times faster than the paper's loop.
- of FMA peak: the operations that the result needs against a loop of fused multiply-adds with the processor's widest
  instructions, float32, or bfloat16 where products are bfloat16. A training step needs those of its scores, and twice
  as many for the pairs that the loss has a gradient for: by hardest negatives 3 of a row's 128, but all of SAF, whose
  BatchNorm couples them. A whole step also needs those of its encoders, forward and backward.
- whole_step: a step as training does it, from features and word ids to new weights: encoders, scores, loss, backward,
  clipping, Adam. training_step: its scores and loss alone, forward and backward, from random embeddings.
- share of encoders: their forward and backward, of the seconds of the whole step.
- of matmul peak: the same against a large float32 matrix product of PyTorch.
- largest difference: of scores; of a training step also of gradients, as a share of the largest.
- bfloat16 products: at torch's matmul precision "medium". x float32: times faster than the same row in float32.
- scratch: what a call reaches above its inputs and scores; beside it on a block of twice the images and captions.
- memory: what a training step reaches above inputs and parameters, a whole step above its gradients and Adam's moments
  too.
- pairs alone: given what depends on one image or one caption alone, which an evaluation computes once.
- all negatives: the loss summed over all pairs; the other rows take the hardest of every row and column.

Sections named traffic_CARD are predicted, not measured: what bounds the kernels on a GPU, from a model of their memory,
cache and operations. Where `gpu_suite.py` has run on that card, and its file lies here as gpu_CARD.json, what it
measured stands beside the prediction. [large_scale.md](large_scale.md) has what 8 and 64 GPUs, and ten million images,
need for exact ranks: bytes, seconds and network, by formula.
"""


def table(kind: str, result: dict) -> str:
    """One Markdown row per model and contender, the losing ones too, and what was left out below them."""
    columns = {
        "pairs/s": lambda r, base: f"{r['pairs_per_second']:,.0f}",
        "x loop": lambda r, base: times(r["times_faster_than_loop"]),
        "of FMA peak": lambda r, base: percent(r.get("fraction_of_peak")),
        "of matmul peak": lambda r, base: percent(r["fraction_of_matmul_peak"]),
        "largest difference": lambda r, base: f"{r['largest_difference']:.0e}",
    }
    if kind == "pair_scorers":
        columns["scratch, MiB"] = lambda r, base: mebibytes(r.get("peak_bytes"))
        columns["of a larger block"] = lambda r, base: mebibytes(r.get("peak_bytes_of_larger_block"))
    if kind == "whole_step":
        del columns["pairs/s"], columns["of matmul peak"]
        columns = {
            "x loop": columns.pop("x loop"),
            "encoders, s": lambda r, base: f"{r['seconds_encoders']:.2f}",
            "share of encoders": lambda r, base: percent(r["seconds_encoders"] / r["seconds_median"]),
            "scores and loss, s": lambda r, base: f"{r['seconds_scores_and_loss']:.2f}",
            "x loop, scores and loss": lambda r, base: times(r["scores_times_faster_than_loop"]),
            "clipping and Adam, s": lambda r, base: f"{r['seconds_clipping_and_adam']:.2f}",
            **columns,
        }
    if kind in ("training_step", "whole_step"):
        columns = {"seconds": lambda r, base: f"{r['seconds_median']:.2f}", **columns}
        ratio = "times_faster_than_float32"
        if any(ratio in r for one in result["results"] for r in one["rows"]):
            columns["x float32"] = lambda r, base: f"{r[ratio]:.2f}" if ratio in r else ""
        columns["memory, MiB"] = lambda r, base: mebibytes(r.get("peak_bytes"))
        columns["of the loop's"] = lambda r, base: percent(_share(r.get("peak_bytes"), base.get("peak_bytes")))
    lines = [f"| model | contender | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for one in result["results"]:
        for r in one["rows"]:
            cells = " | ".join(cell(r, one["rows"][0]) for cell in columns.values())
            lines.append(f"| {one['model']} | {r['name']} | {cells} |")
    return "\n".join([*lines, *_left_out(result)])


def _left_out(result: dict) -> list[str]:
    """Why contenders are missing, a paragraph for each contender and reason."""
    models: dict[tuple[str, str], list[str]] = {}
    for one in result["results"]:
        for why in one.get("left_out", {}).items():
            models.setdefault(why, []).append(one["model"])
    return [f"\nLeft out of {', '.join(of)}: {name} ({why})." for (name, why), of in models.items()]


def headline() -> str:
    """A Markdown row per model: the paper's loop and itm-fast on each processor, scores and whole training steps.

    Models whose scores are not measured with those of the README are on the page of results only.
    """
    kinds = (("pair_scorers", "pairs_per_second", ",.0f", "pairs/s"), ("whole_step", "seconds_median", ".2f", "s/step"))
    heads, cells = ["model"], {}
    for kind, key, form, unit in kinds:
        for maker in MAKERS:
            if found := _pairs_of_rows(f"{kind}_cpu", maker):
                heads += [f"{maker}, loop, {unit}", f"itm-fast, {unit}"]
            for model, (loop, ours) in found.items():
                faster = times(ours["times_faster_than_loop"])
                if kind != kinds[0][0] and model not in cells:
                    continue
                row = cells.setdefault(model, {})
                row[len(heads) - 2], row[len(heads) - 1] = f"{loop[key]:{form}}", f"{ours[key]:{form}} ({faster} x)"
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for model, row in cells.items():
        lines.append(f"| {model} | {' | '.join(row.get(k, '') for k in range(1, len(heads)))} |")
    return "\n".join(lines)


def _pairs_of_rows(benchmark: str, maker: str) -> dict[str, tuple[dict, dict]]:
    """A benchmark's rows of the loop and of the backend `cpu`, by model, where it was run on this make of processor."""
    for path in sorted(RESULTS.glob(f"{benchmark}*.json")):
        result = json.loads(path.read_text())
        if benchmark_of(path.stem) == benchmark and maker_of(result) == maker:
            rows = {one["model"]: {r["name"]: r for r in one["rows"]} for one in result["results"]}
            return {model: (of[BASES[0]], of["itm-fast cpu"]) for model, of in rows.items()}
    return {}


def side_by_side(results: dict[str, dict]) -> str:
    """A Markdown row per model and contender, and for each processor the two ratios; empty where it has no such row."""
    heads = [f"{maker}, {what}" for maker in results for what in ("x loop", "of FMA peak")]
    lines = [f"| model | contender | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(heads)}"]
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for maker, result in results.items():
        for one in result["results"]:
            for r in one["rows"]:
                found.setdefault((one["model"], r["name"]), {})[maker] = r
    order = list(dict.fromkeys(model for model, _ in found))
    for (model, name), of in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        cells = []
        for maker in results:
            cells += _ratios(of[maker]) if maker in of else ["", ""]
        lines.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(r: dict) -> list[str]:
    return [times(r["times_faster_than_loop"]), percent(r["fraction_of_peak"])]


def times(ratio: float) -> str:
    """A ratio; what is slower than the loop in hundredths, so that a loss is not rounded away."""
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


def maker_of(result: dict) -> str:
    """Who made the processor that a result was measured on."""
    device = result["environment"]["device"]
    return next((maker for maker in MAKERS if maker in device), device)


def benchmark_of(stem: str) -> str:
    """The benchmark of a result file: its name without the maker's."""
    return re.sub(f"_({'|'.join(MAKERS).lower()})$", "", stem)


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def mebibytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f}"


def kind_of(name: str) -> str:
    """The kind of a result file, which its name begins with."""
    return next(kind for kind in KINDS if name.startswith(kind))


def recall(result: dict) -> str:
    """Held-out recall of the demo's models, chance and the control beside it."""
    lines = [
        "Recall of the package's models on its held-out pictures, and of one trained on shuffled captions.\n",
        "| model | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | rsum |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in result["held_out"]:
        (pool,) = one["pools"]
        cells = [pool[side][k] for side in ("i2t", "t2i") for k in ("r1", "r5", "r10")]
        name = {"mean of the scores": "SGRAF (mean of SGR and SAF)"}.get(one["name"], one["name"])
        lines.append(f"| {name} | " + " | ".join(f"{x:.1f}" for x in cells) + f" | {pool['rsum']:.1f} |")
    chance = [pool[side]["chance"][k] for side in ("i2t", "t2i") for k in ("r1", "r5", "r10")]
    lines.append("| chance | " + " | ".join(f"{x:.1f}" for x in chance) + f" | {sum(chance):.1f} |")
    return "\n".join(lines)


def _recalls(found: dict) -> list[float]:
    """R@1, 5 and 10 of both directions."""
    return [found[side][f"r{k}"] for side in ("i2t", "t2i") for k in (1, 5, 10)]


def trained(content: dict) -> str:
    """A Markdown row per model: the mean over the seeds, the spread of rsum, the control, and chance."""
    lines = [
        "| model | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | rsum | over seeds | shuffled captions | minutes | "
        "against the dual encoder |",
        "|---|" + "---:|" * 10 + "---|",
    ]

    for one in content["results"]:
        mean = [statistics.mean(x) for x in zip(*(_recalls(run["held_out"]) for run in one["runs"]))]
        seconds = [run["processor_seconds"] for run in one["runs"] if run["processor_seconds"] is not None]
        cells = [
            *(f"{x:.1f}" for x in mean),
            f"{one['rsum_mean']:.1f}",
            f"{one['rsum_least']:.1f} to {one['rsum_most']:.1f}",
            "" if one["control"] is None else f"{one['control']['held_out']['rsum']:.1f}",
            f"{statistics.mean(seconds) / 60:.1f}" if seconds else "",
            one.get("against_baseline", ""),
        ]
        lines.append(f"| {one['model']} | {' | '.join(cells)} |")
    if content["results"]:
        found = content["results"][0]["runs"][0]["held_out"]
        chance = _recalls({side: found[side]["chance"] for side in ("i2t", "t2i")})
        cells = [*(f"{x:.1f}" for x in (*chance, sum(chance))), "", "", "", ""]
        lines.append(f"| chance | {' | '.join(cells)} |")
    e, sizes = content["environment"], content["data"]
    how = (
        f"{e['device']}; {_threads(e)}; torch {e['torch']}; {e['date']}; commit {e['commit']}. Trained on "
        f"{sizes['train']['captions']:,} captions of {sizes['train']['images']:,} pictures, held out "
        f"{sizes['test']['captions']:,} of {sizes['test']['images']:,}."
    )
    return f"{how}\n\n" + "\n".join(lines)


def _threads(environment: dict) -> str:
    n = environment["threads"]
    return f"{n} thread{'' if n == 1 else 's'}"


def readme(text: str) -> str:
    """The README's text with its table generated from the result files."""
    table = f"<!-- headline -->\n\n{headline()}\n\n<!-- end -->"
    return re.sub(r"<!-- headline -->.*?<!-- end -->", lambda _: table, text, flags=re.DOTALL)


def caption(kind: str, result: dict) -> str:
    """Where and how a result was measured."""
    e, block = result["environment"], result["results"][0]
    D = "" if kind == "maxsim" else ", D 1024, S 256"
    fma = result.get("fma_peak_gflops", {})
    peaks = "".join(f" {dtype} FMA {rate:.0f}," for dtype, rate in fma.items() if rate)
    more = _extended(result["results"]) if kind in ("training_step", "whole_step") else ""
    models = [one["model"].partition("-")[0] for one in result["results"]]
    if doubles := [model for model in models if model in IN_FLOAT64]:
        more += f" The differences of {', '.join(doubles)} are of results in float64, which are not timed."
    return (
        f"{e['device']}; {_threads(e)}; torch {e['torch']}; {e['date']}; commit {e['commit']}. "
        f"{block['images']} images x {block['captions']} captions of `{result['shape']}`, R 36{D}, "
        f"float32, {result['rounds']} alternating rounds in one process, medians.{more} Peaks in the same run, "
        f"GFLOP/s:{peaks} a large float32 matrix product {result['matmul_peak_gflops']:.0f}."
    )


def _extended(results: list[dict]) -> str:
    """How the loop's rows were found where it did not run on the whole batch."""
    models: dict[tuple[int, int], list[str]] = {}
    for one in results:
        measured = one["rows"][0]["measured_captions"]
        if measured != one["captions"]:
            models.setdefault((measured, one["captions"]), []).append(one["model"])
    said = ""
    for (measured, whole), of in models.items():
        loop = "The loop" if len(of) == len(results) else f"The loop of {', '.join(of)}"
        said += f" {loop} ran on {measured} captions and on 2, and is extended to {whole} on a straight line."
    return said


def plot(result: dict) -> str:
    """An SVG of bars: times faster than the paper's loop, by model."""
    bars, width, step, left = [], 720, 22, 220
    top = max(r["times_faster_than_loop"] for one in result["results"] for r in one["rows"])
    y = 10
    for one in result["results"]:
        bars.append(f'<text x="8" y="{y + 16}" font-weight="bold">{escape(one["model"])}</text>')
        for r in one["rows"]:
            length = (width - left - 70) * r["times_faster_than_loop"] / top
            ours = OURS if r["name"].startswith("itm-fast") else PACKAGE
            colour = BASE if r["name"] in BASES else PLAIN.get(r["name"], ours)
            bars.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(r["name"])}</text>')
            bars.append(f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="{step - 6}" fill="{colour}"/>')
            bars.append(f'<text x="{left + length + 6:.1f}" y="{y + 16}">{r["times_faster_than_loop"]:.1f}x</text>')
            y += step
        y += 10
    style = 'font-family="sans-serif" font-size="13"'
    background = f'<rect width="{width}" height="{y}" fill="white"/>'
    body = "\n".join([background, *bars])
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" {style}>\n{body}\n</svg>\n'


def benchmark(kind: str, paths: list[Path]) -> str:
    """The sections of one benchmark on each processor, and before them their ratios side by side.

    Raises:
        ValueError: a file's name gives another maker than its result does, or two are of one maker.
    """
    name, results = benchmark_of(paths[0].stem), {}
    for path in paths:
        result = json.loads(path.read_text())
        maker, named = maker_of(result), path.stem.removeprefix(name).lstrip("_")
        if maker in results or named not in ("", maker.lower()):
            raise ValueError(f"{path.name} was measured on {maker}: name it {name}_{maker.lower()}.json, one for each")
        results[maker] = result
    parts = [section(kind, path) for path in paths]
    if len(parts) > 1:
        parts.insert(0, f"## {name} on {' and '.join(results)}\n\n{side_by_side(results)}\n")
    return "\n".join(parts)


def section(kind: str, path: Path) -> str:
    result, name = json.loads(path.read_text()), path.stem
    (RESULTS / f"{name}.svg").write_text(plot(result))
    raw = f"Raw numbers: [{path.name}]({path.name})."
    picture = f"![times faster than the loop]({name}.svg)"
    return f"## {name}\n\n{caption(kind, result)} {raw}\n\n{table(kind, result)}\n\n{picture}\n"


def main() -> None:
    parts = []
    for kind in KINDS:
        paths = sorted(RESULTS.glob(f"{kind}_*.json"))
        for name in dict.fromkeys(benchmark_of(path.stem) for path in paths):
            parts.append(benchmark(kind, [path for path in paths if benchmark_of(path.stem) == name]))
    for path in sorted(RESULTS.glob("traffic_*.json")):
        card = path.stem.removeprefix("traffic_")
        raw = f"Raw numbers: [{path.name}]({path.name})."
        told = traffic_page.tables(json.loads(path.read_text()), RESULTS / f"gpu_{card}.json")
        parts.append(f"## {path.stem}\n\n{told}\n\n{raw}\n")
    tables = (
        ("demo_recall.json", recall),
        ("precision_*.json", bench_precision.table),
        ("gradients_*.json", bench_gradients.table),
        ("trained_models.json", trained),
        ("repositories*.json", repositories.table),
        ("search_*.json", search.table),
        ("large_batches_*.json", large_batches.table),
        ("large_pools.json", large_pools.table),
        ("relatives_*.json", bench_relatives.table),
    )
    for pattern, made in tables:
        for path in sorted(RESULTS.glob(pattern)):
            raw = f"Raw numbers: [{path.name}]({path.name})."
            parts.append(f"## {path.stem}\n\n{raw} {made(json.loads(path.read_text()))}\n")
    (RESULTS / "README.md").write_text("\n".join([HEAD, *parts]))
    if (RESULTS / "large_pools.json").exists():
        (RESULTS / "large_scale.md").write_text(scale_plan.page())
    top = RESULTS.parents[1] / "README.md"
    top.write_text(readme(top.read_text()))


if __name__ == "__main__":
    main()
