"""SGR's and SAF's pair scores by the kernels of csrc/cuda, run on the CPU; see cuda_emulated.py."""

import pytest
import torch
from cuda_emulated import device, emulated  # noqa: F401
from pair_score_cases import drawer, edges, inputs

import itm_fast
from itm_fast import _cuda
from itm_fast.ops._cuda import _pairs, similarity_score
from itm_fast.ops._declare import DECLARED
from itm_fast.testing import assert_accurate

GPUS = {"sm_75": (7, 5), "sm_86": (8, 6), "sm_90": (9, 0), "sm_90a": (9, 0), "clusters": (9, 0)}
# On sm_90 what runs on all GPUs, on sm_90a products by groups of warps, and these in clusters of blocks.
VARIANTS = {"sm_90": _cuda.GENERAL, "sm_90a": _cuda.GROUPS, "clusters": _cuda.CLUSTERS}
GPUS["groups from now on"] = GPUS["clusters"]
HEADS = "graph", "filter"
F16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture
def run(device, monkeypatch):  # noqa: F811
    """The op's CUDA implementation, whose kernels run in the emulator; it returns what they counted as well."""

    def scores(head, args, dtype, order=0, gpu="sm_90"):
        device.launches.clear()
        device.order, device.capability = order, GPUS[gpu]
        best = VARIANTS.get(gpu, _cuda.CLUSTERS)
        monkeypatch.setattr(_cuda, "_variants", {(f"similarity_{head}_score", None, dtype): best})
        found = getattr(similarity_score, f"similarity_{head}_score")(*rounded(args, dtype))
        if device.launches and gpu in VARIANTS:
            kernel = device.launches[-1][0]
            assert (kernel.specific, kernel.cluster) == (VARIANTS[gpu] > 0, 2 if gpu == "clusters" else 1)
        return found, [counts for _, counts in device.launches]

    return scores


