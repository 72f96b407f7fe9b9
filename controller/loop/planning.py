"""What cluster and pool manager share: demand from the load book, the planning problem, and acting on a new plan.

Glue between the state and the pure policies; every choice itself is made in controller/policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt

from controller.domain.classes import ALL_CLASSES, RequestClass
from controller.domain.decision import Json, SolverReport
from controller.domain.layout import Layout
from controller.fleet.port import GONE, HOLDS_GPUS, UP, InstanceState
from controller.loop import caps
from controller.loop.state import Instant, State, Turn, rates_json
from controller.loop.week import Foreseen, hold_against
from controller.policy.forecast import ForecastSettings, LoadWindow, RateForecast, combine, forecast
from controller.policy.idle import LONE_SHARE, keep_s
from controller.policy.milp.problem import PartitionResult, PlanProblem, PlanSolution, PoolDemand
from controller.policy.placement import HeldInstance, Placed, place
from controller.policy.stabilise import LayoutPrice, Verdict, price, starts_needed
from controller.policy.template import expected_ratio, raised
from controller.policy.transition import TransitionSettings, can_roll

# A peak of the load is its mean over this long.
PEAK_S = 60.0
# Bursts are looked for between spans of this length, this far back.
BURST_S = 5.0
BURST_PAST_S = 900.0
LEAST_BURST_SPANS = 24  # of fewer a variance says little
# Variance over mean of independent arrivals whose requests differ in work as those of a chat do; 1 where all are equal.
INDEPENDENT = 2.5
# Share of the GPUs that reserves may make the plan use: the rest is what whole instances leave over.
RESERVED_GPUS = 0.85
# Spread assumed around a configured initial load, for which nothing was measured yet.
_COLD_STD_RATIO = 0.2
_GONE = GONE | {InstanceState.QUARANTINED}


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
    for windows in state.load.by_gateway(now.monotonic_s, settings.max_age_s).values():
        for request_class in ALL_CLASSES:
            counted = [
                LoadWindow(window.end_s, window.seconds, counts.arrived if counts else 0)
                for window in windows
                for counts in (window.classes.get(request_class),)
            ]
            part = forecast(counted, now.monotonic_s, horizon_s, settings)
            if part is not None:
                plain[request_class] = (*plain.get(request_class, ()), part)
                parts[request_class] = (*parts.get(request_class, ()), raised(part, shape[request_class]))
    tokens = state.load.mean_tokens(now.monotonic_s, settings.max_age_s)
    seen_s = max((part.observed_s for seen in parts.values() for part in seen), default=0.0)
    # Silence before the first request says less than the operator's own expectation, for a while.
    expecting = bool(state.settings.initial_rps) and not state.load.any_arrived
    if parts and seen_s >= (state.settings.hold_s if expecting else state.settings.load_window_s):
        return Demand(parts, tokens, False, {c: ratio for c, ratio in shape.items() if ratio is not None}, plain)
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
    return period_s + max(state.start_s(tp) for tp in state.profile.tps)


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


def build_problem(
    state: State,
    now: Instant,
    problem_id: str,
    demand: Demand,
    partitions: Iterable[tuple[str, ...]],
    gpus: int,
    horizon_s: float,
    others_w: float = 0.0,
) -> PlanProblem:
    """The MILP over `gpus` for each partition; pools ask for the forecast at the quantile, divided by the fill. Under a
    power budget, of which `others_w` are left to other pools, a reserve is kept no longer."""
    settings = state.settings
    partitions = tuple(partitions)
    demands = tuple(
        _within(state, gpus, [_pool_demand(state, now, demand, pool) for pool in pools]) for pools in partitions
    )
    room_w = caps.planning_w(state, now.monotonic_s)
    if room_w is not None:
        demands = tuple(
            tuple(
                PoolDemand(asking.pool, forecast_rps, asking.min_instances)
                for asking, forecast_rps in (_pool_demand(state, now, demand, pool) for pool in pools)
            )
            for pools in partitions
        )
    named = {pool for pools in partitions for pool in pools}
    current = {key: n for key, n in state.layout.counts().items() if key[0] in named}
    # Where the present layout is too small, what it has must not first make room for what would be better.
    carries = all(
        price(state.fit, current, {asking.pool: asking.rate_rps for asking in asked}, gpus).carries
        for asked in demands
        if {asking.pool for asking in asked} <= {pool for pool, _ in current}
    )
    return PlanProblem(
        problem_id=problem_id,
        gpus=gpus,
        gpus_per_node=settings.gpus_per_node,
        parked_w=state.profile.parked_w,
        horizon_s=horizon_s,
        partitions=demands,
        columns=tuple(column for column in state.columns if column.pool in named),
        current=current,
        keep_current=not carries,
        start_j={tp: state.start_j(tp) for tp in state.profile.tps},
        retire_j={tp: state.retire_j(tp) for tp in state.profile.tps},
        host_share_w=settings.host_share_w,
        budget_w=None if room_w is None else max(0.0, room_w - others_w),
        cap_floor_w=0.0 if room_w is None else state.settings.cap_range_w[0],
    )


def needed_gpus(state: State, now: Instant, demand: Demand, pools: Iterable[str]) -> float:
    """GPUs that the pools' demand asks for with all its reserves, were there as many as one likes."""
    total = 0.0
    for pool in pools:
        asking, _ = _pool_demand(state, now, demand, pool)
        densest = max((state.fit.max_rate_rps(pool, tp) / tp for tp in state.profile.tps), default=0.0)
        total += asking.rate_rps / densest if densest > 0 else 0.0
    return total / RESERVED_GPUS


