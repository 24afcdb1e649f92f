"""The page of results and the README's tables: every row, both makes of processor, and what was left out."""

import copy
import functools
import json

import pytest
from benchmark_cases import PEAK

from benchmarks import bench_training_step, bench_whole_step, harness, page, shapes
from benchmarks.bench_maxsim import TASKS, Block
from benchmarks.bench_training_step import OTHERS
from benchmarks.shapes import Shape

RESULTS = sorted(p for kind in page.KINDS for p in harness.RESULTS.glob(f"{kind}_*.json"))
NAMES = {"loop": "paper's loop", "cpu": "itm-fast cpu", "torch": "itm-fast torch", "medium": "itm-fast cpu, bfloat16"}
ENVIRONMENT = {"threads": 2, "torch": "2.0", "date": "2026-01-01", "commit": "abc"}


def result(device, **seconds):
    """A result of one model: seconds by contender, the loop's first."""
    base = seconds["loop"]
    rows = [
        harness.row(
            NAMES[name], [s], 100, 1e9, base, largest_difference=0.0, measured_captions=4, peak_bytes=int(s * 2**30)
        )
        for name, s in seconds.items()
    ]
    one = {"model": "saf", "images": 4, "captions": 4, "rows": rows, "left_out": {}}
    harness.hold_against(PEAK, [one])
    head = {"environment": {"device": device, **ENVIRONMENT}, "shape": "quick", "rounds": 1, "matmul_peak_gflops": 2.0}
    return {**head, "results": [one]}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A repository of a README and two result files of one benchmark, by processors of two makers."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(page, "RESULTS", results)
    amd = result("AMD EPYC, 2 cores", loop=2.0, cpu=0.5, torch=1.0)
    intel = result("Intel(R) Xeon(R), 2 cores", loop=1.72, cpu=0.4, torch=2.0, medium=0.8)
    (results / "training_step_cpu.json").write_text(json.dumps(amd))
    (results / "training_step_cpu_intel.json").write_text(json.dumps(intel))
    (tmp_path / "README.md").write_text("<!-- headline -->\nold\n<!-- end -->\n")
    return results


def test_results_of_two_makers_are_side_by_side_and_slower_rows_stay(folder):
    page.main()
    text = (folder / "README.md").read_text()
    first, amd, intel = (text.index(f"## {name}\n") for name in (
        "training_step_cpu on AMD and Intel", "training_step_cpu", "training_step_cpu_intel"))  # fmt: skip
    assert first < amd < intel
    lines = text[first:amd].splitlines()
    assert lines[2] == "| model | contender | AMD, x loop | AMD, of FMA peak | Intel, x loop | Intel, of FMA peak |"
    assert lines[4:8] == [
        "| saf | paper's loop | 1.0 | 10% | 1.0 | 12% |",
        "| saf | itm-fast cpu | 4.0 | 40% | 4.3 | 50% |",
        "| saf | itm-fast torch | 2.0 | 20% | 0.86 | 10% |",
        "| saf | itm-fast cpu, bfloat16 |  |  | 2.1 | 25% |",
    ]
    assert "Intel(R) Xeon(R), 2 cores; 2 threads" in text[intel:]
    assert "| saf | itm-fast torch | 2.00 | 50 | 0.86 | 10% | 25% | 0e+00 | 2,048 | 116% |" in text[intel:]
    assert (folder / "training_step_cpu_intel.svg").read_text().count("<rect") == 1 + 4


def test_the_readme_compares_itm_fast_with_the_loop_on_each_processor(folder):
    for kind, name, seconds in (("pair_scorers_cpu", "AMD EPYC", 0.5), ("whole_step_cpu_intel", "Intel(R)", 2.5)):
        (folder / f"{kind}.json").write_text(json.dumps(result(name, loop=2.0, cpu=seconds, torch=0.1)))
    (folder / "pair_scorers_hgan.json").write_text(json.dumps(result("Intel(R)", loop=3.0, cpu=0.1)))
    steps = result("Intel(R)", loop=2.0, cpu=2.5, torch=0.1)
    steps["results"].append({**steps["results"][0], "model": "dual"})  # whose scores are not in the README
    (folder / "whole_step_cpu_intel.json").write_text(json.dumps(steps))
    text = page.readme("before <!-- headline -->\nold\n<!-- end --> after")
    assert "old" not in text
    assert text.split("\n")[2:5] == [
        "| model | AMD, loop, pairs/s | itm-fast, pairs/s | Intel, loop, s/step | itm-fast, s/step |",
        "|---|---:|---:|---:|---:|",
        "| saf | 50 | 200 (4.0 x) | 2.00 | 2.50 (0.80 x) |",
    ]
    assert page.readme(text) == text