def rounded(args, dtype):
    return [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def case(head, I, counts, R=36, D=72, S=64, regions=None, K=3, seed=0):
    """Arguments of the op in the order of its implementations."""
    draw = drawer(seed)
    args = inputs(draw, I, counts, R, D, S)
    if head == "graph":
        for enlarged in (4, 4, 1):
            args += [enlarged * draw(K, S, S) / S**0.5, 0.3 * draw(K, S) / S**0.5]
        args += [draw(S), draw(1)]
        rest = []
    else:
        args += [3 * draw(S), 0.2 * draw(1), 1 + draw(1).abs(), 0.2 * draw(1), draw(S), draw(1)]
        args += [torch.tensor([0.3]), torch.tensor([0.5])]
        rest = [1e-5]
    lengths = None if regions is None else torch.tensor(regions, dtype=torch.int32)
    args = [*args, edges(counts), lengths, 9.0, *rest, "score"]
    # Weight and bias of the score that leave scores far from 0 and 1, and apart.
    at = 14 if head == "graph" else 12
    if I and counts:
        sums = reference(head, args, torch.float64)(torch.float64)[0].logit()
        spread = 1 / sums.std().item() if sums.numel() > 1 else 1
        args[at], args[at + 1] = args[at] * spread, (args[at + 1] - sums.mean()) * spread
    return args


def reference(head, args, dtype):
    """A dtype to compute in -> the reference's scores of arguments that are rounded to `dtype`."""
    op = DECLARED[f"similarity_{head}_score"]
    given = rounded(args, dtype)
    return lambda kind: [op.reference(*rounded(given, kind))]


SHAPES = {
    # captions of 1 word, of 16 and 17 nodes, of 32 and 33, of 64: each number of slots and its limits
    "lengths": dict(I=2, counts=(15, 1, 16, 5, 31, 32, 63, 12, 3)),
    "I1-T1-R1-W1-D8": dict(I=1, counts=(1,), R=1, D=8),
    "R7-ragged": dict(I=3, counts=(5, 9), R=7, D=200, regions=(7, 1, 4)),
    "R128-ragged": dict(I=2, counts=(5, 2), R=128, D=64, regions=(128, 65)),
    "W127": dict(I=1, counts=(7, 127, 70)),
    "D200": dict(I=2, counts=(9, 30), D=200),  # more stages of a product than shared memory has
    "odd": dict(I=3, counts=(9, 30), D=200),  # a cluster with one image
    "S128": dict(I=2, counts=(9, 20), S=128),
    "S256": dict(I=1, counts=(14, 20), S=256),
    "R100": dict(I=1, counts=(14, 20), R=100, D=200, S=256, regions=(97,)),
    "S256-odd": dict(I=1, counts=(50, 20), D=200, S=256, regions=(20,), K=2),
}


HALVES = [(shape, F16, "sm_90") for shape in SHAPES if shape not in ("D200", "odd", "R100", "S256-odd")]
HALVES += [("lengths", BF16, "sm_90")]
HALVES += [("S256", F16, "sm_75"), ("S256", BF16, "sm_86")]
HALVES += [("W127", F16, "sm_90a"), ("lengths", BF16, "sm_90a"), ("S256", BF16, "sm_90a")]
HALVES += [("R100", BF16, "sm_90a"), ("D200", F16, "clusters")]
HALVES += [("lengths", F16, "clusters"), ("S256", BF16, "clusters")]
FLOATS = [(shape, "highest", "sm_90") for shape in ("lengths", "I1-T1-R1-W1-D8", "R7-ragged", "S256")]
FLOATS += [("lengths", "high", gpu) for gpu in VARIANTS]
PAIRED = [("filter", "odd", "clusters"), ("filter", "lengths", "clusters"), ("filter", "lengths", "sm_90a")]
PAIRED += [("graph", "S256-odd", "clusters"), ("graph", "S256", "sm_90a")]


@pytest.mark.parametrize("shape,dtype,gpu", HALVES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("head", HEADS)
def test_scores_are_accurate(head, shape, dtype, gpu, run):
    args = case(head, **SHAPES[shape])
    found, counts = run(head, args, dtype, gpu=gpu)
    assert found.dtype == dtype
    assert_accurate([found], reference(head, args, dtype), dtype, products=dtype)
    assert not sum(c["bank_conflicts"] for c in counts)


@pytest.mark.parametrize("head,shape,gpu", PAIRED)
def test_float32_scores_by_groups_of_warps_are_accurate(head, shape, gpu, run):
    args = case(head, **SHAPES[shape])
    found, counts = run(head, args, torch.float32, gpu=gpu)
    assert_accurate([found], reference(head, args, torch.float32), torch.float32)
    assert not sum(c["bank_conflicts"] for c in counts)
    for order in (1, 2, 3) if shape.endswith("odd") else ():
        assert torch.equal(bits(run(head, args, torch.float32, order, gpu=gpu)[0]), bits(found))


def test_float32_captions_by_groups_of_warps_keep_their_bits_beside_others(run):
    args = case("graph", I=1, counts=(30, 20), S=256, K=2)
    args[2][3, 5] = torch.nan  # a word of caption 0
    found, _ = run("graph", args, torch.float32, gpu="sm_90a")
    alone, _ = run("graph", part(args, 0, 1), torch.float32, gpu="clusters")
    assert found[0, 0].isnan()
    assert torch.equal(bits(found[:, 1:]), bits(alone))


@pytest.mark.parametrize("shape,precision,gpu", FLOATS)
@pytest.mark.parametrize("head", HEADS)
def test_float32_scores_are_accurate(head, shape, precision, gpu, run, monkeypatch):
    monkeypatch.setattr(_pairs, "matmul_precision", lambda: precision)
    args = case(head, **SHAPES[shape])
    found, counts = run(head, args, torch.float32, gpu=gpu)
    assert found.dtype == torch.float32
    products = None if precision == "highest" else F16
    assert_accurate([found], reference(head, args, torch.float32), torch.float32, products=products)
    assert not sum(c["bank_conflicts"] for c in counts)


@pytest.mark.parametrize("dtype", [F16, torch.float32], ids=["F16", "F16X3"])
@pytest.mark.parametrize("head", HEADS)
def test_logits_are_accurate(head, dtype, run):
    args = [*case(head, 2, (9, 3), D=8)[:-1], "logit"]
    found, _ = run(head, args, dtype)
    assert found.min() < 0  # no score is
    assert_accurate([found], reference(head, args, dtype), dtype, products=F16 if dtype == F16 else None)


MIXED = dict(I=2, counts=(15, 1, 16, 5, 31, 63, 12), regions=(36, 20))
DTYPES = pytest.mark.parametrize("dtype", [F16, torch.float32], ids=["F16", "F16X3"])


def bits(scores):
    return scores.view({2: torch.int16, 4: torch.int32}[scores.itemsize])


@pytest.mark.parametrize(
    "shape,gpu,dtype",
    [
        *(("mixed", "sm_90", F16), ("W127", "sm_90", F16), ("S256", "sm_75", F16), ("S256", "sm_90", None)),
        *(("mixed", "sm_90a", F16), ("D200", "sm_90a", F16), ("S256", "sm_90a", BF16)),
        *(("mixed", "clusters", "high"), ("odd", "clusters", F16), ("S256", "clusters", BF16)),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_the_order_of_threads_and_copies_does_not_matter(head, shape, gpu, dtype, run, monkeypatch):
    # 0 and 1: threads in ascending and descending order; else a seed. Odd: copies land at once, else when waited for.
    if dtype == "high":
        monkeypatch.setattr(_pairs, "matmul_precision", lambda: "high")
    args, dtype = case(head, **SHAPES.get(shape, MIXED)), dtype if dtype in (F16, BF16) else torch.float32
    first, _ = run(head, args, dtype, gpu=gpu)
    assert not first.isnan().any()
    for order in (1, 2, 3):
        again, _ = run(head, args, dtype, order, gpu=gpu)
        assert torch.equal(bits(again), bits(first))


@pytest.mark.parametrize("head", HEADS)
def test_blocks_in_clusters_give_the_bits_of_blocks_alone(head, run):
    args = case(head, **MIXED)
    alone, counts = run(head, args, F16, gpu="sm_90a")
    found, fewer = run(head, args, F16, gpu="clusters")
    assert torch.equal(bits(found), bits(alone))
    assert fewer[-1]["copies"] < counts[-1]["copies"]


@pytest.mark.parametrize("head", HEADS)
def test_scores_of_blocks_that_have_waited_in_vain_are_nan_and_said_to_be(head, emulated, run):  # noqa: F811
    args = case(head, **MIXED)
    want, _ = run(head, args, F16, gpu="clusters")
    emulated.lose(2)
    found, _ = run(head, args, F16, gpu="clusters")
    assert found.isnan().any()
    right = ~found.isnan()
    assert torch.equal(bits(found)[right], bits(want)[right])
    with pytest.warns(UserWarning, match="waited in vain for each other, and scores .* may be NaN: compute them again"):
        again, _ = run(head, args, F16, gpu="groups from now on")
    assert torch.equal(bits(again), bits(want))


@pytest.mark.parametrize("dtype,slots", [(F16, (128, 128, 128)), (torch.float32, (128, 64, 128))], ids=str)
def test_variants_are_chosen_where_their_first_use_compares_them(dtype, slots, device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(_pairs, "COMPARED", (256,))
    kind, sizes = _pairs.kind_of(dtype), (64, 128, 256)
    found = [_pairs.kernels(similarity_score.graph_kernel, kind, 36, S, (9, 0), _cuda.CLUSTERS) for S in sizes]
    assert [fit.head.cluster for fit in found] == [1, 1, 2]
    assert tuple(fit.head_slots for fit in found) == slots
    assert found[2].head.name.endswith(f", {found[2].words + 1}>")  # slots of the longest caption


def part(args, image, caption):
    """One image with one caption."""
    at = next(k for k, x in enumerate(args) if isinstance(x, torch.Tensor) and not x.is_floating_point())
    tensors, (cu_seqlens, lengths, *rest) = list(args[:at]), args[at:]
    one = slice(image, image + 1)
    words = slice(*cu_seqlens[caption : caption + 2].tolist())
    tensors[:4] = tensors[0][one], tensors[1][one], tensors[2][words], tensors[3][caption : caption + 1]
    counts = None if lengths is None else lengths[one]
    return [*tensors, cu_seqlens[caption : caption + 2] - words.start, counts, *rest]


@pytest.mark.parametrize(
    "shape,gpu,dtype",
    [
        *(("mixed", "sm_90", F16), ("mixed", "sm_90", None), ("W127", "sm_90", F16), ("S256", "sm_75", F16)),
        ("mixed", "sm_90a", F16),
        ("odd", "clusters", F16),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_a_pair_alone_has_the_same_bits(head, shape, gpu, dtype, run):
    args, dtype = case(head, **SHAPES.get(shape, MIXED)), dtype or torch.float32
    whole, _ = run(head, args, dtype, gpu=gpu)
    for i, t in {(len(whole) - 1, t) for t in range(whole.shape[1])} | {(0, 0)}:
        alone, _ = run(head, part(args, i, t), dtype, gpu=gpu)
        assert torch.equal(bits(alone), bits(whole[i : i + 1, t : t + 1]))


@pytest.mark.parametrize("head", HEADS)
def test_less_scratch_does_not_change_bits(head, run):
    args = case(head, **MIXED)
    whole, counts = run(head, args, F16)
    with itm_fast.workspace(64 * 212 / 2**30):  # 64 nodes of one image
        found, more = run(head, args, F16)
    assert len(more) > 3 * len(counts)
    assert torch.equal(bits(found), bits(whole))


@pytest.mark.parametrize(
    "value,dtype,gpu",
    [("nan", F16, "sm_90"), ("inf", F16, "sm_90"), ("nan", torch.float32, "sm_90"), ("nan", F16, "clusters")],
    ids=str,
)
@pytest.mark.parametrize("head", HEADS)
def test_a_number_that_is_not_finite_stays_in_its_pairs(head, value, dtype, gpu, run):
    args = case(head, **MIXED)
    whole, _ = run(head, args, dtype, gpu=gpu)
    # A word of caption 4, which shares its tiles with others; an image's region; global vectors of each.
    places = {"word": (2, 38), "region": (0, (1, 2)), "image": (1, 0), "caption": (3, 4)}
    every = slice(None)
    spoiled = {"word": (every, 4), "region": (1, every), "image": (0, every), "caption": (every, 4)}
    for name, (k, row) in places.items():
        changed = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        changed[k][row][3] = float(value)
        found, _ = run(head, changed, dtype, gpu=gpu)
        mask = torch.zeros_like(whole, dtype=torch.bool)
        mask[spoiled[name]] = True
        assert found[mask].isnan().all(), name
        assert torch.equal(bits(found)[~mask], bits(whole)[~mask]), name


def test_a_global_node_that_is_not_finite_stays_in_its_pair_in_a_single_step(run):
    args = case("graph", **MIXED, K=1)
    whole, _ = run("graph", args, F16)
    args[3][1, 0] = torch.nan
    found, _ = run("graph", args, F16)
    others = torch.arange(whole.shape[1]) != 1
    assert found[:, 1].isnan().all()
    assert torch.equal(bits(found)[:, others], bits(whole)[:, others])


def test_a_node_that_becomes_infinite_on_the_way_stays_in_its_pair(run):
    args = case("graph", **MIXED)
    args[12][0] *= 10  # value weights
    args[12][1] *= 3e4  # of step 1, which take some pairs' nodes beyond float16
    found, _ = run("graph", args, F16)
    assert found.isnan().any()
    assert not found.isnan().all()
    for i in range(found.shape[0]):
        for t in range(found.shape[1]):
            alone, _ = run("graph", part(args, i, t), F16)
            assert torch.equal(bits(alone), bits(found[i : i + 1, t : t + 1]))


def with_infinite_empty_rows():
    args = case("graph", I=2, counts=(3, *7 * (15,)), S=64, K=2)  # all of one caption: they attend to each other
    args[8][1] *= 1e-4  # what nodes ask of large ones
    args[12][0][0] = 1e5 * args[5] / args[5].norm()  # nodes of empty rows are the bias, made 1 long
    return args


@pytest.mark.parametrize("gpu", ["sm_90", "sm_90a"])
def test_an_empty_row_that_becomes_infinite_spoils_no_caption(gpu, run):
    found, _ = run("graph", with_infinite_empty_rows(), F16, gpu=gpu)
    assert found.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_padded_regions_are_not_read(head, run):
    args = case(head, **MIXED)
    want, _ = run(head, args, F16)
    for i, n in enumerate(MIXED["regions"]):
        args[0][i, n:] = float("nan")
    found, _ = run(head, args, F16)
    assert torch.equal(bits(found), bits(want))


@DTYPES
@pytest.mark.parametrize("head", HEADS)
def test_attended_vectors_that_nearly_cancel(head, dtype, run):
    args = case(head, I=1, counts=(12,), D=128)
    draw = drawer(1)
    args[0][0, 1::2] = -args[0][0, ::2] + 1e-2 * draw(18, 128)
    args[2] *= 1e-3  # all regions count alike, and the attended vector is a hundredth of a region
    found, _ = run(head, args, dtype)
    assert_accurate([found], reference(head, args, dtype), dtype, products=F16 if dtype == F16 else None)


@pytest.mark.parametrize(
    "image,words,nodes", [(1e15, 1, 1), (1e-18, 1e-3, 1), (1e-12, 300, 1), (1, 1, 1e12), (1, 1, 1e-12)]
)
@pytest.mark.parametrize("head", HEADS)
def test_float32_of_any_magnitude(head, image, words, nodes, run):
    args = case(head, **SHAPES["R7-ragged"])
    args[0] *= image
    args[2] *= words
    args[3] *= words
    args[4] *= nodes / max(1, words) ** 2
    args[6] *= nodes / max(1, words) ** 2
    if head == "graph":
        args[12] *= nodes
        args[13] *= nodes
        args[14] /= nodes
        args[8] /= max(1, nodes)
    found, _ = run(head, args, torch.float32)
    assert_accurate([found], reference(head, args, torch.float32), torch.float32)


@pytest.mark.parametrize("words,overall,gpu", [(3000, 1, "sm_90"), (1, 3000, "sm_90"), (3000, 3000, "sm_90a")])
@pytest.mark.parametrize("head", HEADS)
def test_float16_rows_whose_squared_differences_lie_beyond_float16(head, words, overall, gpu, run):
    args = case(head, **SHAPES["lengths"])
    large = args[2][7].abs().max()
    args[2][7:] *= words / large  # some rows of each tile
    args[3][3:] *= overall / args[3].abs().max()
    found, _ = run(head, args, F16, gpu=gpu)
    # The reference in float16 overflows; in float32 it only leaves less to be off.
    exact = reference(head, args, F16)
    assert exact(F16)[0].isnan().any()
    assert_accurate([found], lambda kind: exact(torch.float32 if kind == F16 else kind), F16, products=F16)


@pytest.mark.parametrize("head", HEADS)
def test_float32_rows_of_a_wide_spread(head, run):
    # Most of a row's numbers lie below what two float16 numbers hold of its largest one.
    args = case(head, **SHAPES["R7-ragged"])
    spread = 2.0 ** -torch.arange(200.0).remainder(30)
    args[0][1] *= spread
    args[2][3:] *= spread.flip(0)
    args[4][::2] *= spread
    found, _ = run(head, args, torch.float32)
    assert_accurate([found], reference(head, args, torch.float32), torch.float32)


@pytest.mark.parametrize("I,counts", [(0, (3, 2)), (2, ())])
@pytest.mark.parametrize("head", HEADS)
def test_empty(head, I, counts, run):
    found, launches = run(head, case(head, I, counts), F16)
    assert found.shape == (I, len(counts))
    assert not launches


@pytest.mark.parametrize(
    "shape,gpu,message",
    [
        (dict(D=12), "sm_90", "D to be a multiple of 8, got 12"),
        (dict(R=129), "sm_90", "take images of 1 to 128 regions, got 129"),
        (dict(S=96), "sm_90", "S to be 64, 128 or 256, got 96"),
        (dict(counts=(128,)), "sm_90", "captions of at most 127 words here, got 128"),
        (dict(counts=(32,), S=256), "sm_75", "captions of at most 31 words for R = 36, S = 256 and float16, as"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_take_is_refused(shape, gpu, message, run):
    with pytest.raises(NotImplementedError, match=f"similarity_graph_score: CUDA kernels .*{message}"):
        run("graph", case("graph", **(dict(I=1, counts=(3,)) | shape)), F16, gpu=gpu)
