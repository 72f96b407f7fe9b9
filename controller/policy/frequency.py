"""The instance manager's rule: the clock of least power that meets the SLO at the load of the next seconds.

Asked every few seconds for all instances at once, with what each serves now. It reads only the profile's curves.
Trouble (requests waiting, load beyond the measured SLO range, KV memory nearly full) means full clock at once;
hysteresis is here and only here, and only on the way down. What else was looked at is told on demand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from typing import NamedTuple

import numpy as np

from controller.domain.reasons import Reason
from controller.profile.actuator import cap_for
from controller.profile.arrays import Bools, CurveArrays, Floats, Ints, interpolate
from controller.profile.fit import Curve, ProfileFit


class InstanceLoad(NamedTuple):
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
    caps: bool = True  # power caps may take the place of locks (not while caps guard a budget)


class ClockAsk(NamedTuple):
    """One instance that needs a clock. `current_mhz` is None where none was chosen yet."""

    group: str
    tp: int
    load: InstanceLoad
    current_mhz: int | None


class ClockChoice(NamedTuple):
    mhz: int
    reason: Reason
    rate_rps: float | None  # effective load that it was chosen for; None when unknown
    predicted_power_w: float | None  # of the whole instance; None where the profile does not know
    margin: float | None  # 1 - load / largest load in SLO at that clock; negative beyond it
    # Power limit of each GPU where that was measured to draw less than any lock; the clock is then free up to `mhz`.
    cap_w: float | None = None


@dataclass(frozen=True, slots=True)
class ClockAlternative:
    """One clock looked at. `rejected` is "" for the chosen one."""

    mhz: int
    max_rate_rps: float
    predicted_power_w: float | None
    rejected: str


_DEFAULTS = ClockSettings()
# With fewer instances than this the arrays cost more than they save.
FEW = 24


def choose_clocks(fit: ProfileFit, asks: Sequence[ClockAsk], settings: ClockSettings = _DEFAULTS) -> list[ClockChoice]:
    """Chooses the clocks of a fleet for the next period, in the order asked. Never fails: what is unknown means full
    clock. Gives for each what `choose_clock` gives for it alone."""
    if len(asks) < FEW:
        return [choose_clock(fit, *ask, settings) for ask in asks]
    arrays = fit.arrays
    kinds = [arrays.rows.get((ask.group, ask.tp), -1) for ask in asks]
    measured = [ask for ask, kind in zip(asks, kinds, strict=True) if kind >= 0]
    rows = np.array([kind for kind in kinds if kind >= 0], dtype=np.int64)
    found = iter(_choose(arrays, rows, measured, settings) if measured else ())
    chosen = [next(found) if kind >= 0 else _unmeasured(fit, ask.load) for ask, kind in zip(asks, kinds, strict=True)]
    if not (fit.caps and settings.caps):
        return chosen
    return [_or_cap(fit, ask.group, ask.tp, choice, settings) for ask, choice in zip(asks, chosen, strict=True)]


def _unmeasured(fit: ProfileFit, load: InstanceLoad) -> ClockChoice:
    return ClockChoice(fit.profile.full_mhz, Reason.NO_PROFILE, load.rate_rps, None, None)


# ------------------------------------------------------------------------------------------------ one instance


def choose_clock(
    fit: ProfileFit,
    group: str,
    tp: int,
    load: InstanceLoad,
    current_mhz: int | None,
    settings: ClockSettings = _DEFAULTS,
) -> ClockChoice:
    """Chooses the clock of one instance for the next period."""
    curves = fit.clocks(group, tp)
    if not curves:
        return _unmeasured(fit, load)
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
    choice = ClockChoice(curves[kept].mhz, reason, rate, powers[kept], 1.0 - rate / curves[kept].max_rate_rps)
    return _or_cap(fit, group, tp, choice, settings) if fit.caps and settings.caps else choice


def _or_cap(fit: ProfileFit, group: str, tp: int, choice: ClockChoice, settings: ClockSettings) -> ClockChoice:
    """A power cap instead of the lock where calibration found one to draw clearly less at that load, in SLO. An
    instance that idles or is in trouble gets none: a cap does not lower the clock of the one, and slows the other."""
    if choice.reason is not Reason.LEAST_POWER or choice.rate_rps is None or choice.predicted_power_w is None:
        return choice
    row = cap_for(fit.caps.get((group, tp), ()), choice.rate_rps / settings.fill)
    if row is None or row.cap_w is None:
        return choice
    # The row stands for a heavier load: its share of saving, not its watts, holds at this one.
    saved = 1.0 - row.cap_power_w / row.clock_power_w if row.clock_power_w > 0 else 0.0
    curve = fit.clocks(group, tp)[-1]
    margin = 1.0 - choice.rate_rps / row.load if row.load > 0 else None
    return ClockChoice(
        curve.mhz, choice.reason, choice.rate_rps, choice.predicted_power_w * (1 - saved), margin, row.cap_w
    )


def at_full_clock(fit: ProfileFit, group: str, tp: int, choice: ClockChoice) -> ClockChoice:
    """The same choice in an emergency of the pool: full clock, whatever the load asks for."""
    curves = fit.clocks(group, tp)
    if not curves or (choice.mhz >= curves[-1].mhz and choice.cap_w is None):
        return choice
    return _full(curves, choice.rate_rps, Reason.DEADLINES_AT_RISK)


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
    curve = curves[-1]
    if rate is None:
        return ClockChoice(curve.mhz, reason, None, None, None)
    known = rate if isfinite(rate) else None
    margin = 1.0 - rate / curve.max_rate_rps if known is not None and curve.max_rate_rps > 0 else None
    return ClockChoice(curve.mhz, reason, known, curve.power_w(min(rate, curve.rates_rps[-1])), margin)


# ------------------------------------------------------------------------------------------------------- a fleet


def _choose(arrays: CurveArrays, rows: Ints, asks: Sequence[ClockAsk], settings: ClockSettings) -> list[ClockChoice]:
    """The same as `choose_clock` for instances whose kinds stand in `rows`; NaN stands for None."""
    every = np.arange(len(rows))
    said, running, waiting, kv = np.array(
        [[nan if value is None else value for value in ask.load] for ask in asks], dtype=np.float64
    ).T
    current = np.array([-2 if ask.current_mhz is None else ask.current_mhz for ask in asks])
    here = arrays.mhz[rows] == current[:, None]
    full = arrays.clocks[rows] - 1
    rate = _effective_rates(arrays, rows, np.where(here.any(axis=1), here.argmax(axis=1), full), said, running)
    tops = arrays.max_rate_rps[rows]
    powers = interpolate(
        arrays.rates_rps[rows], arrays.powers_w[rows], arrays.points[rows], np.repeat(rate[:, None], tops.shape[1], 1)
    )
    fits = (tops > 0) & (rate[:, None] <= tops * settings.fill) & ~np.isnan(powers)
    priced = np.where(fits, powers, inf)
    best = priced.argmin(axis=1)
    kept = np.where(_held(priced, best, here, arrays.mhz[rows, best] < current, settings), here.argmax(axis=1), best)

    unknown, queue = np.isnan(rate), waiting >= settings.waiting_high
    crowded = (kv >= settings.kv_high_ratio) | ~fits.any(axis=1)
    trouble = unknown | queue | crowded
    at = np.where(trouble, full, kept)
    top_w = interpolate(
        arrays.rates_rps[rows, full],
        arrays.powers_w[rows, full],
        arrays.points[rows, full],
        np.minimum(rate, arrays.last_rps[rows, full]),
    )
    watts = np.where(trouble, top_w, powers[every, kept])
    top = tops[every, at]
    with np.errstate(invalid="ignore", divide="ignore"):
        margin = np.where(np.isfinite(rate) & (top > 0), 1.0 - rate / top, nan)
    why = np.select([unknown, queue, crowded, rate == 0], [0, 1, 2, 3], 4)
    return [
        ClockChoice(
            mhz,
            _WHY[reason],
            rps if isfinite(rps) else None,
            None if isnan(power_w) else power_w,
            None if isnan(head_room) else head_room,
        )
        for mhz, reason, rps, power_w, head_room in zip(
            arrays.mhz[rows, at].tolist(), why.tolist(), rate.tolist(), watts.tolist(), margin.tolist(), strict=True
        )
    ]


_WHY = (Reason.STALE_TELEMETRY, Reason.QUEUE_BUILDING, Reason.OVER_CAPACITY, Reason.IDLE, Reason.LEAST_POWER)


def _effective_rates(arrays: CurveArrays, rows: Ints, here: Ints, said: Floats, running: Floats) -> Floats:
    """As `_effective_rate`; `here` is the position of each instance's present clock."""
    implied = interpolate(arrays.runnings[rows, here], arrays.rates_rps[rows, here], arrays.points[rows, here], running)
    outside = np.where(running > arrays.last_running[rows, here], inf, 0.0)
    implied = np.where(running >= 0, np.where(np.isnan(implied), outside, implied), nan)
    return np.fmax(np.where(said >= 0, said, nan), implied)  # of one that is not known the other


