"""Curves over a profile's points: for one (group, tp, clock), what a load does to power, batch and latency.

`fit(profile)` is made once per profile and read by every planner and by every instance tick. Between measured points
it interpolates; beyond them it refuses: None from the scalar readers, OutOfRange from the vectorised ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from controller.domain.classes import Bucket
from controller.domain.slo import Slo
from controller.profile.actuator import caps_by_kind
from controller.profile.arrays import CurveArrays, curve_arrays
from controller.profile.table import ActuatorRow, IdlePoint, OperatingPoint, Profile

Floats = NDArray[np.float64]

# A measured knee is a sample: loads are planned up to this share of it.
SAFETY_MARGIN = 0.05


class OutOfRangeError(ValueError):
    """A load beyond the measured range was asked for: extrapolation is refused."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One instance of `tp` GPUs at `mhz` serving `group`. `rates_rps` ascend from 0 (idle); the rest stands beside
    them. `max_rate_rps` is the largest load in SLO less the safety margin; 0 when not even the lightest is.
    `largest_batch`: the batch at which the mean time between tokens leaves the SLO (see `_largest_batch`)."""

    group: str
    tp: int
    mhz: int
    max_rate_rps: float
    largest_batch: float
    rates_rps: tuple[float, ...]
    powers_w: tuple[float, ...]
    runnings: tuple[float, ...]  # mean requests in the batch
    runnings_p99: tuple[float, ...]
    ttft_p99_ms: Mapping[Bucket, tuple[float, ...]]
    attainments: tuple[float, ...]  # of the input bucket that fares worst
    error_ratio: float = 0.0  # standard error of its powers, as a share of them; 0 where nothing was repeated

    def power_w(self, rate_rps: float) -> float | None:
        """Mean power of the whole instance; None beyond the measured range."""
        return _interpolate(self.rates_rps, self.powers_w, rate_rps)

    def running(self, rate_rps: float) -> float | None:
        return _interpolate(self.rates_rps, self.runnings, rate_rps)

    def running_p99(self, rate_rps: float) -> float | None:
        return _interpolate(self.rates_rps, self.runnings_p99, rate_rps)

    def ttft_p99(self, bucket: Bucket, rate_rps: float) -> float | None:
        """Milliseconds; None beyond the measured range or for a bucket that the group does not hold."""
        values = self.ttft_p99_ms.get(bucket)
        return None if values is None else _interpolate(self.rates_rps, values, rate_rps)

    def attainment(self, rate_rps: float) -> float | None:
        """Share of requests in SLO, of the input bucket that fares worst; None beyond the measured range."""
        return _interpolate(self.rates_rps, self.attainments, rate_rps)

    def rate_for_running(self, running: float) -> float | None:
        """The load at which the mean batch is `running`: the inverse of `running`. None beyond the measured range."""
        return _interpolate(self.runnings, self.rates_rps, running)

    def power_w_array(self, rates_rps: Floats) -> Floats:
        """As `power_w` for many loads; raises OutOfRangeError if any is beyond the measured range."""
        if rates_rps.size and not (rates_rps.min() >= 0 and rates_rps.max() <= self.rates_rps[-1]):
            raise OutOfRangeError(
                f"{self.group} TP{self.tp} {self.mhz} MHz is measured for 0 to {self.rates_rps[-1]:.3g} requests/s"
            )
        return np.interp(rates_rps, self.rates_rps, self.powers_w)


@dataclass(frozen=True)
class ProfileFit:
    """All curves of a profile."""

    profile: Profile
    curves: Mapping[tuple[str, int, int], Curve]  # by (group, tp, mhz)
    by_instance: Mapping[tuple[str, int], tuple[Curve, ...]]  # by (group, tp), clock ascending

    @cached_property
    def arrays(self) -> CurveArrays:
        """The same for choices over a whole fleet."""
        return curve_arrays(self.by_instance)

    @cached_property
    def caps(self) -> Mapping[tuple[str, int], tuple[ActuatorRow, ...]]:
        """By (group, tp): the measured loads of kinds that a power cap serves better than a clock lock at some."""
        return caps_by_kind(self.profile.actuators)

    def curve(self, group: str, tp: int, mhz: int) -> Curve | None:
        return self.curves.get((group, tp, mhz))

    def clocks(self, group: str, tp: int) -> tuple[Curve, ...]:
        """The curves of one instance kind by rising clock; empty when it was not measured."""
        return self.by_instance.get((group, tp), ())

    def max_rate_rps(self, group: str, tp: int) -> float:
        """Largest load in SLO at any clock, in equivalent requests/s of one instance; 0 when there is none."""
        return self._top_rps.get((group, tp), 0.0)

    @cached_property
    def _top_rps(self) -> Mapping[tuple[str, int], float]:
        return {key: max((c.max_rate_rps for c in clocks), default=0.0) for key, clocks in self.by_instance.items()}

    def idle_power_w(self, tp: int, mhz: int) -> float | None:
        return self.profile.idle_power_w(tp, mhz)

    def standby(self, tp: int) -> IdlePoint | None:
        """The clock at which a loaded instance that serves nothing draws least; None where that was not measured."""
        return self._standby.get(tp)

    @cached_property
    def _standby(self) -> Mapping[int, IdlePoint]:
        least: dict[int, IdlePoint] = {}
        for point in sorted(self.profile.idle, key=lambda point: (point.power_w, -point.mhz)):
            least.setdefault(point.tp, point)
        return least

    def error_ratio(self, group: str, tps: Iterable[int]) -> float:
        """Standard error of the power of instances of these kinds, as a share of it; of the least sure kind."""
        return max((curve.error_ratio for tp in tps for curve in self.clocks(group, tp)), default=0.0)

    @property
    def parked_w(self) -> float:
        """One GPU without a context."""
        return self.profile.parked_w

    def at_clock(self, mhz: int) -> ProfileFit:
        """The same of a fleet that runs at one clock alone."""
        by_instance = {key: tuple(c for c in clocks if c.mhz == mhz) for key, clocks in self.by_instance.items()}
        return replace(self, curves={k: c for k, c in self.curves.items() if c.mhz == mhz}, by_instance=by_instance)

    def corrected(self, factors: Mapping[tuple[str, int], float]) -> ProfileFit:
        """The same with the powers of some kinds of instance, by (group, tp), multiplied."""
        if not factors:
            return self
        by_instance = {
            key: tuple(replace(c, powers_w=tuple(w * factors[key] for w in c.powers_w)) for c in clocks)
            if key in factors
            else clocks
            for key, clocks in self.by_instance.items()
        }
        curves = {(c.group, c.tp, c.mhz): c for clocks in by_instance.values() for c in clocks}
        return replace(self, curves=curves, by_instance=by_instance)

    def capped(self, cap_w: float) -> ProfileFit:
        """The same of instances whose every GPU may draw `cap_w`: each clock carries what it can within the cap. Clocks
        above the one that carries most so are left out: the cap would only pull them down."""
        by_instance = {}
        for (group, tp), clocks in self.by_instance.items():
            within = [_within(curve, cap_w * tp) for curve in clocks]
            last = max(range(len(within)), key=lambda i: (within[i].max_rate_rps, -i), default=-1)
            by_instance[group, tp] = tuple(within[: last + 1])
        curves = {(c.group, c.tp, c.mhz): c for clocks in by_instance.values() for c in clocks}
        return replace(self, curves=curves, by_instance=by_instance)


def fit(profile: Profile, safety_margin: float = SAFETY_MARGIN) -> ProfileFit:
    """Builds the curves; points may come in any order."""
    points: dict[tuple[str, int, int], list[OperatingPoint]] = defaultdict(list)
    for point in profile.points:
        points[point.group, point.tp, point.mhz].append(point)
    by_instance: dict[tuple[str, int], tuple[Curve, ...]] = {}
    for group, tp in sorted({(group, tp) for group, tp, _ in points}):
        rising = [
            _curve(profile, sorted(points[group, tp, mhz], key=lambda p: p.rate_rps), safety_margin)
            for mhz in profile.clocks_mhz
            if (group, tp, mhz) in points
        ]
        by_instance[group, tp] = _knees_rise_with_clock(rising)
    curves = {(c.group, c.tp, c.mhz): c for clocks in by_instance.values() for c in clocks}
    return ProfileFit(profile, curves, by_instance)


def _curve(profile: Profile, points: Sequence[OperatingPoint], safety_margin: float) -> Curve:
    """Power, batch and latency can only rise with load, attainment only fall: what goes the other way between two
    neighbouring points is sampling noise, and isotonic regression (weighted by requests) takes it out."""
    group, tp, mhz = points[0].group, points[0].tp, points[0].mhz
    rates = [p.rate_rps for p in points]
    weights = [float(max(p.requests, 1)) for p in points]
    powers = _rising([p.power_w for p in points], weights)
    runnings = _rising([p.running_mean for p in points], weights)
    runnings_p99 = _rising([p.running_p99 for p in points], weights)
    buckets = [b for b in Bucket if all(b in p.ttft_p99_ms for p in points)]
    ttft = {b: _rising([p.ttft_p99_ms[b] for p in points], weights) for b in buckets}
    attainments = [-value for value in _rising([-p.attainment_low for p in points], weights)]
    knee = knee_rps(points, profile.slo)
    idle_w = profile.idle_power_w(tp, mhz)
    if idle_w is not None and rates[0] > 0:
        # No load is a measured point too; its first request meets at most the latency of the lightest load.
        rates, powers = [0.0, *rates], [min(idle_w, powers[0]), *powers]
        runnings, runnings_p99 = [0.0, *runnings], [0.0, *runnings_p99]
        ttft = {b: [values[0], *values] for b, values in ttft.items()}
        attainments = [attainments[0], *attainments]
    return Curve(
        group=group,
        tp=tp,
        mhz=mhz,
        max_rate_rps=knee * (1.0 - safety_margin),
        largest_batch=_largest_batch(points, profile.slo),
        rates_rps=tuple(rates),
        powers_w=tuple(powers),
        runnings=tuple(runnings),
        runnings_p99=tuple(runnings_p99),
        ttft_p99_ms={b: tuple(values) for b, values in ttft.items()},
        attainments=tuple(attainments),
        error_ratio=sqrt(fmean(p.power_error_ratio**2 for p in points)),
    )


# As a share of the largest batch that was measured: so far the line through the measured ones is trusted.
MOST_BATCH = 4.0


def _largest_batch(points: Sequence[OperatingPoint], slo: Slo) -> float:
    """The batch (P99) at which requests' P99 of time between tokens reaches the SLO, on the line through the lightest
    and the heaviest measured load. A knee may stand far below it, where first tokens are late before the batch is
    large: that depends on how many instances share the load, this does not."""
    light, heavy = points[0], max(points, key=lambda point: point.running_p99)
    rise_ms = (heavy.tbt_p99_ms - light.tbt_p99_ms) / max(heavy.running_p99 - light.running_p99, 1e-9)
    if rise_ms <= 0:
        return heavy.running_p99
    batch = light.running_p99 + (slo.tbt_ms - light.tbt_p99_ms) / rise_ms
    return max(1.0, min(batch, MOST_BATCH * heavy.running_p99))


def knee_rps(points: Sequence[OperatingPoint], slo: Slo) -> float:
    """Largest load in SLO of one instance at one clock, without margin: the last measured one that is, plus the way
    to the next as far as attainment and gap allow. `points` by rising load; 0 when the lightest is not in SLO."""
    weights = [float(max(p.requests, 1)) for p in points]
    attainment = [-value for value in _rising([-p.attainment_low for p in points], weights)]
    gap = _rising([p.gap_p99_ms for p in points], weights)
    good = [a >= slo.attainment and g <= slo.token_gap_p99_ms for a, g in zip(attainment, gap, strict=True)]
    if not good[0]:
        return 0.0
    last = next((i for i, ok in enumerate(good) if not ok), len(good)) - 1
    if last == len(good) - 1:
        return points[last].rate_rps
    way = min(
        _share(attainment[last], attainment[last + 1], slo.attainment),
        _share(gap[last], gap[last + 1], slo.token_gap_p99_ms),
    )
    return points[last].rate_rps + way * (points[last + 1].rate_rps - points[last].rate_rps)


def _share(good: float, bad: float, bound: float) -> float:
    """How far from `good` towards `bad` the bound lies; 1 when `bad` does not cross it."""
    return 1.0 if abs(bad - good) <= abs(bound - good) else (bound - good) / (bad - good)


def _knees_rise_with_clock(rising: Sequence[Curve]) -> tuple[Curve, ...]:
    """A lower clock never carries more than a higher one: where the sample says so, the lower value holds."""
    clean: list[Curve] = []
    limit = float("inf")
    for curve in reversed(rising):
        limit = min(limit, curve.max_rate_rps)
        clean.append(replace(curve, max_rate_rps=limit))
    return tuple(reversed(clean))


def _within(curve: Curve, watts: float) -> Curve:
    """A curve up to the load at which it draws so much; without any load where even idle draws more."""
    if curve.powers_w[-1] <= watts:
        return curve
    if curve.powers_w[0] > watts:
        rate_rps, last = 0.0, 1
    else:
        last = bisect_right(curve.powers_w, watts)
        rate_rps = _interpolate(curve.powers_w, curve.rates_rps, watts) or 0.0

    def cut(values: Sequence[float]) -> tuple[float, ...]:
        kept = values[:last]
        end = _interpolate(curve.rates_rps, values, rate_rps)
        return (*kept, end) if end is not None and rate_rps > curve.rates_rps[last - 1] else tuple(kept)

    return replace(
        curve,
        max_rate_rps=min(curve.max_rate_rps, rate_rps),
        rates_rps=cut(curve.rates_rps),
        powers_w=cut(curve.powers_w),
        runnings=cut(curve.runnings),
        runnings_p99=cut(curve.runnings_p99),
        attainments=cut(curve.attainments),
        ttft_p99_ms={bucket: cut(values) for bucket, values in curve.ttft_p99_ms.items()},
    )


def _rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    return [float(value) for value in isotonic_regression(values, weights=weights).x]


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """Linear between points of ascending `xs`; None outside. On a flat stretch of `xs` the last point holds."""
    if not xs[0] <= x <= xs[-1]:  # also refuses NaN
        return None
    i = bisect_right(xs, x)
    if i == len(xs):
        return ys[-1]
    x0, x1 = xs[i - 1], xs[i]
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - x0) / (x1 - x0)
