"""The model of the kernels' traffic says what they load, store and multiply in Triton's interpreter."""

from __future__ import annotations

import json

import pytest
import torch
from benchmark_cases import ROOT
from triton_cases import unless

import itm_fast

pytest.importorskip("triton", reason="triton is not installed")

from traffic_cases import MATMUL, compared, given, precision_restored  # noqa: F401

from benchmarks import traffic, traffic_cuda, traffic_page, traffic_triton
from benchmarks.cards import CARDS, PRODUCTS
from benchmarks.traffic_counts import Count
from itm_fast.ops import _examples as examples
from itm_fast.ops._cuda import similarity_score

interpreted = unless("triton", "cpu")
COCO, SLOW = "coco-eval-5k", pytest.mark.slow
H100 = CARDS["h100"]
PUBLISHED = dict(direction="t2i", affinity_norm="clipped_l2norm", pool="lse")
MAXSIM = dict(direction="i2t", affinity_norm="none", weights="hard", similarity="product", pool="mean")
SIZES = {
    "small": examples.Size(5, (13, 1, 4, 34, 7, 20), 9, 40, 16, 3),
    "wide": examples.Size(2, (5, 2), 70, 32, 300, 2),  # images of two tiles of regions, S of two blocks
    "deep": examples.Size(2, (5, 2), 7, 32, 128, 2),  # S in two blocks of a step's columns
    "long": examples.Size(2, (70, 3), 7, 32, 16, 2),  # a caption that takes a tile of 128 nodes
}


def of(op, size, precision, **options):
    long = SLOW if op.startswith("similarity") else ()
    kind = (options.get(name, "") for name in ("direction", "affinity_norm", "weights"))
    name = "-".join(filter(None, (op, *kind, size, precision)))
    return pytest.param(op, options, size, precision, marks=long, id=name)


SCORE = "cross_attention_score"
CASES = [
    *(of(SCORE, "small", precision, **PUBLISHED) for precision in MATMUL),
    of(SCORE, "wide", "tf32", **PUBLISHED),
    of(SCORE, "small", "float32", direction="i2t", affinity_norm="softmax", pool="mean"),
    of(SCORE, "small", "float16", direction="i2t", affinity_norm="none", pool="max"),
    of(SCORE, "small", "float32", **MAXSIM),
    of(SCORE, "wide", "float32", **PUBLISHED | dict(weights="focal_equal", pool="mean")),
    *(of("similarity_graph_score", "small", precision) for precision in MATMUL),
    of("similarity_graph_score", "long", "tf32"),
    of("similarity_graph_score", "deep", "float16"),
    *(of("similarity_filter_score", "small", precision) for precision in MATMUL),
    of("similarity_filter_score", "wide", "float32"),
]


def moved(count):
    return [(count.requested(written), count.distinct(written)) for written in (False, True)]


@interpreted
@pytest.mark.parametrize("op, options, size, precision", CASES)
def test_every_launch_moves_and_multiplies_what_the_model_says(op, options, size, precision, monkeypatch):
    args = given(op, SIZES[size], precision)
    # So little scratch memory makes several pieces.
    with itm_fast.workspace(2.0**-14), torch.no_grad(), compared(monkeypatch) as launches:
        getattr(itm_fast, op)(*args, backend="triton", **options)
    for name, count, seen in launches:
        assert moved(count) == [(seen.requested[i], seen.distinct(i)) for i in (0, 1)], name
        assert count.products == seen.products, name
        # The interpreter converts float16 factors of products, which matrix units do not.
        if precision != "float16" and (op != SCORE or options == PUBLISHED) and name not in ("_affinity", "_gram"):
            assert 0.75 < count.vector / seen.vector < 1.3, name


@interpreted
@pytest.mark.parametrize(
    "op, options", [(SCORE, PUBLISHED), ("similarity_graph_score", {}), ("similarity_filter_score", {})]
)
def test_the_launches_are_those_that_run(op, options, monkeypatch):
    """The model needs sizes and lengths of captions only, not the features."""
    size = SIZES["small"]
    ran = []
    with itm_fast.workspace(2.0**-14), torch.no_grad():
        with traffic_triton.recording(90, lambda kernel, *_: ran.append(kernel.__name__)) as found:
            getattr(itm_fast, op)(*given(op, size, "tf32"), backend="triton", **options)
        letters = dict(I=size.images, R=size.regions, D=size.dim, S=size.similarity, K=size.steps)
        options_ = {"scale": 9.0, "eps": 1e-5, "pool_scale": 6.0, **options}
        made = traffic_triton.arguments(op, letters, torch.float32, list(size.lengths), **options_)
        without = list(traffic_triton.launches(op, 90, made))
    assert ran == [name for name, _ in found] == [name for name, _ in without]
    assert [moved(count) for _, count in found] == [moved(count) for _, count in without]


