"""`patch` and `unpatch`: find what is known in a repository's modules, prove the replacements, and make them."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from . import _families, _functions, _scorers
from ._proof import Disagrees, Fails, in_float64
from ._report import LEFT, REFUSED, REPLACED, Report, Row

LOSS = "ContrastiveLoss"
_LEFT = {
    "func_attention": "attention of one caption; the functions that call it are replaced",
    "SCAN_attention": "attention of one caption; the class that calls it is replaced",
    "shard_attn_scores": "calls the model's pair scorer",
}
_KNOWN = (*_functions.NAMES, *_families.CLASSES, LOSS, *_LEFT)
_NODES = ("sim_emb_t_list", "sim_emb_v_list")  # what CMCAN's EncoderSimilarity takes
_Undo = Callable[[], None]
_patched: dict[ModuleType, list[_Undo]] = {}  # what restores a module; kept alive here, so that no other has its id
_SKIPPED = ("site-packages", "node_modules")


def patch(*targets: ModuleType | str | Path) -> Report:
    """Replace the slow functions and classes of a published repository by the library's, where these prove equal.

    Call it once, before threads start: while it proves, tensors stay on the CPU.

    Known by name and arguments are `EncoderSimilarity` of SGRAF, its forks and RCAR, `SimsEncoder` of CHAN,
    `VisualGraph` and `TextualGraph` of GSMN, `forward_sim` of CMCAN, `xattn_score_Text_IMRAM` and
    `xattn_score_Image_IMRAM` of IMRAM (the method, on the class, so that its other methods and every reference to it
    stay); `xattn_score_t2i`, `xattn_score_i2t` and their `shard_` forms of SCAN, `xattn_score` and `shard_xattn` of
    BFAN, `xattn_score` and `xattn_score_test` of NAAF, and `i2t` and `t2i` (in every imported module that has them);
    and `ContrastiveLoss` of scores or of embeddings. Each is run beside the very code that it replaces on a small
    random problem in float64, with gradients, in evaluation and in training with the same random state; what differs
    by more than 1e-6 is refused. Code that cannot run here is refused too. Captions of one word get the library's
    score; on them the code of SCAN, BFAN and GSMN fails, and NAAF's averages over images. A CMCAN whose parts are on
    two GPUs keeps its own code.

    Args:
        targets: modules of the repository; or the path of its folder or of one of its .py files, which are imported
            with the folder on `sys.path`, where it stays, so that the repository's own imports find the same modules.
            A folder without .py files of its own stands for the only folder in it that has code known here, unless
            that is a package (it has an `__init__.py`).

    Returns:
        A row for each thing found; its text is a table.

    Raises:
        ValueError: a path does not exist, or a module of its name is imported from elsewhere.

    >>> import types, itm_fast
    >>> print(itm_fast.patch(types.ModuleType("model")))
    nothing that itm_fast.patch knows is defined here
    """
    rows: list[Row] = []
    modules: list[ModuleType] = []
    for target in targets:
        found = [target] if isinstance(target, ModuleType) else _imported(Path(target), rows)
        modules += [module for module in found if module not in modules]
    for module in modules:
        rows += _overridden(module)
        for name in _KNOWN:
            value = vars(module).get(name)
            if inspect.isroutine(value) or inspect.isclass(value):
                if value.__module__ == module.__name__:
                    rows += _one(module, name, value)
                elif value.__module__.startswith("itm_fast."):
                    rows.append(Row(module.__name__, name, LEFT, "it is itm_fast's"))
    return Report(rows)


def unpatch(*modules: ModuleType) -> None:
    """Restore the code that `patch` replaced.

    Args:
        modules: the modules that define it; none means all that were patched.

    Raises:
        TypeError: something is no module, such as the path that `patch` was given.

    >>> import itm_fast
    >>> itm_fast.unpatch()
    """
    for module in modules:
        if not isinstance(module, ModuleType):
            raise TypeError(f"unpatch takes modules, or nothing to restore all that was replaced; got {module!r}")
    for module in list(modules) or list(_patched):
        for undo in reversed(_patched.pop(module, [])):
            undo()


def _one(module: ModuleType, name: str, value: Any) -> Iterator[Row]:
    """Replace one function or class; yield what happened."""
    where = f"{module.__name__}:{_line(value)}"
    if name in _LEFT:
        yield Row(where, name, LEFT, _LEFT[name])
    elif name in _families.CLASSES:
        yield from _scorer(module, where, value)
    elif hasattr(value, "_itm_fast_patched") or hasattr(getattr(value, "forward", None), "_itm_fast_patched"):
        yield Row(where, name, LEFT, "it is replaced already")
    elif next(iter(inspect.signature(value).parameters), "") == "model":
        yield Row(where, name, LEFT, "calls methods of the model")
    else:
        try:
            with in_float64():
                new, apart = _functions.loss(value, module) if name == LOSS else _functions.replacement(name, value)
        except (Disagrees, Fails) as error:
            yield Row(where, name, REFUSED, _reason(error))
            return
        count = _set_method(module, value, new) if name == LOSS else _set_function(module, name, value, new)
        yield Row(where, name, REPLACED, f"differs by {apart:.0e}" + (f", in {count} modules" if count > 1 else ""))


def _scorer(module: ModuleType, where: str, cls: Any) -> Iterator[Row]:
    for known in _families.families(cls):
        original = getattr(cls, known.method)
        takes = tuple(inspect.signature(original).parameters)[1:]
        name = known.name if known.method == "forward" else f"{known.name}.{known.method}"
        if hasattr(original, "_itm_fast_patched"):
            yield Row(where, name, LEFT, "it is replaced already")
        elif takes == _NODES:
            yield Row(where, name, LEFT, "called by CMCAN.forward_sim, which is replaced")
        elif takes != known.takes:
            detail = f"its {known.method} takes ({', '.join(takes)}), known is ({', '.join(known.takes)})"
            yield Row(where, name, REFUSED, detail)
        else:
            yield from _proved(module, where, cls, known, name)


def _proved(module: ModuleType, where: str, cls: Any, known: _families.Family, name: str) -> Iterator[Row]:
    """Prove each mode of a published method, and replace those that agree."""
    returned: dict[str, str] = {}
    for mode in known.modes:
        named = f"{name} ({mode})" if mode else name
        try:
            with in_float64():
                returned[mode], apart = _scorers.prove(cls, known, mode)
        except (Disagrees, Fails) as error:
            yield Row(where, named, REFUSED, _reason(error))
            continue
        more = "" if returned[mode] == "scores" else f", returns {returned[mode]}"
        yield Row(where, named, REPLACED, f"differs by {apart:.0e}{more}")
    if returned:
        _set_method(module, cls, _scorers.method(cls, known, returned), known.method)


def _reason(error: Exception) -> str:
    return f"its own code fails here: {error}" if isinstance(error, Fails) else str(error)


def _set_method(module: ModuleType, cls: Any, new: Callable[..., Any], name: str = "forward") -> int:
    original = getattr(cls, name)
    new._itm_fast_patched = True  # type: ignore[attr-defined]
    setattr(cls, name, new)
    _patched.setdefault(module, []).append(functools.partial(setattr, cls, name, original))
    return 1


def _set_function(module: ModuleType, name: str, original: Any, new: Callable[..., Any]) -> int:
    """Set the function in every imported module that has it; return their number."""

    def replaced(*args, **kwargs):
        return new(*args, **kwargs)

    replaced._itm_fast_patched = True  # type: ignore[attr-defined]
    replaced.__name__, replaced.__doc__, replaced.__module__ = name, new.__doc__, module.__name__
    everywhere = [each for each in list(sys.modules.values()) if isinstance(each, ModuleType)]
    holders = [each for each in dict.fromkeys([module, *everywhere]) if vars(each).get(name) is original]
    for holder in holders:
        setattr(holder, name, replaced)
        _patched.setdefault(module, []).append(functools.partial(setattr, holder, name, original))
    return len(holders)


def _line(value: Any) -> int:
    try:
        return inspect.getsourcelines(value)[1]
    except (OSError, TypeError):
        return 0


def _overridden(module: ModuleType) -> Iterator[Row]:
    """Imports from itm_fast that the module's own class or function of the same name overrides."""
    path = getattr(module, "__file__", None)
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, SyntaxError, ValueError):
        tree = None
    imported: dict[str, int] = {}
    for node in tree.body if tree else ():
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "itm_fast":
            imported.update({alias.asname or alias.name: node.lineno for alias in node.names})
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in imported:
            detail = f"its import in line {imported[node.name]} has no effect: this definition below it overrides it"
            yield Row(f"{module.__name__}:{node.lineno}", node.name, LEFT, detail)


