"""A grid of measured iterations in the place of the physics' formulas.

`Physics.from_text("FILE.csv")` reads one. The file has one row per measurement, with these columns:

    kind,tp,mhz,tokens,context_tokens,seconds,watts

    decode      `tokens` sequences decode one token each over `context_tokens` of context in all
    prefill     a chunk of `tokens` of one prompt, behind which `context_tokens` of it are in the KV cache already
    idle        an engine that has nothing to do, at `mhz` (only watts)
    capacity    tokens that the KV cache of one instance holds, by `tp` (only tokens); optional
    parked, loading     a GPU without a context, and while weights are loaded (only watts); optional

Watts are of one GPU. What is optional, and the steps of lockable clocks, are else the built-in parameters'. For every
TP, each clock needs the same rows: prefill from one token to a whole iteration's, decode from one sequence to a whole
batch, both over several contexts. Between neighbouring rows it is interpolated, over the clock in 1/f; nothing is
extrapolated. `python -m simulator.grid_file > FILE.csv` writes the built-in physics as such a grid.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, exit_on_user_error
from simulator.engine import DEFAULT_MAX_RUNNING, PREFILL_FIRST_TOKENS, token_budget
from simulator.grid import EXTEND, Cell, GridPhysics, Lines
from simulator.physics import Physics

COLUMNS = ("kind", "tp", "mhz", "tokens", "context_tokens", "seconds", "watts")
# Which columns a kind must fill.
_NEEDS = {
    "decode": COLUMNS[1:],
    "prefill": COLUMNS[1:],
    "idle": ("mhz", "watts"),
    "capacity": ("tp", "tokens"),
    "parked": ("watts",),
    "loading": ("watts",),
}
_WHOLE = ("tp", "mhz", "tokens", "context_tokens")
# Neighbouring points of an axis may lie this far apart.
MOST_APART = 4.0
# So much may go the wrong way between two measurements.
NOISE = 0.03
# So far may a row lie off the lines through all rows of its clock.
MOST_OFF = 0.10


class Row(NamedTuple):
    """One measured iteration; watts of one GPU."""

    line: int
    tokens: int
    context_tokens: int
    seconds: float
    watts: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A file's content, as yet unproven."""

    prefill: Mapping[Cell, Sequence[Row]]
    decode: Mapping[Cell, Sequence[Row]]
    idle_w: Mapping[int, float]
    capacity: Mapping[int, int]
    parked_w: float | None
    loading_w: float | None


