"""What every op promises, on its Triton kernels: accuracy, gradients, torch's contracts, the same bits in any block."""

import itertools

import pytest
import test_attended_vectors
import test_cross_attention_score
import test_cross_attention_similarity
import test_global_local_score
import test_hierarchical_alignment_score
import test_similarity_context
import test_similarity_filter
import test_similarity_graph
import test_similarity_nodes
import torch
from test_similarity_score import FILTER, GRAPH
from triton_cases import EVERYWHERE, GPU, TRITON, dtypes, placed

import itm_fast
from itm_fast import _backends
from itm_fast.ops import _score_backward
from itm_fast.ops._attention import DIRECTIONS, NORMS, POOLS
from itm_fast.ops._declare import DECLARED
from itm_fast.testing import op_checks

# op -> the module that has its case(), and that function's arguments for one word on one region, for captions of many
# lengths (several tiles), and for sizes that no tile divides
COUNTS = (13, 1, 4, 4, 7)
SCORED = {
    "one": (1, (1,), 1, 1, 1, None),
    "ragged": (3, COUNTS, 9, 64, 32, None),
    "prime": (3, (5, 5, 2), 7, 17, 11, (7, 1, 4)),
}
CASES = {
    "cross_attention_score": (
        test_cross_attention_score,
        {"one": (1, (1,), 1, 1), "ragged": (3, COUNTS, 36, 64), "prime": (3, (5, 5, 2), 17, 31)},
    ),
    "attended_vectors": (
        test_attended_vectors.OWN,
        {"one": (1, (1,), 1, 1, 1), "ragged": (3, COUNTS, 9, 32, 16), "prime": (3, (5, 5, 2), 7, 31, 11, (7, 1, 4))},
    ),
    "cross_attention_similarity": (
        test_cross_attention_similarity,
        {"one": (1, (1,), 1, 1, 2), "ragged": (3, COUNTS, 36, 64, 32), "prime": (3, (5, 5, 2), 17, 31, 7)},
    ),
    "global_local_score": (
        test_global_local_score,
        {"one": (1, (1,), 1), "ragged": (3, (13, 1, 40, 4, 7), 64), "prime": (3, (5, 5, 2), 31)},
    ),
    "similarity_nodes": (
        test_similarity_nodes,
        SCORED | {"one": (1, (1,), 1, 1, 2, None), "prime": (3, (5, 5, 4), 7, 31, 11, (7, 1, 4))},
    ),
    "similarity_context": (
        test_similarity_context,
        {
            "one": (1, (1,), 1, (1,)),
            "ragged": (3, (14, 2, 5, 33, 8), 64, (4, 1)),
            "prime": (3, (6, 6, 3), 17, (3, 2, 1)),
        },
    ),
    "similarity_graph": (
        test_similarity_graph,
        {"one": (1, (1,), 1, 1), "ragged": (3, (14, 2, 5, 5, 8), 64, 3), "prime": (3, (6, 6, 3), 17, 2)},
    ),
    "similarity_filter": (
        test_similarity_filter,
        {"one": (2, (1,), 2), "ragged": (3, (14, 2, 5, 5, 8), 64), "prime": (3, (6, 6, 3), 17)},
    ),
    "similarity_graph_score": (GRAPH, SCORED | {"prime": (3, (5, 5, 2), 7, 31, 11, (7, 1, 4))}),
    "similarity_filter_score": (FILTER, SCORED),
    "hierarchical_alignment_score": (
        test_hierarchical_alignment_score,
        {"one": (1, (1,), 1, 8), "ragged": (3, COUNTS, 9, 64), "prime": (3, (5, 5, 2), 7, 17, (7, 1, 4))},
    ),
}
OPS = [op for op in CASES if "triton" in _backends.OFFERS[op]]
over_ops = pytest.mark.parametrize("op", OPS)
TRACED = ["cross_attention_score", "similarity_nodes"]  # where kernels are interpreted: one result, and several


