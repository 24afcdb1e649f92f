"""What every op refuses before it chooses a backend."""

import inspect
import re

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


@pytest.mark.parametrize("wrong", ["9", None, [9.0]], ids=repr)
@pytest.mark.parametrize("op,name", NUMBERS)
def test_what_is_no_number_is_refused_by_name(op, name, wrong):
    given, _ = tensors(op)
    with pytest.raises(TypeError, match=rf"^{op}: {name} must be a number, got {re.escape(repr(wrong))}$"):
        getattr(itm_fast, op)(**{**given, name: wrong})
