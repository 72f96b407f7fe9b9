"""Pace: how much slower engines work than the profile says, and what the profile's curves are then.

Little's law gives it from what every engine and gateway tells: the mean batch is the flow of output tokens times the
seconds that each takes. An engine on which everything takes `f` times as long holds at any load the batch that the
profiled one holds at `f` times that load. Pure; fed by controller/loop/pace.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt

import numpy as np
from scipy.optimize import isotonic_regression

from controller.domain.classes import Bucket
from controller.domain.slo import Slo
from controller.profile.fit import SAFETY_MARGIN, Curve, ProfileFit
from controller.profile.table import OperatingPoint, Profile


@dataclass(frozen=True, slots=True)
class PaceSettings:
    windows: int = 20  # that are looked back on
    least_windows: int = 4
    # What is believed is the ratio less so many of its standard errors: of a pool alone more than of the fleet, since
    # several pools are looked at and each holds less.
    standard_errors: float = 1.0
    first_standard_errors: float = 2.0  # before anything is corrected
    pool_standard_errors: float = 3.0
    # Windows of a minute are not independent, and a batch of other requests than the calibrated ones is not wholly
    # explained by their tokens: the error is taken for at least this.
    least_error: float = 0.01
    # Nothing is corrected before it is so much: the margin of the profile's knees is for that. Then all of it is.
    deadband: float = 0.03
    bound: float = 1.2  # most that is corrected
    drift: float = 0.15  # a ratio further from 1 than this asks for another calibration
    step: float = 0.01  # a factor is changed only by at least this: each change makes plans anew
    # A window moves it by no more: later SLO misses cost more than energy, so it comes sooner than it goes.
    rise: float = 0.03
    fall: float = 0.005


@dataclass(frozen=True, slots=True)
class PaceWindow:
    """Of one pool in one window, in equivalent requests/s: the load at which the profile has the batches that were
    seen, and the load that there was."""

    implied_rps: float
    rate_rps: float


@dataclass(frozen=True, slots=True)
class Pace:
    """`ratio` above 1: slower than the profile."""

    ratio: float
    error: float  # its standard error, relative; infinite of too few windows
    windows: int

    def at_least(self, standard_errors: float) -> float:
        """So slow at least; 0 where nothing is known."""
        return self.ratio * max(0.0, 1.0 - standard_errors * self.error)

    def at_most(self, standard_errors: float) -> float:
        return self.ratio * (1.0 + standard_errors * self.error)


UNKNOWN = Pace(1.0, inf, 0)


@dataclass(slots=True)
class PaceBook:
    """What is remembered between ticks, by pool. `unsure`: pools of which this window cannot tell."""

    began_s: float = float("-inf")
    ticks: int = 0
    # Batches, one per tick, by pool, tp, clock and instance: those that fill first hold more than others, and a batch
    # twice as large is not that of twice the load.
    held: dict[tuple[str, int, int, str], list[float]] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)  # pools that had load in the window before
    windows: dict[str, deque[PaceWindow]] = field(default_factory=dict)


_DEFAULTS = PaceSettings()


def pace_of(windows: Sequence[PaceWindow], settings: PaceSettings = _DEFAULTS) -> Pace:
    """The ratio of the sums: a window without load weighs nothing."""
    seen = [window for window in windows if window.rate_rps > 0][-settings.windows :]
    load = sum(window.rate_rps for window in seen)
    ratio = sum(window.implied_rps for window in seen) / load if seen else 1.0
    if len(seen) < settings.least_windows:
        return Pace(ratio, inf, len(seen))
    scatter = sum((window.implied_rps - ratio * window.rate_rps) ** 2 for window in seen)
    error = sqrt(scatter * len(seen) / (len(seen) - 1)) / load / ratio if ratio > 0 else inf
    return Pace(ratio, max(settings.least_error, error), len(seen))


def fleet_of(pools: Sequence[Pace]) -> Pace:
    """All pools run the same engine on the same GPUs: their mean, each weighing what it is sure of."""
    known = [pace for pace in pools if pace.error < inf and pace.ratio > 0]
    if not known:
        return UNKNOWN
    weights = [1.0 / pace.error**2 for pace in known]
    ratio = sum(pace.ratio * weight for pace, weight in zip(known, weights, strict=True)) / sum(weights)
    return Pace(ratio, 1.0 / sqrt(sum(weights)), max(pace.windows for pace in known))


def next_factor(fleet: Pace, pool: Pace, applied: float, settings: PaceSettings = _DEFAULTS) -> float:
    """What a pool's loads and latencies are multiplied with from now on; 1: nothing is corrected. A pace faster than
    the profile's is never counted on: what it would save is for another calibration."""
    if fleet.error == inf and pool.error == inf:
        return applied
    own = pool.at_least(settings.pool_standard_errors)
    wanted = max(fleet.at_least(settings.standard_errors), own)
    begun = applied > 1.0 or max(fleet.at_least(settings.first_standard_errors), own) >= 1.0 + settings.deadband
    if not begun or wanted < 1.0 + settings.step:
        wanted = 1.0
    wanted = min(wanted, settings.bound)
    if wanted > 1.0 and abs(wanted - applied) < settings.step:
        return applied
    return round(max(applied - settings.fall, min(applied + settings.rise, wanted)), 4)


