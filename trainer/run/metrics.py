"""The metrics of a run, means of the training values between two rows, and the file they are kept in."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.storage.files import open_to_append, os_errors, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    Reduce = Callable[[Tensor], Tensor]

_STEP = re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"-?(?:[0-9]{1,40}(?:\.[0-9]{1,40})?(?:e[-+]?[0-9]{1,4})?|inf)|nan")


class MetricsFile:
    """A CSV file with a row per logged step that a resumed run continues byte for byte.

    The first column is ``step``, the number of finished steps. A column that appears later (a new phase) is
    added at the right, and earlier rows leave it empty.

    Args:
        path: the file.
        resumed_step: rows after this step were written by a run that was killed, and are dropped.
        rows: how many rows that checkpoint says there were; None where it does not.

    Raises:
        RepaError: the file is damaged among the rows that are kept.
    """

    def __init__(self, path: Path, *, resumed_step: int, rows: int | None = None) -> None:
        self._path = path
        self._columns: list[str] = ["step"]
        self._rows: list[list[str]] = []
        with os_errors("read", path):
            raw = path.read_bytes() if path.exists() and resumed_step > 0 else b""
        columns, found, damaged = _parse(raw)
        kept = [row for row in found if int(row[0]) <= resumed_step]
        # rows after the checkpoint's may be cut off by a kill: damage there is no error
        if damaged is not None and len(kept) == len(found) and len(kept) != rows:
            raise RepaError(
                f"{path} is damaged in line {damaged}",
                "restore it, or move it away to go on without its rows",
                field=path.name,
            )
        self.missing = 0 if rows is None else max(0, rows - len(kept))
        if kept:
            filled = [
                index for index in range(len(columns)) if any(len(row) > index and row[index] for row in kept)
            ]
            width = max(filled) + 1
            self._columns = columns[:width]
            for row in kept:
                self._append(row[:width])
        self._rewrite()

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._rows)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row and hand it to the operating system."""
        new = [name for name in values if name not in self._columns]
        numbers = {name: format_number(value) for name, value in values.items()}
        self._columns += new
        row = [str(step), *(numbers.get(name, "") for name in self._columns[1:])]
        self._append(row)
        if new or not self._path.exists():
            self._rewrite()
            return
        with os_errors("write", self._path), open_to_append(self._path) as file:
            file.write(_line(row))

    def sync(self) -> None:
        """Have the rows outlive a power cut, before a checkpoint that counts on them is there.

        Raises:
            RepaError: the disk refuses.
        """
        if not self._path.exists():
            self._rewrite()
        with os_errors("write", self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _append(self, row: list[str]) -> None:
        while row and not row[-1]:
            row = row[:-1]
        self._rows.append(row)

    def _rewrite(self) -> None:
        width = len(self._columns)
        lines = [self._columns, *([*row, *[""] * (width - len(row))] for row in self._rows)]
        with os_errors("write", self._path):
            write_file(self._path, "".join(map(_line, lines)).encode(), self._path.parent)


def format_number(value: float) -> str:
    """Write nine significant digits, enough to tell any two float32 apart."""
    return f"{value:.9g}"


def _line(row: list[str]) -> str:
    return ",".join(row) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics file, empty cells left out.

    Raises:
        RepaError: it cannot be read, or a line is no row.
    """
    with os_errors("read", path):
        rows, damaged = read_whole_rows(path.read_bytes())
    if damaged is not None:
        raise RepaError(f"{path} is damaged in line {damaged}", "restore it", field=path.name)
    return rows


def read_whole_rows(raw: bytes) -> tuple[list[dict[str, float]], int | None]:
    """Return the rows of a metrics file that others may have written, up to the first line that is none.

    Args:
        raw: bytes of the file; a last line without an end is left out.

    Returns:
        The rows, empty cells left out, and the number of that line, None where all are rows.
    """
    columns, rows, damaged = _parse(raw)
    return [
        {key: float(cell) for key, cell in zip(columns, row, strict=False) if cell} for row in rows
    ], damaged


def _parse(raw: bytes) -> tuple[list[str], list[list[str]], int | None]:
    """Parse columns, rows, and the first line that is none. From there on nothing is believed.

    A last line without an end was cut short by a kill, and is left out.
    """
    lines = raw.split(b"\n")[:-1]
    if not lines:
        return [], [], None
    columns = _cells(lines[0])
    if columns is None or columns[0] != "step" or len(set(columns)) < len(columns):
        return [], [], 1
    rows: list[list[str]] = []
    for number, line in enumerate(lines[1:], 2):
        row = _cells(line)
        if row is None or not _is_row(row, columns):
            return columns, rows, number
        rows.append(row)
    return columns, rows, None


def _cells(line: bytes) -> list[str] | None:
    try:
        return line.decode().split(",")
    except UnicodeDecodeError:
        return None


def _is_row(row: list[str], columns: list[str]) -> bool:
    return len(row) <= len(columns) and bool(_STEP.fullmatch(row[0])) and all(map(_is_number, row[1:]))


def _is_number(cell: str) -> bool:
    return not cell or bool(_NUMBER.fullmatch(cell))


def first_not_finite(values: Mapping[str, float]) -> str | None:
    """Return the name of the first value that is infinite or not a number."""
    return next((name for name, value in values.items() if not math.isfinite(value)), None)
