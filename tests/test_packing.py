import pytest
import torch

import itm_fast
from itm_fast.packing import bounds


def test_round_trip_and_gradient():
    caption = torch.randn(3, 5, 4, dtype=torch.float64)
    lengths = [2, 5, 1]
    for t, n in enumerate(lengths):
        caption[t, n:] = 0
    caption.requires_grad_()
    words, cu_seqlens = itm_fast.pack(caption, lengths)
    assert cu_seqlens.tolist() == [0, 2, 7, 8]
    assert cu_seqlens.dtype == torch.int32
    torch.testing.assert_close(itm_fast.unpack(words, cu_seqlens), caption)
    words.sum().backward()
    assert caption.grad.sum(-1).eq(4).sum(1).tolist() == lengths


def test_padding_is_never_read():
    caption = torch.full((2, 3, 4), float("nan"))
    caption[0, :2], caption[1, :1] = 1.0, 2.0
    words, _ = itm_fast.pack(caption.requires_grad_(), torch.tensor([2, 1]))
    assert words[:, 0].tolist() == [1.0, 1.0, 2.0]
    words.sum().backward()
    assert caption.grad[0, 2].eq(0).all()


def test_no_captions():
    words, cu_seqlens = itm_fast.pack(torch.zeros(0, 3, 4), [])
    assert words.shape == (0, 4)
    assert cu_seqlens.tolist() == [0]
    assert itm_fast.unpack(words, cu_seqlens).shape == (0, 0, 4)


@pytest.mark.parametrize(
    "lengths,message",
    [
        ([2], r"lengths must be \[T\] with T = 2"),
        ([2, 0], r"must lie in 1\.\.3 \(W\), got 0\.\.2"),
        ([2, 4], r"got 2\.\.4"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        itm_fast.pack(torch.zeros(2, 3, 4), lengths)


@pytest.mark.parametrize(
    "edge,message",
    [([], "no elements"), ([1, 3], r"1\.\.3"), ([0, 2], r"0\.\.2"), ([0, 2, 1, 3], "caption 1")],
)
def test_bad_bounds(edge, message):
    with pytest.raises(ValueError, match=message):
        bounds(torch.tensor(edge, dtype=torch.int32), 3, "op")


def test_lengths_are_integers():
    with pytest.raises(TypeError, match=r"lengths must be integers, got torch\.float32"):
        itm_fast.pack(torch.zeros(2, 3, 4), [2.0, 1.5])
