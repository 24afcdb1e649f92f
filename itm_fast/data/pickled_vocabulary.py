"""The older form of the published vocabularies: a pickled `Vocabulary` object, read without running anything.

A pickle is a program. Here every class and function that it may name is a harmless stand-in or refused.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

from .._files import open_regular
from .stored import damaged

STARTS = (b"\x80", b"(", b"c")  # of a pickle, protocols 0 to 5; JSON begins otherwise
_PARTS = ("word2idx", "idx2word", "idx")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parts of a pickled vocabulary as its JSON file would hold them.

    Args:
        path: a pickle of `Vocabulary` of the published vocab.py, by any protocol and by Python 2 or 3, or of a dict.

    Raises:
        ValueError: damaged, or it names another class or function.
    """

    class Vocabulary:  # of this call alone: what a file does to it touches no other
        pass

    def rebuilt(kind: Any, base: Any, state: Any) -> Any:
        return Vocabulary()

    stand_ins: dict[tuple[str, str], Callable[..., Any]] = {
        ("copy_reg", "_reconstructor"): rebuilt,
        ("copyreg", "_reconstructor"): rebuilt,
        ("__builtin__", "object"): object,
        ("builtins", "object"): object,
        ("collections", "OrderedDict"): dict,
    }

    # The unpickler in C reserves memory for whatever numbers a file holds; this one, in Python, does not.
    class Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
        def find_class(self, module: str, name: str) -> Any:
            if name == "Vocabulary":  # of vocab, __main__ or wherever the script lay
                return Vocabulary
            if (module, name) not in stand_ins:
                raise pickle.UnpicklingError(f"it names {module}.{name}, which no vocabulary needs")
            return stand_ins[module, name]

    with open_regular(path) as file, damaged(f"{path} is no pickle of a published vocabulary; nothing in it was run"):
        found = Reader(file, encoding="utf-8").load()
        parts = vars(found) if isinstance(found, Vocabulary) else dict(found)
        content = {part: parts.get(part) for part in _PARTS}
        if isinstance(content["idx2word"], dict):  # JSON's keys are text
            content["idx2word"] = {str(key): word for key, word in content["idx2word"].items()}
    return content
