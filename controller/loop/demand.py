"""What load the slow loops plan for: the forecast by class, and what of it each pool asks for with all its reserves.

Forecasts are policy/forecast.py's, the week's shape policy/template.py's. Beside the forecast a pool holds what its
recent peak needed, what bursts may add within seconds, and, while little was seen, what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt

from controller.domain.classes import ALL_CLASSES, RequestClass
from controller.domain.decision import Json
from controller.loop.load import SPAN_S
from controller.loop.state import Instant, State, Turn, rates_json
from controller.loop.week import Foreseen, hold_against
from controller.policy.forecast import ForecastSettings, LoadWindow, RateForecast, combine, forecast
from controller.policy.idle import LONE_SHARE, keep_s
from controller.policy.milp.problem import PoolDemand
from controller.policy.template import expected_ratio, raised

# A peak of the load is its mean over this long.
PEAK_S = 60.0
# Bursts are looked for between spans of this length, this far back.
BURST_S = SPAN_S
BURST_PAST_S = 900.0
LEAST_BURST_SPANS = 24  # of fewer a variance says little
BURST_HALF_LIFE_S = 3600.0  # what a burst needed counts half after so long
# Variance over mean of independent arrivals whose requests differ in work as those of a chat do; 1 where all are equal.
INDEPENDENT = 2.5
# Share of the GPUs that reserves may make the plan use: the rest is what whole instances leave over.
RESERVED_GPUS = 0.85
# Spread assumed around a configured initial load, for which nothing was measured yet; and by how much of itself it may
# grow beyond that while one waits a minute for what would carry it.
_COLD_STD_RATIO = 0.2
COLD_GROWTH_PER_MIN = 0.5


@dataclass(frozen=True, slots=True)
class Demand:
    """Expected load by class over one horizon. `cold` when it rests on configuration instead of observation."""

    parts: Mapping[RequestClass, tuple[RateForecast, ...]]  # one per gateway
    mean_tokens: Mapping[RequestClass, tuple[float, float]]
    cold: bool
    # By class, where the shape of the week is known: the load that it expects over that of now.
    week_ratios: Mapping[RequestClass, float] = field(default_factory=dict)
    # The parts as they would be without that shape.
    plain: Mapping[RequestClass, tuple[RateForecast, ...]] = field(default_factory=dict)

    @property
    def seen_s(self) -> float:
        """For how long the load was watched; 0 when nothing was seen."""
        return max((part.observed_s for seen in self.parts.values() for part in seen), default=0.0)

    def pool_rps(self, state: State, pool: str, quantile: float) -> float:
        """Equivalent requests/s of a pool's own classes at the quantile."""
        profile = state.profile
        group = profile.group(pool)
        return combine(
            [
                (profile.request_weight(pool, request_class, self.mean_tokens.get(request_class)), part)
                for request_class in sorted(group.classes)
                for part in self.parts.get(request_class, ())
            ],
            quantile,
        )

    def expected_rps(self, state: State, pool: str) -> float:
        """Equivalent requests/s of a pool's own classes now, without trend and margins."""
        return sum(
            state.profile.request_weight(pool, request_class, self.mean_tokens.get(request_class)) * part.level_rps
            for request_class in sorted(state.profile.group(pool).classes)
            for part in self.parts.get(request_class, ())
        )

    def mean_rps(self) -> dict[RequestClass, float]:
        return {
            request_class: sum(part.mean_rps for part in parts)
            for request_class, parts in self.parts.items()
            if any(part.mean_rps for part in parts)
        }

    def json(self) -> Json:
        """The demand as a decision's input."""
        return {
            "cold": self.cold,
            "classes": {
                str(request_class): [[round(part.mean_rps, 6), round(part.std_rps, 6)] for part in parts]
                for request_class, parts in sorted(self.parts.items())
            },
            "mean_tokens": {
                str(request_class): [round(mean_in, 3), round(mean_out, 3)]
                for request_class, (mean_in, mean_out) in sorted(self.mean_tokens.items())
            },
            **({"week_ratios": rates_json(self.week_ratios)} if self.week_ratios else {}),
        }