def test_every_op_with_triton_kernels_has_a_case():
    assert set(CASES) == {op for op, offered in _backends.OFFERS.items() if "triton" in offered}


def case(op, shape, device, **options):
    """The op as a function of what may need a gradient, and those arguments on a device in float64."""
    module, shapes = CASES[op]
    call, args = module.case(*shapes[shape], **options)
    return (module.nodes_only(call) if op == "similarity_nodes" else call), placed(args, device)


@EVERYWHERE
@pytest.mark.parametrize("shape", ["one", "ragged", "prime"])
@over_ops
def test_forward_and_gradients(op, shape, device, backend):
    call, args = case(op, shape, device)
    for dtype in dtypes(device):
        op_checks.check_forward(call, args, dtype, backend)
        op_checks.check_gradients(call, args, dtype, backend)


@EVERYWHERE
@pytest.mark.parametrize("scorer,numbers", [(GRAPH, 1), (FILTER, 1 << 40)], ids=["together", "one_by_one"])
def test_gradients_where_few_pairs_have_one(scorer, numbers, device, backend, monkeypatch):
    monkeypatch.setattr(_score_backward, "numbers_of_pair", lambda *sizes: numbers)
    regions = (6, 2, 5, 6, 3, 6, 4, 1)
    call, args = scorer.case(8, (4, 1, 7), regions=regions)
    for image, n in zip(args[0], regions):
        image[n:] = float("nan")
    kept, args = torch.zeros(8, 3, device=device), placed(args, device)
    kept[[1, 4, 4], [0, 2, 0]] = 1
    if backend == "triton":  # which does not compute the nodes of the other pairs
        monkeypatch.setattr(torch.ops.itm_fast, "similarity_nodes", None)

    def some(*args, backend):
        return call(*args, backend=backend) * kept.to(args[0].dtype)

    for dtype in dtypes(device):
        op_checks.check_gradients(some, args, dtype, backend)


@EVERYWHERE
@over_ops
def test_a_float64_default_changes_nothing(op, device, backend):
    call, args = case(op, "one", device)
    want = op_checks.gradients(call, args, torch.float32, backend, torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        found = op_checks.gradients(call, args, torch.float32, backend, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@EVERYWHERE
@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("cross_attention") or op == "attended_vectors"])
def test_i2t(op, device, backend):
    call, args = case(op, "prime", device, direction="i2t")
    for dtype in dtypes(device):
        op_checks.check_forward(call, args, dtype, backend)
        op_checks.check_gradients(call, args, dtype, backend)


@EVERYWHERE
@pytest.mark.parametrize("op", [op for op in OPS if op == "similarity_filter"])
def test_statistics_of_training(op, device, backend):
    for shape in ("ragged", "prime"):
        call, args = case(op, shape, device, training=True)
        op_checks.check_forward(call, args, torch.float32, backend)
        op_checks.check_gradients(call, args, torch.float32, backend)


# All pairs of options on a GPU; under the interpreter each norm and each pool once in each direction.
SOME = [(n, POOLS[k % len(POOLS)]) for k, n in enumerate(NORMS)]
OPTIONS = list(itertools.product(NORMS, POOLS)) if GPU else SOME


@EVERYWHERE
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm,pool", OPTIONS)
@pytest.mark.parametrize("op", [op for op in OPS if op == "cross_attention_score"])
def test_every_norm_and_pool(op, norm, pool, direction, device, backend):
    options = dict(direction=direction, affinity_norm=norm, pool=pool)
    for counts in (None, torch.tensor([6, 1, 4])) if GPU else (torch.tensor([6, 1, 4]),):
        call, args = test_cross_attention_score.case(3, (4, 1, 3, 4), 6, 16, counts, **options)
        args = placed(args, device)
        op_checks.check_forward(call, args, torch.float32, backend)
        op_checks.check_gradients(call, args, torch.float32, backend)