def read_grid(file: Path, prefill_first: bool = False) -> Physics:
    """Reads and proves a grid. Raises UserError that names the line, or what is missing."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{file}: cannot read the grid: {reason}.", "Name a readable CSV file.") from None
    built_in = Physics.load(prefill_first=prefill_first)
    measured = _parse(file, text.splitlines())
    lines = {cell: _lines_of(file, cell, measured) for cell in _proven(file, measured, token_budget(built_in))}
    kept = built_in.parameters
    tps = sorted({tp for tp, _ in lines})
    capacity = {tp: measured.capacity.get(tp) or kept.kv_capacity_tokens.get(tp) for tp in tps}
    unknown = [tp for tp, tokens in capacity.items() if tokens is None]
    if unknown:
        raise UserError(
            f"{file}: how many tokens TP{unknown[0]} holds is not known.",
            f"Add a row capacity,{unknown[0]},,TOKENS,,,.",
        )
    changed = {
        "kv_capacity_tokens": capacity,
        "static_w": measured.parked_w or kept.static_w,
        "loading_w": measured.loading_w or kept.loading_w,
        # By TP, and not used: only their keys must be those of the grid.
        **{
            name: {tp: getattr(kept, name).get(tp, 1.0) for tp in tps}
            for name in ("gemm_memory_ms", "gemm_compute_us_per_token", "allreduce_us", "allreduce_us_per_token")
        },
        "gemm": kept.gemm.model_copy(update={"ms": {tp: next(iter(kept.gemm.ms.values())) for tp in tps}}),
    }
    digest = hashlib.sha256(text.encode()).hexdigest()
    parameters = kept.model_copy(update=changed)
    return GridPhysics(file.name, digest, parameters, lines, measured.idle_w, prefill_first)


def _parse(file: Path, lines: Sequence[str]) -> Measured:
    reader = csv.DictReader(lines)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f"{file}: the first line must be {','.join(COLUMNS)}.", "Correct the names of the columns.")
    prefill: defaultdict[Cell, list[Row]] = defaultdict(list)
    decode: defaultdict[Cell, list[Row]] = defaultdict(list)
    idle_w: dict[int, float] = {}
    capacity: dict[int, int] = {}
    single: dict[str, float] = {}
    seen: set[tuple[Any, ...]] = set()
    for number, row in enumerate(reader, start=2):
        kind, values = _values(f"{file}:{number}", row)
        key = (kind, *(values.get(name) for name in _WHOLE))
        if key in seen and kind != "capacity":
            raise UserError(f"{file}:{number}: the same point stands above already.", "Leave one of both out.")
        seen.add(key)
        if kind in ("prefill", "decode"):
            cell = int(values["tp"]), int(values["mhz"])
            tokens, context = int(values["tokens"]), int(values["context_tokens"])
            rows = prefill if kind == "prefill" else decode
            rows[cell].append(Row(number, tokens, context, values["seconds"], values["watts"]))
        elif kind == "idle":
            idle_w[int(values["mhz"])] = values["watts"]
        elif kind == "capacity":
            capacity[int(values["tp"])] = int(values["tokens"])
        else:
            single[kind] = values["watts"]
    return Measured(prefill, decode, idle_w, capacity, single.get("parked"), single.get("loading"))


def _values(where: str, row: Mapping[str, str | None]) -> tuple[str, dict[str, float]]:
    kind = (row["kind"] or "").strip()
    if kind not in _NEEDS:
        raise UserError(f"{where}: unknown kind {kind!r}.", f"Use one of: {', '.join(_NEEDS)}.")
    values = {}
    for name in _NEEDS[kind]:
        text = (row[name] or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        least = 0.0 if name == "context_tokens" else 1e-12
        if not (isfinite(value) and value >= least) or (name in _WHOLE and value != int(value)):
            raise UserError(f"{where}: {name} {text!r} of a {kind} row is no number that it can be.", "Correct it.")
        values[name] = value
    return kind, values


# ------------------------------------------------------------------------------------------------------- proving


def _proven(file: Path, measured: Measured, budget: int) -> list[Cell]:
    """The cells of a grid without holes that rises and falls as it must."""
    cells = sorted({*measured.prefill, *measured.decode})
    if not cells:
        raise UserError(f"{file}: holds no prefill rows.", "Measure prefills and decodes (docs/physics.md).")
    if not measured.idle_w:
        raise UserError(f"{file}: holds no idle rows.", "Measure an idle engine at every clock.")
    _rises(file, "idle", [(mhz, watts, 0) for mhz, watts in sorted(measured.idle_w.items())])
    for tp in sorted({tp for tp, _ in cells}):
        clocks = [mhz for of, mhz in cells if of == tp]
        _near(file, f"TP{tp}, clocks", clocks)
        idle = sorted(measured.idle_w)
        if idle[0] > clocks[0] or idle[-1] < clocks[-1]:
            raise UserError(f"{file}: TP{tp} runs at {clocks[0]} to {clocks[-1]} MHz, idle does not.", EXTEND)
        for kind, rows, most in (
            ("prefill", measured.prefill, budget),
            ("decode", measured.decode, DEFAULT_MAX_RUNNING),
        ):
            _complete(file, kind, tp, clocks, rows, most)
            for mhz in clocks:
                for context in {row.context_tokens for row in rows[tp, mhz]} if kind == "prefill" else ():
                    chosen = sorted(row for row in rows[tp, mhz] if row.context_tokens == context)
                    at = f"{kind}, TP{tp}, {mhz} MHz, context {context}"
                    _rises(file, at, sorted((row.tokens, row.seconds, row.line) for row in chosen))
                for tokens in {row.tokens for row in rows[tp, mhz]}:
                    at = f"{kind}, TP{tp}, {mhz} MHz, {tokens} tokens"
                    chosen = [row for row in rows[tp, mhz] if row.tokens == tokens]
                    _rises(file, at, sorted((row.context_tokens, row.seconds, row.line) for row in chosen))
            for point in {(row.tokens, row.context_tokens) for row in rows[tp, clocks[0]]}:
                at = f"{kind}, TP{tp}, {point[0]} tokens, context {point[1]}"
                of = [
                    (mhz, row) for mhz in clocks for row in rows[tp, mhz] if (row.tokens, row.context_tokens) == point
                ]
                _rises(file, f"{at}, over the clock", [(mhz, row.watts, row.line) for mhz, row in of], "watts")
                _rises(file, f"{at}, over the clock", [(mhz, 1 / row.seconds, row.line) for mhz, row in of], "speed")
    return cells


def _complete(
    file: Path, kind: str, tp: int, clocks: Sequence[int], rows: Mapping[Cell, Sequence[Row]], most: int
) -> None:
    """Every clock has the same points, from one token to `most`, each over several contexts where that is needed."""
    points = {(row.tokens, row.context_tokens) for mhz in clocks for row in rows.get((tp, mhz), ())}
    for mhz in clocks:
        missing = sorted(points - {(row.tokens, row.context_tokens) for row in rows.get((tp, mhz), ())})
        if missing or not points:
            tokens, context = missing[0] if missing else (1, 0)
            raise UserError(
                f"{file}: no {kind} row of TP{tp} at {mhz} MHz for {tokens} tokens and context {context}.",
                "Measure it: every clock needs the same points.",
            )
    counts = sorted({tokens for tokens, _ in points})
    if counts[0] != 1 or counts[-1] < most:
        raise UserError(
            f"{file}: {kind} rows of TP{tp} go from {counts[0]} to {counts[-1]} tokens, engines from 1 to {most}.",
            EXTEND,
        )
    _near(file, f"{kind} rows of TP{tp}, tokens", counts)
    contexts = {tokens: {context for of, context in points if of == tokens} for tokens in counts}
    if kind == "prefill":
        bare = [tokens for tokens in counts if 0 not in contexts[tokens]]
        if bare:
            raise UserError(
                f"{file}: no prefill row of TP{tp} for {bare[0]} tokens without context.", "Measure it: context 0."
            )
    if not any(len(found) > 1 for found in contexts.values()):
        raise UserError(f"{file}: all {kind} rows of TP{tp} have one context.", "Measure several, to the longest.")


def _near(file: Path, what: str, values: Sequence[int]) -> None:
    for low, high in pairwise(values):
        if high > low * MOST_APART:
            raise UserError(
                f"{file}: {what}: nothing between {low} and {high}.",
                f"Measure between them: neighbours may be {MOST_APART:g} times apart.",
            )


def _rises(file: Path, what: str, points: Iterable[tuple[int, float, int]], quantity: str = "seconds") -> None:
    for (low, before, _), (high, value, line) in pairwise(points):
        if value < before * (1 - NOISE):
            where = f"{file}:{line}" if line else str(file)
            raise UserError(
                f"{where}: {what}: {quantity} fall from {low} to {high}, {before:.4g} to {value:.4g}.", "Measure again."
            )


def _lines_of(file: Path, cell: Cell, measured: Measured) -> Lines:
    """One TP at one clock as lines; refused where a row lies far off them."""
    prefill, decode = measured.prefill[cell], measured.decode[cell]
    bare = sorted((row.tokens, row) for row in prefill if row.context_tokens == 0)
    counts = [tokens for tokens, _ in bare]
    alone = {tokens: row for tokens, row in bare}
    behind = [(row, alone[row.tokens]) for row in prefill if row.context_tokens]
    more_s = sum(row.seconds - first.seconds for row, first in behind)
    more_j = sum(_joules(row) - _joules(first) for row, first in behind)
    attention_s = max(0.0, more_s / sum(row.tokens * row.context_tokens for row, _ in behind))
    attention_w = more_j / more_s if more_s > 0 else 0.0
    own_s = [attention_s * tokens * tokens / 2 for tokens in counts]
    prefill_s = _dense(counts, [row.seconds - own for (_, row), own in zip(bare, own_s, strict=True)])
    prefill_j = _dense(counts, [_joules(row) - own * attention_w for (_, row), own in zip(bare, own_s, strict=True)])

    batches = sorted({row.tokens for row in decode})
    of = {batch: [row for row in decode if row.tokens == batch] for batch in batches}
    means = {batch: _means(rows) for batch, rows in of.items()}
    # The one slope of all batches, as each about its own mean has it.
    spread = sum((row.context_tokens - means[row.tokens][0]) ** 2 for row in decode)
    context_s = sum((row.context_tokens - means[row.tokens][0]) * row.seconds for row in decode) / spread
    context_j = sum((row.context_tokens - means[row.tokens][0]) * _joules(row) for row in decode) / spread
    if context_s <= 0:
        raise UserError(
            f"{file}: decode of TP{cell[0]} at {cell[1]} MHz takes no longer over more context.", "Measure again."
        )
    decode_s = _dense(batches, [means[batch][1] - context_s * means[batch][0] for batch in batches])
    decode_j = _dense(batches, [means[batch][2] - context_j * means[batch][0] for batch in batches])
    extra = [(batch, float(decode_s[batch] - prefill_s[batch])) for batch in batches]
    sequence_s = max(0.0, sum(batch * more for batch, more in extra) / sum(batch * batch for batch, _ in extra))
    found = Lines(
        prefill_s, prefill_j, decode_s, decode_j, attention_s, attention_w, context_s, context_j / context_s, sequence_s
    )
    for row, kind in [*((row, "prefill") for row in prefill), *((row, "decode") for row in decode)]:
        tokens, context = row.tokens, row.context_tokens
        seconds, joules = (
            found.cost(0, 0, [(tokens, context)]) if kind == "prefill" else found.cost(tokens, context, ())
        )
        for said, here, what in ((row.seconds, seconds, "seconds"), (row.watts, joules / seconds, "watts")):
            if not abs(here / said - 1) <= MOST_OFF:
                raise UserError(
                    f"{file}:{row.line}: {what} {said:g}, where the other rows of TP{cell[0]} at {cell[1]} MHz say "
                    f"{here:.4g}: time and energy must be linear in the context.",
                    "Measure again.",
                )
    return found


def _means(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Context, seconds, joules."""
    count = len(rows)
    context, seconds = sum(row.context_tokens for row in rows), sum(row.seconds for row in rows)
    return context / count, seconds / count, sum(_joules(row) for row in rows) / count


