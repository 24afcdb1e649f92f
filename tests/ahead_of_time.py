"""What cuda_compile.py and triton_compile.py share: their options, and which few of all kernels they compile."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Set


def options(description: str | None, architectures: Iterable[int]) -> argparse.Namespace:
    """Of the command line: `arch`, the architectures to compile for, all if none is named; and `few`."""
    known = list(architectures)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="*", type=int, metavar="ARCH", help=f"of {', '.join(map(str, known))}; all")
    parser.add_argument("--few", action="store_true", help="only so many that everything occurs once")
    args = parser.parse_args()
    if unknown := set(args.arch) - set(known):
        parser.error(f"no such architecture: {', '.join(map(str, sorted(unknown)))}")
    args.arch = args.arch or known
    return args


def cover(parts: list[Set]) -> list[int]:
    """Indices of a few of the sets that have between them every member of all, in the order of choice."""
    chosen: list[int] = []
    missing = set().union(*parts)
    while missing:
        chosen.append(max(range(len(parts)), key=lambda at: len(parts[at] & missing)))
        missing -= parts[chosen[-1]]
    return chosen
