"""Turn benchmarks/results/*.json into a page of tables and plots, and into the README's tables.

    python benchmarks/page.py

A table of the README stands between `<!-- NAME.json -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLOURS = {"paper's loop": "#9aa0a6", "vectorised rewrite": "#7aa6c2", "compiled rewrite": "#3f7fa6"}
OURS = "#d1622b"


def table(result: dict) -> str:
    """One Markdown row per model and contender, the losing ones too."""
    lines = [
        "| model | contender | pairs/s | x paper's loop | of matmul peak | largest difference | scratch, MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in result["results"]:
        for r in one["rows"]:
            memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}"
            lines.append(
                f"| {one['model']} | {r['name']} | {r['pairs_per_second']:,.0f} | {r['times_faster_than_loop']:.1f} "
                f"| {r['fraction_of_matmul_peak']:.0%} | {r['largest_difference']:.0e} | {memory} |"
            )
    return "\n".join(lines)


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


def readme(text: str) -> str:
    """The README with its tables made anew."""

    def fill(match: re.Match) -> str:
        result = json.loads((RESULTS / match[1]).read_text())
        made = recall(result) if "held_out" in result else f"{caption(result)}\n\n{table(result)}"
        return f"<!-- {match[1]} -->\n\n{made}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+\.json) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def caption(result: dict) -> str:
    """Where and how a result was measured."""
    e, block = result["environment"], result["results"][0]
    return (
        f"{e['device']}; {e['threads']} threads; torch {e['torch']}; {e['date']}; commit {e['commit']}. "
        f"{block['images']} images x {block['captions']} captions of `{result['shape']}`, R 36, D 1024, S 256, "
        f"float32, {result['rounds']} alternating rounds in one process, medians. A large "
        f"matrix product in the same run: {result['matmul_peak_gflops']:.0f} GFLOP/s."
    )


def plot(result: dict) -> str:
    """An SVG of bars: times faster than the paper's loop, by model."""
    bars, width, step, left = [], 720, 22, 220
    top = max(r["times_faster_than_loop"] for one in result["results"] for r in one["rows"])
    y = 10
    for one in result["results"]:
        bars.append(f'<text x="8" y="{y + 16}" font-weight="bold">{escape(one["model"])}</text>')
        for r in one["rows"]:
            length = (width - left - 70) * r["times_faster_than_loop"] / top
            colour = COLOURS.get(r["name"], OURS)
            bars.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(r["name"])}</text>')
            bars.append(f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="{step - 6}" fill="{colour}"/>')
            bars.append(f'<text x="{left + length + 6:.1f}" y="{y + 16}">{r["times_faster_than_loop"]:.1f}x</text>')
            y += step
        y += 10
    style = 'font-family="sans-serif" font-size="13"'
    background = f'<rect width="{width}" height="{y}" fill="white"/>'
    body = "\n".join([background, *bars])
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" {style}>\n{body}\n</svg>\n'


def section(path: Path) -> str:
    result, name = json.loads(path.read_text()), path.stem
    (RESULTS / f"{name}.svg").write_text(plot(result))
    raw = f"Raw numbers: [{path.name}]({path.name})."
    picture = f"![times faster than the paper's loop]({name}.svg)"
    return f"## {name}\n\n{caption(result)} {raw}\n\n{table(result)}\n\n{picture}\n"


def main() -> None:
    parts = [section(path) for path in sorted(RESULTS.glob("pair_scorers_*.json"))]
    head = (
        "# Measured\n\nEach contender's scores are compared with the paper's loop before it is timed. \"Of matmul "
        "peak\" counts only the operations that the result needs; \"scratch\" is what the call reaches above its "
        "inputs.\n"
    )
    (RESULTS / "README.md").write_text("\n".join([head, *parts]))
    top = RESULTS.parents[1] / "README.md"
    top.write_text(readme(top.read_text()))


if __name__ == "__main__":
    main()
