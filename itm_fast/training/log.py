"""The numbers of each training step and validation, as log.csv and, on request, for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .._files import atomic_write, open_regular

if TYPE_CHECKING:
    from ..evaluation import Metrics

STEP = ("loss", "learning_rate", "grad_norm", "samples_per_second")
DEV = (
    *(f"i2t_{name}" for name in ("r1", "r5", "r10", "medr", "meanr")),
    *(f"t2i_{name}" for name in ("r1", "r5", "r10", "medr", "meanr")),
    "rsum",
)
NAME = "log.csv"
COLUMNS = ("epoch", "iteration", *STEP, *DEV)


class Callback(Protocol):
    """What `train(callback=...)` calls after each optimiser step and each validation; `wandb.log` is one."""

    def __call__(self, data: dict[str, Any], /, *, step: int) -> Any:
        """Take numbers.

        Args:
            data: "train/loss", "train/learning_rate", "train/grad_norm", "train/samples_per_second" after an optimiser
                step; "dev/i2t_r1", ..., "dev/rsum" after a validation.
            step: optimiser steps so far.
        """


class Log:
    """Writes `log.csv`: a row for each optimiser step, and for each validation one with the dev columns filled.

    Args:
        folder: the folder of `log.csv`; an existing file is continued.
        iterations: steps that the run has taken. Later rows in the file, which an interrupted run wrote after its last
            save, are dropped.
        validated: False if the run will repeat the validation after step `iterations`; its row is dropped then.
        tensorboard: write `folder/tensorboard` as well.
        callback: called with the values of each row, as `Callback` says.

    Raises:
        ImportError: `tensorboard` is true, and TensorBoard is not installed.
        OSError: the file cannot be read or written.
        ValueError: the existing file is damaged, or is not the log of a run.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> log = Log(folder, 0)
    >>> log.add(1, 1, {"loss": 2.5, "learning_rate": 2e-4})
    >>> log.close()
    >>> (folder / "log.csv").read_text().splitlines()[1][:10]
    '1,1,2.5,0.'
    """

    def __init__(
        self,
        folder: Path,
        iterations: int,
        *,
        validated: bool = True,
        tensorboard: bool = False,
        callback: Callback | None = None,
    ) -> None:
        self._callback = callback
        self._writer = _tensorboard(folder / "tensorboard", iterations) if tensorboard else None
        path = folder / NAME
        text = io.StringIO()
        rows = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        rows.writeheader()
        if path.exists():
            for row in _rows(path):
                at = int(row["iteration"]) if (row["iteration"] or "").isdecimal() else iterations + 1
                if at < iterations or (at == iterations and (validated or not row["rsum"])):
                    rows.writerow(row)
        with atomic_write(path) as file:
            file.write(text.getvalue())
        self._file = open(path, "a", newline="", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._rows = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def add(self, epoch: int, iteration: int, values: Mapping[str, float]) -> None:
        """Add one row; columns without a value stay empty.

        Args:
            epoch: counted from 1.
            iteration: optimiser steps so far.
            values: by the names in `STEP` and `DEV`.
        """
        self._rows.writerow({"epoch": epoch, "iteration": iteration, **{n: f"{v:.7g}" for n, v in values.items()}})
        named = {f"{'train' if name in STEP else 'dev'}/{name}": float(value) for name, value in values.items()}
        if self._writer is not None:
            for name, value in named.items():
                self._writer.add_scalar(name, value, iteration)
        if self._callback is not None:
            self._callback(named, step=iteration)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log; in a row that was cut off, the missing values are None."""
    try:
        with open_regular(path) as binary, io.TextIOWrapper(binary, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are not {', '.join(COLUMNS[:3])}, ...")
            rows = list(reader)
            if any(None in row for row in rows):
                raise ValueError("a row has more values than there are columns")
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged, or is not the log of a run: {error}; move it away, and the run begins a new one"
        ) from error
    return rows


def never_validated(path: Path) -> bool:
    """Whether a file is the log of a run that ended before its first validation; False for any other file."""
    try:
        return not any(row["rsum"] for row in _rows(path))
    except ValueError:
        return False


def dev_values(found: Metrics) -> dict[str, float]:
    """One validation's values for the columns `DEV`."""
    ways = (found.i2t, found.t2i)
    values = [value for way in ways for value in (way.r1, way.r5, way.r10, way.medr, way.meanr)]
    return dict(zip(DEV, [*values, found.rsum], strict=True))


def table(title: str, found: Metrics, remark: str) -> str:
    """The recall table of one validation, for the terminal."""
    lines = [title, f"{'':>14}   R@1   R@5  R@10  medr   meanr"]
    for name, way in (("image to text", found.i2t), ("text to image", found.t2i)):
        lines.append(f"{name:>14} {way.r1:5.1f} {way.r5:5.1f} {way.r10:5.1f} {way.medr:5.0f} {way.meanr:7.1f}")
    return "\n".join([*lines, f"{'rsum':>14} {found.rsum:5.1f}   {remark}".rstrip()])


def _tensorboard(folder: Path, iterations: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard was asked for and is not installed: `pip install tensorboard`, or leave --tensorboard "
            "out; log.csv holds the same numbers"
        ) from error
    return SummaryWriter(folder, purge_step=iterations + 1)
