"""Plans where not all that is asked for fits the GPUs: first the reserve gives way, then the load itself.

What the loop asks for plans; it stands before `milp.model.solve`, as `milp/budget.py` does for watts. A plan for a part
of the demand still has the shape that suits the load; the fallback (milp/fallback.py) is for when the solver has no
answer at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from controller.policy.milp.budget import scaled
from controller.policy.milp.model import solve
from controller.policy.milp.problem import WORTH_RESTARTING, PlanProblem, PlanSolution, PoolDemand

# Halvings of each interval: to within 3 % of the load, and of the reserve.
HALVINGS = 5


@dataclass(frozen=True, slots=True)
class _Found:
    solution: PlanSolution
    load: float  # share of the expected load
    reserve: float  # share of what is asked for beyond it


def plan_for(problem: PlanProblem, solver: str | None = None) -> PlanSolution:
    """The plan for all that is asked for, else for as much as fits; `chosen` is None when not even standing there
    fits, or the solver failed. Deterministic, as `solve`."""
    whole = solve(problem, solver)
    if whole.chosen is not None or problem.budget_w is not None or any(r.status == "error" for r in whole.rejected):
        return whole
    found = _most(problem, partial(solve, solver=solver))
    if found is None:
        return whole
    if problem.keep_current and any(problem.current.values()):
        grown = _most(problem, partial(solve, solver=solver, growing_only=True))
        if grown is not None and (grown.load >= 1.0 or found.load < WORTH_RESTARTING * grown.load):
            found = grown
    return replace(found.solution, served_share=found.load, reserve_share=found.reserve)


def _most(problem: PlanProblem, solved: Callable[[PlanProblem], PlanSolution]) -> _Found | None:
    bare = solved(_with_reserve(problem, 0.0))
    if bare.chosen is not None:
        share, solution = _largest(lambda share: solved(_with_reserve(problem, share)), bare)
        return _Found(solution, 1.0, share)
    without = _with_reserve(problem, 0.0)
    nothing = PlanSolution(problem.problem_id, "", None, ())
    share, solution = _largest(lambda share: solved(scaled(without, share)), nothing)
    return None if solution.chosen is None else _Found(solution, share, 0.0)


def _largest(solved: Callable[[float], PlanSolution], at_zero: PlanSolution) -> tuple[float, PlanSolution]:
    """The largest share of which there is a plan, with the plan; at 1 there is none."""
    low, high, found = 0.0, 1.0, at_zero
    for _ in range(HALVINGS):
        share = (low + high) / 2
        tried = solved(share)
        if tried.chosen is None:
            high = share
        else:
            low, found = share, tried
    return low, found


def _with_reserve(problem: PlanProblem, share: float) -> PlanProblem:
    """The same with so much of every pool's reserve, and no instances that only a minimum asks for beyond the first."""

    def less(demand: PoolDemand) -> PoolDemand:
        rate_rps = demand.priced_rps + share * (demand.rate_rps - demand.priced_rps)
        return replace(demand, rate_rps=rate_rps, min_instances=min(1, demand.min_instances))

    return replace(problem, partitions=tuple(tuple(less(demand) for demand in pools) for pools in problem.partitions))
