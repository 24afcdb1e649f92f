"""The nodes of single pairs in batched PyTorch, with which the backward pass of SGR on a GPU goes on."""

import weakref

import pytest
import torch
from pair_score_cases import drawer, edges, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_cases import unless

from itm_fast.ops import _score_backward
from itm_fast.ops._torch.similarity_nodes import numbers_of_pair
from itm_fast.packing import starts

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, unless("torch", "cuda")])]


def pairs_of(I, counts, R, D, S, images, captions, device="cpu"):
    """Inputs, and the rest of the arguments of `OF_PAIRS`."""
    lengths = torch.tensor(counts)[captions] + 1
    rest = edges(counts), None, 9.0, images, captions, starts(lengths)
    rest = [x.to(device) if isinstance(x, torch.Tensor) else x for x in rest]
    return [x.to(device) for x in inputs(drawer(), I, counts, R, D, S)], rest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_what_pairs_add_to_a_caption_is_summed_in_float32(device, dtype):
    """One caption is the hardest negative of 256 images. Sums in bfloat16 would be 1e-2 off, in float16 1e-3."""
    I = 256
    every, rest = pairs_of(I, (3,), 2, 16, 8, torch.arange(I), torch.zeros(I, dtype=torch.int64), device)
    half = [x.to(dtype) for x in every]

    def gradients(args):
        (nodes,), back = _score_backward._nodes_by_torch([True] * 8, *args, *rest)
        assert nodes.dtype == args[0].dtype
        return back(torch.linspace(0.5, 1.5, nodes.numel(), device=device).view(1, *nodes.shape).to(dtype), [])

    found, exact = gradients(half), gradients([x.double() for x in half])
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2e-5 * b.norm()
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(half), strict=True))


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations made and that live at a time: the most."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "R,L,D,S", [(36, 30, 1024, 256), (36, 2, 1024, 16), (5, 64, 256, 16), (100, 100, 8, 8), (4, 40, 8, 256)]
)
def test_pairs_hold_no_more_than_they_are_counted(R, L, D, S, dtype):
    P = 16
    given, rest = pairs_of(2, (L, L), R, D, S, torch.arange(P) * 2 // P, torch.arange(P) % 2)
    given = [x.to(dtype) for x in given]
    with Held() as held:
        (nodes,), back = _score_backward._nodes_by_torch([True] * 8, *given, *rest)
        gradients = back(torch.ones_like(nodes)[None], [])
    whole = 3 * sum(x.numel() for x in gradients)  # inputs in float32, and gradients: of their own, and their sums
    assert held.most <= 4 * (P * numbers_of_pair(R, D, S, L) + whole)
    assert held.most >= P * numbers_of_pair(R, D, S, L)  # it is no wild guess: a quarter, at the least, is needed
