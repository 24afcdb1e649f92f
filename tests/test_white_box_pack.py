"""pack.h, shuffle.h and write.h on their own: dtypes in and out, transposes, and the layouts that gemm.h reads."""

import numpy as np
import pytest
import torch
from white_box import all_values, bits, blocks, box, corner, draws, filled, in_numpy, whole_numbers

__all__ = ["blocks", "box"]  # fixtures

HALVES = [torch.float16, torch.bfloat16]
ALL = [torch.float32, torch.float64, *HALVES]
SHAPES = [(1, 1), (3, 40), (16, 16), (17, 33), (35, 15), (64, 50)]


def of_dtype(rows, columns, dtype):
    """Normal numbers of a dtype, and the same in float64."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(dtype)
    return in_numpy(values), values.double().numpy()


@pytest.mark.parametrize("dtype", HALVES)
def test_all_values_of_16_bits_are_read_exactly(blocks, dtype):
    values = all_values(dtype)
    found = torch.from_numpy(blocks.read(in_numpy(values), 0, 1 << 16))
    assert torch.equal(bits(found), bits(values.to(found.dtype)))


@pytest.mark.parametrize("dtype", ALL)
def test_values_are_read_from_an_offset(blocks, dtype):
    values, exact = of_dtype(1, 9, dtype)
    assert np.array_equal(blocks.read(values, 3, 5), exact[0, 3:8].astype(blocks.dtype))
    assert blocks.read(values, 9, 0).size == 0


def test_an_unknown_dtype_is_refused(blocks):
    with pytest.raises(ValueError, match="a CPU kernel got a dtype it does not know"):
        blocks.read_unknown_dtype()


def around(dtype):
    """Every finite and infinite value of a dtype of 16 bits as float32, the ones halfway to the next one, and the
    float32 neighbours of both."""
    values = all_values(dtype).float()
    values = values[~values.isnan()].sort().values
    middle = (values[1:].double() + values[:-1].double()).div(2).float()
    middle = middle[middle.isfinite()]
    large = torch.tensor([65519.996, 65520.0, -65520.0, 1e30, 3.4e38, 1e-44])
    no_numbers = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    exact = torch.cat([values, middle, large, no_numbers])
    sides = [torch.nextafter(exact, torch.full_like(exact, to)) for to in (-torch.inf, torch.inf)]
    return torch.cat([exact, *sides])


@pytest.mark.parametrize("dtype", HALVES)
def test_values_are_rounded_to_16_bits_as_torch_rounds_them(blocks, dtype):
    values = around(dtype)
    result = torch.empty(len(values), dtype=dtype)
    blocks.write(in_numpy(result), 0, values.to(getattr(torch, blocks.dtype)).numpy(), 1)
    assert torch.equal(bits(result), bits(values.to(dtype)))


@pytest.mark.parametrize("dtype", ALL)
def test_values_are_written_at_an_offset_times_a_factor(blocks, dtype):
    values, result = draws(blocks, 5), torch.full((9,), 7.0, dtype=dtype)
    blocks.write(in_numpy(result), 3, values, 0.5)
    assert torch.equal(result[3:8], torch.from_numpy(values * values.dtype.type(0.5)).to(dtype))
    assert (torch.cat([result[:3], result[8:]]) == 7).all()


def test_pairs_hold_the_even_value_below_the_odd_one(box):
    values = around(torch.bfloat16)
    # The instruction takes smaller ones for zeros.
    values = values[(values.abs() >= 2.0**-126) | (values == 0) | values.isnan()]
    even, odd = values, values.flip(0).contiguous()
    wanted = torch.stack([even, odd], 1).bfloat16().flatten()
    for found in box.pairs(even.numpy(), odd.numpy()):
        if found is not None:  # the instruction, where there is one
            assert torch.equal(bits(torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)), bits(wanted))


@pytest.mark.parametrize("count,K", SHAPES)
@pytest.mark.parametrize("by_squares", [False, True])
def test_rows_become_columns(blocks, count, K, by_squares):
    rows, out = draws(blocks, count, K), corner(blocks, K, count, fill=7)
    blocks.transpose(filled(blocks, rows), out, by_squares)  # which lie an odd number of values apart
    assert np.array_equal(out, rows.T)
    assert (out.base[:, count:] == 7).all()
    assert (out.base[K:] == 7).all()


@pytest.mark.parametrize("count,K", SHAPES)
@pytest.mark.parametrize("dtype", ALL)
def test_some_rows_of_a_tensor_are_packed_as_columns(blocks, dtype, count, K):
    tensor, exact = of_dtype(count + 5, K, dtype)
    out = corner(blocks, K, count, fill=7)
    blocks.pack_columns(tensor, 3, out)
    assert np.array_equal(out, exact[3 : count + 3].T.astype(blocks.dtype))
    assert (out.base[:, count:] == 7).all()


@pytest.mark.parametrize("count,D", SHAPES)
@pytest.mark.parametrize("dtype", ALL)
def test_some_rows_of_a_tensor_are_read_both_ways(blocks, dtype, count, D):
    tensor, exact = of_dtype(count + 5, D, dtype)
    wanted = exact[3 : count + 3].astype(blocks.dtype)
    row, column = corner(blocks, count, D, fill=7), corner(blocks, D, count, fill=7)
    blocks.read_both(tensor, 3, row, column)
    assert np.array_equal(row, wanted)
    assert np.array_equal(column, wanted.T)
    for matrix in (row, column):
        assert (matrix.base[:, matrix.shape[1] :] == 7).all()


def panels(box, values):
    """Left of gemm.h: panels of TILE_ROWS rows, k-major, the last one of as many as are left up to a multiple of
    ROW_STEP, zeros beyond the real ones."""
    parts = []
    for i in range(0, len(values), box.TILE_ROWS):
        some = values[i : i + box.TILE_ROWS]
        missing = -len(some) % box.ROW_STEP
        parts.append(np.pad(some, ((0, missing), (0, 0))).T.ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("K", [1, 2, 7])
def test_rows_are_packed_in_panels_with_zeros_beyond_them(box, blocks, K):
    for M in range(1, 2 * box.TILE_ROWS + 2):
        values = whole_numbers(M, K) + 100  # none is zero
        assert np.array_equal(blocks.pack_rows(filled(blocks, values)), panels(box, values))


@pytest.mark.parametrize("K", [1, 2, 7])
def test_rows_of_pairs_are_packed_with_a_zero_beyond_an_odd_depth(box, blocks, K):
    for M in (1, 4, box.TILE_ROWS, box.TILE_ROWS + 1):
        values = whole_numbers(M, K) + 100
        half = (np.pad(values, ((0, 0), (0, K % 2))).astype(np.float32).view(np.uint32) >> 16).astype(np.uint32)
        both = half[:, ::2] | half[:, 1::2] << 16
        assert np.array_equal(blocks.pack_rows_of_pairs(filled(blocks, values)), panels(box, both))


def test_rows_lie_an_odd_number_of_cache_lines_apart_with_room_for_a_tile_and_a_vector(blocks):
    line = 64 // np.dtype(blocks.dtype).itemsize
    for columns in range(1, 300):
        distance = blocks.padded(columns)
        whole = -(-columns // blocks.TILE_COLUMNS) * blocks.TILE_COLUMNS
        assert distance % (2 * line) == line
        assert whole + blocks.LANES <= distance < whole + blocks.LANES + 2 * line
