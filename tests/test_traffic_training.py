"""The model of a training step's traffic says what backward kernels do in Triton's interpreter."""

from __future__ import annotations

import json

import pytest
import torch
from benchmark_cases import ROOT
from triton_cases import unless

import itm_fast

pytest.importorskip("triton", reason="triton is not installed")

from traffic_cases import compared, given, precision_restored  # noqa: F401

from benchmarks import shapes, traffic, traffic_training, traffic_triton
from benchmarks.cards import CARDS
from itm_fast.ops import _examples as examples
from itm_fast.ops import _recompute

interpreted = unless("triton", "cpu")
SLOW = pytest.mark.slow
SIZES = {
    "small": examples.Size(3, (13, 1, 4, 34), 9, 40, 16, 3),
    "wide": examples.Size(2, (5, 2), 70, 32, 300, 2),  # images of two tiles of regions, S of two blocks
    "long": examples.Size(2, (70, 3), 7, 32, 16, 2),  # a caption that takes a tile of 128 nodes
}
SCORE, PUBLISHED = "cross_attention_score", dict(affinity_norm="clipped_l2norm", pool="lse")
CASES = [
    (SCORE, "small", "float32", PUBLISHED),
    (SCORE, "wide", "tf32", PUBLISHED | dict(direction="i2t")),
    (SCORE, "small", "float16", dict(direction="i2t", affinity_norm="none", similarity="product", pool="mean")),
    ("similarity_nodes", "small", "float32", {}),
    pytest.param("similarity_nodes", "wide", "float16", {}, marks=SLOW),
    ("similarity_graph", "small", "tf32", {}),
    ("similarity_graph", "long", "float32", {}),
    ("similarity_filter", "small", "float32", dict(training=True)),
    ("similarity_filter", "wide", "float16", {}),
]


@interpreted
@pytest.mark.parametrize("op, size, precision, options", CASES)
def test_every_launch_of_a_step_moves_and_multiplies_what_the_model_says(op, size, precision, options, monkeypatch):
    args = given(op, SIZES[size], precision)
    for a in args:
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            a.requires_grad_()
    with itm_fast.workspace(2.0**-13), compared(monkeypatch) as launches:
        result = getattr(itm_fast, op)(*args, backend="triton", **options)
        result = result if isinstance(result, torch.Tensor) else result[0]
        result.backward(torch.rand_like(result))
    for name, count, seen in launches:
        for i, written in enumerate((False, True)):
            assert (count.requested(written), count.distinct(written)) == (seen.requested[i], seen.distinct(i)), name
        assert count.products == seen.products, name
        if precision != "float16" and name not in ("_affinity", "_gram"):
            assert 0.75 < count.vector / seen.vector < 1.3, name


def operations(run):
    """What PyTorch's operations in `run()` are counted as, by name."""
    found = []
    with traffic_training.Operations(found, traffic_triton.Memory()):
        run()
    return {name.removeprefix("PyTorch: "): count for name, count in found}


@pytest.mark.parametrize("matmul, kind", [("highest", "ieee"), ("high", "tf32")])
def test_pytorchs_products_are_counted(matmul, kind):
    torch.set_float32_matmul_precision(matmul)
    total, left, right = torch.zeros(300, 500), torch.ones(300, 400), torch.ones(400, 500)
    count = operations(lambda: total.addmm_(left, right))["addmm"]
    assert count.products == {kind: 2 * 300 * 400 * 500}
    assert (count.distinct(False), count.distinct(True)) == (4 * (300 * 400 + 400 * 500 + 300 * 500), 4 * 300 * 500)
    assert total.count_nonzero() == 0  # it did not run


def test_pytorchs_operations_move_what_they_take_and_give():
    wide, few, at = torch.ones(600, 400), torch.ones(7, 400), torch.arange(7)
    counts = operations(lambda: (wide.add_(wide[:, :1].expand(600, 400)), torch.zeros_like(wide).view(-1)))
    assert list(counts) == ["add", "zeros_like"]  # a view is no launch
    assert (counts["add"].distinct(False), counts["add"].distinct(True)) == (4 * 600 * 401, 4 * 600 * 400)
    assert (counts["zeros_like"].distinct(False), counts["zeros_like"].distinct(True)) == (0, 4 * 600 * 400)
    counts = operations(lambda: (wide[at], wide.index_add_(0, at, few)))
    assert (counts["index"].distinct(False), counts["index"].distinct(True)) == (4 * 7 * 400, 4 * 7 * 400)
    assert (counts["index_add"].distinct(False), counts["index_add"].distinct(True)) == (8 * 7 * 400, 4 * 7 * 400)


def test_the_hardest_negatives_leave_three_pairs_of_a_row():
    grad = traffic_training._gradient(shapes.SHAPES[traffic.TRAINING], True)
    assert grad.diagonal().eq(1).all()
    assert min(grad.sum(0).min(), grad.sum(1).min()) > 1
    assert 2 * 128 <= grad.count_nonzero() <= 3 * 128
    assert _recompute.few_pairs(grad)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("traffic_*.json")), ids=lambda p: p.stem)
@pytest.mark.parametrize("model, precision", [("scan-t2i", "tf32"), pytest.param("sgr", "float32", marks=SLOW)])
def test_a_result_file_is_what_a_step_launches_today(model, precision, path, monkeypatch):
    """Otherwise write it anew; benchmarks/traffic.py says how."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # scratch as large as a GPU's
    found = json.loads(path.read_text())
    (card,) = (card for card in CARDS.values() if card.name == found["card"])
    (one,) = (x for x in found["training"]["results"] if (x["model"], x["precision"]) == (model, precision))
    assert one["parts"] == json.loads(json.dumps(traffic.training(model, precision, card)))