def expected_demand(state: State, now: Instant, horizon_s: float) -> Demand | None:
    """The load over the next horizon; the configured one for the first plan; None when it is unknown.

    What is decided now serves only after a start, and until what is decided next has started: the horizon is longer
    than the period by one start.
    """
    horizon_s = ahead_s(state, horizon_s)
    settings = ForecastSettings(half_life_s=state.settings.forecast_half_life_s, quantile=state.settings.quantile)
    parts: dict[RequestClass, tuple[RateForecast, ...]] = {}
    plain: dict[RequestClass, tuple[RateForecast, ...]] = {}
    shape = {c: expected_ratio(state.week.slots, c, now.wall_s, horizon_s) for c in ALL_CLASSES}
    for spans in state.load.spans(now.monotonic_s, settings.max_age_s).values():
        for request_class in ALL_CLASSES:
            counted = [LoadWindow(span.end_s, span.seconds, span.arrived.get(request_class, 0)) for span in spans]
            part = forecast(counted, now.monotonic_s, horizon_s, settings)
            if part is not None:
                plain[request_class] = (*plain.get(request_class, ()), part)
                parts[request_class] = (*parts.get(request_class, ()), raised(part, shape[request_class]))
    tokens = state.load.mean_tokens(now.monotonic_s, settings.max_age_s)
    seen = Demand(parts, tokens, False, {c: ratio for c, ratio in shape.items() if ratio is not None}, plain)
    # Silence before the first request says less than the operator's own expectation, for a while.
    expecting = bool(state.settings.initial_rps) and not state.load.any_arrived
    if parts and seen.seen_s >= (state.settings.hold_s if expecting else state.settings.load_window_s):
        return seen
    # The expectation makes the first plan and no later one: a restarted controller holds what it finds instead.
    if state.settings.initial_rps and not state.pools:
        return Demand(
            {
                request_class: (RateForecast(rate, rate * _COLD_STD_RATIO, rate, 0.0, 1.0, 0.0),)
                for request_class, rate in state.settings.initial_rps.items()
                if rate > 0
            },
            {},
            cold=True,
        )
    return None


def ahead_s(state: State, period_s: float) -> float:
    """The horizon of what is decided now and may be decided anew after `period_s`."""
    return period_s + _longest_start_s(state)


def _longest_start_s(state: State) -> float:
    return max(state.start_s(tp) for tp in state.profile.tps)


def foresee(turn: Turn) -> None:
    """Holds the forecasts of before against what came, and remembers those of now: each is of its horizon's second half
    (policy/forecast.py), and of the pool's requests as they arrive."""
    state, now = turn.state, turn.now
    hold_against(state, now.monotonic_s)
    awaited = [pool for pool in state.pools if pool not in state.foreseen]
    demand = expected_demand(state, now, state.settings.look_ahead_s) if awaited else None
    if demand is None or demand.cold:
        return
    horizon_s = ahead_s(state, state.settings.look_ahead_s)
    for pool in awaited:
        mean_rps, quantile_rps = _ahead(state, pool, demand.parts)
        plain_mean_rps, plain_quantile_rps = _ahead(state, pool, demand.plain)
        state.foreseen[pool] = Foreseen(
            mean_rps,
            quantile_rps,
            plain_mean_rps,
            plain_quantile_rps,
            from_s=now.monotonic_s + horizon_s / 2,
            until_s=now.monotonic_s + horizon_s,
        )


def _ahead(state: State, pool: str, by_class: Mapping[RequestClass, tuple[RateForecast, ...]]) -> tuple[float, float]:
    """Mean and quantile of a pool's requests/s, each counting the same."""
    parts = [(1.0, part) for c in sorted(state.pools[pool].group.classes) for part in by_class.get(c, ())]
    return sum(part.mean_rps for _, part in parts), combine(parts, state.settings.quantile)


