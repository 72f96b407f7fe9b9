"""Whether classes are cut into other pools: the cluster manager's judgement of what was planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Reason
from controller.fleet.port import ClassCounters, EffectDone, LoadObservation, LoadSeen, Solve, StartInstance, Tick
from controller.loop.core import Core
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from controller.policy.milp.problem import PartitionResult, PlanProblem, PlanSolution
from tests.synthetic_profile import MODEL, synthetic_profile
from tests.unit.test_loop_core import Bench, ready, settings, starts

SS, LS = RequestClass.parse("SS"), RequestClass.parse("LS")
TOGETHER, APART = ("all",), ("short", "long")
Answer = Callable[[PlanProblem], PlanSolution]


def apart(rate_rps: float = 3.0) -> Bench:
    """Two nodes with a pool of the short and one of the long requests, planned for `rate_rps` each, all ready."""
    start = settings(partitions=(APART,), initial_rps={SS: rate_rps, LS: rate_rps}, pool_s=3600, cluster_s=3600)
    bench = Bench(Core(start, synthetic_profile(), term=3, expected_nodes=2))
    bench.see("a")
    bench.see("b")
    started: list[StartInstance] = []
    effects = bench.send(Tick(Level.INSTANCE))
    while begun := starts(effects):
        started += begun
        effects = [made for effect in begun for made in bench.send(EffectDone(effect.effect_id, True))]
        for node in ("a", "b"):
            effects += bench.see(node, *(ready(effect) for effect in started if effect.node_id == node))
    assert set(bench.core.state.pools) == set(APART)
    bench.core.state.settings = replace(bench.core.state.settings, partitions=(TOGETHER, APART))
    return bench


def under_load(bench: Bench, rate_rps: float, seconds: int = 120) -> None:
    for _ in range(seconds):
        bench.wait(1)
        arrived = round(bench.now_s * rate_rps)
        counts = ClassCounters(arrived, arrived, 0, arrived, 500 * arrived, 150 * arrived)
        bench.send(LoadSeen(LoadObservation("g", "1", bench.now_s, MODEL, {SS: counts, LS: counts}, {})))


def planned_anew(bench: Bench, answer: Answer) -> Decision:
    """The cluster's decision on what `answer` makes of its problem."""
    for node in ("a", "b"):
        bench.see(node, *bench.core.state.nodes[node].instances)
    now = Instant(bench.now_s, 1e9 + bench.now_s)
    (solve,) = [e for e in bench.core.handle(now, Tick(Level.CLUSTER)).effects if isinstance(e, Solve)]
    step = bench.core.handle(now, EffectDone(solve.effect_id, True, solution=answer(solve.problem)))
    (decision,) = [decision for decision in step.decisions if decision.level is Level.CLUSTER]
    return decision


def merged(problem: PlanProblem) -> PlanSolution:
    """The solver's plan of the present pools, and as the best of all the same instances as one pool."""
    own = next(p for p in problem.partitions if tuple(demand.pool for demand in p) == APART)
    stays = plan_for(replace(problem, partitions=(own,))).chosen
    assert stays is not None
    counts: dict[tuple[str, int], int] = {}
    for (_, tp), n in stays.counts.items():
        counts["all", tp] = counts.get(("all", tp), 0) + n
    best = replace(stays, pools=TOGETHER, counts=counts, objective_w=stays.objective_w - 1)
    return PlanSolution(problem.problem_id, "test", best, (replace(stays, reason="costs 1 W more"),))


def without_the_present(problem: PlanProblem) -> PlanSolution:
    """The same where the present pools cannot carry their load."""
    solution = merged(problem)
    (stays,) = solution.rejected
    return replace(solution, rejected=(replace(stays, status="infeasible", counts={}),))


def test_to_need_more_is_no_reason_for_other_pools() -> None:
    bench = apart()
    had = sum(sum(plan.counts.values()) for plan in bench.core.state.pools.values())
    under_load(bench, 5.0)
    decision = planned_anew(bench, merged)
    assert set(bench.core.state.pools) == set(APART)
    assert decision.reason is Reason.PLAN_KEPT
    assert decision.outcome["accepted"], "the plan of the present pools is: its grants hold"
    counts, grants = decision.outcome["counts"], decision.outcome["grants"]
    assert set(grants) == set(APART)
    assert sum(counts.values()) > had
    assert decision.sentence.partition("Not all ")[2], "and says what was better by too little"
    (other,) = decision.alternatives
    assert (other["pools"], other["reason"]) == (["all"], "plan_kept")


def test_where_the_present_pools_cannot_carry_the_load_others_are_taken() -> None:
    bench = apart()
    under_load(bench, 5.0)
    decision = planned_anew(bench, without_the_present)
    assert decision.reason is Reason.CAPACITY_NEEDED
    assert set(bench.core.state.pools) == set(TOGETHER)


def test_for_less_than_the_curves_are_off_by_pools_are_not_merged() -> None:
    """What stands carries the load; the same instances in one pool save a little."""
    bench = apart()
    under_load(bench, 2.0)
    decision = planned_anew(bench, present_as_one)
    assert decision.outcome["accepted"]
    judged = decision.outcome["judged"]
    assert judged["present_load_ratio"] <= 1
    assert 0 < 1 - judged["candidate_w"] / judged["present_w"] < 0.03
    assert decision.alternatives[0]["reason"] == "saving_too_small"
    assert set(bench.core.state.pools) == set(APART)


def present_as_one(problem: PlanProblem) -> PlanSolution:
    """What is there, and as the best of all the same as one pool."""
    solution = merged(problem)
    (stays,) = solution.rejected
    assert solution.chosen is not None
    counts: dict[tuple[str, int], int] = {}
    for (_, tp), n in problem.current.items():
        counts["all", tp] = counts.get(("all", tp), 0) + n
    best: PartitionResult = replace(solution.chosen, counts=counts)
    return replace(solution, chosen=best, rejected=(replace(stays, counts=dict(problem.current)),))
