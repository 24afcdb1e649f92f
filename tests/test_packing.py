"""`pack`, `unpack`, and the grouping of captions by length."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import itm_fast
from itm_fast.ops import _recompute
from itm_fast.ops._attention import DEFAULT
from itm_fast.ops._torch import cross_attention_score
from itm_fast.ops._torch._groups import groups, in_order
from itm_fast.packing import bounds, runs


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


SPARSE, META = torch.zeros(2, 3, 4).to_sparse(), torch.zeros(2, 3, 4, device="meta")
WORDS = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    "caption,lengths,error,message",
    [
        (SPARSE, [2, 1], TypeError, "pack: caption must be a dense tensor, got a tensor of layout torch.sparse_coo"),
        ([[1.0]], [1], TypeError, "pack: caption must be a dense tensor, got list"),
        (None, [1], TypeError, "pack: caption must be a dense tensor, got NoneType"),
        (META, [2, 1], ValueError, "pack: caption must hold values, got a tensor on the meta device"),
        (torch.zeros(2), [2, 1], ValueError, r"pack: caption must be \[T, W, D\], got \[2\]"),
        (torch.zeros(2, 3, 4), None, TypeError, "pack: lengths must be integers, got None"),
        (torch.zeros(2, 3, 4), ["2", "1"], TypeError, r"pack: lengths must be integers, got \['2', '1'\]"),
        (torch.zeros(2, 3, 4), [[2], [1, 1]], TypeError, r"pack: lengths must be integers, got \[\[2\], \[1, 1\]\]"),
        (torch.zeros(2, 3, 4), [True, True], TypeError, r"pack: lengths must be integers, got torch\.bool"),
        (torch.zeros(2, 3, 4), [1 + 0j, 2], TypeError, r"pack: lengths must be integers, got torch\.complex64"),
        (torch.zeros(2, 3, 4), torch.tensor([2, 1], device="meta"), ValueError, "pack: lengths must hold values"),
        (torch.zeros(2, 3, 4), torch.tensor([2, 1]).to_sparse(), TypeError, "pack: lengths must be a dense tensor"),
        (torch.zeros(2, 3, 4), 2, ValueError, r"pack: lengths must be \[T\] with T = 2 as in caption, got \[\]"),
        (torch.zeros(2, 3, 4), [2, 1 << 70], TypeError, "pack: lengths must be integers, got"),
    ],
)
def test_pack_refuses_by_argument(caption, lengths, error, message):
    with pytest.raises(error, match=message):
        itm_fast.pack(caption, lengths)


@pytest.mark.parametrize(
    "words,edge,error,message",
    [
        (WORDS, [0, 2, 4], ValueError, r"unpack: cu_seqlens must start at 0 and end at the 3 packed rows, got 0\.\.4"),
        (WORDS, [0, 2], ValueError, r"got 0\.\.2"),
        (WORDS, [1, 3], ValueError, r"got 1\.\.3"),
        (WORDS, [0, 3, 3], ValueError, r"unpack: caption 1 is empty \(cu_seqlens 3 then 3\)"),
        (WORDS, [0, 5, 3], ValueError, r"unpack: caption 1 is empty \(cu_seqlens 5 then 3\)"),
        (WORDS, [], ValueError, "got no elements"),
        (WORDS, [[0, 3]], ValueError, r"cu_seqlens \[T \+ 1\], got \[3, 4\] and \[1, 2\]"),
        (torch.tensor(1.0), [0, 1], ValueError, r"words must be \[N, D\].*got \[\] and \[2\]"),
        (WORDS, None, TypeError, "unpack: cu_seqlens must be integers, got None"),
        (WORDS, [0.0, 3.0], TypeError, r"unpack: cu_seqlens must be integers, got torch\.float32"),
        (WORDS.to_sparse(), [0, 3], TypeError, "unpack: words must be a dense tensor, got a tensor of layout"),
        (WORDS.tolist(), [0, 3], TypeError, "unpack: words must be a dense tensor, got list"),
        (WORDS.to("meta"), [0, 3], ValueError, "unpack: words must hold values"),
        (WORDS, torch.tensor([0, 3], device="meta"), ValueError, "unpack: cu_seqlens must hold values"),
    ],
)
def test_unpack_refuses_by_argument(words, edge, error, message):
    with pytest.raises(error, match=message):
        itm_fast.unpack(words, edge)


def test_unpack_takes_any_integers():
    want = itm_fast.unpack(WORDS, torch.tensor([0, 2, 3], dtype=torch.int32))
    assert want[:, :, 0].tolist() == [[0, 4], [8, 0]]
    for edge in ([0, 2, 3], torch.tensor([0, 2, 3]), torch.tensor([0, 2, 3], dtype=torch.uint8)):
        assert torch.equal(itm_fast.unpack(WORDS, edge), want)


def test_runs_take_captions_of_one_length_up_to_a_number_of_rows():
    edge = [0, 2, 4, 7, 9, 11, 13]  # lengths 2 2 3 2 2 2
    found = [(run.length, run.size, run.captions) for run in runs(edge, torch.device("cpu"), 6)]
    assert [f[:2] for f in found] == [(2, 3), (2, 2), (3, 1)]
    assert found[0][2].tolist() == [0, 1, 3]  # no neighbours
    assert found[1][2] == slice(4, 6)
    assert [run.size for run in runs(edge, torch.device("cpu"), 1)] == [1] * 6


def test_groups_join_captions_of_several_lengths_up_to_a_number_of_rows():
    edge = [0, 2, 4, 7, 9, 11, 13]  # lengths 2 2 3 2 2 2
    first, last = groups(edge, torch.device("cpu"), 7, 99)
    assert (first.sets, last.sets) == ([(2, 3)], [(2, 2), (3, 1)])
    assert (last.captions.tolist(), last.rows.tolist()) == ([4, 5, 2], [9, 10, 11, 12, 4, 5, 6])
    (both,) = groups([0, 1, 2, 5], torch.device("cpu"), 5, 99)
    assert both.sets == [(1, 2), (3, 1)]
    assert (both.captions, both.rows) == (slice(0, 3), slice(0, 5))  # sorted by length: not copied
    assert not list(groups([0], torch.device("cpu"), 7, 99))
    assert len(list(groups([0, 1, 2, 5], torch.device("cpu"), 5, 8))) == 2  # all three padded have 9 rows


def test_groups_in_order_have_one_set_for_neighbours_of_equal_length():
    (equal,) = in_order([0, 2, 4, 6], 6, 6)
    assert (equal.sets, equal.captions, equal.rows) == ([(2, 3)], slice(0, 3), slice(0, 6))
    (mixed,) = in_order([0, 2, 4, 7, 9], 9, 12)
    assert mixed.sets == [(2, 2), (3, 1), (2, 1)]
    assert [g.captions for g in in_order([0, 2, 4, 7, 9], 8, 12)] == [slice(0, 3), slice(3, 4)]
    assert [g.captions for g in in_order([0, 2, 4, 7, 9], 9, 8)] == [slice(0, 2), slice(2, 4)]  # 3 rows, padded
    assert [g.rows for g in in_order([0, 5, 6], 1, 1)] == [slice(0, 5), slice(5, 6)]
    assert not list(in_order([0], 7, 7))


class Seen(TorchDispatchMode):
    """The names of operations that run inside, and the numbers of the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        self.names.add(func.overloadpacket.__name__)
        if isinstance(found, torch.Tensor):
            self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("norm", ["none", "softmax"])
def test_scores_sort_and_pad_captions_only_where_needed_and_within_a_blocks_bytes(norm, monkeypatch):
    numbers = 1024
    monkeypatch.setattr(_recompute, "CPU_TILE", numbers * cross_attention_score.COPIES * 4)
    monkeypatch.setattr(_recompute, "MIN_QUERIES", 1)
    generator = torch.Generator().manual_seed(1)

    def scored(lengths):
        image, words = torch.randn(8, 2, 4, generator=generator), torch.randn(sum(lengths), 4, generator=generator)
        edge = torch.tensor([0, *lengths]).cumsum(0)
        with Seen() as seen:
            cross_attention_score.forward(image, words, edge, None, "t2i", norm, 4.0, "mean", 1.0, *DEFAULT)
        return seen

    assert "index_copy_" not in scored([3] * 9).names
    assert "index_copy_" in scored([3, 2] * 4).names
    # Captions are sorted by length, and so gathered, where a norm is over each one's words and some lengths are equal.
    assert ("index" in scored([3, 2] * 4).names) == (norm == "softmax")
    assert "index" not in scored([3, 2, 4]).names
    assert scored([1] * 30 + [30] + [1] * 3).largest <= numbers  # all padded to 30 take 8 times as many
