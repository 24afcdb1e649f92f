"""The benchmarks run: each contender is compared with the paper's loop before it is timed."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from benchmark_cases import PEAK, ROOT, shrink, written

import itm_fast
from benchmarks import (
    bench_gradients,
    bench_maxsim,
    bench_pair_scorers,
    bench_precision,
    bench_training_step,
    gpu_scoring,
    harness,
    machine,
    page,
    reconstructions,
    shan,
)
from benchmarks.shapes import SHAPES, Shape, needed_flops, state_flops
from itm_fast import _native

RESULTS = sorted(p for kind in page.KINDS for p in harness.RESULTS.glob(f"{kind}_*.json"))


def run(*command):
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # nothing is timed beside others
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_scripts_start_from_a_bare_checkout():
    assert "--precision" in run("benchmarks/bench_pair_scorers.py", "--help")


def test_the_pair_scorer_benchmark_runs_and_its_rows_add_up(monkeypatch, tmp_path):
    shrink(monkeypatch)
    arguments = ("--shape", "quick", "--no-compile", "--no-fresh", "--precision", "medium")
    result = written(bench_pair_scorers, "pair_scorers", monkeypatch, tmp_path, *arguments)
    shape = SHAPES["quick"]
    for one, model in zip(result["results"], ("scan-t2i", "scan-i2t", "sgr", "saf"), strict=True):
        assert (one["model"], one["images"], one["captions"]) == (model, 8, 12)
        names = [row["name"] for row in one["rows"]]
        assert names[:2] == ["paper's loop", "vectorised rewrite"]
        assert "itm-fast torch" in names
        for row in one["rows"]:
            alone = "pairs alone" in row["name"]
            flops = needed_flops(model, shape) + (0 if alone else state_flops(model, shape))
            assert row["needed_gflops_per_second"] * row["seconds_median"] * 1e9 == pytest.approx(flops)
            assert row["products"] == ("bfloat16" if "bfloat16" in row["name"] else "float32")
    assert page.table("pair_scorers", result).count("| sgr |") == len(names)


def test_the_reconstructions_have_their_rows(monkeypatch, tmp_path):
    shrink(monkeypatch)
    models = reconstructions.MODELS
    arguments = ("--shape", "quick", "--no-compile", "--no-fresh", "--models", *models)
    result = written(bench_pair_scorers, "pair_scorers", monkeypatch, tmp_path, *arguments)
    for one, model in zip(result["results"], models, strict=True):
        names = [row["name"] for row in one["rows"]]
        assert names[0] == "paper's loop"
        assert "itm-fast torch" in names
        shape = SHAPES["quick"]
        flops = reconstructions.needed_flops(model, shape), reconstructions.state_flops(model, shape)
        for row in one["rows"]:
            count = flops[0] + (0 if "pairs alone" in row["name"] else flops[1])
            assert row["needed_gflops_per_second"] * row["seconds_median"] * 1e9 == pytest.approx(count)
    arguments = ("--batch", "4", "--loop-captions", "3", "--no-fresh", "--models", *models)
    result = written(bench_training_step, "training_step", monkeypatch, tmp_path, *arguments)
    assert [one["model"] for one in result["results"]] == list(models)


def test_shan_has_its_rows(monkeypatch, tmp_path):
    shrink(monkeypatch)
    arguments = ("--shape", "quick", "--no-compile", "--no-fresh", "--models", *shan.MODELS)
    result = written(bench_pair_scorers, "pair_scorers", monkeypatch, tmp_path, *arguments)
    for one, model in zip(result["results"], shan.MODELS, strict=True):
        assert one["model"] == model
        rows = {row["name"]: row for row in one["rows"]}
        assert {"paper's loop", "itm-fast torch"} <= set(rows)
        flops = shan.needed_flops(model, SHAPES["quick"]) + shan.state_flops(model, SHAPES["quick"])
        row = rows["itm-fast torch"]
        assert row["needed_gflops_per_second"] * row["seconds_median"] * 1e9 == pytest.approx(flops)
    arguments = ("--batch", "4", "--loop-captions", "3", "--no-fresh", "--models", "shan", "shan-vector")
    result = written(bench_training_step, "training_step", monkeypatch, tmp_path, *arguments)
    assert [one["model"] for one in result["results"]] == ["shan", "shan-vector"]


def test_scratch_is_above_inputs_and_scores():
    small, large = bench_pair_scorers.scratch("scan-t2i", [SHAPES["quick"], Shape("coco-eval-5k", 8, 48)], "torch")
    if small is None:
        pytest.skip("the resident set cannot be reset here")
    assert 0 <= small < 64 << 20
    assert 0 < large < 64 << 20


def test_scratch_leaves_the_scores_out(monkeypatch):
    monkeypatch.setattr(machine, "peak_memory", lambda call: 10**6)
    assert bench_pair_scorers.scratch("scan-t2i", [SHAPES["quick"]], "torch") == [10**6 - 4 * 8 * 12]


@pytest.mark.parametrize("script", [bench_pair_scorers, bench_training_step], ids=lambda s: s.__name__)
def test_ratios_are_of_medians(script, monkeypatch):
    shrink(monkeypatch)
    seconds = {True: [9.0, 1.0, 6.0], False: [1.0, 7.0, 2.0]}  # of the loop, of others
    by_name = lambda calls, rounds: {name: seconds[name == "paper's loop"] for name in calls}  # noqa: E731
    monkeypatch.setattr(harness, "alternate", by_name)
    args = Namespace(no_compile=True, no_fresh=True, rounds=3, loop_captions=None, backends=None)
    medium = [False] if script is bench_pair_scorers else []
    rows = script.measure("scan-t2i", Shape("coco-eval-5k", 3, 3), "cpu", *medium, args)["rows"]
    assert [row["times_faster_than_loop"] for row in rows] == [1.0] + [3.0] * (len(rows) - 1)
    assert len(rows) > 1


@pytest.mark.slow
def test_the_op_benchmarks_run():
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks").glob("bench_*.py"))
    out = run("-m", "pytest", "-q", "--benchmark-disable", "-k", "quick", *files)  # each once
    assert "passed" in out
    assert "failed" not in out


def test_a_training_step_is_compared_with_the_loop_extended_from_fewer_captions(monkeypatch, tmp_path):
    shrink(monkeypatch)
    monkeypatch.setattr(machine, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(bench_training_step, "extended", lambda few, many, *shapes: 1e9 + many)
    arguments = ("--batch", "4", "--loop-captions", "3", "--models", "scan-t2i", "saf")
    result = written(bench_training_step, "training_step", monkeypatch, tmp_path, *arguments)
    assert [one["model"] for one in result["results"]] == ["scan-t2i", "saf"]
    for one in result["results"]:
        loop, *ours = one["rows"]
        assert (loop["name"], loop["measured_captions"], one["captions"]) == ("paper's loop", 3, 4)
        assert loop["seconds_min"] > 1e9
        assert loop["peak_bytes"] is None or loop["peak_bytes"] >= 1e9
        assert "itm-fast torch" in [row["name"] for row in ours]
        rounded = {row["name"]: row for row in ours if harness.BFLOAT16 in row["name"]}
        names = [f"itm-fast cpu{harness.BFLOAT16}{which}" for which in ("", ", all negatives")]
        assert list(rounded) == (names if _native.bfloat16_products()[0] else [])
        for row in ours:
            assert 0 < row["largest_difference"] < row.get("allowed_difference", bench_training_step.ALLOWED)
            assert (row.get("allowed_difference", 0) > bench_training_step.ALLOWED) == (row["name"] in rounded)
            assert row["products"] == ("bfloat16" if row["name"] in rounded else "float32")
        assert all(row["seconds_max"] < 1e9 for row in ours)
    text = page.section("training_step", tmp_path / "training_step_here.json")
    assert "extended to 4 on a straight line" in text
    assert text.count("| saf |") == len(result["results"][1]["rows"])
    assert ("| x float32 |" in text) == bool(rounded)


@pytest.mark.parametrize("contender", [bench_training_step.LOOP, "torch"])
def test_memory_is_that_of_a_second_step(contender, monkeypatch):
    run = []
    monkeypatch.setattr(bench_training_step, "step", lambda model, *args: lambda: run.append(args[:2]))
    monkeypatch.setattr(machine, "peak_memory", lambda call: call() or list(run))
    small, shape = (Shape("coco-eval-5k", n, n) for n in (2, 3))
    (found,) = bench_training_step.memory("sgr", contender, [shape])
    assert found == [(contender, small), (contender, shape), (contender, shape)]


@pytest.mark.parametrize("contender, products", [("torch", "high"), (f"cpu{harness.BFLOAT16}", "medium")])
def test_a_step_multiplies_as_torch_is_set_unless_its_name_says_otherwise(contender, products, monkeypatch):
    asked, loss = [], bench_training_step.ranking_loss

    def asking(*args):
        asked.append(torch.get_float32_matmul_precision())
        return loss(*args)

    monkeypatch.setattr(bench_training_step, "ranking_loss", asking)
    with gpu_scoring.precision("tf32"):
        bench_training_step.step("scan-t2i", contender, Shape("coco-eval-5k", 2, 2), "cpu")()
    assert asked == [products]


def test_results_that_are_too_far_off_are_not_timed():
    allowed = {"cpu": 1e-3, f"cpu{harness.BFLOAT16}": 0.5}
    bench_training_step.refuse_unlike("saf", {"cpu": 9e-4, f"cpu{harness.BFLOAT16}": 0.4}, allowed)
    for off in ({"cpu": 2e-3}, {f"cpu{harness.BFLOAT16}": 0.6}, {"cpu": float("nan")}):
        with pytest.raises(SystemExit, match="not timed"):
            bench_training_step.refuse_unlike("saf", off, allowed)


@pytest.mark.filterwarnings("ignore:NLTK's punkt data")
def test_precisions_are_compared_with_float64(monkeypatch, tmp_path):
    for module in (harness, page):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["precision", "--images", "12", "--write", "here"])
    bench_precision.main()
    result = json.loads((tmp_path / "precision_here.json").read_text())
    assert [one["model"] for one in result["results"]] == list(bench_precision.MODELS)
    for one in result["results"]:
        off = {row["name"]: row["largest_difference"] for row in one["rows"]}
        assert list(off) == [one.name for one in bench_precision.PRECISIONS]
        assert 0 < 10 * off["float32"] < off["TF32 products"] < off["bfloat16"] < 0.1
        assert off["float16"] < off["bfloat16"]
        for row in one["rows"]:
            assert 0.8 < row["least_kendall_tau"] <= row["t2i_kendall_tau"] <= 1
    assert bench_precision.table(result).count("\n| SGRAF | bfloat16") == 3
    assert "| SAF | float64 |" in bench_precision.table(result)


def test_gradients_are_compared_with_float64(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_gradients, "TITLES", {"sgr": "SGR, trained"})
    monkeypatch.setattr(sys, "argv", ["gradients", "--pairs", "8", "--write", "here"])
    bench_gradients.main()
    result = json.loads((tmp_path / "gradients_here.json").read_text())
    titles = ["SGR, trained", *(f"SCAN {direction}, random rows" for direction in ("t2i", "i2t"))]
    titles += [f"{model}, untrained, random rows" for model in ("SGR", "SAF")]
    assert [one["model"] for one in result["results"]] == titles
    for one in result["results"]:
        for k in (0, 3):  # the hardest negatives, all
            exact, rounded, features = one["rows"][k : k + 3]
            assert exact["images"] < 1e-3 < features["images"] < 0.1
            assert (rounded["images"] > 1e-3) == _native.bfloat16_products()[0]
    text = bench_gradients.table(result)
    assert text.count("\n| SGR, trained | hardest | ") == text.count("\n| SGR, trained | all | ") == 3


def test_factors_are_cut_to_what_tensor_cores_read():
    x = torch.tensor([1 + 2.0**-10, 1 + 2.0**-11, -(1 + 2.0**-11), 3.0e38])
    assert bench_precision.cut(x, "tf32").tolist()[:3] == [1 + 2.0**-10, 1, -1]
    assert bench_precision.cut(x, "bfloat16").tolist()[:3] == [1, 1, -1]
    a, b = torch.rand(3, 5), torch.rand(5, 4)
    with bench_precision.Emulated("tf32"):
        found = a @ b, torch.nn.functional.linear(a, b.t(), torch.ones(4))
    product = bench_precision.cut(a, "tf32") @ bench_precision.cut(b, "tf32")
    assert torch.equal(found[0], product)
    torch.testing.assert_close(found[1], product + 1, rtol=1e-6, atol=0)


def test_kendalls_tau():
    exact = torch.tensor([[1.0, 2, 3, 4]] * 3)
    other = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 2, 4, 3]])
    torch.testing.assert_close(bench_precision.kendall(exact, other), torch.tensor([1.0, -1.0, 4 / 6]))
    assert bench_precision.kendall(exact[:1], torch.tensor([[1.0, 1, 2, 3]])) == pytest.approx(5 / (6 * 5) ** 0.5)


def test_maxsim_attention_and_the_models_beside_it(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_maxsim.importlib.util, "find_spec", lambda name: None)
    arguments = ("--tasks", "maxsim-d128", "attention-d1024", "naaf-d1024", "--images", "3", "--captions", "4")
    result = written(bench_maxsim, "maxsim", monkeypatch, tmp_path, *arguments)
    hard, soft, naaf = result["results"]
    assert naaf["rows"][0]["name"] == "loop over captions"
    assert all(row["largest_difference"] < 1e-12 for row in naaf["rows"])
    assert hard["left_out"]["maxsim-cpu"] == hard["left_out"]["pykeops"] == "it is not installed"
    for one in (hard, soft):
        assert [r["name"] for r in one["rows"]][:2] == ["loop over captions", "one matrix product"]
        assert all(row["largest_difference"] < 2e-6 for row in one["rows"])
    text = page.section("maxsim", tmp_path / "maxsim_here.json")
    assert "Left out of maxsim-d128, attention-d1024: pykeops (it is not installed)." in text


@pytest.mark.slow
def test_a_process_of_its_own_has_as_many_threads_and_may_die():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert machine.in_fresh_process(torch.get_num_threads) == before + 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(RuntimeError, match="the process died"):
        machine.in_fresh_process(os.abort)


def test_a_package_that_fails_when_tried_is_left_out_with_the_reason(monkeypatch):
    def died(*args):
        raise RuntimeError("the process died")

    monkeypatch.setattr(bench_maxsim.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(machine, "in_fresh_process", died)
    assert bench_maxsim.unusable("pykeops", "maxsim-d128", 2, 2) == "the process died"
    monkeypatch.setattr(machine, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setitem(bench_maxsim.PACKAGES, "pykeops", lambda block, task: 1 / 0)
    assert "ZeroDivisionError" in bench_maxsim.unusable("pykeops", "maxsim-d128", 2, 2)


@pytest.mark.parametrize("hardest", [True, False])
def test_the_ranking_loss_is_the_papers(hardest):
    score = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    expected = itm_fast.hardest_negative_loss(score, margin=0.2, hardest=hardest, backend="reference")
    torch.testing.assert_close(bench_training_step.ranking_loss(score, hardest), expected)


def test_a_wrong_gradient_is_seen_and_a_bias_of_rounding_errors_is_not():
    exact = {"score": torch.ones(2, 2), "image": torch.ones(3), "weight": torch.ones(4), "bias": torch.full((4,), 1e-9)}
    assert bench_training_step.difference(exact, exact) == 0
    noisy = {**exact, "bias": torch.full((4,), -1e-9)}
    assert bench_training_step.difference(noisy, exact) < 1e-8
    for name in ("score", "image", "weight"):
        assert bench_training_step.difference({**exact, name: 1.01 * exact[name]}, exact) > bench_training_step.ALLOWED


@pytest.mark.parametrize("model, hardest, share", [("sgr", True, 3 / 128), ("sgr", False, 1), ("saf", True, 1)])
def test_a_step_needs_gradients_of_the_pairs_in_its_loss(model, hardest, share):
    """So many pairs of random scores have a gradient, and operations are counted for so many."""
    shape = SHAPES["coco-train-b128"]
    score = torch.randn(128, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(bench_training_step.ranking_loss(score, hardest), score)
    if model != "saf":
        assert gradient.count_nonzero() <= share * shape.pairs
    pairs, states = needed_flops(model, shape), state_flops(model, shape)
    count = bench_training_step.step_flops(model, shape, hardest)
    assert count == pytest.approx((1 + 2 * share) * pairs + 3 * states)


def test_time_is_extrapolated_linearly_in_words():
    least, cut, whole = (Shape("coco-eval-5k", 4, n) for n in (2, 8, 32))
    few, many, all_ = (5.0 + 3.0 * sum(one.lengths) for one in (least, cut, whole))
    assert bench_training_step.extended(few, many, least, cut, whole) == pytest.approx(all_)


def test_a_row_is_compared_with_the_peak_of_its_products():
    common = dict(times=[1.0, 4.0, 2.0], pairs=10, flops=4e9, base=6.0)
    rows = [harness.row("a", **common), harness.row("b", **common, products="bfloat16")]
    assert (rows[0]["seconds_median"], rows[0]["times_faster_than_loop"], rows[0]["pairs_per_second"]) == (2, 3, 5)
    harness.hold_against(PEAK, [{"rows": rows}])
    assert [(r["fraction_of_peak"], r["fraction_of_matmul_peak"]) for r in rows] == [(0.4, 1.0), (0.2, 1.0)]
    harness.hold_against({**PEAK, "fma_float32": None}, [{"rows": rows}])
    assert [r["fraction_of_peak"] for r in rows] == [None, 0.2]


def test_the_higher_of_two_peaks_counts():
    busy = {"matmul_float32": 1e9, "fma_float32": 6e9, "fma_bfloat16": None}
    assert machine.higher(busy, PEAK) == {"matmul_float32": 2e9, "fma_float32": 6e9, "fma_bfloat16": None}


def test_the_peak_of_matrix_products_is_the_best_of_several(monkeypatch):
    took = iter([4.0, 2.0, 3.0, 5.0, 6.0])
    monkeypatch.setattr(machine, "seconds", lambda call: next(took))
    assert machine.matmul_peak() == 2 * 2048**3 / 2.0


def test_peak_memory_is_what_a_call_reaches_above_what_was_held():
    held = torch.ones(8 << 20)

    def call():
        torch.ones(16 << 20)

    peak = machine.peak_memory(call)
    if peak is None:
        pytest.skip("the resident set cannot be reset here")
    assert 63 << 20 <= peak < 72 << 20  # the kernel counts resident pages in batches
    assert held[0] == 1


def test_the_fma_peak_is_the_best_of_several_on_torchs_threads(monkeypatch):
    if reason := itm_fast.why_not("cpu"):
        pytest.skip(reason)
    rates, asked = iter([3e9, 7e9, *[5e9] * 8]), set()
    monkeypatch.setattr(_native.peaks, "peak", lambda library, *how: asked.add(how) or next(rates))
    assert machine.fma_peak("float64") == 7e9
    assert asked == {("float64", 5_000_000, torch.get_num_threads())}


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_result_files_name_their_machine(path):
    result = json.loads(path.read_text())
    assert {"torch", "device", "threads", "commit", "date"} <= set(result["environment"])
    for one in result["results"]:
        for row in one["rows"]:
            assert row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
            rounded = row.get("allowed_difference", 2e-2)  # steps compare it with results of rounded values
            assert rounded <= bench_training_step.ALLOWED_BFLOAT16
            assert row["largest_difference"] < (rounded if row.get("products") == "bfloat16" else 1e-3)
