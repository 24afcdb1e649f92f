"""cu_seqlens and region_lengths are read at the call: what was written to these tensors before is what counts."""

import inspect

import pytest
import torch
from itm_fast.kernels._length_plan import length_plan
from triton_cases import unless

import itm_fast
from itm_fast import _backends, packing
from itm_fast.ops import _examples as examples
from itm_fast.ops import _recompute
from itm_fast.packing import bounds, kept, node_bounds, node_plan
from itm_fast.testing import op_checks

OPS = [op for op in sorted(_backends.OFFERS) if op != "hardest_negative_loss"]
RAGGED = [op for op in OPS if "region_lengths" in inspect.signature(getattr(itm_fast, op)).parameters]


def each(ops):
    """Each op on each of its backends; float64 leaves out Triton's interpreter, which has a test of its own."""
    return pytest.mark.parametrize(
        "op,backend", [(op, b) for op in ops for b in [*op_checks.backends(op, dtype=torch.float64), "reference"]]
    )


def by_numpy(tensor, k, value):
    tensor.numpy()[k] = value


def by_data(tensor, k, value):
    tensor.data[k] = value


def in_place(tensor, k, value):
    tensor[k] = value


def arguments(op):
    """An op's example in float32 and the place of its bounds."""
    args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in examples.example(op)]
    names = list(inspect.signature(getattr(itm_fast, op)).parameters)
    return args, names.index("cu_seqlens")


def called(op, args, backend, **options):
    return op_checks.first(getattr(itm_fast, op)(*args, backend=backend, **options))


@pytest.mark.parametrize("write", [by_numpy, by_data, in_place])
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@each(OPS)
def test_bounds_that_have_changed_are_read_anew(op, backend, inference, write):
    args, at = arguments(op)
    with torch.inference_mode(inference):
        edge = args[at] = args[at].clone()
        before = called(op, args, backend).clone()
        write(edge, 1, 2)
        fresh = [*args[:at], edge.clone(), *args[at + 1 :]]
        after = called(op, args, backend)
        assert torch.equal(after, called(op, fresh, backend))
        assert not torch.equal(after, before)
        write(edge, 1, 400_000_000)
        with pytest.raises(ValueError, match=rf"caption 1 is empty \(cu_seqlens 400000000 then {edge[2]}\)"):
            called(op, args, backend)


@each(RAGGED)
def test_counts_of_regions_that_have_changed_are_read_anew(op, backend):
    args, _ = arguments(op)
    counts = torch.tensor([7, 3, 5], dtype=torch.int32)
    before = called(op, args, backend, region_lengths=counts).clone()
    by_numpy(counts, 0, 2)
    after = called(op, args, backend, region_lengths=counts)
    assert torch.equal(after, called(op, args, backend, region_lengths=counts.clone()))
    assert not torch.equal(after[0], before[0])
    for count in (8, 0):
        by_numpy(counts, 0, count)
        with pytest.raises(ValueError, match=rf"region_lengths must lie in 1\.\.7 \(R\), got {count} for image 0"):
            called(op, args, backend, region_lengths=counts)


PLANS = {
    "bounds": lambda edge, rows: bounds(edge, rows, "op"),
    "node_plan": lambda edge, rows: node_plan(edge, rows, "op", (16,), 64).edge,
    "length_plan": lambda edge, rows: [w.rows.stop for w in length_plan(edge, rows, "op", (4, 8), 1).windows],
    "node_bounds": lambda edge, rows: node_bounds(edge).tolist(),
}


@pytest.fixture
def device(monkeypatch):
    """CPU tensors are treated as those of a device that one waits for."""
    monkeypatch.setattr(packing, "READ_ANEW", ())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_on_a_device_the_writes_that_torch_counts_are_seen(plan, device):
    edge = torch.tensor([0, 2, 5, 8])
    before = plan(edge, 8)
    for write in (lambda: edge[1:].sub_(0), lambda: edge.copy_(edge.clone()), lambda: edge.view(2, 2)[0].add_(0)):
        by_numpy(edge, 1, 3)
        assert plan(edge, 8) == before  # this one torch does not count, and it is promised only until the next
        write()
        assert plan(edge, 8) == plan(torch.tensor([0, 3, 5, 8]), 8) != before
        by_numpy(edge, 1, 2)
        edge.add_(0)
        assert plan(edge, 8) == before
    by_data(edge, 1, 3)
    assert plan(edge, 8) == before
    assert plan(edge.clone(), 8) != before


def test_on_a_device_nothing_is_kept_of_another_object_nor_in_inference_mode(device):
    made = []
    for tensor in (torch.zeros(2), torch.zeros(2)):
        for _ in range(2):
            kept(tensor, "key", made.append)
    assert len(made) == 2
    with torch.inference_mode():
        tensor = torch.zeros(2)
        for _ in range(2):
            kept(tensor, "key", made.append)
    assert len(made) == 4
    assert made[-1] is tensor


def test_on_a_device_node_bounds_that_their_owner_changed_are_made_anew(device):
    edge = torch.tensor([0, 2, 5])
    for mode in (False, True):
        with torch.inference_mode(mode):
            found = node_bounds(edge)
            assert node_bounds(edge) is found
            found.add_(1)
            assert node_bounds(edge).tolist() == [0, 3, 7]
        edge.add_(0)


@pytest.mark.slow
@unless("triton", "cpu")
@pytest.mark.parametrize("op", [op for op in OPS if "triton" in _backends.OFFERS[op]])
def test_on_a_device_kernels_read_the_values_that_were_checked(op, device):
    """A kernel given bounds that nobody checked could read and write anywhere."""
    args, at = arguments(op)
    options = {"region_lengths": torch.tensor([7, 3, 5])} if op in RAGGED else {}
    with torch.no_grad():
        before = called(op, args, "triton", **options).clone()
        by_numpy(args[at], 1, 2)
        for counts in options.values():
            by_numpy(counts, 0, 2)
        assert torch.equal(called(op, args, "triton", **options), before)


@pytest.mark.parametrize("number", [0, 1], ids=["bounds", "regions"])
def test_blocks_scored_again_in_backward_refuse_lengths_that_were_written_to(number):
    def cut(backward, image, cu_seqlens, region_lengths):
        yield _recompute.Block(((slice(None),),), (slice(None), slice(None)), lambda x: x)

    image, lengths = torch.ones(2, 2, requires_grad=True), (torch.tensor([0, 1, 2]), torch.tensor([1, 1]))
    result = _recompute.score(cut, "I", [image], *lengths, numbers=1)
    lengths[number][0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
