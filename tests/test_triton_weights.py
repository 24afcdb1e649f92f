"""The Triton kernels of `cross_attention_score` with weights that are no softmax, similarities that are no cosine, and
the pools of negative similarities."""

import itertools

import pytest
import torch
from family_cases import golden
from sgraf_cases import under
from test_attention_weights import COUNTS, case, norms
from triton_cases import HALVES, TRITON, check_blocks, placed

import itm_fast
from itm_fast.models import scorer
from itm_fast.ops._attention import NEGATIVE, SIMILARITIES, WEIGHTS
from itm_fast.testing import op_checks

POOLS = ("mean", *NEGATIVE, "lse", "max", "sum")
# Every weight with every similarity, and every direction, norm and pool with some of them.
WAYS = [
    (weights, similarity, ("t2i", "i2t")[k % 2], norms(weights)[k // 2 % 2], POOLS[k % len(POOLS)])
    for k, (weights, similarity) in enumerate(itertools.product(WEIGHTS, SIMILARITIES))
]
# BFAN; NAAF's three terms, the first of which is CHAN's and MaxSim's
MODELS = [
    dict(weights="focal_equal", pool="mean"),
    dict(weights="focal_prob", affinity_norm="none"),
    dict(weights="hard", similarity="product", affinity_norm="none", pool="smoothed_negative"),
    dict(weights="threshold", similarity="projection", affinity_norm="none", pool="mean"),
    dict(similarity="product", pool="negative"),
]


def check(call, args, device, backend, dtype=torch.float32):
    args = placed(args, device)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@TRITON
@pytest.mark.parametrize("weights,similarity,direction,norm,pool", WAYS)
def test_forward_and_gradients(weights, similarity, direction, norm, pool, device, backend):
    options = dict(weights=weights, similarity=similarity, direction=direction, affinity_norm=norm, pool=pool)
    call, args = case(COUNTS, (4, 1, 5), threshold=0.45, **options)
    check(call, args, device, backend)


@TRITON
@pytest.mark.parametrize("options", MODELS, ids=["bfan", "bfan-prob", "maxima", "threshold", "products"])
def test_sets_of_several_tiles_and_half_precision(options, device, backend):
    shape = (None, (34, 1), 70)
    for direction in ("t2i", "i2t"):
        check(*case(*shape, direction=direction, threshold=0.4, **options), device, backend)
    # Here every query keeps a context: if none is kept the reference divides by 1e-8, which is 0 in float16.
    call, args = case(None, (4, 1, 5), threshold=0.0, **options)
    for dtype in HALVES[device]:
        op_checks.check_forward(call, placed(args, device), dtype, backend)


@TRITON
def test_gradients_of_many_pieces_are_those_of_one(device, backend):
    call, args = case(None, (13, 1, 40), threshold=0.4, **MODELS[2])
    check_blocks(call, placed(args, device), torch.float32, 2.0**-17, 1e-6)


@TRITON
@pytest.mark.parametrize("k,weights", [*enumerate(WEIGHTS)])
def test_nan_stays_nan_and_in_its_caption(k, weights, device, backend):
    for pool, similarity in (("mean", "cosine"), (NEGATIVE[k % 2], "product")):
        options = dict(affinity_norm="none", weights=weights, similarity=similarity, pool=pool)
        call, args = case(None, (3, 2, 4), **options)
        image, words = placed(args, device, torch.float32)
        words[4, 3] = torch.nan
        assert call(image, words, backend).isnan().tolist() == [[False, True, False]] * 3, pool


# Where float32's affinities, of unit vectors and right to 1e-6, fall as float64's do: see `info/gap`. A weight of the
# softmax at lambda 20 is then right to 1e-4.
FILES = {"bfan_equal": 1e-4, "chan_vha_max": 1e-5, "laps_maxmean_both_leaky": 1e-5, "naaf_test_scaled": 1e-4}


@TRITON
@pytest.mark.parametrize("file", FILES)
def test_published_vectors(file, device, backend):
    want = golden(file)
    assert want["info/gap"] > 1e-4
    module = scorer(file.partition("_")[0], dim=want["image"].shape[2], **under(want, "option/")).to(device)
    names = ("image", "caption", "d_score", "score", "d_image", "d_caption")
    image, caption, d_score, *expected = (want[name].to(device, torch.float32) for name in names)
    lengths = want.get("image_lengths")
    with itm_fast.use_backend(backend):
        score = module(
            image.requires_grad_(), caption.requires_grad_(), want["lengths"].tolist(),
            region_lengths=lengths if lengths is None else lengths.to(device),
        )  # fmt: skip
        score.backward(d_score)
    for found, value in zip((score, image.grad, caption.grad), expected, strict=True):
        largest = value.abs().max().item()
        torch.testing.assert_close(found, value, rtol=0, atol=FILES[file] * max(1.0, largest))
