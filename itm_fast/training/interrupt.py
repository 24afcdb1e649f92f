"""Signal handlers for Ctrl-C and SIGTERM that let the training loop finish its step first."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._ranks import Ranks


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM; ends a command as Ctrl-C does, but with exit code 143 in place of 130."""


class Stop:
    """A signal handler that notes the first signal for the loop, and raises at the second.

    Args:
        quiet: print nothing at the first signal.

    Attributes:
        asked: the exception that the loop raises after the current step; None before the first signal.
        at_once: True while stopping in the middle loses nothing, as in a validation; the first signal then raises.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.asked: type[KeyboardInterrupt] | None = None
        self.at_once = False

    def agree(self, ranks: Ranks) -> type[KeyboardInterrupt] | None:
        """What all processes raise now, so that all stop after the same step; None if none of them was asked to stop.

        A signal that comes while this waits for the others is seen at the next step.
        """
        kinds: tuple[type[KeyboardInterrupt] | None, ...] = (None, KeyboardInterrupt, Terminated)
        return kinds[ranks.most(kinds.index(self.asked))]

    def __call__(self, number: int, *_: object) -> None:
        interrupt = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self.asked or self.at_once:
            raise interrupt
        self.asked = interrupt
        if self.quiet:
            return
        print("\nstopping after this step; a second Ctrl-C or SIGTERM stops at once", file=sys.stderr)


@contextlib.contextmanager
def signals(quiet: bool = False) -> Iterator[Stop]:
    """Inside the `with`, SIGINT and SIGTERM set `asked`; a second one raises KeyboardInterrupt or `Terminated`.

    >>> with signals() as stop:
    ...     stop.asked is None
    True
    """
    stop = Stop(quiet)
    before = {}
    with contextlib.suppress(ValueError):  # only the main thread may set signal handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
