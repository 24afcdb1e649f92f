import pytest
import torch

import itm_fast
from itm_fast.ops._torch import _blocks
from itm_fast.testing import inputs, op_checks

BACKENDS = op_checks.backends("global_local_score")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "I1-T1-W1-D1": (1, (1,), 1),
    "I5-T5-W13-D64": (5, (13, 4, 7, 1, 4), 64),
    "I3-T3-W5-D31": (3, (5, 5, 2), 31),
    "I2-T2-W460-D8": (2, (460, 3), 8),
}


def case(I, lengths, D, scale=1.0):
    image, words, cu_seqlens = inputs(I, lengths, 3, D, dtype=torch.float64)
    # Lengths other than 1, and attention that is sharper than cosines alone make it.
    vector = image.sum(1)
    words = words * torch.linspace(0.5, 2, len(words), dtype=torch.float64)[:, None]

    def call(vector, words, backend):
        return itm_fast.global_local_score(vector, words, cu_seqlens, scale=scale, backend=backend)

    return call, (vector, words)


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, shape, scale):
    call, args = case(*shape, scale=scale)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck(backend):
    call, args = case(3, (3, 1, 4), 5, scale=3.0)
    op_checks.check_gradcheck(call, args, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_torch_contracts(backend):
    call, args = case(3, (4, 2, 4), 8)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    single = [a.float().requires_grad_() for a in args]
    rest = torch.tensor([0, 4, 6, 10]), 1.0
    torch.library.opcheck(torch.ops.itm_fast.global_local_score.default, (*single, *rest, backend))
    op_checks.check_fake_backward("global_local_score", (*single, *rest), 2, backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_hand_computed_pair(backend):
    # The vector along the first of two unit words: cosines 1 and 0, whatever the vector's length.
    words = torch.eye(2, dtype=torch.float64)
    vector = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    score = itm_fast.global_local_score(vector, words, torch.tensor([0, 2]), backend=backend)
    assert score.item() == pytest.approx(torch.e / (torch.e**2 + 1) ** 0.5, abs=1e-7)


@pytest.mark.parametrize("I,lengths", [(0, (3, 2)), (2, ()), (0, ())])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, I, lengths):
    call, args = case(I, lengths, 4)
    inputs = [a.requires_grad_() for a in args]
    score = call(*inputs, backend=backend)
    assert score.shape == (I, len(lengths))
    score.sum().backward()
    assert all(x.grad.eq(0).all() for x in inputs)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_vector_or_word_of_zeros_scores_zero(backend):
    call, (vector, words) = case(3, (3, 2), 6)
    vector[1], words[3:] = 0, 0
    vector, words = vector.requires_grad_(), words.requires_grad_()
    score = call(vector, words, backend=backend)
    assert not score[1].any()
    assert not score[:, 1].any()
    score.sum().backward()
    assert vector.grad.isfinite().all()
    assert words.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_does_not_depend_on_its_block(backend, monkeypatch):
    lengths = (5, 3, 6, 5, 10, 5, 2)
    call, (vector, words) = case(7, lengths, 16)
    whole = call(vector, words, backend=backend)
    edge = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for t, (start, stop) in enumerate(zip(edge, edge[1:])):
        one = itm_fast.global_local_score(vector[2:3], words[start:stop], torch.tensor([0, stop - start]))
        torch.testing.assert_close(one[0, 0], whole[2, t], rtol=1e-12, atol=1e-12)
    for tile in (1, 1 << 12):
        monkeypatch.setattr(_blocks, "CPU_TILE", tile)
        monkeypatch.setattr(_blocks, "MIN_QUERIES", 1)
        torch.testing.assert_close(call(vector, words, backend=backend), whole, rtol=1e-12, atol=1e-12)
        for a, b in zip(
            op_checks.gradients(call, (vector, words), torch.float64, backend, torch.float64),
            op_checks.gradients(call, (vector, words), torch.float64, "reference", torch.float64),
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_autocast_takes_its_dtype():
    call, args = case(2, (3, 2), 8)
    single = [a.float().requires_grad_() for a in args]
    with torch.autocast("cpu", torch.bfloat16):
        result = call(*single, backend="torch")
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert all(s.grad.dtype == torch.float32 for s in single)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"vector": torch.zeros(2, 3, 8)}, ValueError, r"vector must be \[I, D\], got \[2, 3, 8\]"),
        ({"words": torch.zeros(5, 7)}, ValueError, r"words must be \[N, D\] with D = 8 as in vector"),
        ({"words": torch.zeros(5, 8).double()}, TypeError, "one dtype"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, r"end at the 5 packed rows, got 0\.\.4"),
        ({"scale": 0.0}, ValueError, "scale must be more than 0"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    arguments = {"vector": torch.zeros(2, 8), "words": torch.zeros(5, 8), "cu_seqlens": torch.tensor([0, 2, 5])}
    with pytest.raises(error, match=message):
        itm_fast.global_local_score(**{**arguments, **change})
