"""Plans for what does not all fit: the reserve gives way before the load, and nothing restarts for little."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.policy.milp.model import solve
from controller.policy.milp.plan import plan_for
from controller.policy.milp.problem import WORTH_RESTARTING, PlanProblem, PlanSolution, PoolDemand
from tests.unit.test_policy_milp import FITTED, assert_feasible, problem


def asking(gpus: int, *demands: PoolDemand, **changes: object) -> PlanProblem:
    return problem(gpus, partitions=(tuple(demands),), **changes)


def carried_rps(solution: PlanSolution, pool: str) -> float:
    assert solution.chosen is not None
    return sum(n * FITTED.max_rate_rps(name, tp) for (name, tp), n in solution.chosen.counts.items() if name == pool)


def test_what_fits_is_planned_as_the_solver_plans_it() -> None:
    p = problem()
    planned, solved = plan_for(p), solve(p)
    assert not planned.is_short
    assert planned.chosen is not None
    assert solved.chosen is not None
    assert planned.chosen.counts == solved.chosen.counts


def test_a_reserve_that_does_not_fit_gives_way_and_the_expected_load_is_carried() -> None:
    most = FITTED.max_rate_rps("all", 8)
    p = asking(8, PoolDemand("all", 1.5 * most, 2, expected_rps=0.6 * most))
    assert solve(p).chosen is None
    found = plan_for(p)
    assert (found.served_share, 0 <= found.reserve_share < 1) == (1.0, True)
    assert carried_rps(found, "all") >= 0.6 * most
    # Of the reserve, the most that fits is kept, to within a halving.
    assert carried_rps(found, "all") >= 0.6 * most + found.reserve_share * 0.9 * most - 1e-6
    assert (
        solve(
            asking(8, PoolDemand("all", 0.6 * most + (found.reserve_share + 1 / 32) * 0.9 * most, 1, 0.6 * most))
        ).chosen
        is None
    )


def test_of_a_load_that_does_not_fit_every_pool_has_its_part() -> None:
    short, long = FITTED.max_rate_rps("short", 4), FITTED.max_rate_rps("long", 4)
    found = plan_for(asking(16, PoolDemand("short", 8 * short), PoolDemand("long", 8 * long)))
    assert 0 < found.served_share < 1
    for pool, rate in (("short", 8 * short), ("long", 8 * long)):
        assert carried_rps(found, pool) >= found.served_share * rate - 1e-6


def test_nothing_restarts_for_a_little_more_of_a_load_that_is_missed_anyway() -> None:
    """Two TP4 stand where one TP8 would carry a little more; growing them is all that is done."""
    four, eight = FITTED.max_rate_rps("all", 4), FITTED.max_rate_rps("all", 8)
    present = {("all", 4): 2}
    p = asking(8, PoolDemand("all", 3 * max(2 * four, eight)), current=present, keep_current=True)
    found = plan_for(p)
    assert found.chosen is not None
    if eight < WORTH_RESTARTING * 2 * four:
        assert found.chosen.counts == present
    else:
        assert found.chosen.counts == {("all", 8): 1}
    twos = {("all", 2): 1}
    grown = plan_for(replace(p, current=twos)).chosen
    assert grown is not None
    assert grown.counts.get(("all", 2), 0) >= 1, "it grows beside what is there"


def test_without_gpus_or_a_profile_nothing_is_chosen_and_the_reason_is_told() -> None:
    for p in (asking(0, PoolDemand("all", 3.0)), problem(16, columns=()), problem(16, (float("nan"),) * 3)):
        found = plan_for(p)
        assert found.chosen is None
        assert all(result.reason for result in found.rejected)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(2, 24),
    st.floats(0.1, 60),
    st.floats(0.1, 60),
    st.dictionaries(
        st.tuples(st.sampled_from(["short", "long"]), st.sampled_from([2, 4])), st.integers(1, 2), max_size=2
    ),
)
def test_a_plan_for_a_part_is_a_sound_plan_for_that_part(
    gpus: int, short: float, long: float, current: dict[tuple[str, int], int]
) -> None:
    p = asking(gpus, PoolDemand("short", short, 1, 0.7 * short), PoolDemand("long", long, 1), current=current)
    p = replace(p, keep_current=bool(current))
    found = plan_for(p)
    if found.chosen is None:
        assert gpus < 4  # two pools of one instance each do not fit
        return
    expected = found.served_share
    part = tuple(
        PoolDemand(
            d.pool,
            expected * (d.priced_rps + found.reserve_share * (d.rate_rps - d.priced_rps)),
            1,
            expected * d.priced_rps,
        )
        for d in p.partitions[0]
    )
    assert_feasible(p, part, found.chosen)
    again = plan_for(p)
    assert again.chosen is not None
    assert again.chosen.counts == found.chosen.counts
