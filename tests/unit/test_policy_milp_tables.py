"""Plans from tables and from rounding: their bound is true, their plans keep every constraint, and gaps are proven."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.policy.milp import model
from controller.policy.milp.checks import packing, violation
from controller.policy.milp.model import HIGHS, solve
from controller.policy.milp.problem import Column, PartitionResult, PlanProblem, PoolDemand
from controller.policy.milp.tables import tabulate
from simulator.bench.planner import moved, random_problem
from tests.unit.test_policy_milp import assert_sound

# In thousandths: what differs by less than the solver's tolerance is not what is tested here.
RATES = st.integers(0, 4000).map(lambda n: n / 1000)
WATTS = st.integers(50, 3000).map(float)
JOULES = st.dictionaries(st.sampled_from([2, 4, 8]), st.integers(0, 200_000).map(float), max_size=3)


@st.composite
def problems(draw: st.DrawFn) -> PlanProblem:
    pools = ["a", "b", "c"][: draw(st.integers(1, 3))]
    columns = [
        Column(draw(st.sampled_from(pools)), draw(st.sampled_from([2, 4, 8])), 1000, draw(RATES), draw(WATTS))
        for _ in range(draw(st.integers(1, 6)))
    ]
    demands = [
        PoolDemand(pool, draw(RATES), draw(st.integers(0, 2)), draw(st.none() | RATES))
        for pool in pools
        if any(column.pool == pool for column in columns)
    ]
    current = draw(
        st.dictionaries(st.tuples(st.sampled_from(pools), st.sampled_from([2, 4, 8])), st.integers(0, 3), max_size=3)
    )
    return PlanProblem(
        problem_id="p",
        gpus=draw(st.integers(1, 32)),
        gpus_per_node=draw(st.sampled_from([4, 8, 12])),
        parked_w=72.0,
        horizon_s=300.0,
        partitions=(tuple(demands),),
        columns=tuple(columns),
        current=current,
        start_j=draw(JOULES),
        retire_j=draw(JOULES),
        keep_current=draw(st.booleans()),
        host_share_w=draw(st.sampled_from([0.0, 250.0])),
        gap=0.0,
    )


def best_w(p: PlanProblem) -> float | None:
    """The least objective, by branch and bound (some of the problems drawn need very many nodes: of those it is the
    best plan found)."""
    exact = solve(replace(p, gap=1e-7, node_limit=1000, time_limit_s=1e6), HIGHS, milp_only=True).chosen
    return None if exact is None else exact.objective_w


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_bound_is_below_every_plan_and_the_plan_keeps_every_constraint(p: PlanProblem) -> None:
    columns = [c for c in p.columns if c.tp <= p.gpus_per_node]
    groups = packing(p, {c.tp for c in columns})
    # Which of the two keeps what is there is the MILP's own choice: here nothing must stay.
    free = replace(p, keep_current=False)
    best = best_w(free)
    found = tabulate(free, free.partitions[0], columns, groups, {})
    if found is None:
        return
    assert violation(free, free.partitions[0], found.used) == ""
    assert best is not None
    assert found.bound_w <= best + 1e-6 * abs(best) + 1e-3
    must_stay: Counter[int] = Counter()
    for (_, tp), n in p.current.items():
        must_stay[tp] += n
    kept = tabulate(p, p.partitions[0], columns, groups, must_stay)
    if kept is not None:
        used: Counter[int] = Counter()
        for column, n in kept.used:
            used[column.tp] += n
        assert all(used[tp] >= must_stay[tp] for tp in {c.tp for c in columns})


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([0.002, 0.05]))
def test_the_short_way_is_as_good_as_it_says(p: PlanProblem, gap: float) -> None:
    empty = tuple(PoolDemand(name, 0.0, 0) for name in "defg")  # so many pools that tables are tried
    free = replace(p, keep_current=False, partitions=((*p.partitions[0], *empty),))
    best = best_w(free)
    solution = solve(replace(free, gap=gap))
    assert_sound(free, solution)
    assert (solution.chosen is None) == (best is None)
    if solution.chosen is not None and best is not None:
        assert solution.chosen.objective_w * (1 - gap) <= best * (1 + 1e-6) + 1e-3
        assert solution.chosen.bound_w <= best * (1 + 1e-6) + 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_nine_pools_are_planned_without_a_solver(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = random_problem(seed, 96)
    exact = best_w(p)
    assert exact is not None
    monkeypatch.setattr(model, "_run", _no_solver)
    plan = _chosen(p)
    again = _chosen(moved(p, plan, seed))
    assert plan.objective_w <= exact * 1.01
    assert plan.bound_w <= exact * (1 + 1e-6)
    assert max(plan.gap, again.gap) <= p.gap


def test_a_plan_that_still_fits_is_kept() -> None:
    p = random_problem(4, 96)
    plan = _chosen(p)
    again = _chosen(replace(p, current=dict(plan.counts)))
    started = Counter({key: n - plan.counts.get(key, 0) for key, n in again.counts.items()})
    assert sum(max(0, n) * tp for (_, tp), n in started.items()) <= 8
    assert again.objective_w < plan.objective_w  # nothing has to be started any more


def test_large_fleets_are_rounded_within_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    p = random_problem(1, 4000)
    exact = solve(p, HIGHS, milp_only=True).chosen
    assert exact is not None
    runs = []

    def counted(*arguments: object) -> object:
        runs.append(arguments)
        return run(*arguments)

    run = model._run
    monkeypatch.setattr(model, "_run", counted)
    plan = _chosen(p)
    assert plan.gap <= p.gap
    assert plan.bound_w <= exact.objective_w
    assert plan.objective_w >= exact.bound_w
    assert len(runs) <= 2  # relaxations, and no branching
    assert _chosen(p).used == plan.used


def test_the_milp_decides_where_tables_do_not_prove_the_gap() -> None:
    p = replace(random_problem(0, 96), gap=model.LEAST_GAP_OF_TABLES / 2, time_limit_s=100.0)
    plan = _chosen(p)
    assert plan.gap <= p.gap


def _chosen(p: PlanProblem) -> PartitionResult:
    solution = solve(p)
    assert_sound(p, solution)
    assert solution.chosen is not None
    return solution.chosen


def _no_solver(*_: object) -> None:
    raise AssertionError("the solver was asked")