def _held(priced: Floats, best: Ints, here: Bools, lower: Bools, settings: ClockSettings) -> Bools:
    """As `_hold`: where the present clock stays."""
    every = np.arange(len(best))
    present = priced[every, here.argmax(axis=1)]
    with np.errstate(invalid="ignore"):
        little = present - priced[every, best] < settings.min_saving_ratio * present
    held: Bools = here.any(axis=1) & lower & np.isfinite(present) & little
    return held


# --------------------------------------------------------------------------------------------------- explanation

_MISSES = "misses the SLO at this load"
_HELD = "saves too little to switch"
_TROUBLE = "full clock in trouble"


def explain_clock(
    fit: ProfileFit, ask: ClockAsk, choice: ClockChoice, settings: ClockSettings = _DEFAULTS
) -> tuple[ClockAlternative, ...]:
    """Every clock that could have been chosen, and why it was not; in ascending order."""
    curves = fit.clocks(ask.group, ask.tp)
    if not curves:
        return ()
    in_trouble = choice.reason not in (Reason.IDLE, Reason.LEAST_POWER)
    rate = _effective_rate(curves, ask.load, ask.current_mhz)
    fill = 1.0 if in_trouble else settings.fill
    powers = [None if rate is None else _power_in_slo(curve, rate, fill) for curve in curves]
    chosen_w = next((power for curve, power in zip(curves, powers, strict=True) if curve.mhz == choice.mhz), None)
    alternatives = []
    for curve, power in zip(curves, powers, strict=True):
        if curve.mhz == choice.mhz:
            rejected = ""
        elif power is None:
            rejected = _TROUBLE if rate is None else _MISSES
        elif chosen_w is not None and power >= chosen_w:
            rejected = "draws more"
        else:
            rejected = _TROUBLE if in_trouble else _HELD
        alternatives.append(ClockAlternative(curve.mhz, curve.max_rate_rps, power, rejected))
    return tuple(alternatives)
