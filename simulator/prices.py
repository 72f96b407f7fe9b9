"""What a kilowatt-hour emits and costs over time: a constant, or steps read from a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError


@dataclass(frozen=True, slots=True)
class Steps:
    """A constant, or a value that holds from its hour on (hours since the trace's beginning)."""

    hours: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, hours: Iterable[float]) -> NDArray[np.float64]:
        rows = np.searchsorted(self.hours, list(hours), side="right") - 1
        found: NDArray[np.float64] = np.array(self.values)[np.maximum(rows, 0)]
        return found


def read_steps(text: str, option: str) -> Steps:
    """A number, or a CSV file of rows `hours,value` in order of time, with a header or without. Raises UserError."""
    try:
        value = float(text)
    except ValueError:
        pass
    else:
        if not isfinite(value) or value < 0:
            raise UserError(f"{option} {text}: must not be negative or infinite.", "Give a number or a CSV file.")
        return Steps((0.0,), (value,))
    path = Path(text)
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(f"{option} {text}: neither a number nor a CSV file that can be read.", "Check it.") from None
    steps: list[tuple[float, float]] = []
    for line, row in enumerate(rows, start=1):
        if not row:
            continue
        try:
            hour, value = (float(cell) for cell in row)
        except ValueError:
            if line == 1:
                continue  # the header
            raise UserError(f"{text}:{line}: is not `hours,value`.", "Correct that row.") from None
        if not isfinite(hour) or not isfinite(value) or value < 0 or (steps and hour <= steps[-1][0]):
            raise UserError(f"{text}:{line}: hours must rise and values not be negative.", "Correct that row.")
        steps.append((hour, value))
    if not steps:
        raise UserError(f"{text}: holds no rows.", "Give rows of hours,value.")
    return Steps(tuple(hour for hour, _ in steps), tuple(value for _, value in steps))