@EVERYWHERE
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("op", [op for op in OPS if op == "cross_attention_similarity"])
def test_every_norm(op, norm, direction, device, backend):
    counts, options = torch.tensor([6, 1, 4]), dict(direction=direction, affinity_norm=norm)
    call, args = test_cross_attention_similarity.case(3, (4, 1, 3, 4), 6, 16, 8, counts, **options)
    args = placed(args, device)
    op_checks.check_forward(call, args, torch.float32, backend)
    op_checks.check_gradients(call, args, torch.float32, backend)


def two_by_two(op, device):
    """A case of four pairs, for what runs once for each argument."""
    module, shapes = CASES[op]
    I, counts, *rest = shapes["prime"]
    rest = [x if isinstance(x, int) or op == "similarity_context" else x[:2] for x in rest]  # regions of two images
    call, args = module.case(2, counts[:2], *rest)
    return (module.nodes_only(call) if op == "similarity_nodes" else call), placed(args, device)


@EVERYWHERE
@over_ops
def test_torch_contracts(op, device, backend):
    call, args = case(op, "prime", device)
    op_checks.check_needs(*two_by_two(op, device), backend, torch.float32)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, [a.float() for a in args], backend)


@EVERYWHERE
@over_ops
def test_torch_traces_the_op(op, device, backend, monkeypatch):
    if device == "cpu" and op not in TRACED:
        pytest.skip("registered as every op, which the tests of the op's other backends trace")
    # What the public function hands to the registered op, in the registered op's own order.
    seen, declared = [], DECLARED[op]
    real = declared.call
    call, args = case(op, "prime", device)
    op_checks.check_compile(call, args, backend, torch.float32)
    monkeypatch.setattr(declared, "call", lambda *args: seen.append(args) or real(*args))
    call(*[a.float().requires_grad_() for a in args], backend=backend)  # without gradients it is called by itself
    (found,) = seen
    found = [a.detach().requires_grad_() if k < len(args) else a for k, a in enumerate(found)]
    torch.library.opcheck(getattr(torch.ops.itm_fast, op).default, tuple(found))
    if op != "similarity_nodes":  # which hands its result to its backward pass
        op_checks.check_fake_backward(op, found[:-1], len(args), backend)


@EVERYWHERE
@pytest.mark.parametrize("I,T", [(0, 2), (2, 0), (0, 0)])
@over_ops
def test_empty(op, I, T, device, backend):
    module, shapes = CASES[op]
    counts = (3, 2)[:T]
    rest = shapes["prime"][2:]  # and no images' region counts
    rest = rest if op == "similarity_context" else [n for n in rest if isinstance(n, int)]
    call, args = module.case(I, counts, *rest)
    leaves = [a.to(device, torch.float32).requires_grad_() for a in args]
    result = op_checks.first(call(*leaves, backend=backend))
    assert result.shape[0] == I
    assert result.numel() == 0
    result.sum().backward()
    assert all(x.grad.eq(0).all() for x in leaves)


def one_pair(op, args, i, start, stop, t):
    """The arguments of image i with caption t alone, whose words or nodes are rows start to stop."""
    if op == "attended_vectors":
        image, words, queries, values, scale = args
        pair = slice(i, i + 1), slice(start, stop)
        return [image[pair[0]], words[pair[1]], queries[pair], values[pair[0]], scale[pair]]
    at = {"I": slice(i, i + 1), "T": slice(t, t + 1), "N": slice(start, stop), "M": slice(start, stop)}
    shapes = [argument.shape.labels for argument in DECLARED[op].arguments[: len(args)]]
    return [a[tuple(at.get(letter, slice(None)) for letter in shape)] for a, shape in zip(args, shapes, strict=True)]