def drifted(pace: Pace, settings: PaceSettings = _DEFAULTS) -> bool:
    """Surely further from the profile than may be corrected in the long run."""
    if pace.windows < settings.windows // 2:
        return False
    errors = settings.pool_standard_errors
    return pace.at_least(errors) > 1.0 + settings.drift or pace.at_most(errors) < 1.0 - settings.drift


def implied_rps(curve: Curve, running: float) -> float:
    """The load at which the profile has this mean batch; the end of what was measured for any larger one."""
    if running >= curve.runnings[-1]:
        return curve.rates_rps[-1]
    return curve.rate_for_running(running) or 0.0


def output_share(profile: Profile, group: str, input_tokens: float, output_tokens: float) -> float:
    """Output tokens per unit of work, as a multiple of the calibration mix's. A batch is made of requests that write:
    of a mix that writes twice as much per work it is twice as large at the same load."""
    mix = profile.mixes[group]
    share = sum(part.share for part in mix.values())
    calibrated = sum(part.share * part.output_tokens for part in mix.values()) / share / profile.mean_work_s(group)
    work_s = profile.work.of(input_tokens, output_tokens)
    return output_tokens / work_s / calibrated if work_s > 0 and calibrated > 0 else 0.0


# --------------------------------------------------------------------------------------------------------- curves


def slowed(fit: ProfileFit, factors: Mapping[str, float]) -> ProfileFit:
    """The curves of engines on which everything takes as many times as long, by pool: each load is the profile's
    load times the factor, at the same batch and power, and every latency is longer by it."""
    factors = {group: factor for group, factor in factors.items() if factor != 1.0}
    if not factors:
        return fit
    points: dict[tuple[str, int, int], list[OperatingPoint]] = {}
    for point in fit.profile.points:
        if point.group in factors:
            points.setdefault((point.group, point.tp, point.mhz), []).append(point)
    by_instance = {}
    for (group, tp), clocks in fit.by_instance.items():
        if group in factors:
            slower = [_slowed(c, points[group, tp, c.mhz], fit.profile.slo, factors[group]) for c in clocks]
            # A lower clock never carries more than a higher one.
            tops = np.minimum.accumulate([curve.max_rate_rps for curve in slower][::-1])[::-1].tolist()
            clocks = tuple(replace(curve, max_rate_rps=top) for curve, top in zip(slower, tops, strict=True))
        by_instance[group, tp] = clocks
    # That a power cap keeps the SLO was measured at the profile's pace.
    rows = tuple(row for row in fit.profile.actuators if row.group not in factors)
    curves = {(c.group, c.tp, c.mhz): c for clocks in by_instance.values() for c in clocks}
    return replace(fit, profile=replace(fit.profile, actuators=rows), curves=curves, by_instance=by_instance)


def _slowed(curve: Curve, points: Sequence[OperatingPoint], slo: Slo, factor: float) -> Curve:
    return replace(
        curve,
        max_rate_rps=_largest_rps(curve, sorted(points, key=lambda p: p.rate_rps), slo, factor) / factor,
        rates_rps=tuple(rate / factor for rate in curve.rates_rps),
        ttft_p99_ms={bucket: tuple(ms * factor for ms in values) for bucket, values in curve.ttft_p99_ms.items()},
    )


def _largest_rps(curve: Curve, points: Sequence[OperatingPoint], slo: Slo, factor: float) -> float:
    """The largest load, at the profile's pace and less the margin, at which every latency that is longer by `factor` is
    no longer than it may be, or than it is at the measured knee."""
    knee = curve.max_rate_rps / (1.0 - SAFETY_MARGIN)
    if knee <= 0:
        return 0.0
    rates = [p.rate_rps for p in points]
    weights = [float(max(p.requests, 1)) for p in points]
    measured = [([p.gap_p99_ms for p in points], slo.token_gap_p99_ms), ([p.tbt_p99_ms for p in points], slo.tbt_ms)]
    for bucket in Bucket:
        if all(bucket in p.ttft_p99_ms for p in points):
            measured.append(([p.ttft_p99_ms[bucket] for p in points], slo.ttft_ms(bucket)))
    largest = knee
    for values, bound_ms in measured:
        rising = isotonic_regression(values, weights=weights).x
        most_ms = max(bound_ms, float(np.interp(knee, rates, rising))) / factor
        largest = min(largest, _crossing(rates, rising.tolist(), most_ms))
    return largest * (1.0 - SAFETY_MARGIN)


def _crossing(rates: Sequence[float], rising_ms: Sequence[float], most_ms: float) -> float:
    """The load up to which rising values stay within a bound; 0 where the lightest does not."""
    above = next((i for i, ms in enumerate(rising_ms) if ms > most_ms), len(rates))
    if above in (0, len(rates)):
        return rates[-1] if above else 0.0
    part = (most_ms - rising_ms[above - 1]) / (rising_ms[above] - rising_ms[above - 1])
    return rates[above - 1] + part * (rates[above] - rates[above - 1])
