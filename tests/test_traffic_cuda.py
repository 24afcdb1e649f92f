"""What `benchmarks/traffic_cuda.py` says of the CUDA kernels is what the emulated ones count."""

import itertools
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from cuda_emulated import counting_device, device, emulated
from test_cuda_nodes import case, rounded

from itm_fast.ops._cuda import cross_attention_score, similarity_score
from itm_fast.testing import inputs

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import traffic_cuda  # noqa: E402
from benchmarks.cards import CARDS  # noqa: E402

__all__ = ["counting_device", "device", "emulated"]  # fixtures
pytestmark = pytest.mark.slow

# More groups of images than a walk has; captions of one block of nodes, of several and, in a tile, with empty ones.
I, R, D, K = 36, 36, 64, 3
LENGTHS = (12, 1, 37, 30, 5, 20, 16, 62)
DTYPES = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
# At "tf32" the pair scorers' kernels are those of bfloat16 but for the kind of numbers.
CASES = [*itertools.product(["t2i", "i2t"], DTYPES), *itertools.product(["graph", "filter"], ["bfloat16", "float32"])]
# What a kernel reads by plain loads, into registers: not copied to shared memory.
LOADED = {"factor", "global nodes"}


@pytest.fixture(params=DTYPES)
def precision(request):
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision("highest")


def scan(direction, dtype, images=I, lengths=LENGTHS):
    image, words, edge = inputs(images, lengths, R, D)
    options = direction, "clipped_l2norm", 9.0, "lse", 6.0, "softmax", 0.0, "cosine"
    cross_attention_score.forward(image.to(dtype), words.to(dtype), edge, None, *options)
    return edge


def pair_score(head, dtype, images, lengths, S, D=D):
    args = rounded(case(head, images, lengths, R, D, S, K=K), dtype)
    getattr(similarity_score, f"similarity_{head}_score")(*args)
    return next(x for x in args if isinstance(x, torch.Tensor) and not x.is_floating_point())


def compare(op, precision, device, edge, direction="t2i", images=I, S=64, D=D, card="h100"):
    """Compare what is predicted of a call with what its kernels have counted."""
    counted, launches = defaultdict(Counter), Counter()
    for kernel, counts in device.launches:
        name = kernel.name.partition("<")[0].removesuffix("_in_clusters")
        counted[name].update(counts)
        launches[name] += 1
    problem = traffic_cuda.Problem(op, images, R, D, S, K, edge, CARDS[card], precision, direction)
    predicted = {name: count for name, count in traffic_cuda.counts(problem) if name in counted}
    assert set(predicted) == set(counted)
    for name, count in predicted.items():
        for counter, products in (("flops", count.products), ("group_flops", count.by_wgmma)):
            flops = sum(n * (3 if kind.endswith("x3") else 1) for kind, n in products.items())
            assert counted[name][counter] == flops, (name, counter)
        copied = sum(use.requested for use in count.uses if not use.written and use.place[0] not in LOADED)
        if name == "global_nodes":  # an image's global vector is loaded
            copied -= count.programs * D * problem.size
        if "weights" in {use.place[0] for use in count.uses if not use.written}:  # 1 / |P| of a word too
            copied -= 4 * problem.N * images
        assert 16 * counted[name]["copies"] == copied, name
        assert launches[name] == count.launches, name
        assert counted[name]["shared"] == count.shared, name
        if device.counting:
            # The compiler keeps what it likes in registers, and the model leaves out single numbers of a tile.
            assert count.plain == pytest.approx(counted[name]["own"], rel=0.02), name


@pytest.mark.parametrize("model, precision", CASES, indirect=["precision"])
def test_products_and_copies_are_those_of_the_emulated_kernels(model, precision, device):
    device.capability = (9, 0)
    if model in ("t2i", "i2t"):
        compare("cross_attention_score", precision, device, scan(model, DTYPES[precision]), direction=model)
    else:
        edge = pair_score(model, DTYPES[precision], I, LENGTHS, S=64)
        compare(f"similarity_{model}_score", precision, device, edge)


GROUPED = [("graph", "float32"), ("graph", "bfloat16"), ("filter", "bfloat16")]


@pytest.mark.parametrize("head, precision", GROUPED, indirect=["precision"])
def test_the_same_where_groups_of_warps_multiply(head, precision, device):
    """In bfloat16 the last stage of a local weight is half full."""
    device.capability = (9, 0)
    edge = pair_score(head, DTYPES[precision], 2, (30, 20), S=256, D=96)
    assert device.launches[-1][0].cluster == 2
    compare(f"similarity_{head}_score", precision, device, edge, images=2, S=256, D=96)


COUNTED = [
    *(("t2i", "bfloat16", "h100"), ("i2t", "bfloat16", "h100")),
    *(("graph", "bfloat16", "h100"), ("graph", "float32", "h100"), ("graph", "bfloat16", "a100")),
    *(("filter", "tf32", "h100"), ("filter", "float32", "a100")),
]


@pytest.mark.parametrize("model, precision, card", COUNTED, indirect=["precision"])
def test_loads_and_stores_of_threads_are_those_of_the_emulated_kernels(
    model, precision, card, counting_device, monkeypatch
):
    """Those of SCAN's kernels, where the second block of the last cluster has no tile, and of the pair scorers'.

    A caption of 24 words is the longest that a thread of `scan_i2t` keeps in registers.
    """
    counting_device.capability, lengths = divmod(CARDS[card].arch, 10), (100, 24, 25, 9, 60)
    if model in ("graph", "filter"):
        monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # global nodes, where these are not made
        edge = pair_score(model, DTYPES[precision], 2, lengths, S=64)
        compare(f"similarity_{model}_score", precision, counting_device, edge, images=2, card=card)
        assert any(kernel.name.startswith(model) for kernel, _ in counting_device.launches)
        return
    edge = scan(model, torch.bfloat16, 9, (*lengths, 100))
    compare("cross_attention_score", "bfloat16", counting_device, edge, direction=model, images=9)
