"""An operator's own log of requests, CSV or JSON lines, as a trace: which column holds what is given by the operator.

Logs are written as requests end, by several servers, with rows of failed requests between: so rows are sorted by
arrival, and rows that are no served request are left out, counted, and named with their line and what is wrong. Where
most rows are bad the mapping is, and that is an error.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from simulator.traces import AZURE_COLUMNS, Trace, trace_of_rows, whole_tokens

UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
NAMED_ROWS = 20
_USAGE = "Give for example arrival=started_at,input=prompt_tokens,output=completion_tokens (and unit=ms)."


@dataclass(frozen=True, slots=True)
class LogColumns:
    """Names of columns or of JSON keys ("usage.prompt_tokens" is a key in a key). `arrival` is a date and time in ISO
    8601, or a number that counts in `unit`."""

    arrival: str
    input: str
    output: str
    unit: str = "s"

    @staticmethod
    def parse(text: str) -> LogColumns:
        """From `arrival=NAME,input=NAME,output=NAME[,unit=s|ms|us|ns]`. Raises UserError."""
        parts = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
        given = {key.strip(): name.strip() for key, name in parts.items()}
        missing = [key for key in ("arrival", "input", "output") if not given.get(key)]
        unknown = [key for key in given if key not in ("arrival", "input", "output", "unit")]
        if missing or unknown or len(parts) != len(text.split(",")):
            wrong = f"says nothing of {', '.join(missing)}" if missing else "is not key=name pairs"
            raise UserError(f"--columns {text}: {wrong if not unknown else f'has no key {unknown[0]!r}'}.", _USAGE)
        columns = LogColumns(**given)
        if columns.unit not in UNITS_S:
            raise UserError(
                f"--columns {text}: there is no unit {columns.unit!r}.", f"Use one of {', '.join(UNITS_S)}."
            )
        return columns


AZURE = LogColumns(*AZURE_COLUMNS)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Rows that are no request: how many, and the first of them."""

    rows: int = 0
    examples: tuple[str, ...] = ()


def read_log(path: Path, columns: LogColumns) -> tuple[Trace, Skipped]:
    """The trace and what was left out of it. Raises UserError for a file that holds no log."""
    times, inputs, outputs = array("d"), array("q"), array("q")  # the public week has tens of millions of rows
    skipped = 0
    examples: list[str] = []
    read = 0
    try:
        for line, row in _rows(path, columns):
            read += 1
            try:
                if isinstance(row, ValueError):
                    raise row
                second = _second(row[0], columns)
                tokens = whole_tokens(columns.input, str(row[1]))
                answer = whole_tokens(columns.output, str(row[2]))
            except ValueError as error:
                skipped += 1
                if len(examples) < NAMED_ROWS:
                    examples.append(f"{path.name}:{line}: {error}")
                continue
            times.append(second)
            inputs.append(tokens)
            outputs.append(answer)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.", "Check the path given with --trace.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a text file of rows: {error}.", "Name a CSV or JSON lines file.") from None
    if not times or skipped > read / 2:
        why = f"; the first: {examples[0]}" if examples else ""
        raise UserError(f"{path}: {skipped} of {read} rows are no request{why}.", f"Check --columns. {_USAGE}")
    order = np.argsort(np.asarray(times), kind="stable")
    rows = (np.asarray(column)[order] for column in (times, inputs, outputs))
    return trace_of_rows(path.stem, *rows), Skipped(skipped, tuple(examples))


def _rows(path: Path, columns: LogColumns) -> Iterator[tuple[int, Sequence[Any] | ValueError]]:
    """Line number and the three values of a row; a row that cannot be taken apart as the error that says why."""
    names = (columns.arrival, columns.input, columns.output)
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix in (".jsonl", ".ndjson", ".json"):
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield line, _json_row(text, names)
            return
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in names if name not in header]
        if missing:
            there = ",".join(header)[:200]
            raise UserError(f"{path}:1: has no column {missing[0]!r}, only {there!r}.", f"Give --columns. {_USAGE}")
        width, (first, second, third) = len(header), (header.index(name) for name in names)
        for cells in reader:
            if len(cells) == width:
                yield reader.line_num, (cells[first], cells[second], cells[third])
            elif cells:
                yield reader.line_num, ValueError(f"{len(cells)} fields where {width} are needed")


def _json_row(text: str, names: Sequence[str]) -> Sequence[Any] | ValueError:
    try:
        row = json.loads(text)
    except ValueError:
        return ValueError("is not JSON")
    return [_value(row, name) for name in names] if isinstance(row, dict) else ValueError("is no JSON object")


def _value(row: Mapping[str, Any], name: str) -> Any:
    """Of a key, or of a key in a key; None where there is none."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _second(value: Any, columns: LogColumns) -> float:
    """Seconds since the epoch, or since whatever a number counts from."""
    if value is None or value == "":
        raise ValueError(f"{columns.arrival} is missing")
    try:
        second = float(value) * UNITS_S[columns.unit]
    except (TypeError, ValueError):
        try:
            when = datetime.fromisoformat(str(value).strip())
        except ValueError:
            raise ValueError(f"{columns.arrival} {str(value)[:40]!r} is neither a time nor a number") from None
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if not np.isfinite(second):
        raise ValueError(f"{columns.arrival} {value!r} is not finite")
    return second
