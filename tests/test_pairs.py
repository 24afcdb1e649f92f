"""Backward over the pairs that have a gradient: the same gradients, from fewer pairs."""

import re
import weakref
from functools import partial

import pytest
import torch
from test_similarity_score import FILTER, GRAPH
from torch.utils.checkpoint import checkpoint

import itm_fast
from itm_fast import _native
from itm_fast.models import _by_caption
from itm_fast.models._pair_blocks import blocks
from itm_fast.models.cmcan import ConfidenceMatching
from itm_fast.models.gsmn import StructuredMatching
from itm_fast.models.imram import IterativeMatching
from itm_fast.models.laps import SlimmedMaxMean
from itm_fast.models.rcar import RegulatedMatching
from itm_fast.models.tshsr import TwoStreamReasoning
from itm_fast.ops import _recompute
from itm_fast.ops._torch import attended_vectors, cross_attention_similarity, similarity_graph, similarity_score
from itm_fast.ops._torch import cross_attention_score as by_torch
from itm_fast.testing import inputs, op_checks

COUNTS = (5, 2, 7, 3, 5, 1, 4, 6, 2, 3, 8, 4)
REGIONS = (6, 2, 5, 6, 1, 6, 3, 6, 6, 4)
PAIRS = [(0, 3), (0, 0), (2, 11), (7, 3), (9, 1)]  # images 3 to 6, one of the groups, have none


def scan(*args, backend):
    bounds, regions = torch.tensor([0, *COUNTS]).cumsum(0), torch.tensor(REGIONS)
    return itm_fast.cross_attention_score(*args, bounds, region_lengths=regions, backend=backend)


def globally(*args, backend):
    return itm_fast.global_local_score(*args, torch.tensor([0, *COUNTS]).cumsum(0), backend=backend)


def graph():
    return GRAPH.case(10, COUNTS, regions=REGIONS)


CASES = {
    "cross_attention_score": lambda: (scan, [graph()[1][0], graph()[1][2]]),
    "global_local_score": lambda: (globally, [graph()[1][1], graph()[1][2]]),
    "similarity_graph_score": graph,
    "similarity_filter_score": lambda: FILTER.case(10, COUNTS, regions=REGIONS),
}


def gradients(op, backend, grad):
    call, args = CASES[op]()
    leaves = op_checks.leaves(args, torch.float64)
    return torch.autograd.grad(call(*leaves, backend=backend), leaves, grad)


