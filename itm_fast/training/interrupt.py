"""Ctrl-C and SIGTERM as a wish to stop, which the training loop grants at the end of a step."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does but with a code of its own."""


class Stop:
    """What the signal handlers tell the loop.

    Attributes:
        asked: stop after this step, and raise this; None when nobody asked.
        at_once: nothing would be lost by stopping right now, so the next signal raises.
    """

    def __init__(self) -> None:
        self.asked: type[KeyboardInterrupt] | None = None
        self.at_once = False

    def __call__(self, number: int, *_: object) -> None:
        interrupt = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self.asked or self.at_once:
            raise interrupt
        self.asked = interrupt
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Inside the `with`, SIGINT and SIGTERM set `asked`; a second one raises KeyboardInterrupt or `Terminated`.

    >>> with signals() as stop:
    ...     stop.asked is None
    True
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
