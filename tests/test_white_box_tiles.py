"""tiles.h on its own: the kernel for AMX, with tiles in plain C++ that refuse what a processor refuses."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from white_box import box, corner, draws, filled, whole_numbers

from itm_fast import _native
from itm_fast._native import amx, compiling
from itm_fast.testing import assert_accurate

__all__ = ["box"]  # fixture

SIDE = 16


@pytest.fixture
def part(box):
    blocks = box.float32
    blocks.dtype = "float32"
    return blocks


def multiply(box, part, a, b, packed, start=None):
    """The product, and what it started from; all that it wrote lies within whole vectors of its own rows.

    `start` is one number for all elements; without it each element starts from its own.
    """
    M, N = a.shape[1], b.shape[1]
    right = corner(part, *b.shape, fill=0)
    right[:] = b
    beyond = -(-N // SIDE) * SIDE
    own = 100 * np.arange(M)[:, None] + np.arange(beyond)
    start = (own if start is None else np.full(own.shape, start)).astype("float32")
    written = box.product_by_tiles(filled(part, a), right, start, packed)
    assert (written[M:] == 7).all()
    assert (written[:, beyond:] == 7).all()
    assert np.array_equal(written[:M, N:beyond], start[:, N:beyond])
    return written[:M, :N], start[:, :N]


@pytest.mark.parametrize("packed", [False, True])
def test_every_remainder_of_a_block_is_multiplied(box, part, packed):
    shapes = [(M, N) for M in range(1, 4 * box.TILE_ROWS + 2) for N in (1, 16, 17, 32, 33, 49)]
    for M, N in shapes:
        K = (0, 1, 2, 31, 32, 33, 75)[(M + N) % 7]
        a, b = whole_numbers(K, M), whole_numbers(K, N)
        found, start = multiply(box, part, a, b, packed)
        assert np.array_equal(found, start + a.T @ b), (M, N, K)


@pytest.mark.parametrize("K", [1, 29, 500])
def test_products_add_in_float32(box, part, K):
    a, b = draws(part, K, 13), draws(part, K, 37, seed=1)
    found, start = multiply(box, part, a, b, True)
    A, B, C = torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16(), torch.tensor(start)
    assert_accurate([torch.tensor(found)], lambda d: [C.to(d) + A.to(d).T @ B.to(d)], torch.float32)


def test_an_element_has_the_same_bits_wherever_it_stands(box, part):
    a, b = draws(part, 75, 1), draws(part, 75, 1, seed=1)
    alone, _ = multiply(box, part, a, b, False, start=0.3)
    for M, N in ((13, 49), (8, 5), (49, 33)):
        many, _ = multiply(box, part, a.repeat(M, 1), b.repeat(N, 1), True, start=0.3)
        assert (many == alone).all()


RIGHT = [12] * 6 + [16] * 2


@pytest.mark.parametrize(
    "palette,rows,bytes,refused",
    [
        (1, RIGHT, [64] * 8, None),
        (1, [3] * 6 + [5] * 2, [24] * 4 + [20] * 2 + [24] * 2, None),
        (0, RIGHT, [64] * 8, "no processor"),
        (2, RIGHT, [64] * 8, "no processor"),
        (1, [17, *RIGHT[1:]], [64] * 8, "no processor"),
        (1, RIGHT, [68] + [64] * 7, "no processor"),
        (1, [0, *RIGHT[1:]], [64] * 8, "no processor"),
        (1, [*RIGHT, 1], [64] * 9, "no processor"),
        (1, [12] * 4 + [0] + [12] * 3, [64] * 4 + [0] + [64] * 3, "has no shape"),
        (1, [11, *RIGHT[1:]], [64] * 8, "do not fit"),
        (1, RIGHT, [64] * 4 + [60] * 2 + [64] * 2, "do not fit"),
        (1, RIGHT, [60] + [64] * 7, "do not fit"),
        (1, [12] * 6 + [15] * 2, [64] * 8, "do not fit"),
        (1, RIGHT, [62] + [64] * 5 + [62, 64], "do not fit"),
    ],
)
def test_shapes_that_a_processor_refuses(box, palette, rows, bytes, refused):
    if refused is None:
        box.try_tiles(palette, rows, bytes)
    else:
        with pytest.raises(ValueError, match=refused):
            box.try_tiles(palette, rows, bytes)


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "AMD64"), reason="AMX is of x86-64")
def test_the_instructions_compile_and_are_tried_in_a_process_of_their_own(tmp_path):
    """They run on no machine without AMX; there, the process that tries them ends, and this one is told."""
    compiler, deadline = compiling.find_compiler(), time.monotonic() + 300
    if compiling.best_level(compiler, "amx_bf16", tmp_path, deadline) != "amx_bf16":
        pytest.skip(f"{compiler.version} does not know AMX")
    flags = ["-O1", *compiling.FLAGS[1:], *compiling.LEVELS["amx_bf16"], "-save-temps=obj"]
    source, compiled, library = _native.csrc_dir() / "cpu" / "tiles.cpp", tmp_path / "tiles.o", tmp_path / "tiles.so"
    subprocess.run([*compiler.command, *flags, "-c", source, "-o", compiled], check=True)
    said = (tmp_path / "tiles.s").read_text()
    products = {line.split(maxsplit=1)[1] for line in said.splitlines() if line.strip().startswith("tdpbf16ps")}
    assert products == {f"%tmm{b}, %tmm{a}, %tmm{c}" for c, a, b in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))}
    assert all(f"\t{name}" in said for name in ("ldtilecfg", "tilerelease", "tileloadd", "tilestored"))
    if _native.level() in ("amx_bf16", "avx512_bf16", "avx512"):
        subprocess.run([*compiler.command, "-shared", "-pthread", compiled, "-o", library], check=True)
        wanted = None if amx.granted() else f"they end a process with signal {signal.SIGILL:d}"
        assert amx.fault(ctypes.CDLL(str(library))) == wanted


TRIED = """
import ctypes, signal, sys
trial = ctypes.CDLL(sys.argv[1]).itm_tiles
trial.restype = ctypes.c_char_p
for told in (signal.SIG_DFL, signal.SIG_IGN):
    signal.signal(signal.SIGCHLD, told)
    print((trial() or b"right").decode())
