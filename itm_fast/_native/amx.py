"""AMX, the tile instructions of Intel's processors since Sapphire Rapids (tiles.h): are they here, and right?"""

from __future__ import annotations

import functools
from ctypes import CDLL, c_char_p, c_long
from pathlib import Path

_PROCESSORS = Path("/proc/cpuinfo")
_ARCH_PRCTL, _REQUEST, _TILES = 158, 0x1023, 18  # x86-64's system call, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA


@functools.cache
def granted() -> bool:
    """Whether the processor has tiles for bfloat16 and Linux lets this process use them, for which it must ask once."""
    try:
        flags = _PROCESSORS.read_text().partition("\n\n")[0].split()
    except OSError:
        return False
    if not {"amx_tile", "amx_bf16"} <= set(flags):
        return False
    ask = CDLL(None).syscall
    return ask(*map(c_long, (_ARCH_PRCTL, _REQUEST, _TILES))) == 0


def fault(library: CDLL) -> str | None:
    """What is wrong with the products of a library compiled with AMX, a sentence; None if they are right."""
    library.itm_tiles.restype = c_char_p
    said = library.itm_tiles()
    return said and said.decode()
