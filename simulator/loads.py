"""Loads by name: a trace file, a recorded hour made anew (`conv`, `code`), or a week of it; scaled by k with a seed.

The ledger asks a load for the requests at k, and for the hour at its peak, on which k_max is searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from simulator.cached import trace_digest
from simulator.traces import KINDS, Kind, Trace, generate, native_rate_rps, read_azure, scale

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
WEEK_S = 7 * DAY_S
PIECE_S = 600.0  # the rate of a generated week is constant that long
PEAK_HOUR_OF_DAY = 14.0
# Weekend days carry this share of a weekday; peak over trough of the whole week (Azure 2024, 10-minute means).
WEEKEND: dict[Kind, float] = {"conv": 0.8, "code": 0.4}
WEEK_SWING: dict[Kind, float] = {"conv": 4.2, "code": 37.0}


@dataclass(frozen=True, slots=True)
class Load:
    """`recorded` for a file; otherwise generated from the published statistics of `kind`."""

    source: str
    name: str
    kind: Kind
    recorded: Trace | None = None
    week: bool = False

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


def load_named(source: str) -> Load:
    """`conv`, `code`, `week-conv`, `week-code`, or the path of a trace file. Raises UserError."""
    for kind in KINDS:
        if source == kind:
            return Load(source, f"generated hour, {kind}", kind)
        if source == f"week-{kind}":
            return Load(source, f"generated week, {kind}", kind, week=True)
    path = Path(source)
    if not path.exists() and not path.suffix:
        known = ", ".join([*KINDS, *(f"week-{kind}" for kind in KINDS)])
        raise UserError(f"{source}: neither a file nor a built-in load.", f"Use one of {known}, or a trace file.")
    trace = read_azure(path)
    return Load(source, trace.name, "conv", trace)


def _week(kind: Kind, peak_rps: float, seed: int) -> Trace:
    """Seven days from a Monday: the rate's logarithm swings once a day, weekends are lower. Made in pieces."""
    weekend = WEEKEND[kind]
    depth = math.log(WEEK_SWING[kind] * weekend) / 2
    parts = []
    for piece in range(int(WEEK_S / PIECE_S)):
        at_s = piece * PIECE_S
        day_hour = (at_s + PIECE_S / 2) % DAY_S / HOUR_S
        level = math.exp(depth * (math.cos(2 * math.pi * (day_hour - PEAK_HOUR_OF_DAY) / 24) - 1))
        level *= weekend if at_s >= 5 * DAY_S else 1.0
        made = generate(kind, PIECE_S, peak_rps * level, seed * 10_007 + piece, swing=0.0)
        parts.append((made.arrival_s + at_s, made.input_tokens, made.output_tokens))
    arrival_s, inputs, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Trace(f"generated-week-{kind}", WEEK_S, arrival_s, inputs, outputs)