"""


@pytest.mark.skipif(_native.level() not in ("amx_bf16", "avx512_bf16"), reason="compiled for AVX-512 with bfloat16")
def test_the_trial_tells_right_products_from_wrong_ones(tmp_path):
    """Of plain tiles in place of the processor's, also where the process is not told how its children end."""
    compiler = compiling.find_compiler()
    if compiling.best_level(compiler, "amx_bf16", tmp_path, time.monotonic() + 300) != "amx_bf16":
        pytest.skip(f"{compiler.version} does not know AMX")
    flags = ["-O1", *compiling.FLAGS[1:], *compiling.LEVELS["amx_bf16"], "-shared"]
    found = []
    for tried in ("M, N, K,", "M, N, K - 1,", "(throw std::bad_alloc(), M), N, K,"):
        shutil.copytree(_native.csrc_dir() / "cpu", tmp_path / "cpu", dirs_exist_ok=True)
        gemm = tmp_path / "cpu" / "gemm.h"
        text = gemm.read_text().replace("(AmxTiles::ready(), M, N, K,", f"(PlainTiles(TileShapes()), {tried}")
        gemm.write_text(text)
        source = tmp_path / "cpu" / "tiles.cpp"
        subprocess.run([*compiler.command, *flags, f"-I{tmp_path}", source, "-o", tmp_path / "tiles.so"], check=True)
        command = [sys.executable, "-c", TRIED, str(tmp_path / "tiles.so")]
        found += subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    lost = "the process that tried them has ended without a word"
    assert found == ["right"] * 2 + ["their products are wrong"] * 2 + [lost] * 2