def _imported(path: Path, rows: list[Row]) -> list[ModuleType]:
    """Import the files of a repository that define something known; add a row for each that cannot be imported."""
    path = path.resolve()
    if not path.exists():
        raise ValueError(f"patch: there is no {path}; give a module, or the path of a repository's folder or .py file")
    folder = _root(path) if path.is_dir() else path.parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    found = []
    for file in sorted(folder.rglob("*.py")) if path.is_dir() else [path]:
        parts = file.relative_to(folder).with_suffix("").parts
        if any(part in _SKIPPED or not part.isidentifier() for part in parts):
            continue
        name = ".".join(parts)
        try:
            if not _defines(file):
                continue
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            said = (
                f"Python {sys.version_info[0]} cannot read it" if isinstance(error, SyntaxError) else "its import fails"
            )
            rows.append(Row(name, file.name, REFUSED, f"{said}: {type(error).__name__}: {error}"))
            continue
        if Path(str(getattr(module, "__file__", ""))).resolve() != file.resolve():
            raise ValueError(
                f"patch: a module {name} is imported from {getattr(module, '__file__', None)}, not from {file}; start "
                "Python in the repository's folder"
            )
        found.append(module)
    return found


def _root(folder: Path) -> Path:
    """The folder that a repository's scripts run in.

    This one; but while it has no .py files, the only folder in it with code that is known, if no script imports that
    by its name, and it is no package, which scripts import so.
    """
    while not any(folder.glob("*.py")):
        inner = [each for each in folder.iterdir() if each.is_dir() and _has_code(each)]
        if len(inner) != 1 or (inner[0] / "__init__.py").exists() or _imports(folder, inner[0].name):
            break
        folder = inner[0].resolve()
    return folder


def _imports(folder: Path, name: str) -> bool:
    line = re.compile(rf"^\s*(?:from|import)\s+{re.escape(name)}\b", re.MULTILINE)
    for file in folder.rglob("*.py"):
        try:
            if line.search(file.read_text(encoding="utf-8", errors="replace")):
                return True
        except OSError:  # `_imported` tells why
            continue
    return False


def _has_code(folder: Path) -> bool:
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder.parent).parts
        if any(part in _SKIPPED or part.startswith(".") for part in parts):
            continue
        try:
            if _defines(file):
                return True
        except (OSError, SyntaxError, ValueError):  # `_imported` tells why
            return True
    return False


def _defines(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    if not any(name in text for name in _KNOWN):
        return False
    return any(isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name in _KNOWN for n in ast.parse(text).body)
