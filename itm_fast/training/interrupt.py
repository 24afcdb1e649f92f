"""Ctrl-C and SIGTERM as a wish to stop, which the training loop grants at the end of a step."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator


class Stop:
    """What the signal handlers tell the loop.

    Attributes:
        asked: stop after this step.
        at_once: nothing would be lost by stopping right now, so the next signal raises.
    """

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False

    def __call__(self, *_: object) -> None:
        if self.asked or self.at_once:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Inside the `with`, SIGINT and SIGTERM set `asked`; a second one raises KeyboardInterrupt.

    >>> with signals() as stop:
    ...     stop.asked
    False
    """
    stop = Stop()
    before = {}
    with contextlib.suppress(ValueError):  # outside the main thread signals are somebody else's
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
