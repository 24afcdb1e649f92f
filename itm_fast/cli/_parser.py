"""A command-line parser that reports all errors at once, in a sentence each, and suggests the nearest name."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}


class Parser(argparse.ArgumentParser):
    """Reports every misspelt option and every invalid value in a line of its own, and prints no usage.

    A misspelt option is read as the nearest known one, so that its value and the arguments after it are checked too.

    >>> parser = Parser(prog="cook")
    >>> _ = parser.add_argument("--minutes", type=int)
    >>> parser.parse_args(["--minuets", "ten"])
    Traceback (most recent call last):
    SystemExit: 2
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self._problems: list[str] = []

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        self._problems = []
        words, left_out = self._corrected(list(sys.argv[1:] if args is None else args))
        found, extra = super().parse_known_args(words, namespace)
        if extra and not left_out:
            self._problems.append(f"{' '.join(map(repr, extra))} belongs to no option")
        if self._problems:
            self.error()
        return found, []

    def _corrected(self, words: Sequence[str]) -> tuple[list[str], bool]:
        """Replace each misspelt option by the nearest one, or leave it out; also return whether any was left out."""
        found: list[str] = []
        left_out = False
        for at, word in enumerate(words):
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return [*found, *words[at:]], left_out  # after `--` come no options, after a command its own
            name, equals, value = word.partition("=")
            if not word.startswith("-") or re.match(r"-(\.?\d|$)", word):
                found.append(word)
                continue
            near: str | None = name
            if name not in self._option_string_actions:
                near = nearest(name, self._option_string_actions)
                hint = f"did you mean {near}?" if near else f"`{self.prog} --help` lists them"
                for action in self._get_positional_actions():
                    if name.lstrip("-") == (title := str(action.metavar or action.dest)).lower():
                        hint = f"give {title} alone, without an option's name"
                self._problems.append(f"there is no option {name}; {hint}")
            if near is None:
                left_out = True
            elif equals and self._option_string_actions[near].nargs == 0:
                self._problems.append(f"{near} takes no value, got {value!r}")
                found.append(near)
            else:
                found.append(f"{near}{equals}{value}")
        return found, left_out

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            kind = _KINDS.get(action.type)
            why = f"wants {kind}, got {arg_string!r}" if kind else error.message
            self._problems.append(f"{_name(action)} {why}")
            return None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if value is None or action.choices is None or value in action.choices:
            return
        near = nearest(str(value), map(str, action.choices))
        hint = f"; did you mean {near}?" if near else ""
        known = ", ".join(map(str, action.choices))
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"there is no command {value!r}{hint or f'; the commands are {known}'}")
        self._problems.append(f"{_name(action)} must be one of {known}, got {value!r}{hint}")

    def error(self, message: str = "") -> NoReturn:
        """Print all problems and exit with code 2."""
        if message:
            missing = message.removeprefix("the following arguments are required: ")
            if missing != message:
                message = f"{missing} must be given; `{self.prog} --help` explains it"
            self._problems.append(message.removeprefix("argument "))
        self.exit(2, "".join(f"{self.prog}: {problem}\n" for problem in self._problems))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like this one, whatever its case; None when none looks like it.

    >>> nearest("--Chekpoint", ["--data", "--checkpoint"])
    '--checkpoint'
    """
    plain = {each.lower().lstrip("-"): each for each in known}
    found = difflib.get_close_matches(name.lower().lstrip("-").replace("_", "-"), plain, n=1, cutoff=0.65)
    return plain[found[0]] if found else None


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