def _joules(row: Row) -> float:
    return row.seconds * row.watts


def _dense(counts: Sequence[int], values: Sequence[float]) -> NDArray[np.float64]:
    """For every number from 0 (which costs nothing) to the last, linear between the points."""
    dense = np.interp(np.arange(counts[-1] + 1), counts, values)
    dense[0] = 0.0
    return dense


# ------------------------------------------------------------------------------------------------------- writing

BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
CLOCKS_MHZ = (210, 405, 600, 795, 1005, 1200, 1305, 1395, 1545, 1695, 1845, 1980)
BEFORE = (0, 4096)
CONTEXTS = (100, 1000, 4000)  # per sequence


def grid_rows(physics: Physics) -> Iterator[str]:
    """The physics as a grid, line by line."""
    yield ",".join(COLUMNS)
    yield f"parked,,,,,,{physics.idle_w(physics.clocks_mhz[-1], context=False)!r}"
    yield f"loading,,,,,,{physics.loading_w!r}"
    for mhz in CLOCKS_MHZ:
        yield f"idle,,{mhz},,,,{physics.idle_w(mhz, context=True)!r}"
    # Where the times of the GEMMs have their steps.
    known = physics.parameters.gemm.tokens
    counts = sorted({*known, *(known[-1] * share // 2 for share in (2, 3, 4)), PREFILL_FIRST_TOKENS})
    for tp in physics.tps:
        yield f"capacity,{tp},,{physics.kv_capacity_tokens(tp)},,,"
        for mhz in CLOCKS_MHZ:
            for tokens in counts:
                for before in BEFORE:
                    seconds, watts = physics.iteration(tp, mhz, 0, 0, [(tokens, before)])
                    yield f"prefill,{tp},{mhz},{tokens},{before},{seconds!r},{watts!r}"
            for batch in BATCHES:
                for context in CONTEXTS:
                    seconds, watts = physics.iteration(tp, mhz, batch, batch * context)
                    yield f"decode,{tp},{mhz},{batch},{batch * context},{seconds!r},{watts!r}"


def main() -> None:
    with exit_on_user_error("simulator.grid_file"):
        for line in grid_rows(Physics.from_text(sys.argv[1] if len(sys.argv) > 1 else "")):
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
