"""The module of white_box.cpp, which offers the building blocks of csrc/cpu one by one, built once per level.

It is compiled as the library is: by the same compiler, with the same flags, into the same cache folder.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from built_modules import build_module

from itm_fast import _native

NAME = "white_box_module"
DTYPES = ["float32", "float64"]
NATIVE = "native"


def native_level():
    """The processor's best level; the library's, where that has left AMX out since its products are wrong."""
    if _native.level() == "amx_bf16" and not isinstance(built := _native.outcome(), str):
        return built.level
    return _native.level()


@functools.cache
def load(level):
    """The module for one of `_native.LEVELS`; or why there is none, a sentence."""
    levels = list(_native.LEVELS)
    if levels.index(level) < levels.index(_native.level()):
        return f"this processor has no {level} instructions"
    cpu, here = _native.csrc_dir() / "cpu", Path(__file__).parent
    files = dict.fromkeys(cpu.rglob("*.h"), cpu)
    files |= {file: here for file in here.glob("white_box*.*") if file.suffix in (".h", ".cpp")}
    texts = {file.relative_to(folder).as_posix(): file.read_text() for file, folder in files.items()}
    return build_module(NAME, level, texts)


@pytest.fixture(
    scope="module",
    params=[NATIVE, pytest.param("generic", marks=pytest.mark.slow)],
)
def box(request):
    """The building blocks as compiled for this processor's best level, and in plain C++."""
    module = load(native_level() if request.param == NATIVE else request.param)
    if isinstance(module, str):
        pytest.skip(module)
    return module


@pytest.fixture(params=DTYPES)
def blocks(box, request):
    """Those of one type of sums, whose name is `dtype`."""
    part = getattr(box, request.param)
    part.dtype = request.param
    return part


def corner(blocks, rows, columns, fill=np.nan):
    """A matrix with what gemm.h wants beyond it, rows up to a multiple of 4 and columns up to a whole tile: all `fill`.

    The distance between rows is odd, so that no row but the first begins on a vector's boundary. `.base` is all of it.
    """
    wide = -(-max(columns, 1) // blocks.TILE_COLUMNS) * blocks.TILE_COLUMNS + blocks.LANES
    return np.full((rows + 4, wide + 1 - wide % 2), fill, blocks.dtype)[:rows, :columns]


def filled(blocks, values):
    """The values as a `corner`, NaN beyond them."""
    matrix = corner(blocks, *values.shape)
    matrix[:] = values
    return matrix


def whole_numbers(*shape):
    """Numbers so small that every sum of their products is exact, whatever its order."""
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype(np.float64)


def draws(blocks, *shape, seed=0):
    """Normal numbers of the blocks' type."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(blocks.dtype)


def tensors(*arrays):
    """numpy's arrays, copied, as torch's."""
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def all_values(dtype):
    """Every value of a dtype of 16 bits, as a tensor."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def in_numpy(values):
    """A tensor as numpy's array; bfloat16, which numpy lacks, as integers of 16 bits."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def bits(values):
    """Bits of a tensor's values, all NaN alike."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.where(values.isnan(), torch.full_like(values, torch.nan), values).view(kinds[values.element_size()])
