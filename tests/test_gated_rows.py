"""IMRAM's gate and cosines in C++ are those of torch, where rows have queries of their own or share them."""

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors

import itm_fast
from itm_fast.models._rows import cosines, gated
from itm_fast.testing import assert_accurate

pytestmark = needs_cpu
# Queries and rows: words that images share, regions that captions share, one of either, each pair's own.
SHAPES = [((7,), (3, 7)), ((3, 1, 5), (3, 4, 5)), ((7,), (1, 7)), ((1, 1, 5), (1, 4, 5)), ((3, 5), (3, 5))]


def check(few, all, dtype, D=19):
    draw = torch.Generator().manual_seed(0)
    query, product, attended = (
        torch.randn(*shape, generator=draw).to(dtype) for shape in ((*few, D), (*few, 2 * D), (*all, 3 * D))
    )

    def found(kind, backend="torch"):
        x, y, z = (part.to(kind) for part in (query, product, attended))
        with itm_fast.use_backend(backend):
            return [gated(x, y, z, True), gated(x, y, z[..., D:], False), cosines(x, z)]

    in_cpp = found(dtype, "cpu")
    assert any(not torch.equal(a, b) for a, b in zip(found(dtype), in_cpp, strict=True))
    assert_accurate(in_cpp, found, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("few,all", SHAPES)
def test_as_torch_has_them(few, all, dtype):
    check(few, all, dtype)


@over_lesser_processors
def test_older_processors(level, monkeypatch):
    at_level(level, monkeypatch)
    for dtype in (torch.float64, torch.float32):
        check((3, 1, 5), (3, 4, 5), dtype)


def test_no_rows_and_rows_of_zeros():
    none = torch.zeros(2, 8)
    with itm_fast.use_backend("cpu"):
        assert not gated(none, torch.zeros(2, 16), torch.zeros(2, 16), True).any()
        assert not cosines(none, none).any()
        rows = torch.zeros(0, 2, 16)
        assert gated(none, torch.zeros(2, 16), rows, True).shape == (0, 2, 8)
        assert cosines(none, rows).shape == (0, 2)


@pytest.mark.parametrize("trained", range(3))
def test_any_argument_alone_gets_its_gradient(trained):
    tensors = [torch.randn(2, n) for n in (4, 8, 12)]
    tensors[trained].requires_grad_()
    with itm_fast.use_backend("cpu"):
        refined = gated(*tensors, True)
    refined.sum().backward()
    assert tensors[trained].grad.any()


def test_sizes_that_do_not_fit():
    query = torch.zeros(2, 4)
    for product, attended in ((7, 12), (8, 6)):
        with pytest.raises(ValueError, match=rf"product must be \[..., 8\].* got {product} and {attended}"):
            gated(query, torch.zeros(2, product), torch.zeros(2, attended), True)
    with pytest.raises(ValueError, match=r"attended must be \[..., 4 or more\], got 3"):
        cosines(query, torch.zeros(2, 3))
