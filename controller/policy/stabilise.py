"""Is a better layout worth switching to? The one place where plans are held back.

Takes the MILP's answer and the present layout, both priced on the same curves; a change is accepted when capacity
needs it, or when the lower bound of its saving over the horizon exceeds the upper bound of its switching cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot, inf

from controller.domain.reasons import Reason
from controller.policy.idle import choose_serving, power_at
from controller.policy.milp.problem import WORTH_RESTARTING
from controller.profile.fit import ProfileFit

Counts = Mapping[tuple[str, int], int]


@dataclass(frozen=True, slots=True)
class LayoutPrice:
    """What a layout draws and carries under a demand, every instance at its best clock."""

    power_w: float  # with parked GPUs
    carries: bool
    load_ratio: float  # worst pool: demand over capacity; infinity when a pool with demand has no capacity
    host_w: float = 0.0  # shares of hosts that its GPUs keep from being switched off
    error_w: float = 0.0  # standard error of the power, from the repeats of the profile's measurements


@dataclass(frozen=True, slots=True)
class StabiliseSettings:
    saving_confidence: float = 0.7  # share of the predicted saving that is counted on
    errors: float = 1.64  # standard errors of the profile that are taken off it besides: nineteen times of twenty less
    cost_factor: float = 1.3  # on the measured switching energy
    # Share of the present layout's power that must be saved besides: what the curves of different kinds may be off by
    # against each other is no noise of repeats.
    least_saving_ratio: float = 0.0
    dwell_s: float = 60.0  # least time between two changes that only save energy
    # While a transition is under way, a layout that is short by less than this is waited for, not planned anew:
    # what it starts would be thrown away, and the forecast's own margins cover a little.
    pending_load_ratio: float = 1.1
    worth_restarting: float = WORTH_RESTARTING


@dataclass(frozen=True, slots=True)
class Verdict:
    accept: bool
    reason: Reason
    sentence: str
    saving_low_j: float
    cost_high_j: float


def price(
    fit: ProfileFit,
    counts: Counts,
    demand_rps: Mapping[str, float],
    gpus: int,
    expected_rps: Mapping[str, float] | None = None,
    host_share_w: float = 0.0,
) -> LayoutPrice:
    """Prices `counts` of instances by (pool, tp) under a demand in equivalent requests/s by pool.

    `demand_rps` is by the pools of this layout's own partition, so two partitions are priced each with its own.
    Instances share their pool's load by capacity, as routing does. With `expected_rps` only what the demand must be
    carried with is judged by `demand_rps`; the power is that of the expected load, with whom it does not need on
    standby. `host_share_w` is what each GPU that is held costs besides.
    """
    capacity: dict[str, float] = {}
    for (pool, tp), n in counts.items():
        capacity[pool] = capacity.get(pool, 0.0) + n * fit.max_rate_rps(pool, tp)
    ratios = {pool: _ratio(rate, capacity.get(pool, 0.0)) for pool, rate in demand_rps.items()}
    held = sum(n * tp for (_, tp), n in counts.items())
    power_w = fit.parked_w * max(0, gpus - held)
    errors_w = []
    if expected_rps is None:
        for (pool, tp), n in counts.items():
            watts = n * power_at(fit, pool, tp, min(1.0, ratios.get(pool, 0.0)))
            power_w += watts
            errors_w.append(watts * fit.error_ratio(pool, [tp]))
    else:
        for pool in sorted({pool for pool, _ in counts}):
            by_tp = {tp: n for (name, tp), n in counts.items() if name == pool}
            watts = choose_serving(fit, pool, by_tp, expected_rps.get(pool, 0.0)).power_w
            power_w += watts
            errors_w.append(watts * fit.error_ratio(pool, by_tp))
    worst = max(ratios.values(), default=0.0)
    return LayoutPrice(power_w, worst <= 1.0 + 1e-9, worst, held * host_share_w, hypot(*errors_w))


def _ratio(rate_rps: float, capacity_rps: float) -> float:
    if rate_rps <= 0:
        return 0.0
    return rate_rps / capacity_rps if capacity_rps > 0 else inf


def starts_needed(present: Counts, candidate: Counts) -> dict[int, int]:
    """Instances to start, by tp: an instance of the same tp changes its pool without a restart."""
    there, wanted = _by_tp(present), _by_tp(candidate)
    return {tp: n - there[tp] for tp, n in sorted(wanted.items()) if n > there[tp]}


def retirements_needed(present: Counts, candidate: Counts) -> dict[int, int]:
    """Instances to drain and stop, by tp."""
    return starts_needed(candidate, present)


def _by_tp(counts: Counts) -> Counter[int]:
    total: Counter[int] = Counter()
    for (_, tp), n in counts.items():
        total[tp] += n
    return total


def judge(
    present: LayoutPrice,
    candidate: LayoutPrice,
    started: Mapping[int, int],
    start_j: Mapping[int, float],
    horizon_s: float,
    since_change_s: float | None,
    pending: bool,
    settings: StabiliseSettings | None = None,
    retired: Mapping[int, int] | None = None,
    retire_j: Mapping[int, float] | None = None,
) -> Verdict:
    """Accepts or rejects a switch from `present` to `candidate`.

    `started` and `retired` count the instances by tp that would have to be started and drained (`starts_needed`,
    `retirements_needed`), at `start_j` and `retire_j` each; `since_change_s` is None before any change; `pending` is
    True while a transition to `present` is under way.
    """
    settings = settings or StabiliseSettings()
    saving_w = present.power_w + present.host_w - candidate.power_w - candidate.host_w
    unsure_w = settings.errors * hypot(present.error_w, candidate.error_w)
    unsure_w += settings.least_saving_ratio * present.power_w
    saving_j = saving_w * horizon_s * settings.saving_confidence - unsure_w * horizon_s
    cost_j = settings.cost_factor * (_cost_j(started, start_j) + _cost_j(retired or {}, retire_j or {}))

    def verdict(accept: bool, reason: Reason, sentence: str) -> Verdict:
        return Verdict(accept, reason, sentence, saving_j, cost_j)

    if pending and 1.0 < present.load_ratio <= settings.pending_load_ratio:
        return verdict(
            False,
            Reason.TRANSITION_PENDING,
            f"The layout under way carries {_percent(present)} of the demand; a new plan waits for its end.",
        )
    if not present.carries:
        # A retiring instance serves nothing while its GPUs restart: not for a little more of what is missed anyway.
        worth = settings.worth_restarting if retired and not candidate.carries else 1.0
        if candidate.load_ratio * worth < present.load_ratio:
            reason = Reason.CAPACITY_NEEDED if candidate.carries else Reason.NO_CAPACITY
            return verdict(True, reason, f"The present layout carries {_percent(present)} of the demand.")
        return verdict(False, Reason.NO_CAPACITY, "No layout carries more than the present one.")
    if not candidate.carries:
        return verdict(False, Reason.PLAN_KEPT, f"The candidate carries only {_percent(candidate)} of the demand.")
    if saving_w <= 0:
        return verdict(False, Reason.PLAN_KEPT, "The present layout is still the best.")
    if pending:
        return verdict(False, Reason.TRANSITION_PENDING, f"{saving_w:.0f} W could be saved once the transition ends.")
    if since_change_s is not None and since_change_s < settings.dwell_s:
        return verdict(
            False,
            Reason.SAVING_TOO_SMALL,
            f"{saving_w:.0f} W could be saved; the last change was {since_change_s:.0f} s ago, "
            f"the next may come after {settings.dwell_s:.0f} s.",
        )
    if saving_j <= cost_j:
        return verdict(
            False, Reason.SAVING_TOO_SMALL, f"Saves at least {saving_j:.0f} J, switching costs up to {cost_j:.0f} J."
        )
    return verdict(
        True, Reason.FORECAST_CHANGED, f"Saves at least {saving_j:.0f} J, switching costs at most {cost_j:.0f} J."
    )


def _cost_j(counts: Mapping[int, int], each_j: Mapping[int, float]) -> float:
    return sum(n * each_j.get(tp, 0.0) for tp, n in counts.items())


def _percent(layout: LayoutPrice) -> str:
    return "none" if layout.load_ratio == inf else f"{1 / layout.load_ratio:.0%}"
