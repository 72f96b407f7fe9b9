"""The instance manager's rule: the clock of least power that meets the SLO at the load of the next seconds.

Called every few seconds for every instance with what it serves now. It reads only the profile's curves. Trouble
(requests waiting, load beyond the measured SLO range, KV memory nearly full) means full clock at once; hysteresis is
here and only here, and only on the way down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

from controller.domain.reasons import Reason
from controller.profile.fit import Curve, ProfileFit


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """What one instance serves. None is unknown: at least one of rate and running must be known."""

    rate_rps: float | None  # equivalent requests/s that will be routed to it, estimated by the caller
    running: float | None  # requests in its batch now
    waiting: float | None  # requests that its engine queues
    kv_usage_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class ClockSettings:
    min_saving_ratio: float = 0.02  # a lower clock must save at least this share of the present power
    fill: float = 1.0  # share of a clock's largest load in SLO that it is chosen for (`LoopSettings.serve_fill`)
    kv_high_ratio: float = 0.9  # above it preemption is near: full clock
    # Requests waiting at the engine that count as a queue. One alone may just have come during an iteration.
    waiting_high: float = 2.0


@dataclass(frozen=True, slots=True)
class ClockAlternative:
    """One clock looked at. `rejected` is "" for the chosen one."""

    mhz: int
    max_rate_rps: float
    predicted_power_w: float | None
    rejected: str


@dataclass(frozen=True, slots=True)
class ClockChoice:
    mhz: int
    reason: Reason
    rate_rps: float | None  # effective load that it was chosen for; None when unknown
    predicted_power_w: float | None  # of the whole instance; None where the profile does not know
    margin: float | None  # 1 - load / largest load in SLO at that clock; negative beyond it
    alternatives: tuple[ClockAlternative, ...]


def choose_clock(
    fit: ProfileFit,
    group: str,
    tp: int,
    load: InstanceLoad,
    current_mhz: int | None,
    settings: ClockSettings | None = None,
) -> ClockChoice:
    """Chooses the clock of one instance for the next period. Never fails: what is unknown means full clock."""
    settings = settings or _DEFAULTS
    curves = fit.clocks(group, tp)
    if not curves:
        return ClockChoice(fit.profile.full_mhz, Reason.NO_PROFILE, load.rate_rps, None, None, ())
    rate = _effective_rate(curves, load, current_mhz)
    if rate is None:
        return _full(curves, rate, Reason.STALE_TELEMETRY)
    if load.waiting is not None and load.waiting >= settings.waiting_high:
        return _full(curves, rate, Reason.QUEUE_BUILDING)
    if load.kv_usage_ratio is not None and load.kv_usage_ratio >= settings.kv_high_ratio:
        return _full(curves, rate, Reason.OVER_CAPACITY)
    powers = [_power_in_slo(curve, rate, settings.fill) for curve in curves]
    feasible = [i for i, power in enumerate(powers) if power is not None]
    if not feasible:
        return _full(curves, rate, Reason.OVER_CAPACITY)
    best = min(feasible, key=lambda i: (powers[i], i))
    kept = _hold(curves, powers, best, current_mhz, settings)
    reason = Reason.IDLE if rate == 0 else Reason.LEAST_POWER
    return _choice(curves, powers, kept, rate, reason, _HELD if kept != best else "")


_DEFAULTS = ClockSettings()
_MISSES = "misses the SLO at this load"
_HELD = "saves too little to switch"
_TROUBLE = "full clock in trouble"


def _effective_rate(curves: Sequence[Curve], load: InstanceLoad, current_mhz: int | None) -> float | None:
    """The larger of what is said to come and what the batch shows: a batch larger than the estimate explains means
    that the estimate is behind. Infinite beyond the measured range; None when neither is known."""
    rate = load.rate_rps if load.rate_rps is not None and load.rate_rps >= 0 else None
    if load.running is not None and load.running >= 0:
        here = next((c for c in curves if c.mhz == current_mhz), curves[-1])
        implied = here.rate_for_running(load.running)
        if implied is None:
            # Between none and the lightest measured batch there is no gap where idle was measured too.
            implied = inf if load.running > here.runnings[-1] else 0.0
        rate = implied if rate is None else max(rate, implied)
    return rate


def _power_in_slo(curve: Curve, rate_rps: float, fill: float = 1.0) -> float | None:
    if curve.max_rate_rps <= 0 or rate_rps > curve.max_rate_rps * fill:
        return None
    return curve.power_w(rate_rps)


def _hold(
    curves: Sequence[Curve],
    powers: Sequence[float | None],
    best: int,
    current_mhz: int | None,
    settings: ClockSettings,
) -> int:
    """Stays at the present clock where going down saves next to nothing. Never holds back a rise."""
    if current_mhz is None or curves[best].mhz >= current_mhz:
        return best
    for i, curve in enumerate(curves):
        power, best_power = powers[i], powers[best]
        if curve.mhz == current_mhz and power is not None and best_power is not None:
            return i if power - best_power < settings.min_saving_ratio * power else best
    return best


def _full(curves: Sequence[Curve], rate: float | None, reason: Reason) -> ClockChoice:
    powers = [None if rate is None else _power_in_slo(curve, rate) for curve in curves]
    return _choice(curves, powers, len(curves) - 1, rate, reason, _TROUBLE)


def _choice(
    curves: Sequence[Curve],
    powers: Sequence[float | None],
    chosen: int,
    rate: float | None,
    reason: Reason,
    why_not_better: str,
) -> ClockChoice:
    chosen_w = powers[chosen]
    alternatives = []
    for i, (curve, power) in enumerate(zip(curves, powers, strict=True)):
        if i == chosen:
            rejected = ""
        elif power is None:
            rejected = _TROUBLE if rate is None else _MISSES
        elif chosen_w is not None and power >= chosen_w:
            rejected = "draws more"
        else:
            rejected = why_not_better
        alternatives.append(ClockAlternative(curve.mhz, curve.max_rate_rps, power, rejected))
    curve = curves[chosen]
    predicted_w = chosen_w
    if predicted_w is None and rate is not None:
        predicted_w = curve.power_w(min(rate, curve.rates_rps[-1]))
    margin = None
    if rate is not None and isfinite(rate) and curve.max_rate_rps > 0:
        margin = 1.0 - rate / curve.max_rate_rps
    known = rate if rate is not None and isfinite(rate) else None
    return ClockChoice(curve.mhz, reason, known, predicted_w, margin, tuple(alternatives))
