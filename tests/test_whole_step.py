"""Whole training steps in the benchmarks: the published one and ours do the same work; time is measured by part."""

import types
from argparse import Namespace

import pytest
import torch
from benchmark_cases import PEAK, shrink, written
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_training_step, bench_whole_step, harness, machine, page, relatives, rewrites, whole_step
from benchmarks.bench_training_step import LOOP, MODELS, OTHERS
from benchmarks.shapes import Shape
from benchmarks.whole_step import PARTS, REWRITE, Step
from itm_fast.models._catalogue import CATALOGUE

SHAPE = Shape("coco-eval-5k", 4, 4)
BASELINES = {**{model: [REWRITE] for model in MODELS}, **{model: [] for model in ("hgan", "shan", *relatives.MODELS)}}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setattr(whole_step, "VOCABULARY", 50)


@pytest.mark.slow
@pytest.mark.parametrize("model,more", BASELINES.items(), ids=BASELINES)
def test_a_row_for_each_contender_and_their_parts_add_up(model, more, monkeypatch, tmp_path):
    arguments = ("--batch", "4", "--no-fresh", "--models", model)
    result = written(bench_whole_step, "whole_step", monkeypatch, tmp_path, *arguments)
    (one,) = result["results"]
    names = [row["name"] for row in one["rows"]]
    assert names == [LOOP, *more, *(f"itm-fast {name}" for name in harness.backends("cpu"))]
    flops = bench_whole_step.encoder_flops(model, SHAPE) + bench_training_step.step_flops(model, SHAPE, True)
    base = one["rows"][0]
    for row in one["rows"]:
        parts = [row[f"seconds_{part}"] for part in PARTS]
        assert min(parts) > 0
        assert sum(parts) <= row["seconds_median"]
        assert row["needed_gflops_per_second"] * row["seconds_median"] * 1e9 == pytest.approx(flops)
        ratio = base["seconds_scores_and_loss"] / row["seconds_scores_and_loss"]
        assert row["scores_times_faster_than_loop"] == pytest.approx(ratio)
        assert row["largest_difference"] < 1e-4
    assert base["largest_difference"] == 0
    assert base["measured_captions"] == 4
    text = page.section("whole_step", page.RESULTS / "whole_step_here.json")
    share = base["seconds_encoders"] / base["seconds_median"]
    assert f"| {base['seconds_median']:.2f} | 1.0 | {base['seconds_encoders']:.2f} | {share:.0%} |" in text


def test_every_model_that_trains_can_be_measured():
    assert {name.split("-")[0] for name in (*MODELS, *OTHERS)} == set(CATALOGUE)


def test_a_run_in_pieces_fills_one_file(monkeypatch, tmp_path):
    def piece(model, *more):
        arguments = ("--batch", "4", "--no-fresh", "--add", "--backends", "torch", "--models", model, *more)
        return written(bench_whole_step, "whole_step", monkeypatch, tmp_path, *arguments)

    first = piece("dual")["results"][0]["rows"]
    monkeypatch.setattr(machine, "peaks", lambda device: {name: 2 * rate for name, rate in PEAK.items()})
    monkeypatch.setattr("benchmark_cases.PEAK", {name: 2 * rate for name, rate in PEAK.items()})
    found = piece("maxsim")
    assert [one["model"] for one in found["results"]] == ["maxsim", "dual"]
    assert [row["name"] for row in first] == [LOOP, "itm-fast torch"]
    assert found["fma_peak_gflops"]["float32"] == 2e-9 * PEAK["fma_float32"]
    for was, now in zip(first, found["results"][1]["rows"], strict=True):
        assert now == {**was, **{name: was[name] / 2 for name in ("fraction_of_peak", "fraction_of_matmul_peak")}}
    assert [one["model"] for one in piece("dual")["results"]] == ["maxsim", "dual"]
    with pytest.raises(SystemExit, match=r"whole_step_here\.json has shape coco-train-b4, and this run coco-train-b5"):
        piece("dual", "--batch", "5")


