"""Shadow prices of a plan: what one request/s, one GPU or 100 W more are worth at the margin.

They are the duals of the plan's linear relaxation (instances may be split): how its least power moves when a constraint
moves a little. Whole instances make the true answer a staircase around that line, so they say what to look at, not
what the next plan will be to the watt. Called by milp/model.py for the plan that is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from controller.policy.milp.problem import PoolDemand, ShadowPrices

GPUS = "gpus"
TOLERANCE_W = 1e-6


def demand_names(number: int) -> tuple[str, str]:
    """Names of the two demand constraints of a partition's pool: what is priced, and what must be carried."""
    return f"priced{number}", f"carried{number}"


def shadow_prices(partition: Sequence[PoolDemand], duals: Mapping[str, float], parked_w: float) -> ShadowPrices:
    """`duals` by constraint: watts of the objective for one unit more on the right-hand side."""
    pools = {}
    for number, demand in enumerate(partition):
        # One request/s more moves both constraints where the expected load is what is asked for.
        watts = max(0.0, sum(duals.get(name, 0.0) for name in demand_names(number)))
        pools[demand.pool] = watts if watts > TOLERANCE_W else 0.0
    # One GPU more is one more parked; the relaxation's gain stands against that.
    gain_w = max(0.0, -duals.get(GPUS, 0.0))
    return ShadowPrices(pools, gain_w - parked_w if gain_w > TOLERANCE_W else -parked_w)