def test_loops_that_ran_on_fewer_captions_are_named():
    made = result("AMD EPYC", loop=1.0)
    for model, measured in (("rcar", 2), ("cmcan", 3), ("tshsr", 2)):
        made["results"].append(copy.deepcopy(made["results"][0]) | {"model": model})
        made["results"][-1]["rows"][0]["measured_captions"] = measured
    text = page.caption("whole_step", made)
    assert "The loop of rcar, tshsr ran on 2 captions and on 2, and is extended to 4 on a straight line." in text
    assert "The loop of cmcan ran on 3 captions and on 2," in text
    assert text.count("ran on") == 2


def test_what_is_left_out_is_said_once_for_all_models():
    made = result("AMD EPYC", loop=1.0)
    other = copy.deepcopy(made["results"][0]) | {"model": "sgr"}
    made["results"].append(other)
    made["results"][0]["left_out"] = {"a": "too slow", "b": "absent"}
    other["left_out"] = {"a": "too slow"}
    text = page.table("training_step", made)
    assert text.endswith("\n\nLeft out of saf, sgr: a (too slow).\n\nLeft out of saf: b (absent).")
    assert text.count("Left out") == 2


@pytest.mark.parametrize("device, name", [("AMD EPYC", "whole_step_cpu_intel"), ("Intel(R)", "training_step_cpu_amd")])
def test_a_file_named_after_another_maker_is_refused(device, name, folder):
    (folder / f"{name}.json").write_text(json.dumps(result(device, loop=1.0)))
    with pytest.raises(ValueError, match=f"{name}.json was measured on {device[:3]}"):
        page.main()


def test_two_files_of_one_maker_are_refused(folder):
    (folder / "training_step_cpu_amd.json").write_text(json.dumps(result("AMD EPYC", loop=1.0)))
    with pytest.raises(ValueError, match=r"training_step_cpu_amd\.json was measured on AMD: .*one for each"):
        page.main()


@pytest.mark.parametrize("ratio, text", [(28.14, "28.1"), (1.04, "1.0"), (0.861, "0.86"), (0.03, "0.03")])
def test_a_ratio_below_one_is_not_rounded_away(ratio, text):
    assert page.times(ratio) == text


@functools.cache
def needed(kind, model, images, captions, name):
    """The operations of a row, counted independently of the result file."""
    shape = Shape("coco-eval-5k", images, captions)
    if kind == "maxsim":
        return images * Block(1, captions, TASKS[model], "cpu").flops(model)
    if kind == "pair_scorers":
        of = OTHERS.get(model, shapes)
        return of.needed_flops(model, shape) + (0 if "pairs alone" in name else of.state_flops(model, shape))
    step = bench_training_step.step_flops(model, shape, "all negatives" not in name)
    return step + (bench_whole_step.encoder_flops(model, shape) if kind == "whole_step" else 0)


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_the_numbers_of_a_result_file_follow_from_its_seconds(path):
    kind, found = page.kind_of(path.name), json.loads(path.read_text())
    for one in found["results"]:
        base = one["rows"][0]["seconds_median"]
        for row in one["rows"]:
            seconds = row["seconds_median"]
            flops = needed(kind, one["model"], one["images"], one["captions"], row["name"])
            rate = flops / seconds / 1e9
            assert row["needed_gflops_per_second"] == pytest.approx(rate)
            assert row["times_faster_than_loop"] == pytest.approx(base / seconds)
            assert row["pairs_per_second"] == pytest.approx(one["images"] * one["captions"] / seconds)
            assert row["fraction_of_peak"] == pytest.approx(rate / found["fma_peak_gflops"][row["products"]])
            assert row["fraction_of_matmul_peak"] == pytest.approx(rate / found["matmul_peak_gflops"])
