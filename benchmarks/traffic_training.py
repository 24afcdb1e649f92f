"""What a training step launches: Triton's kernels, and PyTorch's own operations between them. Nothing is measured.

A step is that of `bench_training_step.py`: the scores of all pairs, then gradients of images, words and parameters.
Neither kernels nor large operations run, so a gradient of the scores is given: 1 for every pair, or, as the loss of
hardest negatives leaves it, for each match and for one other pair of its row and one of its column, drawn at random.

PyTorch's operations are counted as less than any library does: each one that is no view is one launch, reads each
tensor that it takes once, writes each that it gives once, and has one instruction an element; a product reads its
factors once. Products of float32 at "highest" are made without tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks import bench_training_step, traffic_triton
from benchmarks.shapes import Shape, needed_flops, state_flops
from benchmarks.traffic_counts import Count
from itm_fast.ops import _recompute, _register
from itm_fast.ops._declare import DECLARED

SMALL = 1 << 16  # elements of the largest tensors on which operations are run: what is chosen depends on their values
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
GATHERED = {"index", "index_select"}  # as much is read of the first tensor as is written
ADDED = {"index_add_", "index_put_", "_index_put_impl_"}  # as much is read and written of the first as is added
FILLED = {"zero_", "fill_", "copy_", "bernoulli_", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full"}
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"}


class Part(NamedTuple):
    """A part of a step: the operations that it needs, multiply-add = 2, and name and count of each launch."""

    name: str
    needed: float
    launches: list[tuple[str, Count]]


def parts(model: str, shape: Shape, arch: int, matmul: str) -> list[Part]:
    """The forward pass, and the backward passes of both losses; of SAF, whose pairs all have a gradient, the second.

    Args:
        model: of `bench_training_step.MODELS`.
        shape: images and captions of the batch, whose features are float32.
        arch: whose tiles are taken, of kernels/_tiles.py.
        matmul: what torch may do with float32 products.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    losses = {"backward, hardest": True, "backward, all": False}
    if model == "saf":
        del losses["backward, hardest"]
    try:
        forward, *backward = _step(model, shape, arch, [_gradient(shape, hardest) for hardest in losses.values()])
    finally:
        torch.set_float32_matmul_precision(before)
    needed = needed_flops(model, shape) + state_flops(model, shape)
    found = [Part("forward", needed, forward)]
    for (name, hardest), launches in zip(losses.items(), backward, strict=True):
        found.append(Part(name, bench_training_step.step_flops(model, shape, hardest) - needed, launches))
    return found


def _step(model: str, shape: Shape, arch: int, grads: list[Tensor]) -> list[list[tuple[str, Count]]]:
    """Launches of the forward pass, then of a backward pass from each gradient of the scores."""
    image, words, cu_seqlens = shape.features()
    score, parameters = bench_training_step.build(model, "triton", shape, "cpu")
    leaves = [image.requires_grad_(), words.requires_grad_(), *parameters.values()]
    memory = traffic_triton.Memory()
    with (
        mock.patch.object(_register, "resolve", return_value="triton"),
        mock.patch.object(_recompute, "IMAGES", _recompute.GPU_IMAGES),  # as on a GPU, where there is no oneDNN
        mock.patch.object(torch.backends.mkldnn, "is_available", return_value=False),
        mock.patch.object(torch.nn.functional, "dropout", _fused_dropout),
        traffic_triton.recording(arch, memory=memory) as found,
        Operations(found, memory),
    ):
        result, ends = score(image, words, cu_seqlens), [0]
        for grad in grads:
            ends.append(len(found))
            torch.autograd.grad(result, leaves, grad, retain_graph=True, materialize_grads=True)
    return [found[start:stop] for start, stop in zip(ends, [*ends[1:], len(found)])]


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One launch, as on a GPU; torch makes it of three operations on a CPU."""
    return torch.native_dropout(x, p, training)[0] if training else x


def _gradient(shape: Shape, hardest: bool) -> Tensor:
    """A gradient of the scores [I, T], of a square batch, that tells which pairs have one."""
    if not hardest:
        return torch.ones(shape.images, shape.captions)
    n, draw = shape.images, torch.Generator().manual_seed(0)
    grad, at = torch.eye(n, shape.captions), torch.arange(n)
    for rows in (grad, grad.t()):
        rows[at, (at + torch.randint(1, n, (n,), generator=draw)) % n] = 1
    return grad


class Operations(TorchDispatchMode):
    """Count PyTorch's operations, and run only those on small tensors; the results of others have no values.

    Args:
        found: where to put name and count of each launch.
        memory: numbers of the tensors' memory.
    """

    def __init__(self, found: list[tuple[str, Count]], memory: traffic_triton.Memory) -> None:
        super().__init__()
        self.found, self.memory = found, memory
        self.excluded = torch._C._dispatch_tls_local_exclude_set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func.namespace == "itm_fast":  # whose kernels are recorded, and whose operations are counted
            op, keys = DECLARED[name.removesuffix("_backward")], torch._C._dispatch_tls_local_include_set()
            if not name.endswith("_backward"):
                with self:
                    return op.run(*args)
            with torch._C._ForceDispatchKeyGuard(keys, self.excluded), self:  # autograd works inside, as without us
                return op.run_backward(*args)
        if func.is_view or name in FREE:
            return func(*args, **kwargs)
        taken = _tensors((args, kwargs))
        changed = [x for x, s in zip(args, func._schema.arguments) if s.alias_info and s.alias_info.is_write]
        if not any(x.numel() > SMALL for x in taken):
            result = func(*args, **kwargs)
        elif changed:
            result = changed[0]
        else:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
            result = tree_map_only(Tensor, _without_values, func(*args, **kwargs))
        self._count(name, taken, changed or _tensors(result))
        return result

    def _count(self, name: str, taken: list[Tensor], given: list[Tensor]) -> None:
        count = Count(1)
        for k, x in enumerate(taken):
            if k == 0 and name in FILLED:  # which do not read it
                continue
            size = _bytes(x)
            if k == 0 and name in GATHERED | ADDED:
                size = min(size, _bytes(given[0] if name in GATHERED else taken[-1]))
            count.reads(self.memory.place(x), size, size)
        for x in given:
            size = _bytes(x) if name not in ADDED else min(_bytes(x), _bytes(taken[-1]))
            count.writes(self.memory.place(x), size)
        if name in PRODUCTS:
            *_, left, right = taken
            count.dots(left.shape[:-2].numel(), left.shape[-2], right.shape[-1], left.shape[-1], _kind(left.dtype))
        else:
            count.vector = max((x.numel() for x in (*taken, *given)), default=0)
        self.found.append((f"PyTorch: {name.strip('_')}", count))


def _tensors(tree: Any) -> list[Tensor]:
    """Those that are not of integers."""
    found = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
    return [x for x in found if x.is_floating_point() or x.dtype == torch.bool]


def _without_values(meta: Tensor) -> Tensor:
    return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)


def _bytes(x: Tensor) -> int:
    """Of a tensor's elements, each place once."""
    size = x.element_size()
    for n, stride in zip(x.shape, x.stride()):
        size *= n if stride else 1
    return size


def _kind(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
