"""The planning MILP: never a capacity-violating or silent plan, as good as brute force, calm about bad input."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.policy.milp.columns import build_columns
from controller.policy.milp.model import CBC, HIGHS, build, solve
from controller.policy.milp.problem import Column, PartitionResult, PlanProblem, PlanSolution, PoolDemand, Way
from controller.profile.fit import fit
from tests.synthetic_profile import synthetic_profile

FITTED = fit(synthetic_profile())
COLUMNS = build_columns(FITTED, ("all", "short", "long"))


def problem(gpus: int = 16, rates: tuple[float, ...] = (6.0, 3.0, 3.0), **changes: object) -> PlanProblem:
    plain = PlanProblem(
        problem_id="p",
        gpus=gpus,
        gpus_per_node=8,
        parked_w=72.0,
        horizon_s=300.0,
        partitions=(
            (PoolDemand("all", rates[0]),),
            (PoolDemand("short", rates[1]), PoolDemand("long", rates[2])),
        ),
        columns=COLUMNS,
    )
    return replace(plain, **changes)  # type: ignore[arg-type] - keyword names are PlanProblem's own


def assert_sound(p: PlanProblem, solution: PlanSolution) -> None:
    """No capacity violated, nothing silent."""
    results = [r for r in (solution.chosen, *solution.rejected) if r is not None]
    assert results
    assert all(r.reason for r in solution.rejected)
    demands = {tuple(d.pool for d in partition): partition for partition in p.partitions}
    for result in results:
        if result.status in ("infeasible", "error"):
            assert not result.counts
            assert result is not solution.chosen
            continue
        assert_feasible(p, demands[result.pools], result)
    if solution.chosen is not None:
        feasible = [r for r in results if r.status in ("optimal", "feasible")]
        assert solution.chosen.objective_w == min(r.objective_w for r in feasible)


def assert_feasible(p: PlanProblem, partition: tuple[PoolDemand, ...], result: PartitionResult) -> None:
    assert sum(n * tp for (_, tp), n in result.counts.items()) <= p.gpus
    assert sum(n for _, n in result.used) == sum(result.counts.values())
    for demand in partition:
        used = [(c, n) for c, n in result.used if c.pool == demand.pool]
        tops = {
            tp: max(c.rate_rps for c in p.columns if (c.pool, c.tp) == (demand.pool, tp))
            for tp in {c.tp for c, _ in used}
        }
        assert sum(n * c.rate_rps for c, n in used) >= demand.priced_rps - 1e-5
        assert sum(n * tops[c.tp] for c, n in used) >= demand.rate_rps - 1e-5
        assert sum(n for _, n in used) >= demand.min_instances
        assert {c.pool for c, _ in result.used} <= set(result.pools)
    nodes, rest = divmod(p.gpus, p.gpus_per_node)
    assert sum(n for (_, tp), n in result.counts.items() if tp == 8) <= nodes + rest // 8
    assert result.bound_w <= result.objective_w + 1e-6


# ------------------------------------------------------------------------------------------------- columns


def test_columns_are_in_slo_least_power_and_not_dominated() -> None:
    assert {(c.pool, c.tp) for c in COLUMNS} == set(product(("all", "short", "long"), (2, 4, 8)))
    for column in COLUMNS:
        curve = FITTED.curve(column.pool, column.tp, column.mhz)
        assert curve is not None
        assert column.rate_rps <= curve.max_rate_rps
        assert column.power_w == pytest.approx(curve.power_w(column.rate_rps))
        for other in FITTED.clocks(column.pool, column.tp):
            power = other.power_w(column.rate_rps) if other.max_rate_rps >= column.rate_rps else None
            assert power is None or power >= column.power_w
    for one, two in product(COLUMNS, COLUMNS):
        if (one.pool, one.tp) == (two.pool, two.tp) and one is not two:
            assert not (one.rate_rps <= two.rate_rps and one.power_w >= two.power_w)


def test_a_kind_that_never_meets_the_slo_has_no_columns() -> None:
    profile = synthetic_profile()
    bad = replace(
        profile,
        points=tuple(
            replace(p, attainment_worst=0.5) if p.group == "long" and p.tp == 2 else p for p in profile.points
        ),
    )
    assert {c.tp for c in build_columns(fit(bad), ("long",))} == {4, 8}


# --------------------------------------------------------------------------------------------------- solve


def brute_force_w(p: PlanProblem, partition: tuple[PoolDemand, ...]) -> float | None:
    """Least objective over all integer choices; small problems only."""
    pools = [d.pool for d in partition]
    columns = [c for c in p.columns if c.pool in pools]
    best = None
    for counts in product(*(range(p.gpus // c.tp + 1) for c in columns)):
        used = [(c, n) for c, n in zip(columns, counts, strict=True) if n]
        gpus = sum(n * c.tp for c, n in used)
        if gpus > p.gpus or sum(n for c, n in used if c.tp == 8) > p.gpus // 8:
            continue
        if any(
            sum(n * c.rate_rps for c, n in used if c.pool == d.pool) < d.rate_rps - 1e-9
            or sum(n for c, n in used if c.pool == d.pool) < d.min_instances
            for d in partition
        ):
            continue
        by_tp = Counter({tp: 0 for tp in (2, 4, 8)})
        for c, n in used:
            by_tp[c.tp] += n
        have = Counter({tp: sum(n for (_, t), n in p.current.items() if t == tp) for tp in (2, 4, 8)})
        switch_j = sum(max(0, n - have[tp]) * p.start_j.get(tp, 0.0) for tp, n in by_tp.items())
        switch_j += sum(max(0, have[tp] - n) * p.retire_j.get(tp, 0.0) for tp, n in by_tp.items())
        watts = sum(n * c.power_w for c, n in used) + p.parked_w * (p.gpus - gpus) + switch_j / p.horizon_s
        best = watts if best is None else min(best, watts)
    return best


# In thousandths: what differs by less than the solver's tolerance is not what is tested here.
RATES = st.integers(0, 8000).map(lambda n: n / 1000)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([2, 4, 8]), RATES, st.floats(50, 3000)),
        min_size=1,
        max_size=4,
    ),
    RATES,
    RATES,
    st.integers(0, 2),
    st.dictionaries(st.sampled_from([2, 4, 8]), st.floats(0, 1e5), max_size=3),
    st.dictionaries(st.sampled_from([2, 4, 8]), st.floats(0, 1e5), max_size=3),
)
def test_matches_brute_force_on_small_instances(
    rows: list[tuple[str, int, float, float]],
    a: float,
    b: float,
    current: int,
    start_j: dict[int, float],
    retire_j: dict[int, float],
) -> None:
    columns = tuple(Column(pool, tp, 1000, rate, watts) for pool, tp, rate, watts in rows)
    p = problem(
        partitions=((PoolDemand("a", a),), (PoolDemand("a", a, 0), PoolDemand("b", b))),
        columns=columns,
        gpus=8,
        current={("a", 4): current},
        start_j=start_j,
        retire_j=retire_j,
        gap=0.0,
    )
    solution = solve(p)
    assert_sound(p, solution)
    for partition, result in zip(p.partitions, _in_order(p, solution), strict=True):
        best = brute_force_w(p, partition)
        if best is None:
            assert result.status == "infeasible"
        else:
            assert result.objective_w == pytest.approx(best, rel=1e-6, abs=1e-4)


def _in_order(p: PlanProblem, solution: PlanSolution) -> list[PartitionResult]:
    by_pools = {r.pools: r for r in (solution.chosen, *solution.rejected) if r is not None}
    return [by_pools[tuple(d.pool for d in partition)] for partition in p.partitions]


NUMBERS = st.one_of(st.floats(0, 200), st.sampled_from([float("nan"), float("inf"), -1.0, 0.0]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-8, 40), st.tuples(NUMBERS, NUMBERS, NUMBERS), NUMBERS, st.sampled_from([0, 1, 3, 8]), st.integers(0, 4)
)
def test_no_input_makes_a_violating_or_silent_plan(
    gpus: int, rates: tuple[float, float, float], horizon_s: float, gpus_per_node: int, least: int
) -> None:
    p = problem(gpus, rates, horizon_s=horizon_s, gpus_per_node=gpus_per_node)
    p = replace(p, partitions=tuple(tuple(replace(d, min_instances=least) for d in part) for part in p.partitions))
    assert_sound(p, solve(p))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"columns": ()}, "no operating point of pool"),
        ({"gpus": 2}, "needs at least"),
        ({"partitions": ()}, "no partition"),
        ({"partitions": ((PoolDemand("all", float("nan")),),)}, "demand of all is nan"),
        ({"partitions": ((PoolDemand("all", -1.0),),)}, "demand of all is -1"),
        ({"partitions": ((PoolDemand("all", None),),)}, "malformed"),
        ({"horizon_s": 0.0}, "horizon_s is 0"),
        ({"columns": (Column("all", 4, 800, float("nan"), 1.0),)}, "malformed"),
        ({"current": {("all", 8): -2}}, "current count"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_comes_back_as_a_reason(changes: dict[str, object], reason: str) -> None:
    solution = solve(problem(**changes))
    assert solution.chosen is None
    assert any(reason in r.reason for r in solution.rejected)


def test_the_cheaper_partition_is_chosen_and_the_other_explained() -> None:
    cheap_split = solve(problem(rates=(9.0, 1.0, 1.0)))
    assert cheap_split.chosen is not None
    assert cheap_split.chosen.pools == ("short", "long")
    assert "W more than short+long" in cheap_split.rejected[0].reason
    cheap_single = solve(problem(rates=(2.0, 3.0, 3.0)))
    assert cheap_single.chosen is not None
    assert cheap_single.chosen.pools == ("all",)


def test_starting_costs_hold_a_layout_and_relabelling_is_free() -> None:
    there, dear = {("all", 8): 2}, {2: 1e7, 4: 1e7, 8: 1e7}
    free = solve(problem(rates=(2.0, 9.0, 9.0)))
    held = solve(problem(rates=(2.0, 9.0, 9.0), current=there, start_j=dear))
    assert free.chosen is not None
    assert held.chosen is not None
    assert set(free.chosen.counts) != {("all", 8)}
    assert set(held.chosen.counts) == {("all", 8)}
    split = solve(replace(problem(current=there, start_j=dear), partitions=problem().partitions[1:]))
    assert split.chosen is not None
    assert split.chosen.counts == {("long", 8): 1, ("short", 8): 1}
    assert split.chosen.objective_w == pytest.approx(split.chosen.power_w)


def test_what_retires_is_paid_for() -> None:
    there = {("all", 8): 2}
    free = solve(problem(rates=(2.0, 99.0, 99.0), current=there))
    dear = solve(problem(rates=(2.0, 99.0, 99.0), current=there, retire_j={8: 1e7}))
    assert free.chosen is not None
    assert dear.chosen is not None
    assert free.chosen.counts.get(("all", 8), 0) < 2
    assert dear.chosen.counts[("all", 8)] == 2
    assert free.chosen.objective_w == pytest.approx(free.chosen.power_w)


def test_short_of_capacity_it_grows_beside_what_is_there_where_it_can() -> None:
    one_pool = problem(partitions=((PoolDemand("all", 9.0),),), current={("all", 4): 1, ("all", 2): 1})
    anew = solve(replace(one_pool, gpus=14))
    beside = solve(replace(one_pool, gpus=14, keep_current=True))
    assert anew.chosen is not None
    assert beside.chosen is not None
    assert beside.chosen.objective_w >= anew.chosen.objective_w * (1 - anew.chosen.gap - 1e-9)
    assert sum(n for (_, tp), n in beside.chosen.counts.items() if tp == 4) >= 1
    assert sum(n for (_, tp), n in beside.chosen.counts.items() if tp == 2) >= 1
    no_room = replace(one_pool, gpus=8, partitions=((PoolDemand("all", 7.0),),), current={("all", 4): 1, ("all", 8): 1})
    assert solve(replace(no_room, keep_current=True)).chosen is not None


def test_groups_must_fit_into_nodes_whole() -> None:
    columns = (Column("all", 8, 1980, 1.0, 3000.0),)
    wide = problem(24, gpus_per_node=12, columns=columns, partitions=((PoolDemand("all", 2.5),),))
    solution = solve(wide)
    assert solution.chosen is None
    assert solution.rejected[0].status == "infeasible"
    assert "does not fit" in solution.rejected[0].reason
    assert solve(replace(wide, gpus_per_node=8)).chosen is not None


def test_redundancy_is_met_even_without_load() -> None:
    twice = solve(problem(partitions=((PoolDemand("all", 0.0, min_instances=2),),)))
    assert twice.chosen is not None
    assert twice.chosen.counts == {("all", 2): 2}


def test_both_solvers_agree_and_repeat_themselves() -> None:
    p = problem(40, (25.0, 11.0, 12.0), gap=0.0)
    one, two, other = solve(p, HIGHS), solve(p, HIGHS), solve(p, CBC)
    assert one.chosen is not None
    assert two.chosen is not None
    assert other.chosen is not None
    assert (one.chosen.counts, one.chosen.used) == (two.chosen.counts, two.chosen.used)
    assert other.chosen.objective_w == pytest.approx(one.chosen.objective_w, rel=1e-6)


def test_a_node_limit_stop_says_what_it_has() -> None:
    p = problem(88, (63.1, 29.7, 31.3), node_limit=0, gap=0.0)
    for solver in (HIGHS, CBC):
        solution = solve(p, solver)
        assert_sound(p, solution)
        for result in (solution.chosen, *solution.rejected):
            assert result is None or result.status in ("optimal", "feasible", "error")


def test_no_warning_is_raised() -> None:
    code = (
        "from tests.unit.test_policy_milp import problem, solve, HIGHS, CBC\n"
        "assert solve(problem(), HIGHS).chosen and solve(problem(), CBC).chosen"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------- how, and at the margin


def least_w(p: PlanProblem) -> float:
    """Of the relaxation."""
    model = build(p, p.partitions[0], keep_current=False, whole=False)
    model.lp.solve(pulp.HiGHS(msg=False))
    return float(pulp.value(model.lp.objective)) + model.constant_w


@pytest.mark.parametrize("gpus", [24, 96], ids=["crowded", "roomy"])
def test_shadow_prices_are_what_a_little_more_costs(gpus: int) -> None:
    demands = (PoolDemand("short", 9.0), PoolDemand("long", 9.0))
    base = problem(gpus, partitions=(demands,))
    solution = solve(base)
    assert solution.chosen is not None
    prices = solution.chosen.prices
    assert prices is not None
    for i, demand in enumerate(demands):
        more = tuple(replace(d, rate_rps=d.rate_rps + 0.01) if j == i else d for j, d in enumerate(demands))
        each = (least_w(replace(base, partitions=(more,))) - least_w(base)) / 0.01
        assert prices.w_per_rps[demand.pool] == pytest.approx(each, rel=0.02)
        assert prices.more_rps(demand.pool, 100.0) == pytest.approx(100.0 / each, rel=0.02)
    one_more = least_w(replace(base, gpus=gpus + 8)) - least_w(base)
    assert 8 * prices.gpu_saves_w >= -one_more - 1e-6  # the gain of each further GPU only falls
    assert (prices.gpu_saves_w == -base.parked_w) == (gpus == 96)


def test_load_that_what_stands_there_serves_has_no_price() -> None:
    solution = solve(problem(partitions=((PoolDemand("all", 0.0, 1),),)))
    assert solution.chosen is not None
    assert solution.chosen.prices is not None
    assert solution.chosen.prices.more_rps("nowhere", 100.0) is None


def test_a_plan_says_which_way_it_was_found() -> None:
    few = solve(problem())
    assert few.chosen is not None
    assert few.chosen.way is Way.MILP
    assert all(result.way is Way.MILP for result in few.rejected)
    assert all(result.prices is None for result in few.rejected)
    large = solve(problem(gpus=4000, rates=(1500.0, 700.0, 700.0), gap=0.02))
    assert large.chosen is not None
    assert large.chosen.way is Way.ROUNDED
    nothing = solve(problem(gpus=1))
    assert nothing.chosen is None
    assert {result.way for result in nothing.rejected} == {Way.NONE}


def test_hosts_weigh_in_the_plan_and_not_in_the_power_of_its_gpus() -> None:
    """Wide and slow draws less than narrow and fast, until every GPU that is held keeps a host from going off."""
    slow, fast = Column("all", 8, 800, 4.0, 1200.0), Column("all", 4, 1980, 4.0, 1800.0)
    alone = problem(partitions=((PoolDemand("all", 4.0),),), columns=(slow, fast))
    plain, with_hosts = solve(alone), solve(replace(alone, host_share_w=250.0))
    assert plain.chosen is not None
    assert with_hosts.chosen is not None
    assert plain.chosen.counts == {("all", 8): 1}
    assert with_hosts.chosen.counts == {("all", 4): 1}
    assert with_hosts.chosen.power_w == pytest.approx(1800.0 + 12 * 72.0)
    assert with_hosts.chosen.objective_w == pytest.approx(1800.0 + 12 * 72.0 + 4 * 250.0)
    wrong = solve(replace(alone, host_share_w=float("nan")))
    assert wrong.chosen is None
