"""Whatever it is given, the planner answers: a plan that keeps every constraint, or a reason and a safe plan."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite, nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.reasons import Reason
from controller.policy.milp.fallback import FallbackPlan, fall_back
from controller.policy.milp.model import solve
from controller.policy.milp.problem import Column, PlanProblem, PlanSolution, PoolDemand
from tests.unit.test_policy_milp import assert_sound, problem

HOSTILE = st.sampled_from([nan, inf, -inf, -1.0, 0.0, 1e-300, 1e-7, 1e300, 1.0, 3.0, 40.0])
SMALL = st.sampled_from([-1, 0, 1, 2, 3, 8])
POOLS = st.sampled_from(["all", "short", "long", ""])
TPS = st.sampled_from([-2, 0, 1, 2, 3, 4, 8, 16])


@st.composite
def hostile_problems(draw: st.DrawFn) -> PlanProblem:
    columns = st.builds(Column, POOLS, TPS, st.just(1000), HOSTILE, HOSTILE)
    demands = st.builds(PoolDemand, POOLS, HOSTILE, SMALL, st.none() | HOSTILE)
    return PlanProblem(
        problem_id="p",
        gpus=draw(st.sampled_from([-8, 0, 1, 7, 16, 30, 1200])),
        gpus_per_node=draw(st.sampled_from([-1, 0, 1, 4, 8])),
        parked_w=draw(st.just(72.0) | HOSTILE),
        horizon_s=draw(st.just(300.0) | HOSTILE),
        partitions=tuple(draw(st.lists(st.lists(demands, max_size=3).map(tuple), max_size=2, unique_by=_names))),
        columns=tuple(draw(st.lists(columns, max_size=6))),
        current=draw(st.dictionaries(st.tuples(POOLS, TPS), SMALL, max_size=3)),
        start_j=draw(st.dictionaries(TPS, HOSTILE, max_size=2)),
        retire_j=draw(st.dictionaries(TPS, HOSTILE, max_size=2)),
        keep_current=draw(st.booleans()),
        gap=draw(st.sampled_from([0.01, 0.0, nan, -1.0])),
        node_limit=draw(st.sampled_from([200, 0, -5])),
    )


def likely(p: PlanProblem) -> PlanProblem:
    """The same with what would be refused at first sight mended, so that the rest is looked at too."""
    partitions = [
        tuple({d.pool: PoolDemand(d.pool, _mended(d.rate_rps), max(0, d.min_instances)) for d in part}.values())
        for part in p.partitions
        if part
    ]
    return replace(
        p,
        gpus=abs(p.gpus),
        gpus_per_node=max(1, p.gpus_per_node),
        parked_w=72.0,
        horizon_s=300.0,
        partitions=tuple({_names(part): part for part in partitions}.values()),
        columns=tuple(
            replace(c, tp=max(1, c.tp), rate_rps=_mended(c.rate_rps), power_w=_mended(c.power_w)) for c in p.columns
        ),
        current={(pool, max(1, tp)): max(0, n) for (pool, tp), n in p.current.items()},
        start_j={tp: _mended(joules) for tp, joules in p.start_j.items()},
        retire_j={tp: _mended(joules) for tp, joules in p.retire_j.items()},
        gap=0.01,
        node_limit=200,
    )


def _names(partition: tuple[PoolDemand, ...]) -> tuple[str, ...]:
    return tuple(demand.pool for demand in partition)


def _mended(value: float) -> float:
    return value if isfinite(value) and value >= 0 else 1.0


@settings(max_examples=200, deadline=None)
@given(hostile_problems(), st.booleans())
def test_no_input_makes_a_violating_or_a_silent_plan(p: PlanProblem, mend: bool) -> None:
    p = likely(p) if mend else p
    answer(p)


def answer(p: PlanProblem) -> tuple[PlanSolution, FallbackPlan | None]:
    """The planner's answer as the managers take it, checked."""
    solution = solve(p)
    if solution.rejected or solution.chosen:
        assert_sound(p, solution)
    assert solution.chosen is not None or any(r.reason for r in solution.rejected)
    if solution.chosen is not None:
        return solution, None
    plan = fall_back(p)
    assert sum(n * tp for (_, tp), n in plan.counts.items()) <= max(0, p.gpus)
    assert all(n > 0 and tp > 0 for (_, tp), n in plan.counts.items())
    assert {pool for pool, _ in plan.counts} <= set(plan.pools)
    assert plan.sentence
    assert plan.carries == (plan.served_ratio >= 1.0)
    assert (plan.reason is Reason.SOLVER_FAILED) == plan.carries
    return solution, plan


@pytest.mark.parametrize(
    ("changes", "reason", "counts", "says"),
    [
        pytest.param({"columns": ()}, Reason.NO_PROFILE, {("all", 8): 2}, "pool all is known", id="no profile"),
        pytest.param(
            {"columns": (Column("all", 4, 1980, 0.0, 400.0),)},
            Reason.NO_PROFILE,
            {("all", 8): 2},
            "meet the SLO",
            id="nothing in SLO",
        ),
        pytest.param({"gpus": 1}, Reason.NO_CAPACITY, {}, "no GPU group", id="fewer GPUs than an instance"),
        pytest.param({"gpus": 0}, Reason.NO_CAPACITY, {}, "no GPU group", id="no GPUs"),
        pytest.param(
            {"partitions": ((PoolDemand("all", 99.0),),)}, Reason.NO_CAPACITY, {("all", 8): 2}, "%", id="too much load"
        ),
        pytest.param(
            {"partitions": ((PoolDemand("all", nan),),)}, Reason.NO_LOAD_DATA, {("all", 8): 2}, "is nan", id="NaN"
        ),
        pytest.param(
            {"partitions": ((PoolDemand("all", -2.0),),)}, Reason.NO_LOAD_DATA, {("all", 8): 2}, "is -2", id="negative"
        ),
        pytest.param(
            {"partitions": ((PoolDemand("all", None),),)}, Reason.NO_LOAD_DATA, {("all", 8): 2}, "is None", id="None"
        ),
        pytest.param({"partitions": ()}, Reason.NO_CAPACITY, {}, "no GPU group", id="no pools"),
    ],
)
def test_bad_input_has_a_reason_and_a_safe_plan(
    changes: dict[str, Any], reason: Reason, counts: dict[tuple[str, int], int], says: str
) -> None:
    _, plan = answer(problem(**changes))
    assert plan is not None
    assert (plan.reason, plan.counts) == (reason, counts)
    assert says in plan.sentence
    assert not plan.carries


def test_pools_without_a_place_keep_their_names() -> None:
    """Their demand is missed, not gone: nobody must take an empty plan for one that saves everything."""
    _, plan = answer(problem(1, current={("short", 4): 1, ("long", 4): 1}))
    assert plan is not None
    assert plan.pools == ("short", "long")
    assert plan.served_ratio == 0.0


def test_a_solver_that_fails_leaves_a_plan_that_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("gave up")

    monkeypatch.setattr("controller.policy.milp.model._run", fail)
    monkeypatch.setattr("controller.policy.milp.model.tabulate", lambda *_: None)
    solution, plan = answer(problem(16, (6.0, 3.0, 3.0), current={("short", 4): 1, ("long", 4): 1}))
    assert all("gave up" in r.reason for r in solution.rejected)
    assert plan is not None
    assert plan.reason is Reason.SOLVER_FAILED
    assert plan.counts == {("short", 4): 1, ("long", 4): 1}
