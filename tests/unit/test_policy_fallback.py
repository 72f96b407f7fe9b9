"""What runs when the MILP has no answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.reasons import Reason
from controller.policy.milp.fallback import fall_back
from controller.policy.milp.problem import PlanProblem, PoolDemand
from tests.unit.test_policy_milp import problem


def gpus_of(counts: object) -> int:
    return sum(tp * n for (_, tp), n in dict(counts).items())  # type: ignore[call-overload] - a mapping


def test_the_last_layout_stands_when_it_carries_the_demand() -> None:
    plan = fall_back(problem(16, (6.0, 3.0, 3.0), current={("short", 4): 1, ("long", 4): 1}))
    assert plan.counts == {("short", 4): 1, ("long", 4): 1}
    assert plan.carries
    assert plan.reason is Reason.SOLVER_FAILED


def test_the_last_layout_grows_where_it_is_short() -> None:
    plan = fall_back(problem(16, (9.0, 7.0, 3.0), current={("short", 4): 1, ("long", 4): 1}))
    assert plan.counts[("long", 4)] == 1
    assert sum(tp * n for (pool, tp), n in plan.counts.items() if pool == "short") >= 8
    assert plan.carries


def test_a_layout_larger_than_the_fleet_is_cut() -> None:
    plan = fall_back(problem(8, (3.0, 3.0, 3.0), current={("all", 8): 2}))
    assert plan.counts == {("all", 8): 1}


def test_single_pool_when_there_is_no_last_layout() -> None:
    plan = fall_back(problem(24, (3.0, 3.0, 3.0)))
    assert plan.pools == ("all",)
    assert plan.counts == {("all", 8): 3}
    assert "SinglePool" in plan.sentence


def test_beyond_all_capacity_it_serves_what_it_can_and_says_how_much() -> None:
    plan = fall_back(problem(16, (160.0, 80.0, 80.0)))
    assert not plan.carries
    assert plan.reason is Reason.NO_CAPACITY
    assert 0 < plan.served_ratio < 0.2
    assert gpus_of(plan.counts) == 16
    assert f"{plan.served_ratio:.0%}" in plan.sentence


def test_without_a_profile_the_widest_instance_is_taken() -> None:
    plan = fall_back(problem(16, columns=()))
    assert plan.counts == {("all", 8): 2}
    assert not plan.carries


@given(
    st.integers(0, 40),
    st.one_of(st.floats(0, 300), st.just(float("nan"))),
    st.dictionaries(
        st.tuples(st.sampled_from(["all", "short", "long"]), st.sampled_from([2, 4, 8])), st.integers(-1, 9), max_size=6
    ),
    st.booleans(),
)
def test_never_more_gpus_than_there_are_and_never_silent(
    gpus: int, rate: float, current: dict[tuple[str, int], int], single: bool
) -> None:
    p: PlanProblem = replace(problem(gpus, (rate, rate, rate)), current=current)
    if not single:
        p = replace(p, partitions=((PoolDemand("short", rate), PoolDemand("long", rate)),))
    plan = fall_back(p)
    assert gpus_of(plan.counts) <= gpus
    assert all(n > 0 for n in plan.counts.values())
    assert {pool for pool, _ in plan.counts} <= set(plan.pools)
    assert plan.sentence
    assert plan.carries == (plan.served_ratio >= 1)
    if plan.carries and rate == rate:
        capacity = {key: max(c.rate_rps for c in p.columns if (c.pool, c.tp) == key) for key in plan.counts}
        for pool in plan.pools:
            have = sum(n * capacity[key] for key, n in plan.counts.items() if key[0] == pool)
            assert have >= rate or rate == pytest.approx(have)
