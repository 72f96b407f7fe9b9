"""What the slow loops record beside a plan's watts and head-room: which way it was solved, the attainment it is
expected to reach, and what a little more load, a GPU or 100 W would be worth.
"""

from __future__ import annotations

from collections.abc import Mapping

from controller.domain.decision import Json
from controller.loop.state import State
from controller.policy.milp.problem import PlanSolution
from controller.policy.predict import predicted_attainment

MARGIN_W = 100.0
FALLBACK = "fallback"  # no plan was found: the last one repaired, or one pool


def foresight_json(
    state: State, solution: PlanSolution, counts: Mapping[tuple[str, int], int], rates_rps: Mapping[str, float]
) -> Json:
    """For a plan that leaves `counts` instances with `rates_rps` equivalent requests/s to serve, by pool. Prices are of
    the plan that the solver chose, also where what stands there is kept."""
    chosen = solution.chosen
    attainment = predicted_attainment(state.fit, counts, rates_rps)
    data = {
        "way": FALLBACK if chosen is None else chosen.way.value,
        "attainment": None if attainment is None else round(attainment, 6),
    }
    prices = chosen.prices if chosen is not None else None
    if prices is None:
        return data
    return {
        **data,
        "gpu_saves_w": round(prices.gpu_saves_w, 3),
        "pools": {
            pool: {"w_per_rps": round(each, 3), "rps_per_100w": _rounded(prices.more_rps(pool, MARGIN_W))}
            for pool, each in sorted(prices.w_per_rps.items())
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
