"""Cross-attention where a function has no derivative or jumps: gradients are PyTorch's, and the same contexts and
queries count, whatever the backend."""

import pytest
import torch

import itm_fast
from itm_fast.ops._attention import DIRECTIONS, WEIGHTS
from itm_fast.testing import op_checks

OPS = ("cross_attention_score", "cross_attention_similarity")


def each(*ops):
    backends = [(op, b) for op in ops for b in op_checks.backends(op, dtype=torch.float32)]
    return pytest.mark.parametrize("op,backend", backends)


def check(op, backend, image, words, counts, **options):
    """Results and gradients of float32 in a backend are the reference's; returns the gradients."""
    found = {}
    for name in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in (image, words)]
        options["cu_seqlens"] = torch.tensor([0, *counts]).cumsum(0)
        result = getattr(itm_fast, op)(*leaves, backend=name, **options)
        found[name] = torch.autograd.grad(result, leaves, op_checks.upstream(result)) + (result,)
    for a, b in zip(found[backend], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return found[backend]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["clipped", "clipped_l2norm"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@each(*OPS)
def test_slope_of_leaky_relu_at_affinities_of_exactly_0(op, backend, direction, norm):
    generator = torch.Generator().manual_seed(0)
    image, words = (torch.randint(-1, 2, n, generator=generator).float() for n in ((3, 7, 8), (9, 8)))
    assert (image @ words.t() == 0).float().mean() > 0.1
    options = {"direction": direction, "affinity_norm": norm, "scale": 2.0}
    if op == "cross_attention_similarity":
        options |= {"weight": torch.randn(5, 8, generator=generator), "bias": torch.zeros(5)}
    check(op, backend, image, words, (4, 3, 2), **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@each("cross_attention_score")
def test_the_first_of_equal_cosines_gets_the_gradient_of_their_maximum(op, backend, direction):
    """With one context a query attends to it alone, so that the same query has the same bits wherever it stands."""
    generator = torch.Generator().manual_seed(0)
    query, context = (torch.randn(n, 8, generator=generator) for n in (1, 3))
    query = torch.cat([-query, query.expand(70, 8)])
    if direction == "t2i":
        gradient = check(op, backend, context[:, None], query, (71,), pool="max", direction=direction)[1]
    else:
        gradient = check(op, backend, query[None], context, (1, 1, 1), pool="max", direction=direction)[0][0]
    assert (gradient.abs().sum(1) > 1e-6).nonzero().flatten().tolist() == [1]  # -query, the row before, is no maximum


SUBSETS = [(w, s) for w in WEIGHTS if w != "softmax" for s in ("product", "cosine")]


@pytest.mark.slow
@pytest.mark.parametrize("weights,similarity", SUBSETS)
@each("cross_attention_score")
def test_contexts_and_queries_at_a_threshold_and_equal_ones(op, backend, weights, similarity):
    """Affinities are whole numbers: many are the largest of a query together, or exactly the threshold, as are products
    r of hard weights. Words of zeros have equal affinities, which no threshold keeps.
    """
    generator = torch.Generator().manual_seed(2)
    image, words = (torch.randint(-1, 2, n, generator=generator).float() for n in ((3, 7, 8), (9, 8)))
    words[[2, 8]] = 0
    affinity = image @ words.t()
    assert (affinity == 1).float().mean() > 0.1
    assert ((affinity == affinity.amax(1, keepdim=True)).sum(1) > 1).float().mean() > 0.3
    options = dict(affinity_norm="none", scale=2.0, weights=weights, threshold=1.0, similarity=similarity)
    for direction, pool in zip(DIRECTIONS, ("negative", "sum")):
        check(op, backend, image, words, (4, 3, 2), direction=direction, pool=pool, **options)
