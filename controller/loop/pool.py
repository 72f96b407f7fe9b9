"""The pool manager (every 5 minutes): how many instances of which tensor parallelism, within the pool's grant.

It never sets clocks: a clock in its MILP is a price. A layout is changed only when capacity needs it or when the
saving pays for the switch; the cluster manager is asked for more when the grant itself is too small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from controller.domain.reasons import Level, Reason
from controller.fleet.port import Solve
from controller.loop import budget, caps
from controller.loop.demand import expected_demand
from controller.loop.foresight import foresight_json
from controller.loop.planning import (
    build_problem,
    counts_json,
    demand_by_pool,
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
from controller.loop.state import PendingSolve, Turn, plan_json
from controller.policy.milp.fallback import fall_back
from controller.policy.milp.problem import PlanSolution
from controller.policy.stabilise import StabiliseSettings, judge, price, retirements_needed, starts_needed


def tick(turn: Turn, pool: str, trigger: str) -> None:
    """Asks for the pool's plan; the answer comes to `on_solution`. Nothing to do for a static fleet."""
    state, now = turn.state, turn.now
    may_plan = state.settings.knobs.instances or (state.settings.knobs.sharding and bool(state.settings.fixed))
    if not may_plan or any(pending.pool == pool for pending in state.solving.values()):
        return
    demand = expected_demand(state, now, state.settings.look_ahead_s)
    if demand is None:
        return  # the cluster manager says so in its own decision
    effect_id = turn.effect_id()
    others_w = caps.others_w(state, pool, state.usable_gpus(now.monotonic_s)) if state.budgets else 0.0
    problem = build_problem(
        state, now, effect_id, demand, ((pool,),), state.pools[pool].granted_gpus, state.settings.pool_s, others_w
    )
    inputs = {"demand": demand.json(), "problem": problem_json(problem), "profile": state.profile_checksum}
    state.solving[effect_id] = PendingSolve(
        Level.POOL, pool, trigger, problem, inputs, demand.cold, state.budget_version
    )
    turn.effects.append(Solve(effect_id, problem))


def on_solution(turn: Turn, pending: PendingSolve, solution: PlanSolution) -> bool:
    """Takes or rejects the plan. Returns True when the grant is too small and the cluster must plan again."""
    state, now, problem, pool = turn.state, turn.now, pending.problem, pending.pool
    plan = state.pools.get(pool)
    if plan is None:
        return False  # the partition changed while this was being solved
    chosen = solution.chosen
    fallback = fall_back(problem) if chosen is None else None
    counts = dict(fallback.counts if fallback else chosen.counts if chosen else {})
    demand, expected = demand_by_pool(problem, [pool]), expected_by_pool(problem, [pool])
    present_counts = {(pool, tp): n for tp, n in plan.counts.items()}
    present = price(state.fit, present_counts, demand, problem.gpus, expected, problem.host_share_w)
    candidate = price(state.fit, counts, demand, problem.gpus, expected, problem.host_share_w)
    over_grant = sum(tp * n for (_, tp), n in present_counts.items()) > problem.gpus
    verdict = budget.judge(state, problem, solution, present_counts, demand) or judge(
        present,
        candidate,
        starts_needed(problem.current, counts),
        problem.start_j,
        problem.horizon_s,
        now.monotonic_s - state.layout_changed_s,
        pending=transition_pending(state, pool),
        settings=StabiliseSettings(dwell_s=state.settings.min_dwell_s),
        retired=retirements_needed(problem.current, counts),
        retire_j=problem.retire_j,
    )
    reason, sentence, accept = verdict.reason, verdict.sentence, verdict.accept
    same = counts_json(counts) == counts_json(present_counts)
    forced = reason is not Reason.FORECAST_CHANGED
    if accept and not reachable(state, now, _in_cluster(turn, counts, pool), demand, forced):
        accept, reason = False, Reason.NO_ROOM_TO_SWITCH
        better = "carry more" if forced else "save energy"
        sentence = f"{say_counts(counts)} would {better}, but there is no way to it that carries the load."
    if over_grant:
        accept, reason, sentence = True, Reason.GRANT_CHANGED, "The cluster manager needs the GPUs elsewhere."
    if fallback:
        # With the grant too small, the most that it can carry is right, unless that is what already stands.
        reason, sentence, accept = fallback.reason, fallback.sentence, not same
        if problem.budget_w is not None:
            accept, reason = False, Reason.BUDGET_UNREACHABLE
            sentence = f"No layout stands within {problem.budget_w:.0f} W, even without load."
    short = solution.is_short and problem.budget_w is None
    if short:
        sentence = f"{short_sentence(solution)} {sentence}".strip()
    if same and not fallback:
        reason, accept = Reason.NO_CAPACITY if short else Reason.PLAN_KEPT, False
    carries = not short and (fallback is None or fallback.carries)
    if accept:
        state.pools[pool] = replace(
            plan,
            counts={tp: n for (_, tp), n in counts.items() if n},
            demand_rps=demand[pool],
            decided_by=state.decision_numbers + 1,
            decided_at_s=now.monotonic_s,
            carries=carries,
        )
        state.layout_forced = reason is not Reason.FORECAST_CHANGED
    else:
        state.pools[pool] = replace(plan, carries=carries)
    placed = lay_out(state, now) if accept else None
    alternatives = [result_json(result) for result in solution.rejected]
    if not accept and not same and chosen is not None:
        alternatives.append({**result_json(chosen), "reason": str(reason)})
    turn.decide(
        Level.POOL,
        pool,
        pending.trigger,
        reason,
        _say(present_counts, counts, accept, "" if same and not short else sentence),
        inputs=pending.inputs,
        outcome={
            "accepted": accept,
            "counts": counts_json(counts if accept else present_counts),
            "missing": counts_json(placed.missing) if placed else {},
            "judged": judged_json(present, candidate, verdict),
            "foresight": foresight_json(state, solution, counts if accept else present_counts, expected or demand),
            **budget.served_json(problem, solution),
            **({"plan": plan_json(state)} if accept else {}),
        },
        alternatives=tuple(alternatives),
        # Of its instances alone: the empty GPUs of a grant belong to nobody.
        predicted_power_w=_power_w(turn, counts if accept else present_counts, demand, expected),
        predicted_slo_margin=margin((candidate if accept else present).load_ratio),
        solver=solver_report(solution, len(problem.columns)),
        parent=plan.decided_by,
    )
    return not carries and not pending.cold


def _power_w(
    turn: Turn,
    counts: Mapping[tuple[str, int], int],
    demand: Mapping[str, float],
    expected: Mapping[str, float] | None,
) -> float:
    return price(turn.state.fit, counts, demand, sum(tp * n for (_, tp), n in counts.items()), expected).power_w


def _in_cluster(turn: Turn, counts: Mapping[tuple[str, int], int], pool: str) -> dict[tuple[str, int], int]:
    """The whole cluster's counts with one pool's replaced."""
    others = {key: n for key, n in wanted_counts(turn.state).items() if key[0] != pool}
    return {**others, **counts}


def _say(present: Mapping[tuple[str, int], int], counts: Mapping[tuple[str, int], int], accept: bool, why: str) -> str:
    if accept:
        return f"From {say_counts(present)} to {say_counts(counts)}. {why}".strip()
    return f"Kept {say_counts(present)}. {why}".strip()
