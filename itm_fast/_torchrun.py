"""What torchrun tells each process that it starts, in environment variables; without torchrun there is one process."""

from __future__ import annotations

import os


def world() -> int:
    """Number of processes, on all machines."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank() -> int:
    """This process's number among all, 0 to `world()` - 1. The process of rank 0 prints, and writes all files."""
    return _number("RANK", 0) if world() > 1 else 0


def local_world() -> int:
    """Number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1) if world() > 1 else 1


def local_rank() -> int:
    """This process's number among those of this machine."""
    return _number("LOCAL_RANK", 0) if world() > 1 else 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name}, which torchrun sets, must be a whole number, got {text!r}")
    return int(text)