def test_a_part_is_read_again_once_others_have_filled_l2():
    cache, count = traffic.Cache(100), Count(1)
    count.writes("a", 60)
    count.reads("b", 40, 400)
    assert cache.memory(count.uses) == (40, 60)
    assert cache.memory(count.uses[1:]) == (0, 0)
    count = Count(1)
    count.reads("c", 50, 50)
    assert cache.memory(count.uses) == (50, 0)  # which takes the place of a
    count.reads("b", 40, 40)
    count.reads("a", 60, 60)
    assert cache.memory(count.uses) == (60, 0)
    count.reads("d", 101, 101)
    assert cache.memory(count.uses[-1:]) == cache.memory(count.uses[-1:]) == (101, 0)


def test_a_launch_takes_the_longest_of_its_parts():
    memory, products = Count(1), Count(H100.processors + 1)
    memory.reads("x", int(3.35e9), 1)
    products.dots(1, 1000, 1000, 494_700, "tf32x3")
    products.reads("y", 0, int(H100.cache_rate / 1e3))
    products.shared, products.plain = 1.5e-3 * H100.shared, 0.5e-3 * H100.shared
    (row,) = traffic.kernels([("k", memory), ("k", products)], H100)
    assert row["launches"] == 2
    assert row["bound"] == pytest.approx(1e-3 + 6e-3)
    assert row["limited_by"] == "products"
    assert row["seconds"] == pytest.approx(
        {"memory": 1e-3, "L2": 1e-3, "shared memory": 2e-3, "products": 6e-3, "vector": 0}, abs=1e-9
    )
    assert row["waves"] == pytest.approx((1 + 133) / (132 + 264))


@pytest.mark.parametrize("model, kind, seconds", [
    ("scan-t2i", "bfloat16", 0.128), ("scan-t2i", "tf32x3", 0.77), ("sgr", "tf32", 4.46), ("saf", "float16x3", 3.6),
])  # fmt: skip
def test_floors_of_coco(model, kind, seconds):
    """126.7, 2,209 and 1,186 TFLOP."""
    precision = next(p for p, asked in traffic.PRECISIONS.items() if kind in asked.kinds)
    assert traffic.floor(model, COCO, H100, precision, kind) == pytest.approx(seconds, rel=5e-3)
    assert traffic.floor(model, COCO, CARDS["t4"], precision, kind) is None or kind == "float16x3"


def test_every_kind_of_product_has_a_rate():
    for card in CARDS.values():
        assert {unit for unit, _ in PRODUCTS.values()} >= set(card.products)
    assert CARDS["t4"].rate("bfloat16") is None
    assert H100.rate("float16x3") == pytest.approx(329.8e12)
    assert H100.rate("float16", by_mma=True) == pytest.approx(0.63 * 989.4e12)


@pytest.mark.parametrize("precision", traffic.PRECISIONS)
@pytest.mark.parametrize("model, limit", [("scan-t2i", 1.3), ("scan-i2t", 1.3), ("sgr", 1.6), ("saf", 1.6)])
def test_the_cuda_kernels_do_all_that_is_needed_and_not_much_more(model, limit, precision):
    found = traffic.counts("cuda", model, COCO, H100, precision)
    kind = traffic.PRECISIONS[precision].kinds[-1]
    bound = sum(row["bound"] for row in traffic.kernels(found, H100))
    if precision == "tf32" and limit == 1.6:  # float16 numbers have factors besides, which registers do not hold
        limit = 1.68
    assert 1 < bound / traffic.floor(model, COCO, H100, precision, kind) < limit


