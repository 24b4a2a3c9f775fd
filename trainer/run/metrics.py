"""What a run says of itself: means of the training values between two rows, and the file they are kept in."""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING

from ...data.storage.files import os_errors, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    Reduce = Callable[[Tensor], Tensor]


class MetricsFile:
    """A CSV file with a row per logged step that a resumed run continues byte for byte.

    The first column is ``step``, the number of finished steps. A column that appears later (a new phase) is
    added at the right, and earlier rows leave it empty.

    Args:
        path: the file.
        resumed_step: rows after this step were written by a run that was killed, and are dropped.
    """

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        self._columns: list[str] = ["step"]
        self._rows: list[list[str]] = []
        with os_errors("read", path):
            text = path.read_text(encoding="utf-8") if path.exists() and resumed_step > 0 else ""
        # a killed run may have left half a line at the end
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        kept = [row for row in lines[1:] if row and row[0].isdigit() and int(row[0]) <= resumed_step]
        if kept:
            filled = [
                index
                for index in range(len(lines[0]))
                if any(len(row) > index and row[index] for row in kept)
            ]
            width = max(filled) + 1
            self._columns = lines[0][:width]
            for row in kept:
                self._append(row[:width])
        self._rewrite()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row and hand it to the operating system."""
        new = [name for name in values if name not in self._columns]
        numbers = {name: format_number(value) for name, value in values.items()}
        self._columns += new
        row = [str(step), *(numbers.get(name, "") for name in self._columns[1:])]
        self._append(row)
        if new:
            self._rewrite()
            return
        with os_errors("write", self._path), self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(_line(row))

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
    """Nine significant digits: enough to tell any two float32 apart."""
    return f"{value:.9g}"


def _line(row: list[str]) -> str:
    return ",".join(row) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file, empty cells left out."""
    with os_errors("read", path), path.open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def first_not_finite(values: Mapping[str, float]) -> str | None:
    """Name of the first value that is infinite or not a number."""
    return next((name for name, value in values.items() if not math.isfinite(value)), None)