def _within(state: State, gpus: int, asked: list[tuple[PoolDemand, float]]) -> tuple[PoolDemand, ...]:
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


def _pool_demand(state: State, now: Instant, demand: Demand, pool: str) -> tuple[PoolDemand, float]:
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
    reserve_rps = (max(rate_rps, peak_rps) + burst_rps(state, now, pool, demand.mean_tokens)) / settings.reserve_fill
    expected_rps = demand.expected_rps(state, pool) / settings.serve_fill
    return PoolDemand(pool, reserve_rps, least, expected_rps), rate_rps / settings.fill


def outgrown(state: State, now: Instant) -> list[str]:
    """Pools whose plan would not carry what the forecast asks of it, by name."""
    demand = expected_demand(state, now, state.settings.look_ahead_s)
    if demand is None or demand.cold:
        return []
    found = []
    for pool, plan in sorted(state.pools.items()):
        asked, _ = _pool_demand(state, now, demand, pool)
        capacity_rps = sum(n * state.fit.max_rate_rps(pool, tp) for tp, n in plan.counts.items())
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
    for windows in state.load.by_gateway(now.monotonic_s, past_s).values():
        counted: dict[int, list[float]] = {}
        for window in windows:
            span = counted.setdefault(int(last - window.end_s // bin_s), [0.0, 0.0])
            span[0] += sum(weights[c] * counts.arrived for c, counts in window.classes.items() if c in weights)
            span[1] += window.seconds
        for number, (arrived, seconds) in counted.items():
            if seconds >= bin_s / 2:  # of less a mean says little
                rates[number] = rates.get(number, 0.0) + arrived / seconds
    return rates


def demand_by_pool(problem: PlanProblem, pools: Iterable[str]) -> dict[str, float]:
    """Equivalent requests/s that the problem asks of each of the named pools."""
    wanted = set(pools)
    return {
        demand.pool: demand.rate_rps
        for partition in problem.partitions
        for demand in partition
        if demand.pool in wanted
    }


def expected_by_pool(problem: PlanProblem, pools: Iterable[str]) -> dict[str, float] | None:
    """What the named pools are expected to carry; None where nothing stands by, and all demand is priced."""
    wanted = set(pools)
    found = {
        demand.pool: demand.expected_rps
        for partition in problem.partitions
        for demand in partition
        if demand.pool in wanted
    }
    expected = {pool: rate for pool, rate in found.items() if rate is not None}
    return expected if len(expected) == len(found) and found else None


def problem_json(problem: PlanProblem) -> Json:
    """The problem as a decision's input. Columns follow from the profile and settings and are not repeated."""
    return {
        "gpus": problem.gpus,
        "horizon_s": problem.horizon_s,
        "parked_w": problem.parked_w,
        "partitions": [
            {
                demand.pool: [round(demand.rate_rps, 6), demand.min_instances, round(demand.priced_rps, 6)]
                for demand in partition
            }
            for partition in problem.partitions
        ],
        "current": counts_json(problem.current),
        "keep_current": problem.keep_current,
        **({"host_share_w": round(problem.host_share_w, 3)} if problem.host_share_w else {}),
        "retire_j": {str(tp): round(joules, 3) for tp, joules in sorted(problem.retire_j.items())},
        "start_j": {str(tp): round(joules, 3) for tp, joules in sorted(problem.start_j.items())},
        "columns": len(problem.columns),
        **({} if problem.budget_w is None else {"budget_w": round(problem.budget_w, 3)}),
    }


def result_json(result: PartitionResult) -> Json:
    return {
        "pools": list(result.pools),
        "status": result.status,
        "power_w": round(result.power_w, 3),
        "objective_w": round(result.objective_w, 3),
        "bound_w": round(result.bound_w, 3),
        "counts": counts_json(result.counts),
        "reason": result.reason,
    }


def judged_json(present: LayoutPrice, candidate: LayoutPrice, verdict: Verdict | None) -> Json:
    """How a change was weighed, for the record of the decision."""
    finite = present.load_ratio < float("inf")
    return {
        "present_w": round(present.power_w, 3),
        "candidate_w": round(candidate.power_w, 3),
        "present_load_ratio": round(present.load_ratio, 6) if finite else None,
        "saving_low_j": round(verdict.saving_low_j, 3) if verdict else None,
        "cost_high_j": round(verdict.cost_high_j, 3) if verdict else None,
    }


def solver_report(solution: PlanSolution, columns: int) -> SolverReport | None:
    chosen = solution.chosen
    if chosen is None:
        return None
    solve_ms = chosen.solve_ms + sum(result.solve_ms for result in solution.rejected)
    return SolverReport(
        solution.solver, chosen.status, chosen.objective_w, chosen.bound_w, chosen.gap, solve_ms, columns
    )


def counts_json(counts: Mapping[tuple[str, int], int]) -> dict[str, int]:
    return {f"{pool}/tp{tp}": n for (pool, tp), n in sorted(counts.items()) if n}


def say_counts(counts: Mapping[tuple[str, int], int]) -> str:
    """For people: "short 2xTP4, long 1xTP8"."""
    by_pool: dict[str, list[str]] = {}
    for (pool, tp), n in sorted(counts.items()):
        if n:
            by_pool.setdefault(pool, []).append(f"{n}xTP{tp}")
    return ", ".join(f"{pool} {'+'.join(kinds)}" for pool, kinds in by_pool.items()) or "nothing"


def wanted_counts(state: State) -> dict[tuple[str, int], int]:
    """What all pool plans together want."""
    return {(pool, tp): n for pool, plan in state.pools.items() for tp, n in plan.counts.items() if n}


def reachable(
    state: State,
    now: Instant,
    counts: Mapping[tuple[str, int], int],
    demand: Mapping[str, float],
    forced: bool = False,
) -> bool:
    """Can `counts` be reached while `demand` is carried all the way?

    Yes when everything new fits beside everything that is there, or when what stays carries the demand alone, or one
    instance after the other makes room for new ones and the rest carries the demand each time. `forced` is for when
    the demand is missed already: then each step may miss as much as a transition dares (`next_steps`).
    """
    held = sum(held.tp for held in _held(state, now))
    present = state.layout.counts()
    new = sum(tp * n for tp, n in starts_needed(present, counts).items())
    usable = state.usable_gpus(now.monotonic_s)
    if held + new <= usable:
        return True

    def missed_rps(serving: Mapping[tuple[str, int], int]) -> float:
        carried = dict.fromkeys(demand, 0.0)
        for (pool, tp), n in serving.items():
            if pool in carried:
                carried[pool] += n * state.fit.max_rate_rps(pool, tp)
        return sum(max(0.0, rate - carried[pool]) for pool, rate in demand.items())

    allowed_rps = 0.0
    if forced:
        allowed_rps = missed_rps(counts) + TransitionSettings().max_break_ratio * max(
            0.0, missed_rps(present) - missed_rps(counts)
        )
    kept = {key: min(n, present.get(key, 0)) for key, n in counts.items()}
    most_rps = allowed_rps + 1e-9 * sum(demand.values())
    if missed_rps(kept) <= most_rps:
        return True
    return can_roll(present, counts, usable - held, lambda serving: missed_rps(serving) <= most_rps)


def short_sentence(solution: PlanSolution) -> str:
    """What a plan for a part of the demand (milp/plan.py) leaves out."""
    if solution.served_share < 1.0:
        return f"Not all fits: planned for {solution.served_share:.0%} of the expected load."
    return f"The expected load fits, and {solution.reserve_share:.0%} of the reserve asked for beyond it."


def transition_pending(state: State, pool: str | None = None) -> bool:
    """True while what is there is not yet what is wanted: of one pool, or of the whole cluster."""
    wanted = state.layout.by_id()
    ready = set()
    for _, instance in state.instances().values():
        planned = wanted.get(instance.instance_id)
        if planned is None:
            if instance.state not in _GONE and pool in (None, state.pool_of(instance)):
                return True
        elif instance.state is InstanceState.READY and state.pool_of(instance) == planned.pool:
            ready.add(instance.instance_id)
    return any(i.instance_id not in ready for i in wanted.values() if pool in (None, i.pool))


def margin(load_ratio: float) -> float | None:
    """Head-room: 1 - demand / capacity; None where there is no capacity at all."""
    return 1.0 - load_ratio if load_ratio < float("inf") else None


def lay_out(state: State, now: Instant) -> Placed:
    """Places the pools' wanted counts and makes the result the wanted layout."""
    nodes = state.placeable_nodes(now.monotonic_s)
    settings = state.settings
    placed = place(
        wanted_counts(state),
        settings.model,
        state.layout,
        _held(state, now),
        nodes,
        state.new_instance_id,
        settings.min_instances if settings.hosts_off else None,
    )
    if placed.layout != state.layout:
        state.layout = placed.layout
        state.layout_changed_s = now.monotonic_s
    return placed


def _held(state: State, now: Instant) -> tuple[HeldInstance, ...]:
    return tuple(
        HeldInstance(
            instance.instance_id,
            state.pool_of(instance),
            node_id,
            instance.gpu_uuids,
            keep=instance.state in UP and instance.instance_id not in state.draining,
        )
        for node_id, instance in state.instances().values()
        if instance.state in HOLDS_GPUS and not state.is_lost(node_id, now.monotonic_s)
    )


def drop_from_layout(state: State, instance_ids: Iterable[str]) -> None:
    """Forgets wanted instances that cannot stand where they were planned; the next `lay_out` places them anew."""
    gone = set(instance_ids)
    state.layout = Layout(tuple(i for i in state.layout.instances if i.instance_id not in gone))
