"""The `itm-fast` program: one thin module per command, imported when that command is asked for.

A command is a module `itm_fast/cli/<command>.py` with `HELP` (what `itm-fast <command> --help` says first),
`add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from .. import _torchrun
from .._lock import LockedError
from ..training.interrupt import Terminated
from ._parser import Parser

_SUMMARIES = {
    "evaluate": "recall tables of one checkpoint or an ensemble on precomputed features",
    "metrics": "recall tables of a score matrix that you already have",
    "compare": "confidence intervals and p-values of the recalls of two evaluated models",
    "search": "find the images of a gallery that score best with a caption",
    "gallery": "encode the images of a data set into a gallery, for search",
    "attend": "draw what a model attends to in an image and its captions",
    "features": "make a split from a folder of pictures, or of one array per image, and a file of captions",
    "train": "train a model with the published recipe, or continue an interrupted run",
    "demo": "evaluate the trained models inside the package on its pictures, and draw what SAF attends to",
    "convert": "turn SCAN's .npy folder into HDF5, or back",
    "doctor": "versions, devices, which backends can run here, and why the others cannot",
}
COMMANDS = tuple(_SUMMARIES)
DIVIDED = ("evaluate", "train")  # commands that several processes, started by torchrun, run together
_EXPECTED = (ValueError, TypeError, OSError, NotImplementedError, ImportError, LockedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `itm-fast` command.

    Only the module of the chosen command is imported, and torch only when it runs, so that `--help` and errors of
    options are quick and `doctor` works where another command's dependency is broken. Bad values, missing files,
    refused backends, missing packages and exhausted memory become one sentence on standard error;
    `ITM_FAST_DEBUG=1` adds the traceback.

    Args:
        argv: the arguments after `itm-fast`; None means `sys.argv[1:]`.

    Returns:
        The exit code: that of the command (0 for success), 2 for an error that the user can correct, 130 after
        Ctrl-C, 143 after SIGTERM, 1 if standard output was closed, as by `| head`.

    Raises:
        SystemExit: from argparse, for `--help`, `--version` (code 0) and unknown options (code 2).

    Example:
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    if argv is None:
        warnings.showwarning = _one_line
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), None)
    rank, program = _torchrun.rank(), f"itm-fast {command}"
    try:
        with _sigterm_interrupts():
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere if rank else sys.stderr):
                args = build_parser(command).parse_args(words)
            _check_processes(command, program)
            return args.run(args)
    except KeyboardInterrupt as interrupt:
        _trace()
        if not rank:
            print(f"{program}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except BrokenPipeError:
        # Python flushes standard output again at exit, which would fail again: let it write to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not isinstance(error, _EXPECTED) and not _out_of_memory(error):
            raise
        _trace()
        if not (rank and isinstance(error, ChildProcessError)):  # rank 0 says why
            print(f"{program}: {f'process {rank}: ' if rank else ''}{_sentence(error, words)}", file=sys.stderr)
        return 2


def _check_processes(command: str | None, program: str) -> None:
    """Refuse a command that torchrun would run once in each of its processes."""
    count = _torchrun.world()
    if count == 1 or command in DIVIDED:
        return
    if not _torchrun.rank():
        others = " and ".join(DIVIDED)
        print(
            f"{program}: torchrun started {count} processes, and this command runs in one; torchrun is for {others}",
            file=sys.stderr,
        )
    raise SystemExit(2)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def terminate(*_: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # only the main thread may set signal handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def build_parser(command: str | None) -> Parser:
    from .. import __version__

    parser = Parser(
        prog="itm-fast",
        description="Fast, exact image-text matching by region-word cross-attention.",
        epilog="`itm-fast COMMAND --help` explains a command's options. ITM_FAST_BACKEND=name forces a\n"
        "backend, ITM_FAST_DEBUG=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"itm-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in _SUMMARIES.items():
        if name != command:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f"{__name__}.{name}")
        chosen = commands.add_parser(name, help=summary, description=module.HELP)
        module.add_arguments(chosen)
        chosen.set_defaults(run=module.run)
    return parser


def _sentence(error: BaseException, words: Sequence[str]) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name, pairs = str(error.filename), zip(words, words[1:])
        option = next((f"{option} " for option, value in pairs if option.startswith("--") and value == name), "")
        return f"{option}{name}: {error.strerror}"
    package = (error.name or "itm_fast") if isinstance(error, ModuleNotFoundError) else "itm_fast"
    if not package.startswith("itm_fast") and str(error).startswith("No module named"):
        return f"this needs the Python package {package!r}, which is not installed; `pip install` it"
    if _out_of_memory(error):
        detail = (str(error) or "no details").splitlines()[0]
        return f"out of memory; use a smaller batch size or memory budget ({detail})"
    return str(error) or f"{type(error).__name__} without a message"


def _out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # if it is not imported, the error is not one of torch
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _one_line(message, category, filename, lineno, file=None, line=None) -> None:
    if not _torchrun.rank():
        print(f"itm-fast: {message}", file=sys.stderr)


def _trace() -> None:
    if os.environ.get("ITM_FAST_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
