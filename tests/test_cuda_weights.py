"""The CUDA kernels of `cross_attention_score`, emulated, with weights that are no softmax, similarities that are no
cosine, and the pool of negative similarities."""

import itertools

import pytest
import torch
from cuda_emulated import device, emulated
from family_cases import golden
from sgraf_cases import under
from test_cuda_emulated import DIRECTIONS, check, drawn, run

from itm_fast.models import scorer
from itm_fast.ops import _draws, _examples
from itm_fast.ops._attention import POOLS, SIMILARITIES, WEIGHTS
from itm_fast.packing import pack

__all__ = ["device", "emulated"]  # fixtures
# Every weight with every similarity, and pools with some of them.
WAYS = [
    (*way, [*POOLS, "negative"][k % 5])
    for k, way in enumerate(itertools.product(WEIGHTS, SIMILARITIES))
    if way != ("softmax", "cosine")
]


def given(weights, similarity, **options):
    """Options in the order of the kernels' launch."""
    return dict(**options, weights=weights, threshold=0.45, similarity=similarity)


@pytest.mark.parametrize("weights, similarity, pool", WAYS)
def test_every_weight_and_similarity(device, weights, similarity, pool):
    image, words, cu_seqlens = drawn(3, (9, 1, 4), 7, 24)
    norm = "none" if weights in ("hard", "threshold") else "clipped_l2norm"
    for direction, counts in zip(DIRECTIONS, (None, torch.tensor([7, 1, 5]))):
        options = given(weights, similarity, direction=direction, affinity_norm=norm, scale=5.0, pool=pool)
        check("F16X3", 1.3 * image, 0.8 * words, cu_seqlens, counts, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["F16", "F16X3"])
@pytest.mark.parametrize("weights", WEIGHTS[1:])
def test_full_tiles(device, weights, dtype):
    """Affinities so far apart that no rounding changes which regions are kept."""
    size = _examples.SMALL._replace(images=5, lengths=(13, 30, 1), regions=36, dim=40)
    generator = torch.Generator().manual_seed(0)
    rows = _draws.apart(size, lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64))
    image, words = (x.to(dtype) for x in rows[:2])
    options = dict(affinity_norm="none", scale=4.0, weights=weights, threshold=0.35, similarity="projection")
    check("F16" if dtype == torch.float16 else "F16X3", image, words, rows[2], **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_equal_contexts_share_and_a_query_without_any_counts_zero(device, direction, similarity):
    image, words, _ = drawn(1, (3,), 4, 16)
    image, words = torch.cat([image, image], 1), torch.cat([words, words])
    cu_seqlens, options = torch.tensor([0, 6]), dict(direction=direction, affinity_norm="none", pool="sum")
    hard = run(image, words, cu_seqlens, **given("hard", similarity, **options))
    once = image[:, :4] if direction == "t2i" else image
    caption = words[:3] if direction == "i2t" else words
    some = run(once, caption, torch.tensor([0, len(caption)]), **given("hard", similarity, **options))
    torch.testing.assert_close(hard, some, rtol=0, atol=1e-5)
    above = {**given("threshold", similarity, **options), "threshold": 2.0}
    assert run(image, words, cu_seqlens, **above).eq(0).all()
    focal = [run(image[:, :1], words[:1], torch.tensor([0, 1]), **given(w, "cosine", **options)) for w in WEIGHTS[:3]]
    assert torch.equal(focal[0], focal[1])  # one context has all the weight
    assert torch.equal(focal[0], focal[2])


@pytest.mark.parametrize("norm", ["clipped", "clipped_l1norm", "clipped_l2norm"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_largest_affinity_equals_itself_after_a_norm(device, direction, norm):
    # Wherever it is computed. That is in doubt where products become part of differences, as NVRTC may have it, and the
    # emulator's compiler with -O3 -ffp-contract=fast.
    image, words, cu_seqlens = drawn(3, (9, 5, 4), 7, 24)
    image = -image if norm == "clipped" else image  # affinities that the slope multiplies
    options = dict(direction=direction, affinity_norm=norm, pool="sum")
    check("F16X3", image, words, cu_seqlens, **given("hard", "product", **options))
    if direction == "t2i":  # one context has all the weight
        image = image[:, :1].contiguous()
    else:
        words, cu_seqlens = words[:3], torch.arange(4)
    soft, *others = (run(image, words, cu_seqlens, **given(w, "cosine", **options)) for w in WEIGHTS[:4])
    assert all(torch.equal(found, soft) for found in others)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_threshold_is_compared_with_affinities_whatever_the_scale(device, direction):
    affinity = 0.5 + 1e-4 * torch.arange(8)
    contexts, query = affinity.diag()[None], torch.ones(1, 8)
    image, words = (contexts, query) if direction == "t2i" else (query[None], contexts[0])
    options = dict(direction=direction, affinity_norm="none", scale=1e-4, pool="sum", pool_scale=6.0)
    found = run(image, words, torch.tensor([0, len(words)]), **options, weights="threshold", threshold=0.50035,
                similarity="product")  # fmt: skip
    torch.testing.assert_close(found, affinity[4:].mean().view(1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS[1:])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_nan_stays_in_its_pairs(device, direction, weights):
    for similarity, pool in (("product", "mean"), ("cosine", "negative")):
        options = given(weights, similarity, direction=direction, affinity_norm="none", pool=pool)
        image, words, cu_seqlens = drawn(3, (3, 2, 4), 6, 16)
        words[4, 3] = torch.nan
        assert run(image, words, cu_seqlens, **options).isnan().tolist() == [[False, True, False]] * 3, similarity


# In float32 the softmax at lambda 20 of affinities that are right to 1e-6 is right to 1e-4.
FILES = {"bfan_equal": 1e-4, "chan_vha_max": 1e-5, "laps_maxmean_both_leaky": 1e-5, "naaf_train_scaled": 1e-4}


@pytest.mark.parametrize("file", FILES)
def test_published_vectors(device, file):
    want = golden(file)
    assert want["info/gap"] > 1e-4
    module = scorer(file.partition("_")[0], dim=want["image"].shape[2], **under(want, "option/"))
    counts, (words, edge) = want.get("image_lengths"), pack(want["caption"].float(), want["lengths"].tolist())
    terms = module.terms if hasattr(module, "terms") else [(1.0, term) for term in module._terms()]
    image = want["image"]
    if file.startswith("laps"):  # whose scorer makes unit vectors first
        image, words = (torch.nn.functional.normalize(x, dim=-1) for x in (image, words))
    plain = dict(
        direction="t2i", affinity_norm="clipped_l2norm", scale=9.0, pool="lse", pool_scale=6.0, weights="softmax",
        threshold=0.0, similarity="cosine",
    )  # fmt: skip
    score = sum(factor * run(image.float(), words, edge, counts, **{**plain, **own}) for factor, own in terms)
    largest = want["score"].abs().max().item()
    torch.testing.assert_close(score.double(), want["score"], rtol=0, atol=FILES[file] * max(1.0, largest))
