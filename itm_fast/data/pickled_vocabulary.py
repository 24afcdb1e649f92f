"""Read the older form of the published vocabularies, a pickled `Vocabulary` object, without running code from the file.

A pickle can call any function. Here each class or function that it names is replaced by a harmless one or refused.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

from .._files import open_regular
from .stored import damaged

STARTS = (b"\x80", b"(", b"c")  # first bytes of a pickle, protocols 0 to 5; no JSON file begins with one of them
_PARTS = ("word2idx", "idx2word", "idx")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a pickled vocabulary, as `json.load` returns it for a JSON vocabulary.

    Args:
        path: a pickle of the published vocab.py's `Vocabulary`, or of a dict, of any protocol, by Python 2 or 3.

    Raises:
        ValueError: the file is damaged, or names another class or function.
    """

    class Vocabulary:  # a new class for each call, as a file may set its attributes
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

    # The C unpickler allocates as much memory as a damaged file asks for; the Python one does not.
    class Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
        def find_class(self, module: str, name: str) -> Any:
            if name == "Vocabulary":  # in whatever module: vocab, __main__, ...
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
