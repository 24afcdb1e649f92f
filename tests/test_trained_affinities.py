"""What a forward pass of cross_attention_score in C++ keeps for its backward pass, which need not compute it again."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import itm_fast
from itm_fast.ops import _cpu_calls

BOUNDS = torch.tensor([0, 4, 5, 11, 14])
REGIONS = torch.tensor([6, 2, 5])


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """The elements that each forward pass kept."""
    whole, sizes = _cpu_calls.Calls.forward_trained, []

    def counted(self, *args):
        results = whole(self, *args)
        sizes.append(results[1].numel())
        return results

    monkeypatch.setattr(_cpu_calls.Calls, "forward_trained", counted)
    return sizes


def leaves(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((3, 6, 21), (14, 21))]


def score(image, words, **options):
    return itm_fast.cross_attention_score(image, words, BOUNDS, region_lengths=REGIONS, backend="cpu", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"direction": "i2t", "pool": "mean"}, {"weights": "hard", "pool": "max"}])
def test_gradients_have_the_same_bits_with_and_without_kept_affinities(kept, options, dtype):
    inputs = leaves(dtype)
    result, upstream = score(*inputs, **options), torch.linspace(-1, 1, 12).view(3, 4).to(dtype)
    found = torch.autograd.grad(result, inputs, upstream, retain_graph=True)
    assert kept == [3 * 6 * 14]
    assert not result.grad_fn.saved_tensors[-1].untyped_storage().size()  # the first backward pass has freed them
    again = torch.autograd.grad(result, inputs, upstream)
    with itm_fast.workspace(1e-9):
        small = torch.autograd.grad(score(*inputs, **options), inputs, upstream)
    assert kept == [3 * 6 * 14]
    for a, b, c in zip(found, again, small, strict=True):
        assert a.any()
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_nothing_is_kept_where_no_gradient_will_be_asked(kept):
    inputs = leaves()
    with torch.no_grad():
        score(*inputs)
    score(*[x.detach() for x in inputs])
    assert kept == []
    few = torch.zeros(3, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0))
    torch.autograd.grad(score(*inputs), inputs, few)  # of one pair, without what the forward pass has kept
    assert len(kept) == 1


def test_what_is_kept_is_a_saved_tensor(kept):
    """So torch.utils.checkpoint, which replaces saved tensors, holds none of it until it scores again."""
    inputs, saved = leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        score(*inputs)
    assert kept == [3 * 6 * 14]
    assert 3 * 6 * 14 in saved
    again = checkpoint(score, *inputs, use_reentrant=False)
    assert len(kept) == 2
    found = torch.autograd.grad(again.sum(), inputs)
    assert len(kept) == 3  # scored again
    for a, b in zip(found, torch.autograd.grad(score(*inputs).sum(), inputs), strict=True):
        assert torch.equal(a, b)
