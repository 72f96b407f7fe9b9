"""Loads by name: a trace file, a recorded hour made anew (`conv`, `code`), or a week of it; scaled by k with a seed.

A week has the token mix of the recorded hour and the shape of the public week of 2024. The ledger asks a load for the
requests at k, and for the hour at its peak, on which k_max is searched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from simulator.cached import trace_digest
from simulator.logs import AZURE, LogColumns, Skipped, read_log
from simulator.traces import KINDS, Kind, Trace, generate, native_rate_rps, scale

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
WEEK_S = 7 * DAY_S
PIECE_S = 600.0  # the rate of a generated week is constant that long


@dataclass(frozen=True, slots=True)
class Load:
    """`recorded` for a file; otherwise generated from the published statistics of `kind`."""

    source: str
    name: str
    kind: Kind
    recorded: Trace | None = None
    week: bool = False
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def mix(self) -> Kind | Trace:
        """Where calibration takes its tokens from."""
        return self.kind if self.recorded is None else self.recorded

    @property
    def digest(self) -> str:
        return self.source if self.recorded is None else trace_digest(self.recorded)

    @property
    def native_rps(self) -> float:
        """Mean rate at k = 1; of a week: at its peak."""
        return native_rate_rps(self.kind) if self.recorded is None else self.recorded.mean_rate_rps

    def at(self, k: float, seed: int) -> Trace:
        """k superposed copies, each jittered by the seed; generated loads have k times the recorded hour's rate."""
        if self.recorded is not None:
            return scale(self.recorded, k, seed)
        if self.week:
            return _week(self.kind, k * self.native_rps, seed)
        return generate(self.kind, HOUR_S, k * self.native_rps, seed)

    def at_peak(self, k: float, seed: int) -> Trace:
        """The same, of a week only an hour at its peak rate."""
        if self.week:
            return generate(self.kind, HOUR_S, k * self.native_rps, seed, swing=0.0)
        return self.at(k, seed)


def load_named(source: str, columns: LogColumns | None = None) -> Load:
    """`conv`, `code`, `week-conv`, `week-code`, or the path of a file: an Azure trace, or a log of other `columns`.

    Raises UserError.
    """
    for kind in KINDS:
        if source == kind:
            return Load(source, f"generated hour, {kind}", kind)
        if source == f"week-{kind}":
            return Load(source, f"generated week, {kind}", kind, week=True)
    path = Path(source)
    if not path.exists() and not path.suffix:
        known = ", ".join([*KINDS, *(f"week-{kind}" for kind in KINDS)])
        raise UserError(f"{source}: neither a file nor a built-in load.", f"Use one of {known}, or a trace file.")
    trace, skipped = read_log(path, columns or AZURE)
    return Load(source, trace.name, "conv", trace, skipped=skipped)


@cache
def week_shape(kind: Kind) -> NDArray[np.float64]:
    """Requests in each hour of a week from Monday on, as a share of the busiest (Azure 2024, digitised)."""
    text = resources.files("simulator").joinpath("data/azure2024_week_shape.json").read_text(encoding="utf-8")
    return np.array(json.loads(text)[kind]).ravel()


def _week(kind: Kind, peak_rps: float, seed: int) -> Trace:
    """Seven days from a Monday in the shape of the public week. Made in pieces, and straight into its columns: a week
    in memory twice is too much."""
    hours = week_shape(kind)
    middle_s = (np.arange(int(WEEK_S / PIECE_S)) + 0.5) * PIECE_S
    rates_rps = peak_rps * np.interp(middle_s / HOUR_S - 0.5, np.arange(len(hours)), hours, period=len(hours))
    counts = [max(1, round(float(rate_rps) * PIECE_S)) for rate_rps in rates_rps]
    arrival_s, tokens = np.empty(sum(counts)), np.empty((2, sum(counts)), np.int64)
    at = 0
    for piece, (rate_rps, count) in enumerate(zip(rates_rps, counts, strict=True)):
        made = generate(kind, PIECE_S, float(rate_rps), seed * 10_007 + piece, swing=0.0)
        arrival_s[at : at + count] = made.arrival_s + piece * PIECE_S
        tokens[0, at : at + count], tokens[1, at : at + count] = made.input_tokens, made.output_tokens
        at += count
    return Trace(f"generated-week-{kind}", WEEK_S, arrival_s, tokens[0], tokens[1])