@TRITON
@over_ops
def test_a_pair_has_the_same_bits_in_any_block(op, device, backend):
    module, shapes = CASES[op]

    def same(a, b):
        # Under the interpreter products are numpy's, whose bits depend on where a row lies.
        assert torch.equal(a, b) if device == "cuda" else torch.allclose(a, b, rtol=0, atol=8 * torch.finfo(dtype).eps)

    for dtype in dtypes(device):
        call, args = case(op, "ragged", device)
        args = [a.to(dtype) for a in args]
        whole = op_checks.first(call(*args, backend=backend))
        with itm_fast.workspace(2.0**-14):  # 64 KiB: many blocks
            same(op_checks.first(call(*args, backend=backend)), whole)
        _, lengths, *rest = shapes["ragged"]
        edge = [0, *itertools.accumulate(lengths)]
        for i, t in ((0, 0), (2, 3), (1, 1)):
            alone, _ = module.case(1, lengths[t : t + 1], *rest)
            found = alone(*one_pair(op, args, i, edge[t], edge[t + 1], t), backend=backend)
            found = op_checks.first(found)
            if op == "similarity_nodes":
                same(found[0], whole[i, edge[t] + t : edge[t + 1] + t + 1])
            elif op in ("cross_attention_similarity", "attended_vectors"):
                same(found[0], whole[i, edge[t] : edge[t + 1]])
            elif op == "similarity_context":
                same(found[0], whole[i, edge[t] + 6 * t : edge[t + 1] + 6 * t + 6])
            else:
                same(found[0, 0], whole[i, t])


@EVERYWHERE
@pytest.mark.parametrize("op", [op for op in OPS if "region_lengths" in DECLARED[op].names])
def test_regions_beyond_the_count_change_nothing(op, device, backend):
    module, _ = CASES[op]
    counts = (6, 1, 4)
    sizes = (6, 16, 8) if "S" in DECLARED[op].places else (6, 16)
    given = torch.tensor(counts) if op.startswith("cross_attention") else counts
    call, args = module.case(3, (4, 2), *sizes, given)
    call = module.nodes_only(call) if op == "similarity_nodes" else call
    args = placed(args, device, torch.float32)
    want = op_checks.first(call(*args, backend=backend))
    for i, n in enumerate(counts):
        args[0][i, n:] = float("nan")
    leaves = [a.requires_grad_() for a in args]
    found = op_checks.first(call(*leaves, backend=backend))
    torch.testing.assert_close(found, want)
    (found * op_checks.upstream(found)).sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert not leaves[0].grad[1, 1:].any()


@TRITON
@over_ops
def test_products_of_tf32_only_where_they_are_allowed(op, device, backend):
    call, args = case(op, "ragged", device)
    args = [a.float() for a in args]
    exact = op_checks.first(call(*[a.double() for a in args], backend="reference"))
    largest = exact.abs().max().item()
    try:
        torch.set_float32_matmul_precision("high")
        coarse = op_checks.first(call(*args, backend=backend))
    finally:
        torch.set_float32_matmul_precision("highest")
    fine = op_checks.first(call(*args, backend=backend))
    op_checks.check_forward(call, args, torch.float32, backend)
    assert (coarse - exact).abs().max() < 3e-2 * largest
    if device == "cuda" and op != "similarity_filter":  # which has no product; and the interpreter rounds none
        assert not torch.equal(coarse, fine)


@TRITON
@over_ops
def test_autocast_takes_its_dtype(op, device, backend):
    call, args = case(op, "prime", device)
    leaves = [a.float().requires_grad_() for a in args]
    with torch.autocast(device, torch.float16):
        result = op_checks.first(call(*leaves, backend=backend))
    assert result.dtype == torch.float16
    result.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


@TRITON
@over_ops
def test_float64_is_refused_by_name(op, device, backend):
    call, args = case(op, "one", device)
    with pytest.raises(NotImplementedError, match=r"triton: its kernels .* take no float64"):
        call(*args, backend=backend)
