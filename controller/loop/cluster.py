"""The cluster manager (every 30 minutes): which classes share a pool, and how many GPUs each pool is granted.

It plans for the highest load expected in its epoch, jointly over all pools. It changes the layout itself only where
it must: for another partition of the classes. Within an unchanged partition it only moves grants, and a pool that
stands over its new grant is planned anew by its own manager.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from controller.domain.decision import Json
from controller.domain.reasons import Level, Reason
from controller.fleet.port import Solve
from controller.loop import budget
from controller.loop import pool as pool_manager
from controller.loop.demand import expected_demand
from controller.loop.foresight import foresight_json
from controller.loop.planning import (
    build_problem,
    counts_json,
    demand_by_pool,
    drop_from_layout,
    expected_by_pool,
    judged_json,
    lay_out,
    margin,
    problem_json,
    reachable,
    result_json,
    say_counts,
    short_sentence,
    solver_report,
    transition_pending,
    wanted_counts,
)
from controller.loop.state import PendingSolve, PoolPlan, State, Turn, plan_json
from controller.policy.milp.fallback import FallbackPlan, fall_back
from controller.policy.milp.problem import PlanProblem, PlanSolution
from controller.policy.stabilise import (
    LayoutPrice,
    StabiliseSettings,
    Verdict,
    judge,
    price,
    retirements_needed,
    starts_needed,
)

SCOPE = "cluster"
# Pools are compared over curves of different classes: another partition must promise more than these are off by.
LEAST_SAVING_RATIO = 0.03


def tick(turn: Turn, trigger: str) -> None:
    """Asks for a joint plan; the answer comes to `on_solution`."""
    state, now = turn.state, turn.now
    if any(pending.level is Level.CLUSTER for pending in state.solving.values()):
        return
    gpus = state.usable_gpus(now.monotonic_s)
    if gpus == 0:
        return  # no node has reported yet, or all are lost: there is nothing to plan on
    state.last_cluster_s = now.monotonic_s
    _leave_lost_nodes(state, now.monotonic_s)
    demand = expected_demand(state, now, state.settings.cluster_s)
    if demand is None or not state.settings.knobs.instances:
        _without_forecast(turn, trigger, gpus, known=demand is not None)
        return
    partitions = state.settings.partitions if state.settings.knobs.pools else state.settings.partitions[:1]
    effect_id = turn.effect_id()
    problem = build_problem(state, now, effect_id, demand, partitions, gpus, state.settings.cluster_s)
    inputs = {"demand": demand.json(), "problem": problem_json(problem), "profile": state.profile_checksum}
    state.solving[effect_id] = PendingSolve(
        Level.CLUSTER, "", trigger, problem, inputs, demand.cold, state.budget_version
    )
    turn.effects.append(Solve(effect_id, problem))


def on_solution(turn: Turn, pending: PendingSolve, solution: PlanSolution) -> None:
    """Turns the joint plan into grants, and into a layout where the partition changes."""
    state, now, problem = turn.state, turn.now, pending.problem
    fallback = fall_back(problem) if solution.chosen is None else None
    reason, sentence, accept = Reason.COLD_START if not state.pools else Reason.PLAN_KEPT, "", True
    judged: Json | None = None
    pools, counts = _planned(solution, fallback)
    if state.pools and set(pools) != set(state.pools):
        verdict, judged = _weigh(turn, problem, solution, pools, counts)
        accept, reason, sentence = verdict.accept, verdict.reason, verdict.sentence
        within = None if accept else _within(tuple(state.pools), solution, reason)
        if within is not None:
            accept, reason, sentence = True, Reason.PLAN_KEPT, f"Not {say_counts(counts)}: {sentence}"
            solution = within
            pools, counts = _planned(solution, None)
    repartition = set(pools) != set(state.pools)
    chosen = solution.chosen
    demand = demand_by_pool(problem, pools)
    candidate = _priced(state, problem, pools, counts)
    if solution.is_short and problem.budget_w is None:
        reason = reason if reason is Reason.NO_ROOM_TO_SWITCH else Reason.NO_CAPACITY
        sentence = f"{short_sentence(solution)} {sentence}".strip()
    if fallback:
        reason, sentence = fallback.reason, fallback.sentence
        if problem.budget_w is not None and state.pools:
            accept, reason = accept and not repartition, Reason.BUDGET_UNREACHABLE
            sentence = f"No layout stands within {problem.budget_w:.0f} W, even without load."

    grants: Mapping[str, int] = {}
    if accept:
        grants = share_out(problem.gpus, pools, counts, wanted_counts(state))
        if repartition:
            state.pools = {}
            state.layout_forced = reason is not Reason.FORECAST_CHANGED
    number = state.decision_numbers + 1
    for pool, granted in grants.items():
        have = state.pools.get(pool)
        state.pools[pool] = PoolPlan(
            group=state.profile.group(pool),
            granted_gpus=granted,
            counts=have.counts if have else {tp: n for (name, tp), n in counts.items() if name == pool and n},
            demand_rps=have.demand_rps if have else demand[pool],
            decided_by=number,
            decided_at_s=now.monotonic_s,
        )
    placed = lay_out(state, now) if accept else None
    alternatives = [result_json(result) for result in solution.rejected]
    if chosen is not None and not accept:
        alternatives.append({**result_json(chosen), "reason": str(reason)})
    turn.decide(
        Level.CLUSTER,
        SCOPE,
        pending.trigger,
        reason,
        _say(state, grants, counts, accept, sentence),
        inputs=pending.inputs,
        outcome={
            "accepted": accept,
            "counts": counts_json(counts),
            "grants": dict(sorted(grants.items())),
            "missing": counts_json(placed.missing) if placed else {},
            "judged": judged,
            "foresight": foresight_json(state, solution, counts, expected_by_pool(problem, pools) or demand),
            **budget.served_json(problem, solution),
            "plan": plan_json(state),
        },
        alternatives=tuple(alternatives),
        predicted_power_w=candidate.power_w,
        predicted_slo_margin=margin(candidate.load_ratio),
        solver=solver_report(solution, len(problem.columns)),
    )
    for name, plan in list(state.pools.items()):
        # Over its grant it must give back; short of capacity it may now have been granted more.
        if sum(tp * n for tp, n in plan.counts.items()) > plan.granted_gpus or not plan.carries:
            pool_manager.tick(turn, name, trigger="grant")


def _planned(
    solution: PlanSolution, fallback: FallbackPlan | None
) -> tuple[tuple[str, ...], dict[tuple[str, int], int]]:
    """Pools and instances of what was planned."""
    plan = fallback or solution.chosen
    return (tuple(plan.pools), dict(plan.counts)) if plan else ((), {})


def _within(pools: tuple[str, ...], solution: PlanSolution, reason: Reason) -> PlanSolution | None:
    """The same solution with the best plan of the partition that stands; None where there is none."""
    best = solution.chosen
    stays = next((r for r in solution.rejected if set(r.pools) == set(pools) and r.is_feasible), None)
    if best is None or stays is None:
        return None
    others = tuple(result for result in solution.rejected if result is not stays)
    return replace(solution, chosen=replace(stays, reason=""), rejected=(replace(best, reason=str(reason)), *others))


def _weigh(
    turn: Turn,
    problem: PlanProblem,
    solution: PlanSolution,
    pools: tuple[str, ...],
    counts: Mapping[tuple[str, int], int],
) -> tuple[Verdict, Json]:
    """Is another partition worth it? It is held against what stands; where that is too small, against the best plan of
    the partition that stands: to need more is no reason for other pools."""
    state, now = turn.state, turn.now
    present_pools, there = tuple(state.pools), dict(wanted_counts(state))
    switched_from = dict(state.layout.counts())
    present = _priced(state, problem, present_pools, there)
    within = _within(present_pools, solution, Reason.PLAN_KEPT)
    if not present.carries and within is not None:
        there = switched_from = _planned(within, None)[1]
        present = _priced(state, problem, present_pools, there)
    candidate, demand = _priced(state, problem, pools, counts), demand_by_pool(problem, pools)
    verdict = budget.judge(
        state, problem, solution, wanted_counts(state), demand_by_pool(problem, present_pools)
    ) or judge(
        present,
        candidate,
        starts_needed(switched_from, counts),
        problem.start_j,
        problem.horizon_s,
        now.monotonic_s - state.layout_changed_s,
        pending=transition_pending(state),
        settings=StabiliseSettings(dwell_s=state.settings.min_dwell_s, least_saving_ratio=LEAST_SAVING_RATIO),
        retired=retirements_needed(switched_from, counts),
        retire_j=problem.retire_j,
    )
    judged = judged_json(present, candidate, verdict)
    forced = verdict.reason is not Reason.FORECAST_CHANGED
    if verdict.accept and not reachable(state, now, counts, demand, forced=forced):
        sentence = "There is no way to it that carries the load."
        verdict = replace(verdict, accept=False, reason=Reason.NO_ROOM_TO_SWITCH, sentence=sentence)
    return verdict, judged


def _priced(
    state: State, problem: PlanProblem, pools: tuple[str, ...], counts: Mapping[tuple[str, int], int]
) -> LayoutPrice:
    return price(
        state.fit,
        counts,
        demand_by_pool(problem, pools),
        problem.gpus,
        expected_by_pool(problem, pools),
        problem.host_share_w,
    )


def share_out(
    gpus: int,
    pools: tuple[str, ...],
    counts: Mapping[tuple[str, int], int],
    present: Mapping[tuple[str, int], int],
) -> dict[str, int]:
    """Grants: what the plan uses; then what pools use now beyond that; the rest shared out in twos by size.

    A grant costs nothing (its GPUs may stay empty) but lets a pool grow between two cluster epochs, and a pool that
    uses more than the plan foresees gives nothing back before somebody else needs it.
    """
    grants = {pool: _gpus_of(pool, counts) for pool in pools}
    by_size = sorted(pools, key=lambda pool: (-grants[pool], pool))
    spare = gpus - sum(grants.values())
    for pool in by_size:
        extra = max(0, min(spare, _gpus_of(pool, present) - grants[pool]))
        grants[pool] += extra
        spare -= extra
    # In proportion to what the plan uses: requests of different pools are not worth the same GPUs.
    total = sum(_gpus_of(pool, counts) for pool in pools) or 1
    shared = spare
    for pool in by_size:
        extra = min(spare, 2 * round(shared * _gpus_of(pool, counts) / total / 2))
        grants[pool] += extra
        spare -= extra
    if by_size:
        grants[by_size[0]] += spare
    return grants


def _gpus_of(pool: str, counts: Mapping[tuple[str, int], int]) -> int:
    return sum(tp * n for (name, tp), n in counts.items() if name == pool)


def _leave_lost_nodes(state: State, now_s: float) -> None:
    lost = [i.instance_id for i in state.layout.instances if state.is_lost(i.node_id, now_s)]
    if lost:
        drop_from_layout(state, lost)


def _without_forecast(turn: Turn, trigger: str, gpus: int, known: bool) -> None:
    """No forecast, or a static fleet: SinglePool (one pool, widest TP on every GPU), or the plan that stands."""
    state, now = turn.state, turn.now
    inputs = {"gpus": gpus, "load_known": known, "profile": state.profile_checksum}
    if state.pools and state.settings.knobs.instances:
        placed = lay_out(state, now)  # what stood on a lost node is placed anew
        turn.decide(
            Level.CLUSTER,
            SCOPE,
            trigger,
            Reason.NO_LOAD_DATA,
            "No load data: the last plan is held.",
            inputs=inputs,
            outcome={"accepted": True, "missing": counts_json(placed.missing), "plan": plan_json(state)},
        )
        return
    cold = not state.pools
    tp = state.settings.widest_tp
    fixed = state.settings.fixed
    # A pool manager that may reshard has cut the pool's GPUs anew since: its counts stay.
    resharded = state.pools if fixed and state.settings.knobs.sharding else {}
    state.pools = {
        pool: PoolPlan(
            group=state.profile.group(pool),
            granted_gpus=tp * n if fixed else gpus,
            counts=resharded[pool].counts if pool in resharded else {tp: n},
            demand_rps=0.0,
            decided_by=state.decision_numbers + 1,
            decided_at_s=now.monotonic_s,
        )
        for pool, n in (fixed or {state.settings.partitions[0][0]: gpus // tp}).items()
    }
    placed = lay_out(state, now)
    turn.decide(
        Level.CLUSTER,
        SCOPE,
        trigger,
        Reason.COLD_START if cold else Reason.PLAN_KEPT,
        f"{'No load seen yet' if cold and not known else 'Fixed layout'}: {say_counts(wanted_counts(state))}.",
        inputs=inputs,
        outcome={"accepted": True, "missing": counts_json(placed.missing), "plan": plan_json(state)},
    )


def _say(state: State, grants: Mapping[str, int], counts: Mapping[tuple[str, int], int], accept: bool, why: str) -> str:
    if not accept:
        return f"Kept {say_counts(wanted_counts(state))}, not {say_counts(counts)}. {why}".strip()
    granted = ", ".join(f"{pool} {gpus} GPUs" for pool, gpus in sorted(grants.items()))
    return f"Granted {granted} for {say_counts(counts)}. {why}".strip()