def pool_demand(state: State, now: Instant, demand: Demand, pool: str) -> tuple[PoolDemand, float]:
    """What a pool must be able to carry and is expected to; and what of that is forecast.

    With standby the peak of the recent past counts too: an instance that was needed then is kept for as long as that
    is cheaper than another start.
    """
    settings = state.settings
    rate_rps = demand.pool_rps(state, pool, settings.quantile)
    least = settings.fixed.get(pool, settings.min_instances)
    if rate_rps > LONE_SHARE * max((state.fit.max_rate_rps(pool, tp) for tp in state.profile.tps), default=0.0):
        least = max(least, 2)
    if not settings.knobs.standby:
        return PoolDemand(pool, rate_rps / settings.fill, least), rate_rps / settings.fill
    tp = max(state.profile.tps, key=lambda tp: state.fit.max_rate_rps(pool, tp) / tp)
    kept_s = keep_s(state.fit, pool, tp, state.start_j(tp), settings.host_share_w, settings.host_cycle_s)
    peak_rps = _peak_rps(state, now, pool, demand.mean_tokens, kept_s)
    expected_rps = demand.expected_rps(state, pool)
    if demand.cold:
        sudden_rps = expected_rps * COLD_GROWTH_PER_MIN * _longest_start_s(state) / 60
    else:
        sudden_rps = burst_rps(state, now, pool, demand.mean_tokens)
    reserve_rps = (max(rate_rps, peak_rps) + sudden_rps) / settings.reserve_fill
    asked_rps = max(reserve_rps, _kept_rps(state, pool, demand))
    return PoolDemand(pool, asked_rps, least, expected_rps / settings.serve_fill), rate_rps / settings.fill


def _kept_rps(state: State, pool: str, demand: Demand) -> float:
    """What of the present plan is kept though nothing asks for it: all, while the load was watched for less than it
    takes to bring back what is given away (or to know its bursts); later what remembered bursts needed."""
    if pool not in state.pools:
        return 0.0
    capacity_rps = _capacity_rps(state, pool, state.pools[pool].counts)
    if demand.seen_s < max(_longest_start_s(state), LEAST_BURST_SPANS * BURST_S):
        return capacity_rps
    return min(capacity_rps, state.burst_needed_rps.get(pool, 0.0) / state.settings.reserve_fill)


def _capacity_rps(state: State, pool: str, counts: Mapping[int, int]) -> float:
    return sum(n * state.fit.max_rate_rps(pool, tp) for tp, n in counts.items())


def within_reach(state: State, gpus: int, asked: list[tuple[PoolDemand, float]]) -> tuple[PoolDemand, ...]:
    """Demands whose reserve the GPUs may hold: where they may not, it shrinks to what they may, but never below the
    forecast itself (the second of each pair). A reserve that nothing can hold must not make a fleet look too small."""

    def needed(rates: Iterable[float]) -> float:
        total = 0.0
        for (demand, _), rate in zip(asked, rates, strict=True):
            densest = max((state.fit.max_rate_rps(demand.pool, tp) / tp for tp in state.profile.tps), default=0.0)
            total += rate / densest if densest > 0 else 0.0
        return total

    full, least = needed(d.rate_rps for d, _ in asked), needed(forecast for _, forecast in asked)
    room = gpus * RESERVED_GPUS
    share = 1.0 if full <= room or full <= least else max(0.0, (room - least) / (full - least))
    return tuple(replace(d, rate_rps=forecast + share * max(0.0, d.rate_rps - forecast)) for d, forecast in asked)


def needed_gpus(state: State, now: Instant, demand: Demand, pools: Iterable[str]) -> float:
    """GPUs that the pools' demand asks for with all its reserves, were there as many as one likes."""
    total = 0.0
    for pool in pools:
        asking, _ = pool_demand(state, now, demand, pool)
        densest = max((state.fit.max_rate_rps(pool, tp) / tp for tp in state.profile.tps), default=0.0)
        total += asking.rate_rps / densest if densest > 0 else 0.0
    return total / RESERVED_GPUS


def outgrown(state: State, now: Instant) -> list[str]:
    """Pools whose plan would not carry what the forecast asks of it, by name."""
    demand = expected_demand(state, now, state.settings.look_ahead_s)
    if demand is None or demand.cold:
        return []
    found = []
    for pool, plan in sorted(state.pools.items()):
        asked, _ = pool_demand(state, now, demand, pool)
        capacity_rps = _capacity_rps(state, pool, plan.counts)
        if plan.carries and 0 < capacity_rps < asked.rate_rps:
            found.append(pool)
    return found


