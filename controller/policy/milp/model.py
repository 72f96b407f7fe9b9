"""The planning MILP: builds it with PuLP, solves it with HiGHS in process, and reads the answer back as values.

Every partition of the problem is solved on its own and reported with a reason; the cheapest feasible one is chosen.
Small fleets of many pools are solved from tables (milp/tables.py), large ones by rounding the relaxation; both prove
their gap, and where it is wider than asked the MILP decides.
`solve` never raises: bad input, a failing solver and infeasibility all come back as a solution without a choice.
Answers are recomputed and checked against the problem here, whatever the solver claims.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import replace
from math import ceil, floor, inf, isfinite
from time import perf_counter
from typing import Any, NamedTuple

import pulp

from controller.policy.milp.problem import Column, PartitionResult, PlanProblem, PlanSolution, PoolDemand
from controller.policy.milp.tables import Tabulated, tabulate

HIGHS = "highs"
CBC = "cbc"
TOLERANCE = 1e-6


def solve(problem: PlanProblem, solver: str | None = None, milp_only: bool = False) -> PlanSolution:
    """Solves all partitions; deterministic for equal input (one thread, node limit and gap before any time limit).

    `solver` forces "highs" or "cbc"; by default HiGHS where it is installed, else CBC. `milp_only` leaves out the
    shorter ways.
    """
    solver = solver or default_solver()
    fault = _fault(problem)
    if fault:
        pools = [tuple(demand.pool for demand in partition) for partition in problem.partitions] or [()]
        return PlanSolution(problem.problem_id, solver, None, tuple(_failed(p, "error", fault) for p in pools))
    results = [_solve_partition(problem, partition, solver, milp_only) for partition in problem.partitions]
    feasible = [r for r in results if r.status in ("optimal", "feasible")]
    if not feasible:
        return PlanSolution(problem.problem_id, solver, None, tuple(results))
    # Of equals the one with fewer pools: it strands fewer GPUs when the load moves.
    chosen = min(feasible, key=lambda r: (r.objective_w, len(r.pools)))
    rejected = tuple(_explain(r, chosen) for r in results if r is not chosen)
    return PlanSolution(problem.problem_id, solver, chosen, rejected)


def default_solver() -> str:
    return HIGHS if pulp.HiGHS(msg=False).available() else CBC


def _explain(result: PartitionResult, chosen: PartitionResult) -> PartitionResult:
    if result.reason:
        return result
    more_w = result.objective_w - chosen.objective_w
    return replace(result, reason=f"costs {more_w:.0f} W more than {'+'.join(chosen.pools)}")


# ------------------------------------------------------------------------------------------------- checking


def _fault(problem: PlanProblem) -> str:
    """What is wrong with the input, in one sentence; "" when nothing is."""
    try:
        return _fault_in_values(problem)
    except (TypeError, ValueError, AttributeError) as error:  # a None or a text where a number belongs
        return f"the problem is malformed: {error}"


def _fault_in_values(problem: PlanProblem) -> str:
    if not problem.partitions:
        return "no partition of the classes into pools was given"
    if problem.gpus < 0 or problem.gpus_per_node < 1:
        return f"{problem.gpus} GPUs in nodes of {problem.gpus_per_node}: neither can be"
    for name, value in (("parked_w", problem.parked_w), ("gap", problem.gap), ("node_limit", problem.node_limit)):
        if not (isfinite(value) and value >= 0):
            return f"{name} is {value}: a finite number of 0 or more is needed"
    for name, value in (("horizon_s", problem.horizon_s), ("time_limit_s", problem.time_limit_s)):
        if not (isfinite(value) and value > 0):
            return f"{name} is {value}: a finite number above 0 is needed"
    for name, costs in (("start_j", problem.start_j), ("retire_j", problem.retire_j)):
        for tp, joules in costs.items():
            if not (isfinite(joules) and joules >= 0):
                return f"{name} of TP{tp} is {joules}"
    for (pool, tp), count in problem.current.items():
        if count < 0:
            return f"current count of {pool} TP{tp} is {count}"
    for column in problem.columns:
        if column.tp < 1 or not all(isfinite(v) and v >= 0 for v in (column.rate_rps, column.power_w)):
            return f"column {column} is malformed"
    for partition in problem.partitions:
        names = [demand.pool for demand in partition]
        if not names or len(set(names)) != len(names):
            return f"partition {names} is empty or names a pool twice"
        for demand in partition:
            if not (isfinite(demand.rate_rps) and demand.rate_rps >= 0 and demand.min_instances >= 0):
                return f"demand of {demand.pool} is {demand.rate_rps} requests/s, {demand.min_instances} instances"
            if not (isfinite(demand.priced_rps) and demand.priced_rps >= 0):
                return f"expected demand of {demand.pool} is {demand.expected_rps} requests/s"
    return ""


def _why_infeasible(problem: PlanProblem, partition: tuple[PoolDemand, ...]) -> str:
    """The plainest true reason that there is no plan."""
    need = 0
    for demand in partition:
        kinds = [c for c in problem.columns if c.pool == demand.pool]
        if demand.rate_rps <= 0 and demand.min_instances <= 0:
            continue
        if not kinds:
            return f"no operating point of pool {demand.pool} meets the SLO"
        densest = max(c.rate_rps / c.tp for c in kinds)
        if demand.rate_rps > 0 and densest <= 0:
            return f"no operating point of pool {demand.pool} carries any load in SLO"
        by_rate = ceil(demand.rate_rps / densest - TOLERANCE) if demand.rate_rps > 0 else 0
        need += max(by_rate, demand.min_instances * min(c.tp for c in kinds))
    if need > problem.gpus:
        return f"needs at least {need} GPUs, {problem.gpus} are there"
    return f"does not fit {problem.gpus} GPUs in nodes of {problem.gpus_per_node} as whole instances"


def _violation(problem: PlanProblem, partition: tuple[PoolDemand, ...], used: list[tuple[Column, int]]) -> str:
    """Which constraint the answer breaks; "" when it keeps them all."""
    gpus = sum(n * c.tp for c, n in used)
    if gpus > problem.gpus:
        return f"answer uses {gpus} GPUs of {problem.gpus}"
    for demand in partition:
        mine = [(c, n) for c, n in used if c.pool == demand.pool]
        tops = _tops(problem, demand.pool)
        if (
            sum(n * c.rate_rps for c, n in mine) < demand.priced_rps * (1 - TOLERANCE) - TOLERANCE
            or sum(n * tops[c.tp] for c, n in mine) < demand.rate_rps * (1 - TOLERANCE) - TOLERANCE
        ):
            return f"answer does not carry the demand of pool {demand.pool}"
        if sum(n for _, n in mine) < demand.min_instances:
            return f"answer has too few instances of pool {demand.pool}"
    for tp, most in _packing(problem, {c.tp for c, _ in used}).items():
        if sum(n * c.tp // tp for c, n in used if c.tp % tp == 0) > most:
            return f"answer does not fit its TP{tp} groups into the nodes"
    return ""


def _tops(problem: PlanProblem, pool: str) -> dict[int, float]:
    """The largest load of one instance of a pool, by tp."""
    tops: dict[int, float] = {}
    for column in problem.columns:
        if column.pool == pool:
            tops[column.tp] = max(tops.get(column.tp, 0.0), column.rate_rps)
    return tops


def _packing(problem: PlanProblem, tps: set[int]) -> dict[int, int]:
    """Aligned groups of `tp` GPUs that the nodes hold. An instance of a multiple of `tp` takes that many groups."""
    nodes, rest = divmod(problem.gpus, problem.gpus_per_node)
    return {tp: nodes * (problem.gpus_per_node // tp) + rest // tp for tp in sorted(tps)}


# -------------------------------------------------------------------------------------------------- solving


class _Model(NamedTuple):
    lp: Any
    counts: list[tuple[Column, Any]]
    constant_w: float  # of the objective, kept out of the model: all GPUs parked, and what leaves in any case


def _solve_partition(
    problem: PlanProblem, partition: tuple[PoolDemand, ...], solver: str, milp_only: bool
) -> PartitionResult:
    if problem.keep_current:
        growing = _solve_once(problem, partition, solver, milp_only, keep_current=True)
        if growing.status in ("optimal", "feasible"):
            return growing
    return _solve_once(problem, partition, solver, milp_only, keep_current=False)


def _solve_once(
    problem: PlanProblem, partition: tuple[PoolDemand, ...], solver: str, milp_only: bool, keep_current: bool
) -> PartitionResult:
    pools = tuple(demand.pool for demand in partition)
    known = {column.pool for column in problem.columns}
    if any(d.pool not in known and (d.rate_rps > 0 or d.min_instances > 0) for d in partition):
        return _failed(pools, "infeasible", _why_infeasible(problem, partition))
    began_s = perf_counter()
    if not milp_only and problem.gap >= LEAST_GAP_OF_TABLES:
        found = _by_tables(replace(problem, partitions=(partition,)), keep_current)
        if found is not None:
            result = _result(problem, partition, found.used, found.bound_w, False, began_s)
            if result.status == "optimal" and result.gap <= problem.gap:
                return result
    try:
        if not milp_only and problem.gpus >= ROUND_FROM_GPUS:
            found = _by_rounding(problem, partition, solver, keep_current)
            if found is not None:
                result = _result(problem, partition, found.used, found.bound_w, False, began_s)
                if result.status == "optimal" and result.gap <= problem.gap:
                    return result
        model = build(problem, partition, keep_current)
        bound_w, limited = _run(model.lp, problem, solver)
    except _InfeasibleError:
        return _failed(pools, "infeasible", _why_infeasible(problem, partition))
    except Exception as error:  # a solver's failure of any kind must not stop control; it is reported as such
        return _failed(pools, "error", f"{solver} failed: {type(error).__name__}: {error}")
    used = [(c, round(v.value() or 0.0)) for c, v in model.counts]
    return _result(problem, partition, used, bound_w + model.constant_w, limited, began_s)


def _result(
    problem: PlanProblem,
    partition: tuple[PoolDemand, ...],
    used: list[tuple[Column, int]],
    bound_w: float,
    limited: bool,
    began_s: float,
) -> PartitionResult:
    """An answer as a result: recomputed, and an error where it breaks a constraint."""
    pools = tuple(demand.pool for demand in partition)
    used = [(c, n) for c, n in used if n > 0]
    broken = _violation(problem, partition, used)
    if broken:
        return _failed(pools, "error", broken)
    counts: Counter[tuple[str, int]] = Counter()
    for column, n in used:
        counts[column.pool, column.tp] += n
    gpus = sum(n * c.tp for c, n in used)
    power_w = sum(n * c.power_w for c, n in used) + problem.parked_w * (problem.gpus - gpus)
    objective_w = power_w + _switch_w(problem, counts)
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
    )


# Tables round loads to cells: what is asked for more exactly than this goes to the MILP at once.
LEAST_GAP_OF_TABLES = 0.001
# From here on the relaxation alone proves a gap of half a percent, and less the larger the fleet. What rounding leaves
# over is a problem of a small fleet.
ROUND_FROM_GPUS = 1000
ROUNDED_GPUS = 96
ROOM_GPUS_PER_POOL = 6


def _by_tables(problem: PlanProblem, keep_current: bool) -> Tabulated | None:
    """Of a problem with one partition."""
    partition = problem.partitions[0]
    columns = _columns(problem, partition)
    least = _by_tp(problem.current) if keep_current else Counter[int]()
    return tabulate(problem, partition, columns, _packing(problem, {c.tp for c in columns}), least)


def _by_rounding(
    problem: PlanProblem, partition: tuple[PoolDemand, ...], solver: str, keep_current: bool
) -> Tabulated | None:
    """The relaxation rounded down, and from tables what its fractions carried. None where that finds no plan; raises
    what `_run` raises."""
    bound_w = -inf
    # A plan on every GPU leaves no room to round in; then some GPUs are held back.
    for held_back in (0, ROOM_GPUS_PER_POOL * len(partition)):
        smaller = replace(problem, gpus=problem.gpus - held_back)
        model = build(smaller, partition, keep_current, whole=False)
        _run(model.lp, smaller, solver)
        if held_back == 0:
            bound_w = float(pulp.value(model.lp.objective)) + model.constant_w
        whole = [(c, floor((v.value() or 0.0) + TOLERANCE)) for c, v in model.counts]
        rest = _by_tables(_rest(problem, partition, whole), keep_current)
        if rest is not None:
            return Tabulated([*whole, *rest.used], bound_w)
    return None


def _rest(problem: PlanProblem, partition: tuple[PoolDemand, ...], whole: list[tuple[Column, int]]) -> PlanProblem:
    """What is left of a problem beside instances that are settled."""
    demands = []
    for demand in partition:
        tops = _tops(problem, demand.pool)
        mine = [(c, n) for c, n in whole if c.pool == demand.pool]
        priced_rps = max(0.0, demand.priced_rps - sum(n * c.rate_rps for c, n in mine))
        rate_rps = max(priced_rps, demand.rate_rps - sum(n * tops[c.tp] for c, n in mine))
        least = max(0, demand.min_instances - sum(n for _, n in mine))
        demands.append(PoolDemand(demand.pool, rate_rps, least, priced_rps))
    settled = Counter[int]()
    for column, n in whole:
        settled[column.tp] += n
    return replace(
        problem,
        gpus=min(ROUNDED_GPUS, problem.gpus - sum(n * tp for tp, n in settled.items())),
        partitions=(tuple(demands),),
        current={("", tp): max(0, n - settled[tp]) for tp, n in _by_tp(problem.current).items()},
    )


def _switch_w(problem: PlanProblem, counts: Counter[tuple[str, int]]) -> float:
    """Starts and retirements spread over the horizon. An instance may change its pool without a restart, so only the
    change of each tp in all is paid for."""
    wanted, there = _by_tp(counts), _by_tp(problem.current)
    joules = 0.0
    for tp in sorted(wanted | there):
        more = wanted[tp] - there[tp]
        joules += max(0, more) * problem.start_j.get(tp, 0.0) + max(0, -more) * problem.retire_j.get(tp, 0.0)
    return joules / problem.horizon_s


def _by_tp(counts: Any) -> Counter[int]:
    total: Counter[int] = Counter()
    for (_, tp), n in counts.items():
        total[tp] += n
    return total


def _columns(problem: PlanProblem, partition: tuple[PoolDemand, ...]) -> list[Column]:
    """Those that the partition may use."""
    pools = {demand.pool for demand in partition}
    return [c for c in problem.columns if c.pool in pools and c.tp <= problem.gpus_per_node]


def build(problem: PlanProblem, partition: tuple[PoolDemand, ...], keep_current: bool, whole: bool = True) -> _Model:
    """The MILP; with `whole` False its relaxation, in which instances may be split."""
    columns = _columns(problem, partition)
    there = _by_tp(problem.current)
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
            *((n, c.power_w - c.tp * problem.parked_w) for c, n in counts),
            *((started, problem.start_j[tp] / problem.horizon_s) for tp, started in starts.items()),
            *((retired, problem.retire_j[tp] / problem.horizon_s) for tp, retired in retires.items()),
        )
    )
    of_tp = {tp: [(n, 1) for c, n in counts if c.tp == tp] for tp in sorted(tps)}
    lp.addConstraint(_sum(*((n, c.tp) for c, n in counts)) <= problem.gpus)
    for demand in partition:
        mine = [(c, n) for c, n in counts if c.pool == demand.pool]
        lp.addConstraint(_sum(*((n, c.rate_rps) for c, n in mine)) >= demand.priced_rps)
        if demand.priced_rps < demand.rate_rps:
            tops = _tops(problem, demand.pool)
            lp.addConstraint(_sum(*((n, tops[c.tp]) for c, n in mine)) >= demand.rate_rps)
        lp.addConstraint(_sum(*((n, 1) for _, n in mine)) >= demand.min_instances)
    for tp, most in _packing(problem, tps).items():
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
