"""What a plan must keep, counted anew from the plan itself: checks of the problem, and of every answer to it.

Nothing here trusts a solver; the ways to solve (milp/model.py, milp/tables.py) share these counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import ceil, inf, isfinite

from controller.policy.milp.problem import Column, PlanProblem, PoolDemand

TOLERANCE = 1e-6


def fault(problem: PlanProblem) -> str:
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
    for name, value in (
        ("parked_w", problem.parked_w),
        ("host_share_w", problem.host_share_w),
        ("gap", problem.gap),
        ("node_limit", problem.node_limit),
    ):
        if not (isfinite(value) and value >= 0):
            return f"{name} is {value}: a finite number of 0 or more is needed"
    if problem.budget_w is not None and not (isfinite(problem.budget_w) and isfinite(problem.cap_floor_w)):
        return f"budget_w is {problem.budget_w}, cap_floor_w {problem.cap_floor_w}: finite numbers are needed"
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


def why_infeasible(problem: PlanProblem, partition: tuple[PoolDemand, ...]) -> str:
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
        gpus = demand.rate_rps / densest if demand.rate_rps > 0 else 0.0
        if gpus == inf:
            return f"no number of GPUs carries the {demand.rate_rps:g} requests/s of pool {demand.pool}"
        by_rate = ceil(gpus - TOLERANCE)
        need += max(by_rate, demand.min_instances * min(c.tp for c in kinds))
    if need > problem.gpus:
        return f"needs at least {need} GPUs, {problem.gpus} are there"
    if problem.budget_w is not None:
        return f"does not fit {problem.gpus} GPUs within {problem.budget_w:.0f} W"
    return f"does not fit {problem.gpus} GPUs in nodes of {problem.gpus_per_node} as whole instances"


def violation(problem: PlanProblem, partition: tuple[PoolDemand, ...], used: list[tuple[Column, int]]) -> str:
    """Which constraint the answer breaks; "" when it keeps them all."""
    gpus = sum(n * c.tp for c, n in used)
    if gpus > problem.gpus:
        return f"answer uses {gpus} GPUs of {problem.gpus}"
    for demand in partition:
        mine = [(c, n) for c, n in used if c.pool == demand.pool]
        largest = tops(problem, demand.pool)
        if (
            sum(n * c.rate_rps for c, n in mine) < demand.priced_rps * (1 - TOLERANCE) - TOLERANCE
            or sum(n * largest[c.tp] for c, n in mine) < demand.rate_rps * (1 - TOLERANCE) - TOLERANCE
        ):
            return f"answer does not carry the demand of pool {demand.pool}"
        if sum(n for _, n in mine) < demand.min_instances:
            return f"answer has too few instances of pool {demand.pool}"
    if problem.budget_w is not None and caps_w(problem, used) > problem.budget_w * (1 + TOLERANCE) + TOLERANCE:
        return f"answer needs caps of {caps_w(problem, used):.0f} W in all, the budget is {problem.budget_w:.0f} W"
    for tp, most in packing(problem, {c.tp for c, _ in used}).items():
        if sum(n * c.tp // tp for c, n in used if c.tp % tp == 0) > most:
            return f"answer does not fit its TP{tp} groups into the nodes"
    return ""


def cap_w(problem: PlanProblem, column: Column) -> float:
    """What the caps of one instance's GPUs must add up to."""
    return max(column.power_w, column.tp * problem.cap_floor_w)


def caps_w(problem: PlanProblem, used: list[tuple[Column, int]]) -> float:
    """What the caps of all GPUs, empty ones too, must add up to."""
    empty = problem.gpus - sum(n * c.tp for c, n in used)
    return sum(n * cap_w(problem, c) for c, n in used) + empty * problem.cap_floor_w


def tops(problem: PlanProblem, pool: str) -> dict[int, float]:
    """The largest load of one instance of a pool, by tp."""
    found: dict[int, float] = {}
    for column in problem.columns:
        if column.pool == pool:
            found[column.tp] = max(found.get(column.tp, 0.0), column.rate_rps)
    return found


def packing(problem: PlanProblem, tps: set[int]) -> dict[int, int]:
    """Aligned groups of `tp` GPUs that the nodes hold. An instance of a multiple of `tp` takes that many groups."""
    nodes, rest = divmod(problem.gpus, problem.gpus_per_node)
    return {tp: nodes * (problem.gpus_per_node // tp) + rest // tp for tp in sorted(tps)}


def switch_w(problem: PlanProblem, counts: Counter[tuple[str, int]]) -> float:
    """Starts and retirements spread over the horizon. An instance may change its pool without a restart, so only the
    change of each tp in all is paid for."""
    wanted, there = by_tp(counts), by_tp(problem.current)
    joules = 0.0
    for tp in sorted(wanted | there):
        more = wanted[tp] - there[tp]
        joules += max(0, more) * problem.start_j.get(tp, 0.0) + max(0, -more) * problem.retire_j.get(tp, 0.0)
    return joules / problem.horizon_s


def by_tp(counts: Mapping[tuple[str, int], int]) -> Counter[int]:
    total: Counter[int] = Counter()
    for (_, tp), n in counts.items():
        total[tp] += n
    return total