def burst_rps(state: State, now: Instant, pool: str, mean_tokens: Mapping[RequestClass, tuple[float, float]]) -> float:
    """How far a pool's load may leave its mean within seconds, in equivalent requests/s; 0 for independent arrivals,
    whose noise was there when the profile was measured."""
    bins = _binned_rps(state, now, pool, mean_tokens, BURST_PAST_S, BURST_S)
    if len(bins) < LEAST_BURST_SPANS:
        return 0.0
    mean_rps = sum(bins.values()) / len(bins)
    # From one to the next, so that what changes slowly is no burst. Over a gap nothing is known or compared.
    steps = [(bins[number] - bins[number + 1]) ** 2 for number in bins if number + 1 in bins]
    variance = sum(steps) / max(1, len(steps)) / 2
    excess = variance - INDEPENDENT * mean_rps / BURST_S
    return state.settings.burst_deviations * sqrt(max(0.0, excess))


def remember_bursts(
    state: State,
    now: Instant,
    means_rps: Mapping[str, float],
    mean_tokens: Mapping[RequestClass, tuple[float, float]],
    passed_s: float,
) -> None:
    """Looks for bursts in the pools whose mean loads are given, `passed_s` after the last look. Where they exceed
    the mean, they are forgotten slowly: silence for a quarter of an hour does not say that no other comes."""
    left = 0.5 ** (passed_s / BURST_HALF_LIFE_S)
    burst_by_pool: dict[str, float] = {}
    needed_by_pool: dict[str, float] = {}
    for pool, mean_rps in means_rps.items():
        sudden_rps = burst_rps(state, now, pool, mean_tokens)
        needed_rps = left * state.burst_needed_rps.get(pool, 0.0)
        if sudden_rps > mean_rps:
            needed_rps = max(needed_rps, sudden_rps + _peak_rps(state, now, pool, mean_tokens, BURST_PAST_S))
        # A peak is no lower than the mean, so a burst larger than the mean needs more than twice that.
        if needed_rps > 2 * mean_rps:
            sudden_rps = max(sudden_rps, left * state.burst_rps.get(pool, 0.0))
        burst_by_pool[pool], needed_by_pool[pool] = sudden_rps, needed_rps
    state.burst_rps, state.burst_needed_rps = burst_by_pool, needed_by_pool
    state.bursty = frozenset(pool for pool, rps in needed_by_pool.items() if rps > 2 * means_rps[pool])


def _peak_rps(
    state: State, now: Instant, pool: str, mean_tokens: Mapping[RequestClass, tuple[float, float]], past_s: float
) -> float:
    """Largest minute mean of a pool's equivalent requests/s in the recent past."""
    return max(_binned_rps(state, now, pool, mean_tokens, past_s, PEAK_S).values(), default=0.0)


def _binned_rps(
    state: State,
    now: Instant,
    pool: str,
    mean_tokens: Mapping[RequestClass, tuple[float, float]],
    past_s: float,
    bin_s: float,
) -> dict[int, float]:
    """Means of a pool's equivalent requests/s over spans of `bin_s`, by their number from now backwards.

    They are spans of a fixed grid: cut back from now, a past peak would be another one at every look."""
    last = now.monotonic_s // bin_s
    weights = {
        request_class: state.profile.request_weight(pool, request_class, mean_tokens.get(request_class))
        for request_class in state.profile.group(pool).classes
    }
    rates: dict[int, float] = {}
    for spans in state.load.spans(now.monotonic_s, past_s).values():
        counted: dict[int, list[float]] = {}
        for span in spans:
            bin_ = counted.setdefault(int(last - span.end_s // bin_s), [0.0, 0.0])
            bin_[0] += sum(weights[c] * arrived for c, arrived in span.arrived.items() if c in weights)
            bin_[1] += span.seconds
        for number, (arrived, seconds) in counted.items():
            if seconds >= bin_s / 2:  # of less a mean says little
                rates[number] = rates.get(number, 0.0) + arrived / seconds
    return rates
