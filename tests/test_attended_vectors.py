"""`attended_vectors` on every backend that runs on a CPU."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors

import itm_fast
from itm_fast.ops import _recompute
from itm_fast.ops._attention import DIRECTIONS, NORMS
from itm_fast.testing import inputs, op_checks

BACKENDS = op_checks.backends("attended_vectors")
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_all = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
over_directions = pytest.mark.parametrize("direction", DIRECTIONS)
LENGTHS = (4, 1, 3, 4)


def case(I, lengths, R, D, S=None, regions=None, own=False, **options):
    """The op as a function of its differentiable arguments, and these: with `own`, queries, values and scales too."""
    image, words, cu_seqlens = inputs(I, lengths, R, D, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    i2t, N, T = options.get("direction") == "i2t", len(words), len(lengths)
    args = [image, words]
    if own:
        pairs = (I, T, R) if i2t else (I, N)
        args.append(torch.randn(*pairs, D, generator=generator, dtype=torch.float64))
        args.append(torch.randn(*((N,) if i2t else (I, R)), S or D, generator=generator, dtype=torch.float64))
        args.append(5 * torch.rand(pairs, generator=generator, dtype=torch.float64))

    def call(image, words, queries=None, values=None, scale=4.0, *, backend):
        edge, counts = op_checks.beside(image, cu_seqlens, None if regions is None else torch.tensor(regions))
        return itm_fast.attended_vectors(
            image, words, edge, queries, values, scale=scale, region_lengths=counts, backend=backend, **options
        )

    return call, args


OWN = SimpleNamespace(case=partial(case, own=True))


@over_directions
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@over_backends
def test_forward_and_gradients(backend, dtype, own, direction):
    for shape in ((1, (1,), 1, 1), (5, (13, 1, 4, 4, 7), 9, 32, 11, (9, 1, 3, 9, 8)), (2, (230, 1, 3), 5, 37)):
        call, args = case(*shape, own=own, direction=direction)
        op_checks.check_forward(call, args, dtype, backend)
        if dtype != torch.float32 or shape[0] == 5:
            op_checks.check_gradients(call, args, dtype, backend)


@over_directions
@pytest.mark.parametrize("norm", NORMS)
@over_backends
def test_every_norm(backend, norm, direction):
    call, args = case(3, LENGTHS, 6, 16, 5, (6, 1, 4), own=True, direction=direction, affinity_norm=norm)
    op_checks.check_forward(call, args, torch.float64, backend)
    op_checks.check_gradients(call, args, torch.float64, backend)


@over_directions
def test_gradcheck(direction):
    call, args = case(2, (3, 1), 3, 4, 2, (3, 2), own=True, direction=direction)
    op_checks.check_gradcheck(call, args, "torch")


@pytest.mark.slow
@over_directions
@over_all
def test_torch_contracts(backend, direction):
    call, args = case(3, (4, 2, 4), 5, 8, 6, own=True, direction=direction)
    op_checks.check_needs(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    call, args = case(3, (4, 2, 4), 5, 8, direction=direction)
    op_checks.check_compile(call, args, backend)
    image, words, edge = inputs(2, (3, 2), 4, 8, requires_grad=True)
    queries, values = (words[None], image.flatten(0, 1)) if direction == "t2i" else (image, words)
    rest = edge, torch.tensor([4, 2]), direction, "l2norm", backend
    tensors = [x.detach().requires_grad_() for x in (image, words, queries, values, torch.full((1, 1), 4.0))]
    torch.library.opcheck(torch.ops.itm_fast.attended_vectors.default, (*tensors, *rest))


@over_all
def test_mapped_values_are_the_mapped_vectors(backend):
    # W P = sum of alpha (W x), on which IMRAM's scorer rests.
    call, (image, words) = case(3, LENGTHS, 6, 16)
    weight = torch.randn(5, 16, dtype=torch.float64)
    mapped = call(image, words, values=image @ weight.t(), backend=backend)
    torch.testing.assert_close(mapped, call(image, words, backend=backend) @ weight.t(), rtol=0, atol=1e-12)


@over_all
def test_a_scale_of_zero_gives_the_mean(backend):
    call, (image, words) = case(2, (3, 2), 4, 8)
    scale = torch.zeros(2, 5, dtype=torch.float64)
    found = call(image, words, words.expand(2, 5, 8).contiguous(), scale=scale, backend=backend)
    torch.testing.assert_close(found, image.mean(1, keepdim=True).expand(2, 5, 8))


@over_directions
@pytest.mark.parametrize("I,lengths", [(0, (3, 2)), (2, ()), (0, ())])
@over_all
def test_empty(backend, I, lengths, direction):
    call, args = case(I, lengths, 4, 8, own=True, direction=direction)
    leaves = [x.requires_grad_() for x in args]
    found = call(*leaves, backend=backend)
    assert found.shape == ((I, sum(lengths), 8) if direction == "t2i" else (I, len(lengths), 4, 8))
    found.sum().backward()
    assert all(x.grad.eq(0).all() for x in leaves if x.grad is not None)


@over_directions
@over_all
def test_padded_regions_never_leak(backend, direction):
    call, args = case(3, (4, 2), 6, 8, 5, (6, 1, 4), own=True, direction=direction)
    want = call(*args, backend=backend)
    spoiled = [args[0], *args[2:4]] if direction == "t2i" else [args[0], args[2].transpose(1, 2)]
    for i, n in enumerate((6, 1, 4)):
        for x in spoiled if direction == "i2t" else (args[0], args[3]):
            x[i, n:] = float("nan")
    leaves = [x.requires_grad_() for x in args]
    found = call(*leaves, backend=backend)
    torch.testing.assert_close(found, want)
    found.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves if x.grad is not None)
    if direction == "i2t":
        assert found[1, :, 1:].eq(0).all()


@over_directions
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@over_backends
def test_a_pair_does_not_depend_on_its_block(backend, own, direction, monkeypatch):
    call, args = case(7, (4, 2, 5, 4, 9, 4, 1), 6, 16, own=own, direction=direction)
    whole = call(*args, backend=backend)
    edge = [0, 4, 6, 11, 15, 24, 28, 29]
    image, words, *more = args
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        at = slice(start, stop) if direction == "t2i" else slice(t, t + 1)
        part, scale = [], 4.0
        if own:
            part = [more[0][2:3, at], more[1][2:3] if direction == "t2i" else more[1][start:stop]]
            scale = more[2][2:3, at]
        one = itm_fast.attended_vectors(
            image[2:3], words[start:stop], torch.tensor([0, stop - start]), *part, direction=direction,
            scale=scale, backend=backend,
        )  # fmt: skip
        if backend == "cpu":
            assert torch.equal(one, whole[2:3, at])
        torch.testing.assert_close(one, whole[2:3, at], rtol=0, atol=1e-13)
    monkeypatch.setattr(_recompute, "CPU_TILE", 1)
    monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
    torch.testing.assert_close(call(*args, backend=backend), whole, rtol=0, atol=1e-13)


@needs_cpu
@over_directions
@over_lesser_processors
def test_older_processors(level, direction, monkeypatch):
    at_level(level, monkeypatch)
    call, args = case(3, (13, 4, 1), 9, 37, 11, (9, 1, 4), own=True, direction=direction)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        op_checks.check_forward(call, args, dtype, "cpu")


WRONG = [
    ({"queries": torch.zeros(2, 4, 8)}, ValueError, r"queries must be \[I, N, D\] with I = 2, R = 4, T = 1 and N = 5"),
    ({"queries": torch.zeros(2, 5, 9)}, ValueError, r"queries must be \[B, Q, D\] with D = 8 as in image"),
    ({"values": torch.zeros(3, 4, 8)}, ValueError, r"values must be \[I, R, S\], as the regions, got 12 rows"),
    ({"scale": torch.zeros(2, 4)}, ValueError, r"scale must be a number or \[I, N\], got 2 x 4"),
    ({"scale": torch.zeros(2, 5).double()}, TypeError, "scale and image must have one dtype"),
    ({"queries": torch.zeros(2, 5, 8), "direction": "i2t"}, ValueError, r"queries must be \[I, T, R, D\]"),
    ({"values": torch.zeros(4, 8), "direction": "i2t"}, ValueError, r"values must be \[N, S\], as the words, got 4"),
    ({"words": torch.zeros(5)}, ValueError, r"words must be \[N, D\], got \[5\]"),
    ({"direction": "v2t"}, ValueError, "direction must be one of t2i, i2t"),
    ({"backend": "cuda"}, NotImplementedError, "attended_vectors cannot run on cpu: cuda: needs CUDA tensors"),
]


@pytest.mark.parametrize("change,error,message", WRONG, ids=[*map(str, range(len(WRONG)))])
def test_refusals(change, error, message):
    given = {"image": torch.zeros(2, 4, 8), "words": torch.zeros(5, 8), "cu_seqlens": torch.tensor([0, 5])}
    with pytest.raises(error, match=message):
        itm_fast.attended_vectors(**{**given, **change})