@pytest.mark.parametrize("rows, reuse", [(64, 56), (128, 103)])
def test_the_cuda_graph_kernel_has_the_reuse_of_its_design(rows, reuse, monkeypatch):
    """Operations a byte through L2 of full tiles."""
    tile = traffic_cuda._tiles.tile_of(36, (9, 0))
    kind = traffic_cuda.FORMS["bfloat16"]
    head = similarity_score.graph_kernel(kind, 256, rows, 48, 64, 0, 0)
    overall = traffic_cuda._pairs.global_kernel(kind, 256, 64, 64)
    found = traffic_cuda._pairs.Kernels(tile, overall, overall, 64, head, rows, rows - 1)
    monkeypatch.setattr(traffic_cuda._pairs, "kernels", lambda *_: found)
    edge = torch.arange(0, 15 * (rows // 16 * 100) + 1, 15, dtype=torch.int32)
    problem = traffic_cuda.Problem("similarity_graph_score", 100, 36, 1024, 256, 3, edge, H100, "bfloat16")
    count = dict(traffic_cuda.counts(problem))["graph_scores"]
    assert sum(count.products.values()) / count.requested(False) == pytest.approx(reuse, rel=0.1)


def test_what_cannot_run_says_why():
    assert "compute capability 8.0" in traffic.counts("triton", "sgr", COCO, CARDS["t4"], "tf32")
    assert traffic.counts("cuda", "sgr", COCO, CARDS["t4"], "bfloat16") == "the T4 has no bfloat16 products"
    assert "shared memory for the longest captions" in traffic.counts("cuda", "sgr", COCO, CARDS["t4"], "tf32")


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("traffic_*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
@pytest.mark.parametrize("model", ["scan-t2i", pytest.param("saf", marks=SLOW), pytest.param("sgr", marks=SLOW)])
def test_a_result_file_is_what_todays_launchers_give(model, path, monkeypatch):
    """Otherwise write it anew; benchmarks/traffic.py says how."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # features as large as real ones
    found = json.loads(path.read_text())
    (card,) = (card for card in CARDS.values() if card.name == found["card"])
    for one in (x for x in found["results"] if x["model"] == model):
        for backend, value in one["backends"].items():
            if backend == "cuda" or one["precision"] == "bfloat16":  # of Triton the others take minutes
                rows = traffic.kernels(traffic.counts(backend, model, found["workload"], card, one["precision"]), card)
                assert value["kernels"] == json.loads(json.dumps(rows))


def test_the_page_says_that_nothing_is_measured_and_sets_beside_it_what_is(tmp_path):
    rows = traffic.kernels([("k", Count(1))], H100) + traffic.kernels([("other", Count(1))], H100)
    rows[0] |= {"bound": 3.0, "limited_by": "L2"}
    backend = {"products": "tf32", "bound": 4.0, "bound_without_cache": 2.0, "kernels": rows}
    one = {"model": "sgr", "precision": "tf32", "floors": {"tf32": 2.0, "float16": 1.0, "x": None}}
    one["backends"] = {"triton": backend, "cuda": {"left_out": "not designed"}}
    part = {"part": "backward, all", "bound": 4.0, "floor": 2.0, "launches": 5, "others": 1.0, "other_launches": 3}
    step = {"model": "sgr", "precision": "tf32", "parts": [part | {"kernels": rows[:1]}]}
    found = {"workload": COCO, "card": "H100", "source": "s", "cache_source": "c", "results": [one]}
    found["training"] = {"workload": "batch", "results": [step]}
    told = traffic_page.tables(found)
    assert told.startswith("**Predicted, not measured.**")
    assert "| sgr | tf32 | triton | tf32 | 4.000 | 2.000 | 2.00 | 4.00 | 1.00 | `k`, 75%, by L2 |  |" in told
    assert "| sgr | tf32 | cuda | | | | | | | not designed | |" in told
    assert "| sgr | tf32 | backward, all | 5 | 4000.000 | 2000.000 | 2.00 | `k`, 75%, by L2 |" in told
    found["training"]["results"] = []
    assert "Triton does not run on this card" in traffic_page.tables(found)
    parts = {"sgraf tf32": {"parts": {"score sgr": 5.25, "all": 9.0}}, "peak": 3.0}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"steps": {"tests": {}, "evaluate-sgraf": {"result": parts}}}))
    assert "by L2 | 5.250 |" in traffic_page.tables(found, path)
