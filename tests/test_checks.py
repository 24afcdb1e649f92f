"""What every op refuses before it chooses a backend."""

import inspect
import re

import numpy as np
import pytest
import torch

import itm_fast
from itm_fast.ops import _examples as examples
from itm_fast.ops._declare import DECLARED


def tensors(op):
    """An op's example by names, and the names of its tensors but the first."""
    given = dict(zip(inspect.signature(getattr(itm_fast, op)).parameters, examples.example(op)))
    if "region_lengths" in inspect.signature(getattr(itm_fast, op)).parameters:
        given["region_lengths"] = torch.tensor([7, 3, 5])
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    return given, names[1:]


EACH = [(op, name) for op in sorted(DECLARED) for name in tensors(op)[1]]


@pytest.mark.parametrize("op,name", EACH)
def test_tensors_on_two_devices_are_refused_by_name(op, name):
    given, _ = tensors(op)
    first = next(iter(given))
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=rf"^{op}: {name} and {first} must be on one device, got meta and cpu$"):
        getattr(itm_fast, op)(**given)


def test_image_ids_of_the_loss_on_another_device_are_refused():
    with pytest.raises(ValueError, match=r"image_ids and score must be on one device, got meta and cpu"):
        itm_fast.hardest_negative_loss(torch.zeros(2, 2), image_ids=torch.zeros(2, dtype=torch.long, device="meta"))


NUMBERS = [(op, a.name) for op, declared in sorted(DECLARED.items()) for a in declared.arguments if a.type == "float"]


@pytest.mark.parametrize("wrong", ["9", None, [9.0], torch.ones(2), float("nan")], ids=repr)
@pytest.mark.parametrize("op,name", NUMBERS)
def test_what_is_no_number_is_refused_by_name(op, name, wrong):
    given, _ = tensors(op)
    error = ValueError if isinstance(wrong, float) else TypeError
    with pytest.raises(error, match=rf"^{op}: {name} must be a number, got {re.escape(repr(wrong))}$"):
        getattr(itm_fast, op)(**{**given, name: wrong})


def test_the_scale_of_attended_vectors_is_refused_by_name():
    given, _ = tensors("attended_vectors")
    with pytest.raises(TypeError, match=r"^attended_vectors: scale must be a number, got 'x'$"):
        itm_fast.attended_vectors(**{**given, "scale": "x"})


FLAGS = [(op, a.name) for op, declared in sorted(DECLARED.items()) for a in declared.arguments if a.type == "bool"]


NO_FLAGS = ["no", None, [True], torch.ones(2), 2, -1, np.int64(5), torch.tensor(1), torch.tensor(True, device="meta")]


@pytest.mark.parametrize("wrong", NO_FLAGS, ids=repr)
@pytest.mark.parametrize("op,name", FLAGS)
def test_what_is_neither_true_nor_false_is_refused_by_name(op, name, wrong):
    given, _ = tensors(op)
    with pytest.raises(TypeError, match=rf"^{op}: {name} must be True or False, got {re.escape(repr(wrong))}$"):
        getattr(itm_fast, op)(**{**given, name: wrong})


@pytest.mark.parametrize("make", [int, np.bool_, np.int64, torch.tensor], ids=["int", "bool_", "int64", "tensor"])
def test_flags_of_other_types_mean_what_bools_mean(make):
    score = torch.arange(9.0).view(3, 3).sin()
    for flag in (False, True):
        wanted = itm_fast.hardest_negative_loss(score, hardest=flag)
        assert itm_fast.hardest_negative_loss(score, hardest=make(flag)) == wanted


@pytest.mark.parametrize("wrong", [None, 5, (2.5, 2.5)], ids=repr)
def test_what_are_no_sizes_is_refused_by_name(wrong):
    given, _ = tensors("similarity_context")
    said = rf"^similarity_context: sizes must be a sequence of whole numbers, got {re.escape(repr(wrong))}$"
    with pytest.raises(TypeError, match=said):
        itm_fast.similarity_context(**{**given, "sizes": wrong})


def nested(tensor):
    return torch.nested.nested_tensor([tensor.flatten()[:1], tensor.flatten()])


@pytest.mark.parametrize("make,said", [(torch.Tensor.to_sparse, "a tensor of layout torch"), (nested, "a nested")])
@pytest.mark.parametrize("op,name", [(op, next(iter(tensors(op)[0]))) for op in sorted(DECLARED)] + EACH)
def test_tensors_that_are_not_dense_are_refused_by_name(op, name, make, said):
    given, _ = tensors(op)
    with pytest.raises(TypeError, match=f"^{op}: {name} must be a dense tensor, got {said}"):
        getattr(itm_fast, op)(**{**given, name: make(given[name])})


@pytest.mark.parametrize("op", sorted(DECLARED))
def test_tensors_without_values_are_refused_by_name(op):
    given, names = tensors(op)
    first = next(iter(given))
    given |= {name: given[name].to("meta") for name in (first, *names)}
    with pytest.raises(ValueError, match=f"^{op}: {first} must hold values, got a tensor on the meta device"):
        getattr(itm_fast, op)(**given)
