"""Plans within a power budget: where the whole demand does not fit, the largest share of it that does.

Stands between `milp.model.solve` and the solver. The share is what the budget costs in SLO: what is beyond it cannot
be served in time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from controller.policy.milp.problem import PlanProblem, PlanSolution, PoolDemand

# Halvings of the interval in which the largest share is looked for: to within 1.6 %.
HALVINGS = 6


def within_budget(problem: PlanProblem, solve: Callable[[PlanProblem], PlanSolution]) -> PlanSolution:
    """The plan for the whole demand, else for the largest share of every pool's; `chosen` is None where not even
    standing there without any load keeps the budget."""
    whole = solve(problem)
    if whole.chosen is not None:
        return whole
    found = solve(scaled(problem, 0.0))
    if found.chosen is None:
        return whole
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        tried = solve(scaled(problem, share))
        if tried.chosen is None:
            high = share
        else:
            low, found = share, tried
    return replace(found, served_share=low)


def scaled(problem: PlanProblem, share: float) -> PlanProblem:
    """The same with so much of every pool's demand, and no instances that only a minimum asks for beyond the first."""
    return replace(
        problem, partitions=tuple(tuple(_scaled(demand, share) for demand in pools) for pools in problem.partitions)
    )


def _scaled(demand: PoolDemand, share: float) -> PoolDemand:
    expected = None if demand.expected_rps is None else demand.expected_rps * share
    return replace(
        demand, rate_rps=demand.rate_rps * share, expected_rps=expected, min_instances=min(1, demand.min_instances)
    )
