"""The pair scorers around a head: `similarity_graph_score` and `similarity_filter_score`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from pair_score_cases import DTYPES, INPUTS, SHAPES, drawer, edges, inputs, lengths

import itm_fast
from itm_fast.ops import _recompute
from itm_fast.testing import op_checks

BACKENDS = op_checks.backends("similarity_graph_score")
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_all = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])


class Scorer(NamedTuple):
    """A pair scorer: its op, the op of its head, and what it takes for that."""

    op: str
    head: str
    names: tuple[str, ...]  # of the head's parameters
    draw: Callable  # (draw, S, K) -> them
    statistics: Mapping[str, torch.Tensor] = MappingProxyType({})
    options: tuple[float, ...] = ()

    def named(self, args):
        """The arguments that may need a gradient, by name."""
        return dict(zip([*INPUTS, *self.names, "score_weight", "score_bias"], args, strict=True))

    def scored(self, counts, *args, **options):
        (edge,) = op_checks.beside(args[0], edges(counts))
        statistics = {name: value.to(args[0]) for name, value in self.statistics.items()}
        return getattr(itm_fast, self.op)(**self.named(args), **statistics, cu_seqlens=edge, **options)

    def case(self, I, counts, R=6, D=16, S=8, regions=None, K=2, **options):
        """The op as a function of what may need a gradient, and those arguments."""
        draw = drawer()
        args = [*inputs(draw, I, counts, R, D, S), *self.draw(draw, S, K), 4 * draw(S), draw(1)]

        def call(*args, backend):
            (region_lengths,) = op_checks.beside(args[0], lengths(regions))
            return self.scored(counts, *args, region_lengths=region_lengths, backend=backend, **options)

        return call, args


def graph(draw, S, K):
    # Enlarged query and key weights: with small ones every node becomes the mean and no test sees the edges.
    pairs = [(enlarged * draw(K, S, S) / S**0.5, 0.3 * draw(K, S)) for enlarged in (6, 6, 1)]
    return [x for pair in pairs for x in pair]


SCORERS = {
    "similarity_graph_score": Scorer(
        "similarity_graph_score",
        "similarity_graph",
        ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "value_bias"),
        graph,
    ),
    "similarity_filter_score": Scorer(
        "similarity_filter_score",
        "similarity_filter",
        ("filter_weight", "filter_bias", "norm_weight", "norm_bias"),
        lambda draw, S, K: [3 * draw(S), 0.2 * draw(1), 1 + draw(1).abs(), 0.2 * draw(1)],
        {name: torch.tensor([x], dtype=torch.float64) for name, x in (("running_mean", 0.3), ("running_var", 0.5))},
        (1e-5,),
    ),
}
GRAPH, FILTER = SCORERS.values()
over_scorers = pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@over_backends
@over_scorers
def test_forward_and_gradients(scorer, backend, dtype, shape):
    call, args = scorer.case(*shape)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@over_all
@over_scorers
def test_gradcheck(scorer, backend):
    call, args = scorer.case(2, (3, 1), 3, 4, 3, (3, 2))
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.slow
@over_all
@over_scorers
def test_torch_contracts(scorer, backend):
    counts = (4, 2, 4)
    call, args = scorer.case(3, counts)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    statistics = [x.float() for x in scorer.statistics.values()]
    rest = *statistics, edges(counts), torch.tensor([6, 2, 3]), 9.0, *scorer.options, "logit"
    torch.library.opcheck(getattr(torch.ops.itm_fast, scorer.op).default, (*single, *rest, backend))
    op_checks.check_fake_backward(scorer.op, (*single, *rest), len(single), backend)


@over_all
@over_scorers
def test_it_is_the_ops_one_after_the_other(scorer, backend):
    counts, regions = (5, 3, 5), (6, 2, 5, 6)
    call, args = scorer.case(4, counts, regions=regions)
    image, v, words, t, *local, global_weight, global_bias = args[:8]
    *parameters, score_weight, score_bias = args[8:]
    similar = itm_fast.cross_attention_similarity(
        image, words, edges(counts), *local, region_lengths=lengths(regions), backend="reference"
    )
    y = (v[:, None] - t).square() @ global_weight.t() + global_bias
    overall = y / (y.norm(dim=-1, keepdim=True) + 1e-8)
    head = getattr(itm_fast, scorer.head)
    want = []
    for n, part in enumerate(similar.split(counts, 1)):
        nodes = torch.cat([overall[:, n : n + 1], part], 1)
        bounds = torch.tensor([0, nodes.shape[1]])
        z = op_checks.first(head(nodes, bounds, *parameters, *scorer.statistics.values(), backend="reference"))
        want.append((z[:, 0] @ score_weight + score_bias).sigmoid())
    found = call(*args, backend=backend)
    assert found.std() > 0.01  # or the comparison would see little
    torch.testing.assert_close(found, torch.stack(want, 1), rtol=1e-12, atol=1e-12)


@over_all
def test_the_key_bias_has_no_effect(backend):
    call, args = GRAPH.case(2, (5, 3))
    place = list(GRAPH.named(args)).index("key_bias")
    moved = list(args)
    moved[place] = args[place] + 1
    torch.testing.assert_close(call(*moved, backend=backend), call(*args, backend=backend))
    grads = op_checks.gradients(call, args, torch.float64, backend, torch.float64)
    assert grads[place].abs().max() < 1e-12


@over_all
@over_scorers
def test_logits(scorer, backend):
    call, args = scorer.case(3, (5, 3, 5), output="logit")
    logit = call(*args, backend=backend)
    torch.testing.assert_close(logit.sigmoid(), scorer.case(3, (5, 3, 5))[0](*args, backend=backend))
    for dtype in (torch.float64, torch.float32) if backend != "reference" else ():
        op_checks.check_forward(call, args, dtype, backend)
        op_checks.check_gradients(call, args, dtype, backend)
    # A score of 1.0 in float32 has no gradient, its logit has.
    args[-1] += 30
    single = [a.float().requires_grad_() for a in args]
    result = call(*single, backend=backend)
    assert result.sigmoid().eq(1).all()
    result.sum().backward()
    assert single[0].grad.isfinite().all()
    assert single[0].grad.any()


@pytest.mark.parametrize("I,counts", [(0, (3, 2)), (2, ()), (0, ())])
@over_all
@over_scorers
def test_empty(scorer, backend, I, counts):
    call, args = scorer.case(I, counts)
    leaves = [a.requires_grad_() for a in args]
    result = call(*leaves, backend=backend)
    assert result.shape == (I, len(counts))
    result.sum().backward()
    assert all(x.grad.eq(0).all() for x in leaves)


@over_backends
@over_scorers
def test_a_pair_does_not_depend_on_its_block(scorer, backend, monkeypatch):
    counts = (5, 3, 6, 5, 10, 5, 2)
    call, args = scorer.case(7, counts)
    whole = call(*args, backend=backend)
    image, image_global, words, caption_global, *parameters = args
    edge = edges(counts).tolist()
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        part = image[2:3], image_global[2:3], words[start:stop], caption_global[t : t + 1]
        one = scorer.scored((stop - start,), *part, *parameters, backend=backend)
        torch.testing.assert_close(one[0, 0], whole[2, t], rtol=1e-12, atol=1e-12)
    grads = op_checks.gradients(call, args, torch.float64, backend, torch.float64)
    for tile in (1, 1 << 15):
        monkeypatch.setattr(_recompute, "CPU_TILE", tile)
        monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
        torch.testing.assert_close(call(*args, backend=backend), whole, rtol=1e-12, atol=1e-12)
        again = op_checks.gradients(call, args, torch.float64, backend, torch.float64)
        for a, b in zip(again, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@over_backends
@over_scorers
def test_padded_regions_never_leak(scorer, backend):
    regions = (6, 1, 4)
    call, args = scorer.case(3, (4, 2), regions=regions)
    want = call(*args, backend="reference")
    for i, n in enumerate(regions):
        args[0][i, n:] = float("nan")
    leaves = [a.requires_grad_() for a in args]
    score = call(*leaves, backend=backend)
    torch.testing.assert_close(score, want)
    score.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert not leaves[0].grad[1, 1:].any()


@over_scorers
def test_autocast_takes_its_dtype(scorer):
    call, args = scorer.case(2, (3, 2))
    op_checks.check_autocast(call, args)


WRONG = [
    ({"image_global": torch.zeros(2, 5)}, ValueError, r"image_global must be \[I, D\] with D = 16 as in image"),
    ({"caption_global": torch.zeros(3, 16)}, ValueError, r"cu_seqlens must be \[T\+1\] with T = 3 as in caption"),
    ({"global_weight": torch.zeros(7, 16)}, ValueError, r"global_weight must be \[S, D\] with S = 8"),
    ({"score_weight": torch.zeros(1, 8)}, ValueError, r"score_weight must be \[S\], got \[1, 8\]"),
    ({"score_bias": torch.zeros(1).double()}, TypeError, "score_bias and image must have one dtype"),
    ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, r"end at the 5 packed rows, got 0\.\.4"),
    ({"region_lengths": torch.tensor([7, 1])}, ValueError, r"region_lengths must lie in 1\.\.6"),
    ({"scale": 0.0}, ValueError, "scale must be more than 0"),
    ({"output": "raw"}, ValueError, "output must be one of score, logit, got 'raw'"),
    ({"backend": "cuda"}, NotImplementedError, "cuda"),
]
WRONG_OF_GRAPH = [({"value_bias": torch.zeros(3, 8)}, ValueError, r"value_bias must be \[K, S\] with K = 2")]
WRONG_OF_FILTER = [
    ({"filter_weight": torch.zeros(1, 8)}, ValueError, r"filter_weight must be \[S\], got \[1, 8\]"),
    ({"running_var": torch.ones(2)}, ValueError, r"running_var must be \[1\], got \[2\]"),
    ({"eps": 0.0}, ValueError, "eps must be more than 0"),
]
REFUSED = [(GRAPH, *row) for row in WRONG + WRONG_OF_GRAPH] + [(FILTER, *row) for row in WRONG + WRONG_OF_FILTER]


@pytest.mark.parametrize("scorer,change,error,message", REFUSED, ids=[f"{row[0].head}-{row[1]}" for row in REFUSED])
def test_refusals(scorer, change, error, message):
    _, args = scorer.case(2, (3, 2))
    given = {**scorer.named(args), **scorer.statistics}
    arguments = {name: x.float() for name, x in given.items()} | {"cu_seqlens": edges((3, 2))} | change
    with pytest.raises(error, match=message) as refusal:
        getattr(itm_fast, scorer.op)(**arguments)
    assert str(refusal.value).startswith(scorer.op)


def test_no_steps_are_refused():
    _, args = GRAPH.case(2, (3, 2))
    args[8:14] = (p[:0] for p in args[8:14])
    with pytest.raises(ValueError, match="number of steps K must be more than 0"):
        GRAPH.scored((3, 2), *args)