@pytest.mark.parametrize("op", CASES)
def test_gradients_of_few_pairs(op, monkeypatch):
    grad = torch.zeros(len(REGIONS), len(COUNTS), dtype=torch.float64)
    for n, (i, t) in enumerate(PAIRS):
        grad[i, t] = n - 1.5
    with monkeypatch.context() as patch:
        patch.setattr(_recompute, "FEW", 1 << 40)  # all pairs at once: what does not go through the rule under test
        want = gradients(op, "reference", grad)
    pairs, rule = [], _recompute.of_pairs

    def counted(dense, axes, grad, needs, args):
        def count(part, *rest):
            pairs.append(part.shape)
            return dense(part, *rest)

        return rule(count, axes, grad, needs, args)

    monkeypatch.setattr(_recompute, "of_pairs", counted)
    for backend in [*op_checks.backends(op), "reference"]:
        pairs.clear()
        for found, exact in zip(gradients(op, backend, grad), want, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
        own = backend == "cpu"  # C++ leaves pairs out itself
        assert pairs == ([] if own else [(4, 3), (4, 1), (2, 1)])


SCORERS = {
    "CMCAN": lambda: ConfidenceMatching(16, 7, num_region=6).eval(),
    "IMRAM text": lambda: IterativeMatching(16, "text_IMRAM", 3),
    "IMRAM image, not normed": lambda: IterativeMatching(16, "image_IMRAM", 2, no_IMRAM_norm=True),
    "RCAR t2i": lambda: RegulatedMatching(16, 7, "t2i", "coop_rcar", 3),
    "RCAR i2t": lambda: RegulatedMatching(16, 7, "i2t", "coop_rcar", 2),
    "RCAR i2t, only rcr": lambda: RegulatedMatching(16, 7, "i2t", "only_rcr", 2),
    "RCAR t2i, without dropout": lambda: RegulatedMatching(16, 7, "t2i", "only_rar", 2).eval(),
    "TSHSR": lambda: TwoStreamReasoning(16, 7, num_region=6).eval(),
}


@pytest.mark.parametrize("regions", [None, REGIONS])
@pytest.mark.parametrize("name", SCORERS)
def test_scorers_of_several_ops_take_few_pairs_alone(name, regions, monkeypatch):
    torch.manual_seed(0)
    scorer = SCORERS[name]().double()
    for parameter in scorer.parameters():  # large ones, so that every layer matters
        torch.nn.init.normal_(parameter, 0, 0.5)
    image, words, cu_seqlens = inputs(10, COUNTS, 6, 16, dtype=torch.float64)
    leaves = [image.requires_grad_(), words.requires_grad_(), *scorer.parameters()]
    grad = torch.zeros(len(REGIONS), len(COUNTS), dtype=torch.float64)
    grad[tuple(zip(*PAIRS))] = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    grad[5] = 0.7  # too many for rectangles, which have others between them; but not one pair in 4
    assert not _recompute.few_pairs(grad)
    refused = [(_recompute, "of_pairs"), (_by_caption, "_columns")]  # where rectangles of pairs are taken

    def close(found, want):
        for one, exact in zip(found, want, strict=True):
            torch.testing.assert_close(one, exact, rtol=1e-10, atol=1e-12)

    def gradients(backend):
        torch.manual_seed(1)  # of dropout
        with itm_fast.use_backend(backend):
            score = scorer(image, words, cu_seqlens, None if regions is None else torch.tensor(regions))
            return torch.autograd.grad(score, leaves, grad, materialize_grads=True)

    with monkeypatch.context() as patch:
        patch.setattr(_recompute, "few_pairs", lambda *args: False)
        want = gradients("torch")
    with monkeypatch.context() as patch:
        patch.setattr(_by_caption, "_matched", _by_caption._columns)  # of dropout; as on a GPU
        close(gradients("torch"), want)
    for place, function in refused:
        monkeypatch.setattr(place, function, None if place is _by_caption else _only_ops(getattr(place, function)))
    for backend in op_checks.backends("attended_vectors"):
        close(gradients(backend), want)


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_of_several_ops_refuse_second_derivatives(name):
    image, words, cu_seqlens = inputs(3, (2, 5), 6, 16)
    with itm_fast.use_backend("torch"):
        score = SCORERS[name]()(image.requires_grad_(), words, cu_seqlens)
        with pytest.raises(NotImplementedError, match="has no second derivative; differentiate it without"):
            torch.autograd.grad(score.sum(), image, create_graph=True)


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_of_several_ops_hold_nothing_after_backward(name):
    image, words, cu_seqlens = inputs(10, COUNTS, 6, 16)
    for backend in op_checks.backends("attended_vectors"):
        given = [x.clone().requires_grad_() * 1 for x in (image, words)]
        held = [weakref.ref(x) for x in given]
        with itm_fast.use_backend(backend):
            score = SCORERS[name]()(*given, cu_seqlens)
            del given
            score.sum().backward()
        assert [x() for x in held] == [None, None]
        assert score.grad_fn is not None


def _only_ops(of_pairs):
    """`of_pairs` for backward passes of ops, which refuses those of scorers."""

    def run(dense, *args):
        assert "_Scored" not in dense.__qualname__
        return of_pairs(dense, *args)

    return run


def test_dropout_is_kept_as_bits():
    kept = torch.rand(3, 2, 5, 77) < 0.6
    bits = _by_caption.packed(kept)
    assert bits.shape == (3, 2, 5, 2)
    assert bits[0, 0, 0, 1].item() == sum(1 << s for s in range(13) if kept[0, 0, 0, 64 + s])
    assert torch.equal(_by_caption.unpacked(bits, 77), kept)


def test_what_few_pairs_are_is_the_same_in_cpp():
    sources = "".join(path.read_text() for path in sorted((_native.csrc_dir() / "cpu").glob("*_backward.*")))
    assert re.findall(r"\bFEW = (\d+);", sources) == [str(_recompute.FEW)]


@pytest.mark.parametrize("op", CASES)
def test_no_pair_at_all_and_nan(op):
    grad = torch.zeros(len(REGIONS), len(COUNTS), dtype=torch.float64)
    assert all(not g.any() for g in gradients(op, None, grad))
    grad[3, 2] = torch.nan  # is not zero: it must be seen
    assert gradients(op, None, grad)[0][3].isnan().any()


def similar(image, words, cu_seqlens):
    return itm_fast.cross_attention_similarity(image, words, cu_seqlens, torch.randn(7, 16), torch.randn(7))


def reasoned(image, words, cu_seqlens):
    weights = [x for _ in range(3) for x in (torch.randn(2, 16, 16), torch.randn(2, 16))]
    return itm_fast.similarity_graph(image[:, :1] + words, cu_seqlens, *weights)


@pytest.mark.usefixtures("small_calls")
@pytest.mark.parametrize(
    "place,name,scorer",
    [
        (by_torch, "_score", itm_fast.nn.CrossAttentionScore),
        (attended_vectors, "_attend", lambda: partial(itm_fast.attended_vectors, direction="i2t")),
        (cross_attention_similarity, "similarity", lambda: similar),
        (similarity_graph, "reason", lambda: reasoned),
        (TwoStreamReasoning, "_block", SCORERS["TSHSR"]),
        (RegulatedMatching, "_block", SCORERS["RCAR t2i"]),
        (RegulatedMatching, "_block", SCORERS["RCAR i2t"]),
    ],
    ids=["score", "attended", "similarity", "graph", "scorer", "dropout t2i", "dropout i2t"],
)
def test_of_small_calls_what_autograd_records_is_kept(place, name, scorer, monkeypatch):
    (image, words, cu_seqlens), computed, function = inputs(4, COUNTS[:5], 6, 16), [], getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **options: computed.append(1) or function(*args, **options))
    scorer, leaves = scorer(), [image.requires_grad_(), words.requires_grad_()]

    def scored():
        torch.manual_seed(1)  # of dropout
        return scorer(*leaves, cu_seqlens)

    with itm_fast.use_backend("torch"):
        score = scored()
        once = len(computed)
        found = [torch.autograd.grad(score.sum(), leaves, retain_graph=True)]
        assert len(computed) == once
        found += [torch.autograd.grad(score.sum(), leaves)]  # the record has gone
        assert len(computed) == 2 * once
        monkeypatch.setattr(_recompute, "RECORDED_PAIRS", 0)
        found += [torch.autograd.grad(scored().sum(), leaves)]
    for again in found[1:]:
        for a, b in zip(found[0], again, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("small_calls")
@pytest.mark.parametrize("op", ["similarity_graph_score", "similarity_filter_score"])
def test_of_small_calls_with_a_head_what_autograd_records_is_kept(op, monkeypatch):
    computed, function = [], similarity_score._score
    monkeypatch.setattr(similarity_score, "_score", lambda *args: computed.append(1) or function(*args))
    grad = torch.randn(len(REGIONS), len(COUNTS), dtype=torch.float64)
    found = gradients(op, "torch", grad)
    once = len(computed)
    monkeypatch.setattr(_recompute, "RECORDED_PAIRS", 0)
    for again, first in zip(gradients(op, "torch", grad), found, strict=True):
        torch.testing.assert_close(again, first, rtol=1e-10, atol=1e-12)
    assert len(computed) == 3 * once


@pytest.mark.usefixtures("small_calls")
@pytest.mark.parametrize("scorer", [itm_fast.nn.CrossAttentionScore, SCORERS["TSHSR"]], ids=["op", "scorer"])
def test_what_autograd_records_is_kept_only_where_it_may_be(scorer, monkeypatch):
    recorded, function, scorer = [], _recompute.forward_recorded, scorer()
    monkeypatch.setattr(_recompute, "forward_recorded", lambda *args: recorded.append(1) or function(*args))
    image, words, cu_seqlens = inputs(4, COUNTS[:5], 6, 16)
    half = [x.bfloat16().requires_grad_() for x in (image, words)]
    leaves = [image.requires_grad_(), words.requires_grad_()]
    with itm_fast.use_backend("torch"):
        expected = scorer(*leaves, cu_seqlens)
        assert recorded
        recorded.clear()
        with torch.inference_mode():
            features = image * 1, words * 1
        with torch.no_grad():  # where a parameter needs a gradient, but nobody can ask for it
            torch.testing.assert_close(scorer(*features, cu_seqlens), expected, rtol=0, atol=1e-6)
        with itm_fast.workspace(1e-6):
            scorer(*leaves, cu_seqlens)
        if list(scorer.parameters()):  # which rounds between its ops, unless it is recorded
            scorer.bfloat16()(*half, cu_seqlens)
        assert not recorded


@pytest.mark.usefixtures("small_calls")
@pytest.mark.parametrize("scorer", [itm_fast.nn.CrossAttentionScore, SCORERS["TSHSR"]], ids=["op", "scorer"])
def test_of_small_calls_too_nan_stays_in_its_pairs(scorer):
    image, words, cu_seqlens = inputs(4, COUNTS[:5], 6, 16)
    words[cu_seqlens[2] : cu_seqlens[3]] = torch.nan
    leaves = [image.requires_grad_(), words.requires_grad_()]
    grad = torch.zeros(4, 5)
    grad[0, 1], grad[3, 4] = 1.0, -1.0
    with itm_fast.use_backend("torch"):
        d_image, d_words = torch.autograd.grad(scorer()(*leaves, cu_seqlens), leaves, grad)
    assert d_image.any()
    for finite in (d_image, d_words[: cu_seqlens[2]], d_words[cu_seqlens[3] :]):
        assert finite.isfinite().all()


@pytest.mark.parametrize("direction,lengths", [("t2i", (1,) * 60 + (10,)), ("t2i", (10,) * 20), ("i2t", (10,) * 20)])
def test_blocks_of_joined_captions_keep_to_their_memory(direction, lengths, monkeypatch):
    """Half of the scratch memory, with what autograd saves of captions that are padded to the longest."""
    saved, recorded = [], _recompute.recorded

    def weighed(blocks, *args):
        for block in blocks:
            storages = {}

            def pack(x, storages=storages):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                (found,) = recorded([block], *args)
            saved.append(sum(x.nbytes() for x in storages.values()))
            yield found

    monkeypatch.setattr(_recompute, "recorded", weighed)
    scorer = RegulatedMatching(16, 64, direction, step=3)
    image, words, cu_seqlens = inputs(24, lengths, 12, 16)
    with itm_fast.use_backend("torch"), itm_fast.workspace(16 / 1024):
        scorer(image.requires_grad_(), words, cu_seqlens).sum().backward()
    assert len(saved) > 1
    assert max(saved) < 8 << 20


def test_all_images_share_the_padding_of_joined_captions():
    """So that its places are made, and copied to a GPU, once."""
    seen, given = [], (*inputs(40, (2, 3, 3), 4, 8), None)
    for block in blocks("", "IN", lambda n: n << 20, lambda of, *rest: seen.append(of), False, *given, joined=True):
        block.function(*given[:2])
    assert len(seen) > 1
    assert len({id(of.padded) for of in seen}) == 1


@pytest.mark.usefixtures("small_calls")
def test_what_autograd_records_of_one_op_stands_the_checks_of_ops():
    image, words, cu_seqlens = inputs(2, (2, 3, 1), 3, 4, dtype=torch.float64)
    call = lambda image, words, backend: itm_fast.attended_vectors(image, words, cu_seqlens, backend=backend)  # noqa: E731
    op_checks.check_gradcheck(call, [image, words], "torch")
    op_checks.check_deterministic(call, [image, words], "torch")
    image.requires_grad_()
    changed = words * 1
    result = call(image, changed, "torch")
    changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.usefixtures("small_calls")
@pytest.mark.parametrize("scorer", [lambda: partial(itm_fast.attended_vectors, direction="i2t"), SCORERS["RCAR i2t"]])
def test_checkpoint_computes_small_calls_again(scorer):
    """With other limits and another backend than forward: backward runs outside both `with`."""
    (image, words, cu_seqlens), scorer = inputs(4, (3, 4, 5, 6), 36, 16), scorer()
    leaves, found = [image.requires_grad_(), words.requires_grad_()], []
    for call in (scorer, partial(checkpoint, scorer, use_reentrant=False)):
        torch.manual_seed(1)  # of dropout
        with itm_fast.use_backend("torch"), itm_fast.workspace(0.1):
            score = call(*leaves, cu_seqlens)
        found.append(torch.autograd.grad(score.sum(), leaves))
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(again, once)


class Later(IterativeMatching):
    """IMRAM's steps from the second on: the first one is an op, which says for itself what it records."""

    def score(self, state, words, cu_seqlens, _, region_lengths):
        direction = "t2i" if self.model_mode == "text_IMRAM" else "i2t"
        return self._later(direction, *state, words, cu_seqlens, region_lengths)


@pytest.mark.usefixtures("small_calls")
@pytest.mark.parametrize("counts,regions", [((9, 4, 12, 9), None), ((1, 2, 1), None), ((30, 40), [36, 20, 30, 10])])
@pytest.mark.parametrize(
    "scorer",
    [
        partial(ConfidenceMatching, 128, 64, num_region=36),
        partial(RegulatedMatching, 128, 64, "t2i", "coop_rcar", 3),
        partial(RegulatedMatching, 128, 64, "i2t", "only_rcr", 1),
        partial(TwoStreamReasoning, 128, 64, num_region=36),
        StructuredMatching,
        partial(SlimmedMaxMean, 128, num_patches=35),
        partial(Later, 128, "text_IMRAM"),
        partial(Later, 128, "image_IMRAM", 2),
    ],
    ids=["CMCAN", "RCAR t2i", "RCAR i2t", "TSHSR", "GSMN", "LAPS", "IMRAM t2i", "IMRAM i2t"],
)
def test_a_model_records_about_as_much_as_it_is_said_to(scorer, counts, regions, monkeypatch):
    """With the ops that it calls. At most 5 % more, as bounds and copies that depend on how torch multiplies are not
    counted; and more than half, as calls of half the size that is allowed would else be computed again."""
    sizes, kept, decide = [], {}, _recompute.recordable
    monkeypatch.setattr(_recompute, "recordable", lambda *args: sizes.append(args[1]) or decide(*args))
    monkeypatch.setattr(_recompute, "_hooked", lambda: False)  # here they only count
    image, words, cu_seqlens = inputs(4, counts, 36, 128)
    leaves, scorer = [image.requires_grad_(), words.requires_grad_()], scorer()
    takes_lengths = regions and not isinstance(scorer, SlimmedMaxMean)
    lengths = torch.tensor(regions) if takes_lengths else None

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no other takes its place
        return x

    boxes = [torch.rand(4, 36, 4).sort(-1).values] if scorer.takes_boxes else []
    states = scorer.image_state(image, lengths, *boxes), scorer.caption_state(words, cu_seqlens)
    with itm_fast.use_backend("torch"), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        scorer.score(states[0], words, cu_seqlens, states[1], lengths)
    given = {x.data_ptr() for x in (*leaves, *states[0], *states[1], *scorer.parameters())}
    held = sum(x.nbytes() for at, x in kept.items() if at not in given)
    assert sizes[0] / 2 < held < 1.05 * sizes[0]
