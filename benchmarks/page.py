"""Turn benchmarks/results/*.json into a page of tables and plots, and into the README's tables.

    python benchmarks/page.py

A table of the README stands between `<!-- NAME.json -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import statistics
from html import escape
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("pair_scorers", "training_step", "maxsim")
BASES = ("paper's loop", "loop over captions")
PLAIN = {"vectorised rewrite": "#7aa6c2", "compiled rewrite": "#3f7fa6", "one matrix product": "#7aa6c2"}
BASE, PACKAGE, OURS = "#9aa0a6", "#3f7fa6", "#d1622b"
HEAD = """# Measured

Each contender's results are compared with the loop's before it is timed.

- x loop: times faster than the paper's loop.
- of FMA peak: the operations that the result needs against a loop of fused multiply-adds with the processor's widest
  instructions, float32, or bfloat16 where products are bfloat16. A training step needs those of its scores, and twice
  as many for the pairs that the loss has a gradient for: by hardest negatives 3 of a row's 128, but all of SAF, whose
  BatchNorm couples them.
- of matmul peak: the same against a large float32 matrix product of PyTorch.
- largest difference: of scores; of a training step also of gradients, as a share of the largest.
- scratch: what a call reaches above its inputs and scores; beside it on a block of twice the images and captions.
- memory: what a training step reaches above inputs and parameters.
- pairs alone: given what depends on one image or one caption alone, which an evaluation computes once.
- all negatives: the loss summed over all pairs; the other rows take the hardest of every row and column.
"""


def table(kind: str, result: dict) -> str:
    """One Markdown row per model and contender, the losing ones too, and what was left out below them."""
    columns = {
        "pairs/s": lambda r, base: f"{r['pairs_per_second']:,.0f}",
        "x loop": lambda r, base: f"{r['times_faster_than_loop']:.1f}",
        "of FMA peak": lambda r, base: percent(r.get("fraction_of_peak")),
        "of matmul peak": lambda r, base: percent(r["fraction_of_matmul_peak"]),
        "largest difference": lambda r, base: f"{r['largest_difference']:.0e}",
    }
    if kind == "pair_scorers":
        columns["scratch, MiB"] = lambda r, base: mebibytes(r.get("peak_bytes"))
        columns["of a larger block"] = lambda r, base: mebibytes(r.get("peak_bytes_of_larger_block"))
    elif kind == "training_step":
        columns = {"seconds": lambda r, base: f"{r['seconds_median']:.2f}", **columns}
        columns["memory, MiB"] = lambda r, base: mebibytes(r.get("peak_bytes"))
        columns["of the loop's"] = lambda r, base: percent(_share(r.get("peak_bytes"), base.get("peak_bytes")))
    lines = [f"| model | contender | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for one in result["results"]:
        for r in one["rows"]:
            cells = " | ".join(cell(r, one["rows"][0]) for cell in columns.values())
            lines.append(f"| {one['model']} | {r['name']} | {cells} |")
    reasons = [
        f"Left out of {one['model']}: {name} ({why})."
        for one in result["results"]
        for name, why in one.get("left_out", {}).items()
    ]
    return "\n".join(lines) + "".join(f"\n\n{reason}" for reason in reasons)


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


def precision(result: dict) -> str:
    """What each precision does to the ranking, and how it was found."""
    lines = [
        "| model | precision | largest difference | i2t R@1 | t2i R@1 | rsum | Kendall tau i2t | t2i | first changed |",
        f"|---|---|{'---:|' * 7}",
    ]
    for one in result["results"]:
        lines.append(f"| {one['model']} | float64 |  | {one['i2t_r1']:.2f} | {one['t2i_r1']:.2f} |  |  |  |  |")
        for r in one["rows"]:
            changes = " | ".join(f"{r[key]:+.2f}" for key in ("i2t_r1_change", "t2i_r1_change", "rsum_change"))
            taus = f"{r['i2t_kendall_tau']:.4f} | {r['t2i_kendall_tau']:.4f}"
            first = max(r["i2t_first_changed"], r["t2i_first_changed"])
            name = f"{one['model']} | {r['name']} | {r['largest_difference']:.0e}"
            lines.append(f"| {name} | {changes} | {taus} | {first:.1%} |")
    e, queries = result["environment"], result["kendall_queries"]
    how = "emulated on the CPU" if result["emulated"] else f"on {e['device']}"
    return (
        f"The package's models on {result['images']} held-out pictures x {result['captions']} captions, {how}; torch "
        f"{e['torch']}; {e['date']}; commit {e['commit']}. Changes against float64; tau over {queries} "
        "queries of each direction; first changed: queries whose first item is another, the worse direction.\n\n"
        + "\n".join(lines)
    )


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
    """The README with its tables made anew."""

    def fill(match: re.Match) -> str:
        result = json.loads((RESULTS / match[1]).read_text())
        if "held_out" in result:
            made = recall(result)
        elif "emulated" in result:
            made = precision(result)
        elif "recipe" in result:
            made = trained(result)
        else:
            kind = kind_of(match[1])
            made = f"{caption(kind, result)}\n\n{table(kind, result)}"
        return f"<!-- {match[1]} -->\n\n{made}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+\.json) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def caption(kind: str, result: dict) -> str:
    """Where and how a result was measured."""
    e, block = result["environment"], result["results"][0]
    D = "" if kind == "maxsim" else ", D 1024, S 256"
    fma = result.get("fma_peak_gflops", {})
    peaks = "".join(f" {dtype} FMA {rate:.0f}," for dtype, rate in fma.items() if rate)
    more = _extended(block) if kind == "training_step" else ""
    return (
        f"{e['device']}; {_threads(e)}; torch {e['torch']}; {e['date']}; commit {e['commit']}. "
        f"{block['images']} images x {block['captions']} captions of `{result['shape']}`, R 36{D}, "
        f"float32, {result['rounds']} alternating rounds in one process, medians.{more} Peaks in the same run, "
        f"GFLOP/s:{peaks} a large float32 matrix product {result['matmul_peak_gflops']:.0f}."
    )


def _extended(one: dict) -> str:
    """How the loop's row was found when it did not run on the whole batch."""
    measured = one["rows"][0]["measured_captions"]
    if measured == one["captions"]:
        return ""
    return f" The loop ran on {measured} captions and on 2, and is extended to {one['captions']} on a straight line."


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


def section(kind: str, path: Path) -> str:
    result, name = json.loads(path.read_text()), path.stem
    (RESULTS / f"{name}.svg").write_text(plot(result))
    raw = f"Raw numbers: [{path.name}]({path.name})."
    picture = f"![times faster than the loop]({name}.svg)"
    return f"## {name}\n\n{caption(kind, result)} {raw}\n\n{table(kind, result)}\n\n{picture}\n"


def main() -> None:
    parts = [section(kind, path) for kind in KINDS for path in sorted(RESULTS.glob(f"{kind}_*.json"))]
    for pattern, made in (("precision_*.json", precision), ("trained_models.json", trained)):
        for path in sorted(RESULTS.glob(pattern)):
            raw = f"Raw numbers: [{path.name}]({path.name})."
            parts.append(f"## {path.stem}\n\n{raw} {made(json.loads(path.read_text()))}\n")
    (RESULTS / "README.md").write_text("\n".join([HEAD, *parts]))
    top = RESULTS.parents[1] / "README.md"
    top.write_text(readme(top.read_text()))


if __name__ == "__main__":
    main()
