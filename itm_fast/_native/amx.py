"""AMX, the tile instructions of Intel's processors since Sapphire Rapids (csrc/cpu/tiles.h): may this process use them?

No machine that we have had knows them. The kernel of tiles.h is tested with the same tiles in plain C++ and compiled
with the instructions; how fast it is has not been measured.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_ARCH_PRCTL, _REQUEST, _TILES = 158, 0x1023, 18  # x86-64's system call, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA


@functools.cache
def granted() -> bool:
    """Whether the processor has tiles for bfloat16 and Linux lets this process use them, for which it must ask once."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split()
    except OSError:
        return False
    if not {"amx_tile", "amx_bf16"} <= set(flags):
        return False
    ask = ctypes.CDLL(None).syscall
    return ask(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST, _TILES))) == 0


def fault(library: ctypes.CDLL) -> str | None:
    """What is wrong with the products of a library compiled with AMX, a sentence; None if they are right."""
    library.itm_tiles.restype = ctypes.c_char_p
    said = library.itm_tiles()
    return said and said.decode()
