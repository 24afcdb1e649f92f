"""The README is true: its examples run, its commands parse, its links exist, its numbers are those of result files."""

import json
import re
import shlex
from itertools import product
from pathlib import Path

import pytest
import torch

from itm_fast import cli
from itm_fast.evaluation import calibration
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.ops._cuda.similarity_score import HEADS, why_not

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs a checkout")
TEXT = README.read_text() if README.is_file() else ""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands():
    """Every itm-fast command in a bash block or between backticks that has arguments; without torchrun before it."""
    lines = "\n".join(blocks("bash")).splitlines()
    inline = re.findall(r"`(itm-fast [^`]+)`", TEXT)
    alone = (re.sub(r"^torchrun .* -m itm_fast ", "itm-fast ", c) for c in (*lines, *inline))
    return [c.split("&&")[-1].strip() for c in alone if "itm-fast " in c]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda c: c.strip().splitlines()[-1][:40])
def test_python_examples_run(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    words = shlex.split(command)[1:]
    assert words[0] in cli.COMMANDS
    assert cli.build_parser(words[0]).parse_args(words).run


@pytest.mark.slow
def test_the_dry_run_prints_its_plan(capsys, monkeypatch):
    """Of every model at full size, without data. Its speed is that of a small block, and is not read."""
    for name, value in {"_IMAGES": 4, "_CAPTIONS": 16, "_LEAST": 0.0}.items():
        monkeypatch.setattr(calibration, name, value)
    words = shlex.split(next(c for c in commands() if "--dry-run" in c))[1:]
    assert cli.main([*words, "--memory-gb", "16"]) == 0
    text = capsys.readouterr().out
    for name in CATALOGUE:
        assert f"coco-eval-5k, {name}: 5,000 images x 25,000 captions (331,916 words) = 125,000,000 pairs" in text
    assert text.count("under torchrun: ") == len(CATALOGUE)
    assert text.count("0.737 GB") == text.count("1.360 GB") == len(CATALOGUE)
    assert text.count("time: about ") == text.count(" to score (") == len(CATALOGUE)
    assert "peak" in text
    assert "score matri" not in text
    assert cli.main([*words, "--memory-gb", "1"]) == 2
    assert "the least that can is" in capsys.readouterr().err


def test_ci_runs_the_test_command():
    (command,) = [b.strip() for b in blocks("bash") if "pytest" in b]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def numbers(sentence):
    """The numbers that `sentence` has as (...), wherever the README breaks its lines."""
    return re.search(sentence.replace("NUMBER", r"([\d.]+)"), " ".join(TEXT.split())).groups()


def test_training_steps_are_as_much_faster_as_measured():
    models = {one["model"]: one["rows"] for one in results("whole_step_cpu_composed.json")["results"]}
    said = numbers("step of RCAR, CMCAN and IMRAM is NUMBER, NUMBER and NUMBER times faster")
    for model, times in zip(("rcar", "cmcan", "imram"), said, strict=True):
        [row] = [row for row in models[model] if row["name"] == "itm-fast cpu"]
        assert times == f"{row['times_faster_than_loop']:.1f}"


def test_gradients_of_bfloat16_products_are_as_far_away_as_measured():
    away = {}
    for one in results("gradients_cpu.json")["results"]:
        for row in one["rows"]:
            parts = [100 * row[part] for part in ("images", "words", "parameters") if part in row]
            away.setdefault((row["name"], one["model"].endswith(", trained")), []).extend(parts)
    said = numbers(
        "are then NUMBER to NUMBER % of their length away from float64's, and up to NUMBER % where SGR's training "
        "begins; features rounded to bfloat16 take them NUMBER to NUMBER %, and NUMBER %"
    )
    for name, (low, high, most) in zip(("bfloat16 products", "rounded features"), (said[:3], said[3:]), strict=True):
        trained, untrained = away[name, True], away[name, False]
        assert (low, high, most) == (f"{min(trained):.1f}", f"{max(trained):.1f}", f"{max(untrained):.0f}")


def test_the_wheel_is_as_large_and_as_slow_as_measured():
    measured = results("wheel.json")
    said = re.search(r"\[(\d+) MB, (\d+) minutes of one core\]\(benchmarks/results/wheel\.json\)", TEXT)
    assert int(said[1]) == round(measured["bytes"] / 1e6)
    assert int(said[2]) == round(measured["compiled"]["cpu_seconds"] / 60)


def test_captions_of_sgr_and_saf_in_cuda_kernels_are_as_long_as_it_says():
    """Compute capabilities in columns, dtypes in rows, "SGR / SAF" in each cell."""
    head, _, *rows = re.search(r"^\| \| 7\.5.*\n(?:\|.*\n)+", TEXT, re.MULTILINE)[0].splitlines()
    for row, dtype in zip(rows, (torch.float32, torch.float16), strict=True):
        for names, cell in zip(head.split("|")[2:-1], row.split("|")[2:-1], strict=True):
            for name, (op, most) in product(names.split(","), zip(HEADS, cell.replace("none", "0").split("/"))):
                capability, size = tuple(map(int, name.split("."))), dict(R=36, D=1024, S=256)
                refused = [bool(why_not(op, dtype, size, int(most) + more, capability)) for more in (0, 1)]
                assert refused == [most.strip() == "0", True], (op, dtype, name)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_its_table_is_that_of_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import page

    assert TEXT.count("\n| sgr |") == TEXT.count("\n| saf |") == 1
    assert page.readme(TEXT) == TEXT
