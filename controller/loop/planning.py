"""What cluster and pool manager share: the planning problem, its records, and acting on a new plan.

Glue between the state and the pure policies; every choice itself is made in controller/policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controller.domain.decision import Json, SolverReport
from controller.domain.layout import Layout
from controller.fleet.port import GONE, HOLDS_GPUS, UP, InstanceState
from controller.loop import caps
from controller.loop.demand import Demand, pool_demand, within_reach
from controller.loop.state import Instant, State
from controller.policy.milp.problem import PartitionResult, PlanProblem, PlanSolution, PoolDemand
from controller.policy.placement import HeldInstance, Placed, place
from controller.policy.stabilise import LayoutPrice, Verdict, price, starts_needed
from controller.policy.transition import TransitionSettings, can_roll

_GONE = GONE | {InstanceState.QUARANTINED}


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
        within_reach(state, gpus, [pool_demand(state, now, demand, pool) for pool in pools]) for pools in partitions
    )
    room_w = caps.planning_w(state, now.monotonic_s)
    if room_w is not None:
        demands = tuple(
            tuple(
                PoolDemand(asking.pool, forecast_rps, asking.min_instances)
                for asking, forecast_rps in (pool_demand(state, now, demand, pool) for pool in pools)
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
