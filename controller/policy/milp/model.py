"""The planning MILP: builds it with PuLP, solves it with HiGHS in process, and reads the answer back as values.

Every partition of the problem is solved on its own and reported with a reason; the cheapest feasible one is chosen.
Small fleets of many pools are solved from tables (milp/tables.py), large ones by rounding the relaxation; both prove
their gap, and where it is wider than asked the MILP decides.
`solve` never raises: bad input, a failing solver and infeasibility all come back as a solution without a choice.
Answers are recomputed and checked against the problem here, whatever the solver claims.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import floor, inf, isfinite
from time import perf_counter
from typing import Any, NamedTuple

import pulp

from controller.policy.milp.budget import within_budget
from controller.policy.milp.checks import (
    TOLERANCE,
    by_tp,
    cap_w,
    fault,
    packing,
    switch_w,
    tops,
    violation,
    why_infeasible,
)
from controller.policy.milp.prices import GPUS, demand_names, shadow_prices
from controller.policy.milp.problem import (
    Column,
    PartitionResult,
    PlanProblem,
    PlanSolution,
    PoolDemand,
    ShadowPrices,
    Way,
)
from controller.policy.milp.tables import ROOMS, Room, Tabulated, tabulate

HIGHS = "highs"
CBC = "cbc"


def solve(
    problem: PlanProblem, solver: str | None = None, milp_only: bool = False, growing_only: bool = False
) -> PlanSolution:
    """Solves all partitions; deterministic for equal input (one thread, node limit and gap before any time limit).

    `solver` forces "highs" or "cbc"; by default HiGHS where it is installed, else CBC. `milp_only` leaves out the
    shorter ways. With `growing_only` no present instance retires.
    """
    solver = solver or default_solver()
    wrong = fault(problem)
    if wrong:
        pools = [tuple(demand.pool for demand in partition) for partition in problem.partitions] or [()]
        return PlanSolution(problem.problem_id, solver, None, tuple(_failed(p, "error", wrong) for p in pools))
    if problem.budget_w is not None:
        return within_budget(problem, partial(_solve, solver=solver, milp_only=True))
    return _solve(problem, solver, milp_only, growing_only)


def _solve(problem: PlanProblem, solver: str, milp_only: bool, growing_only: bool = False) -> PlanSolution:
    results = [
        _solve_partition(problem, partition, solver, milp_only, growing_only) for partition in problem.partitions
    ]
    feasible = [r for r in results if r.is_feasible]
    if not feasible:
        return PlanSolution(problem.problem_id, solver, None, tuple(results))
    # Of equals the one with fewer pools: it strands fewer GPUs when the load moves.
    chosen = min(feasible, key=lambda r: (r.objective_w, len(r.pools)))
    present = {pool for (pool, _), n in problem.current.items() if n}
    priced = [
        replace(r, prices=_prices(problem, r, solver))
        if r is chosen or (r.is_feasible and set(r.pools) == present)
        else r
        for r in results
    ]
    best = priced[results.index(chosen)]
    return PlanSolution(problem.problem_id, solver, best, tuple(_explain(r, best) for r in priced if r is not best))


def _prices(problem: PlanProblem, chosen: PartitionResult, solver: str) -> ShadowPrices | None:
    """From the relaxation of the chosen partition; None where the solver does not tell them (or fails at it)."""
    partition = next(p for p in problem.partitions if tuple(demand.pool for demand in p) == chosen.pools)
    model = build(problem, partition, keep_current=False, whole=False)
    try:
        _run(model.lp, problem, solver)
    except Exception:  # a plan stands without its prices
        return None
    duals = {constraint.name: constraint.pi for constraint in model.lp.constraints()}
    if any(value is None for value in duals.values()):
        return None
    return shadow_prices(partition, {name: float(value) for name, value in duals.items()}, problem.parked_w)


def default_solver() -> str:
    return HIGHS if pulp.HiGHS(msg=False).available() else CBC


def _explain(result: PartitionResult, chosen: PartitionResult) -> PartitionResult:
    if result.reason:
        return result
    more_w = result.objective_w - chosen.objective_w
    return replace(result, reason=f"costs {more_w:.0f} W more than {'+'.join(chosen.pools)}")


class _Model(NamedTuple):
    lp: Any
    counts: list[tuple[Column, Any]]
    constant_w: float  # of the objective, kept out of the model: all GPUs parked, and what leaves in any case


def _solve_partition(
    problem: PlanProblem, partition: tuple[PoolDemand, ...], solver: str, milp_only: bool, growing_only: bool
) -> PartitionResult:
    if problem.keep_current or growing_only:
        growing = _solve_once(problem, partition, solver, milp_only, keep_current=True)
        if growing_only or growing.is_feasible:
            return growing
    return _solve_once(problem, partition, solver, milp_only, keep_current=False)


def _solve_once(
    problem: PlanProblem, partition: tuple[PoolDemand, ...], solver: str, milp_only: bool, keep_current: bool
) -> PartitionResult:
    pools = tuple(demand.pool for demand in partition)
    known = {column.pool for column in problem.columns}
    if any(d.pool not in known and (d.rate_rps > 0 or d.min_instances > 0) for d in partition):
        return _failed(pools, "infeasible", why_infeasible(problem, partition))
    began_s = perf_counter()
    try:
        short = None if milp_only else _shortcut(problem, partition, solver, keep_current, began_s)
        if short is not None:
            return short
        model = build(problem, partition, keep_current)
        bound_w, limited = _run(model.lp, problem, solver)
    except _InfeasibleError:
        return _failed(pools, "infeasible", why_infeasible(problem, partition))
    except Exception as error:  # a solver's failure of any kind must not stop control; it is reported as such
        return _failed(pools, "error", f"{solver} failed: {type(error).__name__}: {error}")
    used = [(c, round(v.value() or 0.0)) for c, v in model.counts]
    return _result(problem, partition, used, bound_w + model.constant_w, limited, began_s, Way.MILP)


def _result(
    problem: PlanProblem,
    partition: tuple[PoolDemand, ...],
    used: list[tuple[Column, int]],
    bound_w: float,
    limited: bool,
    began_s: float,
    way: Way,
) -> PartitionResult:
    """An answer as a result: recomputed, and an error where it breaks a constraint."""
    pools = tuple(demand.pool for demand in partition)
    used = [(c, n) for c, n in used if n > 0]
    broken = violation(problem, partition, used)
    if broken:
        return _failed(pools, "error", broken)
    counts: Counter[tuple[str, int]] = Counter()
    for column, n in used:
        counts[column.pool, column.tp] += n
    gpus = sum(n * c.tp for c, n in used)
    power_w = sum(n * c.power_w for c, n in used) + problem.parked_w * (problem.gpus - gpus)
    objective_w = power_w + problem.host_share_w * gpus + switch_w(problem, counts)
    bound_w = max(0.0, min(bound_w, objective_w))  # power is never negative: 0 W always bounds it
    gap = (objective_w - bound_w) / objective_w if objective_w > 0 else 0.0
    return PartitionResult(
        pools=pools,
        status="feasible" if limited else "optimal",
        power_w=power_w,
        objective_w=objective_w,
        bound_w=bound_w,
        gap=gap,
        solve_ms=(perf_counter() - began_s) * 1000,
        counts=dict(sorted(counts.items())),
        used=tuple(used),
        way=way,
    )


# Tables round loads to cells: what is asked for more exactly than this goes to the MILP at once.
LEAST_GAP_OF_TABLES = 0.001
# Pools multiply the branches of the MILP and only add up in tables: with fewer the MILP is as fast.
LEAST_POOLS_OF_TABLES = 4
# From here on the relaxation alone proves a gap of half a percent, and less the larger the fleet. What rounding leaves
# over is a problem of a small fleet.
ROUND_FROM_GPUS = 1000
ROUNDED_GPUS = 96
ROOM_GPUS_PER_POOL = 6


def _shortcut(
    problem: PlanProblem, partition: tuple[PoolDemand, ...], solver: str, keep_current: bool, began_s: float
) -> PartitionResult | None:
    """A plan without branching, where one of the ways proves the asked gap. Raises what `_run` raises."""
    ways: list[tuple[Way, Callable[[], Tabulated | None]]] = []
    if problem.gap >= LEAST_GAP_OF_TABLES and len(partition) >= LEAST_POOLS_OF_TABLES:
        alone = replace(problem, partitions=(partition,))
        ways += [(Way.TABLES, partial(_by_tables, alone, keep_current, room)) for room in ROOMS]
    if problem.gpus >= ROUND_FROM_GPUS:
        ways.append((Way.ROUNDED, partial(_by_rounding, problem, partition, solver, keep_current)))
    for way, find in ways:
        found = find()
        if found is not None:
            result = _result(problem, partition, found.used, found.bound_w, False, began_s, way)
            if result.status == "optimal" and result.gap <= problem.gap:
                return result
    return None


def _by_tables(problem: PlanProblem, keep_current: bool, room: Room = ROOMS[0]) -> Tabulated | None:
    """Of a problem with one partition."""
    partition = problem.partitions[0]
    columns = _columns(problem, partition)
    least = by_tp(problem.current) if keep_current else Counter[int]()
    return tabulate(problem, partition, columns, packing(problem, {c.tp for c in columns}), least, room)


def _by_rounding(
    problem: PlanProblem, partition: tuple[PoolDemand, ...], solver: str, keep_current: bool
) -> Tabulated | None:
    """The relaxation rounded down, and from tables what its fractions carried. None where that finds no plan; raises
    what `_run` raises."""
    found = _rounded(problem, partition, solver, keep_current, held_back=0)
    room = ROOM_GPUS_PER_POOL * len(partition)
    if found.plan is None and problem.gpus > room:
        # A plan on every GPU leaves no room to round in: some GPUs are held back.
        with suppress(_InfeasibleError):
            found = _Rounded(_rounded(problem, partition, solver, keep_current, room).plan, found.bound_w)
    return None if found.plan is None else Tabulated(found.plan, found.bound_w)


class _Rounded(NamedTuple):
    plan: list[tuple[Column, int]] | None
    bound_w: float  # of the relaxation


def _rounded(
    problem: PlanProblem, partition: tuple[PoolDemand, ...], solver: str, keep_current: bool, held_back: int
) -> _Rounded:
    """With so many GPUs held back from the relaxation, for what its fractions carried."""
    model = build(replace(problem, gpus=problem.gpus - held_back), partition, keep_current, whole=False)
    _run(model.lp, problem, solver)
    bound_w = float(pulp.value(model.lp.objective)) + model.constant_w
    whole = [(c, floor((v.value() or 0.0) + TOLERANCE)) for c, v in model.counts]
    rest = _by_tables(_rest(problem, partition, whole), keep_current)
    return _Rounded(None if rest is None else [*whole, *rest.used], bound_w)


def _rest(problem: PlanProblem, partition: tuple[PoolDemand, ...], whole: list[tuple[Column, int]]) -> PlanProblem:
    """What is left of a problem beside instances that are settled."""
    demands = []
    for demand in partition:
        largest = tops(problem, demand.pool)
        mine = [(c, n) for c, n in whole if c.pool == demand.pool]
        priced_rps = max(0.0, demand.priced_rps - sum(n * c.rate_rps for c, n in mine))
        rate_rps = max(priced_rps, demand.rate_rps - sum(n * largest[c.tp] for c, n in mine))
        least = max(0, demand.min_instances - sum(n for _, n in mine))
        demands.append(PoolDemand(demand.pool, rate_rps, least, priced_rps))
    settled = Counter[int]()
    for column, n in whole:
        settled[column.tp] += n
    return replace(
        problem,
        gpus=min(ROUNDED_GPUS, problem.gpus - sum(n * tp for tp, n in settled.items())),
        partitions=(tuple(demands),),
        current={("", tp): max(0, n - settled[tp]) for tp, n in by_tp(problem.current).items()},
    )


def _columns(problem: PlanProblem, partition: tuple[PoolDemand, ...]) -> list[Column]:
    """Those that the partition may use."""
    pools = {demand.pool for demand in partition}
    return [c for c in problem.columns if c.pool in pools and c.tp <= problem.gpus_per_node]


def build(problem: PlanProblem, partition: tuple[PoolDemand, ...], keep_current: bool, whole: bool = True) -> _Model:
    """The MILP; with `whole` False its relaxation, in which instances may be split."""
    columns = _columns(problem, partition)
    there = by_tp(problem.current)
    tps = {c.tp for c in columns}
    lp = pulp.LpProblem("plan", pulp.LpMinimize)
    category = pulp.LpInteger if whole else pulp.LpContinuous
    counts = [
        (c, lp.add_variable(f"n{i}", lowBound=0, upBound=floor(problem.gpus / c.tp), cat=category))
        for i, c in enumerate(columns)
    ]
    starts = {tp: lp.add_variable(f"start{tp}", lowBound=0) for tp in sorted(tps) if problem.start_j.get(tp)}
    retires = {tp: lp.add_variable(f"retire{tp}", lowBound=0) for tp in sorted(tps) if problem.retire_j.get(tp)}
    lp.setObjective(
        _sum(
            *((n, c.power_w - c.tp * problem.freed_w) for c, n in counts),
            *((started, problem.start_j[tp] / problem.horizon_s) for tp, started in starts.items()),
            *((retired, problem.retire_j[tp] / problem.horizon_s) for tp, retired in retires.items()),
        )
    )
    of_tp = {tp: [(n, 1) for c, n in counts if c.tp == tp] for tp in sorted(tps)}
    lp.addConstraint(_sum(*((n, c.tp) for c, n in counts)) <= problem.gpus, GPUS)
    if problem.budget_w is not None:
        over = [(n, cap_w(problem, c) - c.tp * problem.cap_floor_w) for c, n in counts]
        lp.addConstraint(_sum(*over) <= problem.budget_w - problem.gpus * problem.cap_floor_w)
    of_pool: dict[str, list[tuple[Column, Any]]] = {demand.pool: [] for demand in partition}
    for c, n in counts:
        of_pool[c.pool].append((c, n))
    for number, demand in enumerate(partition):
        mine = of_pool[demand.pool]
        priced, carried = demand_names(number)
        lp.addConstraint(_sum(*((n, c.rate_rps) for c, n in mine)) >= demand.priced_rps, priced)
        if demand.priced_rps < demand.rate_rps:
            largest = {tp: max(c.rate_rps for c, _ in mine if c.tp == tp) for tp in {c.tp for c, _ in mine}}
            lp.addConstraint(_sum(*((n, largest[c.tp]) for c, n in mine)) >= demand.rate_rps, carried)
        lp.addConstraint(_sum(*((n, 1) for _, n in mine)) >= demand.min_instances)
    for tp, most in packing(problem, tps).items():
        lp.addConstraint(_sum(*((n, c.tp // tp) for c, n in counts if c.tp % tp == 0)) <= most)
    for tp, started in starts.items():
        lp.addConstraint(_sum(*of_tp[tp], (started, -1)) <= there[tp])
    for tp, retired in retires.items():
        lp.addConstraint(_sum(*of_tp[tp], (retired, 1)) >= there[tp])
    if keep_current:
        for tp in sorted(tps & set(there)):
            lp.addConstraint(_sum(*of_tp[tp]) >= there[tp])
    # Kinds that no column has any more leave in any case.
    gone_j = sum(n * problem.retire_j.get(tp, 0.0) for tp, n in there.items() if tp not in tps)
    return _Model(lp, counts, problem.parked_w * problem.gpus + gone_j / problem.horizon_s)


def _sum(*terms: tuple[Any, float]) -> Any:
    """Variables times numbers. Added up term by term PuLP would take most of the time that a small fleet has."""
    return pulp.LpAffineExpression(terms)


class _InfeasibleError(Exception):
    pass


def _run(lp: Any, problem: PlanProblem, solver: str) -> tuple[float, bool]:
    """Runs the solver: its bound, and whether a limit stopped it with a solution short of the asked gap.

    Raises _InfeasibleError, or any error of the solver.
    """
    if solver == CBC:
        return _run_cbc(lp, problem)
    options = {"mip_max_nodes": int(problem.node_limit), "random_seed": 0, "parallel": "off"}
    highs = pulp.HiGHS(msg=False, threads=1, gapRel=problem.gap, timeLimit=problem.time_limit_s, **options)
    # PuLP knows no name for a stop at the node limit; it has read the solution by then, and the status is read here.
    with suppress(KeyError):
        lp.solve(highs)
    state = lp.solverModel.getModelStatus().name
    if state in ("kInfeasible", "kUnboundedOrInfeasible"):
        raise _InfeasibleError
    info = lp.solverModel.getInfo()
    if state == "kModelEmpty" or (state == "kOptimal" and not isfinite(info.mip_dual_bound)):
        return float(info.objective_function_value), False
    if state != "kOptimal" and (state not in _LIMITS or not isfinite(info.mip_gap)):
        raise RuntimeError(f"stopped as {state} without a solution")
    return float(info.mip_dual_bound), state != "kOptimal"


_LIMITS = ("kTimeLimit", "kSolutionLimit", "kIterationLimit", "kInterrupt")


def _run_cbc(lp: Any, problem: PlanProblem) -> tuple[float, bool]:
    """CBC tells no bound through PuLP: what the asked gap proves stands for it, or nothing after a limit."""
    cbc = pulp.COIN_CMD(
        path=pulp.PULP_CBC_CMD.pulp_cbc_path,
        msg=False,
        threads=1,
        gapRel=problem.gap,
        timeLimit=problem.time_limit_s,
        maxNodes=problem.node_limit,
    )
    lp.solve(cbc)
    if lp.sol_status == pulp.LpSolutionInfeasible:
        raise _InfeasibleError
    if lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise RuntimeError("stopped without a solution")
    limited = lp.sol_status != pulp.LpSolutionOptimal
    value = float(pulp.value(lp.objective) or 0.0)
    return (-inf if limited else value - abs(value) * problem.gap), limited


def _failed(pools: tuple[str, ...], status: str, reason: str) -> PartitionResult:
    """A partition without an answer. Its numbers are zero, not NaN, so that they can be stored."""
    return PartitionResult(pools, status, 0.0, 0.0, 0.0, 0.0, 0.0, {}, (), reason)