def test_a_loop_on_fewer_captions_is_extended_with_the_parts_that_depend_on_words(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(bench_whole_step, "extended", lambda few, many, *shapes: 1e9 + many)
    arguments = ("--batch", "4", "--loop-captions", "3", "--models", "saf")
    (one,) = written(bench_whole_step, "whole_step", monkeypatch, tmp_path, *arguments)["results"]
    loop, *others = one["rows"]
    assert (loop["name"], loop["measured_captions"], one["captions"]) == (LOOP, 3, 4)
    assert min(loop[f"seconds_{part}"] for part in ("encoders", "scores_and_loss")) >= 1e9
    assert 0 < loop["seconds_clipping_and_adam"] < 1e9
    assert loop["seconds_min"] >= 2e9  # the parts of a step are extended and the step with them
    assert loop["peak_bytes"] is None or loop["peak_bytes"] >= 1e9
    assert all(row["seconds_max"] < 1e9 and (row["peak_bytes"] or 0) < 1e9 for row in others)
    text = page.section("whole_step", page.RESULTS / "whole_step_here.json")
    assert "The loop ran on 3 captions and on 2, and is extended to 4 on a straight line." in text


def test_medians_leave_the_first_round_out(monkeypatch):
    """It makes what later ones use, as Adam's moments."""

    def alternate(steps, rounds):
        seconds = [100.0] if rounds == 1 else [9.0, 1.0, 2.0]
        for name, step in steps.items():
            for k, part in enumerate(PARTS):
                step.parts[part] += [(k + 1) * (2 if name == LOOP else 1) * s for s in seconds]
        return {name: seconds if name != LOOP else [4 * s for s in seconds] for name in steps}

    monkeypatch.setattr(harness, "alternate", alternate)
    monkeypatch.setattr(bench_whole_step, "compare", lambda model, names, shape, device: ({"torch": 0.1}, {}))
    args = Namespace(loop_captions=None, backends=None, rounds=3, no_fresh=True)
    loop, ours = bench_whole_step.measure("scan-t2i", SHAPE, "cpu", args)["rows"]
    assert (loop["seconds_median"], ours["seconds_median"], ours["times_faster_than_loop"]) == (8, 2, 4)
    assert [ours[f"seconds_{part}"] for part in PARTS] == [2, 4, 6]
    assert (ours["scores_times_faster_than_loop"], ours["largest_difference"]) == (2, 0.1)


def test_memory_is_taken_when_adam_has_its_moments(monkeypatch):
    seen = []

    def peak_memory(step):
        seen.append((len(step.matcher.optimizer.state), len(step.batch.features), len(step.batch.lengths)))
        return len(seen)

    monkeypatch.setattr(machine, "peak_memory", peak_memory)
    assert bench_whole_step.memory("scan-t2i", LOOP, [Shape("coco-eval-5k", 4, 2), SHAPE]) == [1, 2]
    parameters = len(Step("scan-t2i", LOOP, SHAPE, "cpu").matcher.params)
    assert seen == [(parameters, 4, 2), (parameters, 4, 4)]


@pytest.mark.parametrize("model", ["scan-t2i", "saf"])
def test_steps_after_the_first_agree_too(model):
    """So the baseline clips and moves its weights as ours does."""
    steps = [Step(model, contender, SHAPE, "cpu") for contender in (LOOP, REWRITE, "torch")]
    losses = torch.tensor([[step().item() for _ in range(4)] for step in steps])
    assert (losses[0, 1:] < losses[0, :-1]).all()
    torch.testing.assert_close(losses[1:], losses[:1].expand(2, -1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("contender", [LOOP, REWRITE, "torch"])
def test_gradients_are_clipped(contender):
    step = Step("sgr", contender, SHAPE, "cpu")
    step.matcher.grad_clip = 1e-3
    found = step.result()
    assert list(found) == ["loss", "img_enc", "txt_enc", "sim_enc"]
    norm = torch.cat([x for name, x in found.items() if name != "loss"]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_a_contender_with_other_results_is_not_timed(monkeypatch):
    right = rewrites.scan
    monkeypatch.setattr(rewrites, "scan", lambda *args, **more: 1.01 * right(*args, **more))
    with pytest.raises(SystemExit, match=f"scan-t2i: {REWRITE} differs from the paper's loop by .*; not timed"):
        bench_whole_step.compare("scan-t2i", [REWRITE], SHAPE, "cpu")


class Passing(torch.autograd.Function):
    """Moves a clock in forward and in backward."""

    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        ctx.clock, ctx.backward_seconds = clock, backward
        clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += ctx.backward_seconds
        return gradient, None, None, None


@pytest.mark.parametrize("contender", [LOOP, REWRITE, "torch"])
def test_seconds_go_to_the_part_that_took_them(contender, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(whole_step, "time", clock)
    step = Step("sgr", contender, SHAPE, "cpu")

    def spend(module, forward, backward):
        module.register_forward_hook(lambda m, args, x: Passing.apply(x, clock, forward, backward))

    matcher = step.matcher
    spend(matcher.img_enc.fc, 1, 10)
    spend(matcher.txt_enc.embed, 2, 20)
    spend(matcher.scorer.v_global_w, 100, 1000)
    if contender == LOOP:  # which takes the scorer's weights, not the module
        score = step._score
        step._score = lambda *args: Passing.apply(score(*args), clock, 100, 1000)
    zero_grad = matcher.optimizer.zero_grad

    def zero_slowly():  # before the encoders
        clock.now += 50000
        zero_grad()

    matcher.optimizer.zero_grad = zero_slowly
    matcher.optimizer.register_step_pre_hook(lambda *_: setattr(clock, "now", clock.now + 10000))
    step()
    step()
    assert step.parts == {"encoders": [33, 33], "scores_and_loss": [1100, 1100], "clipping_and_adam": [60000, 60000]}


@pytest.mark.parametrize("model", ["scan-t2i", "rcar"])
def test_operations_of_the_encoders_are_those_that_torch_counts(model):
    """But for gradients of the GRU's first hidden states, zeros, which torch leaves out."""
    shape = Shape("coco-eval-5k", 3, 5)
    step = Step(model, LOOP, shape, "cpu")
    with FlopCounterMode(display=False) as counter:
        image, caption, _ = step.matcher.forward_emb(*step.batch)
        (image.sum() + caption.sum()).backward()
    counted = bench_whole_step.encoder_flops(model, shape)
    assert counted == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_the_batch_is_sorted_as_the_published_loaders_sort_it():
    batch = whole_step.batch(Shape("coco-eval-5k", 3, 6), "cpu")
    assert batch.lengths == sorted(batch.lengths, reverse=True)
    assert len(set(batch.lengths)) > 1
    assert batch.ids.shape == (6, batch.lengths[0])
    assert batch.features.shape == (3, 36, 24)
