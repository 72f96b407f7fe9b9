"""Clock lock or power cap: which of the two holds an instance's power down further, from what calibration measured.

A cap lets light iterations run at full clock and slows heavy ones; a lock slows all alike. What that is worth depends
on the hardware, so it is measured: at equal load, both within the SLO (`compare`), and for each phase alone at equal
speed (`compare_phases`). Pure; the rows stand in the profile, and the instance manager follows them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import hypot

from controller.profile.fit import Curve, ProfileFit
from controller.profile.table import SERVING, Actuator, ActuatorRow, OperatingPoint

# Of two powers nearer than this, or than two standard errors, neither is called the better one. Where nothing was
# repeated the error is not known.
LEAST_RATIO = 0.01
UNREPEATED_RATIO = 0.03


@dataclass(frozen=True, slots=True)
class PhasePoint:
    """One phase alone, saturated: `seconds_per_token` and watts of a whole instance under a lock or a cap."""

    phase: str
    tp: int
    mhz: int
    cap_w: float | None
    seconds_per_token: float
    power_w: float


def compare(fit: ProfileFit, cap_points: Iterable[OperatingPoint]) -> tuple[ActuatorRow, ...]:
    """One row for each (group, tp, load) that caps were measured at."""
    by_load: dict[tuple[str, int, float], list[OperatingPoint]] = defaultdict(list)
    for point in cap_points:
        by_load[point.group, point.tp, point.rate_rps].append(point)
    rows = []
    for (group, tp, rate), points in sorted(by_load.items()):
        cap = min(
            (p for p in points if p.in_slo(fit.profile.slo) and p.cap_w is not None),
            key=lambda p: (p.power_w, p.cap_w or 0.0),
            default=None,
        )
        lock = _least(fit.clocks(group, tp), rate)
        lock_error = _error(fit, lock, rate) if lock is not None else 0.0
        rows.append(
            ActuatorRow(
                phase=SERVING,
                group=group,
                tp=tp,
                load=rate,
                mhz=lock.mhz if lock is not None else None,
                clock_power_w=(lock.power_w(rate) or 0.0) if lock is not None else 0.0,
                cap_w=cap.cap_w if cap is not None else None,
                cap_power_w=cap.power_w if cap is not None else 0.0,
                error_ratio=hypot(lock_error, cap.power_error_ratio if cap is not None else 0.0),
                better=Actuator.EITHER,
            )
        )
    return tuple(_judged(row) for row in rows)


def _least(curves: Sequence[Curve], rate_rps: float) -> Curve | None:
    """Of the clocks that keep the SLO at a load the one of least power."""
    powers = [
        (power, curve)
        for curve in curves
        if curve.max_rate_rps >= rate_rps and (power := curve.power_w(rate_rps)) is not None
    ]
    return min(powers, key=lambda item: (item[0], item[1].mhz))[1] if powers else None


def _error(fit: ProfileFit, curve: Curve, rate_rps: float) -> float:
    near = min(
        (p for p in fit.profile.points if (p.group, p.tp, p.mhz) == (curve.group, curve.tp, curve.mhz)),
        key=lambda p: abs(p.rate_rps - rate_rps),
    )
    return near.power_error_ratio


def compare_phases(points: Iterable[PhasePoint]) -> tuple[ActuatorRow, ...]:
    """One row for each cap of each (phase, tp): the lock that is as fast against it, between measured locks. A cap that
    is faster or slower than every lock says nothing and is left out."""
    by_kind: dict[tuple[str, int], list[PhasePoint]] = defaultdict(list)
    for point in points:
        by_kind[point.phase, point.tp].append(point)
    rows = []
    for (phase, tp), kind in sorted(by_kind.items()):
        locks = sorted((p for p in kind if p.cap_w is None), key=lambda p: p.mhz)
        for cap in sorted((p for p in kind if p.cap_w is not None), key=lambda p: p.cap_w or 0.0):
            at = _as_fast(locks, cap.seconds_per_token)
            if at is not None:
                mhz, watts, error = at
                load = 1.0 / cap.seconds_per_token
                either = Actuator.EITHER
                rows.append(ActuatorRow(phase, "", tp, load, mhz, watts, cap.cap_w, cap.power_w, error, either))
    return tuple(_judged(row) for row in rows)


def _as_fast(locks: Sequence[PhasePoint], seconds_per_token: float) -> tuple[int, float, float] | None:
    """Clock and power of a lock with that speed, and how far that power may be off, relative: between two locks a line
    misses a curve by up to an eighth of their distance. Where several clocks have that speed, the lowest."""
    for slow, fast in pairwise(locks):
        if fast.seconds_per_token <= seconds_per_token <= slow.seconds_per_token:
            span = slow.seconds_per_token - fast.seconds_per_token
            way = (slow.seconds_per_token - seconds_per_token) / span if span > 0 else 0.0
            power_w = slow.power_w + way * (fast.power_w - slow.power_w)
            error = abs(fast.power_w - slow.power_w) / 8 / power_w if 0 < way < 1 else 0.0
            return round(slow.mhz + way * (fast.mhz - slow.mhz)), power_w, error
    return None


def _judged(row: ActuatorRow) -> ActuatorRow:
    if row.mhz is None or row.cap_w is None:
        better = Actuator.EITHER if row.mhz is row.cap_w else Actuator.CAP if row.mhz is None else Actuator.CLOCK
    else:
        unknown = row.phase == SERVING and row.error_ratio == 0
        least = max(UNREPEATED_RATIO if unknown else LEAST_RATIO, 2 * row.error_ratio) * row.clock_power_w
        saved_w = row.clock_power_w - row.cap_power_w
        better = Actuator.EITHER if abs(saved_w) <= least else Actuator.CAP if saved_w > 0 else Actuator.CLOCK
    return replace(row, better=better)
