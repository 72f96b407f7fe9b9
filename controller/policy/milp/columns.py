"""Columns of the planning MILP from the profile's curves.

One column is one way to run one instance: (pool, tp, load bin) at the clock of least power there. What misses the
SLO is removed here, before any model is built; what another column beats in load and power is pruned.
"""

from __future__ import annotations

from collections.abc import Sequence

from controller.policy.milp.problem import Column
from controller.profile.fit import ProfileFit

# Upper ends of the load bins, as shares of the largest load in SLO; the knee of every clock is added to them.
LOAD_BINS: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def build_columns(fit: ProfileFit, pools: Sequence[str], bins: Sequence[float] = LOAD_BINS) -> tuple[Column, ...]:
    """Columns of the named pools (group names), in a fixed order. A pool without any has no feasible instance."""
    columns: list[Column] = []
    for pool in pools:
        for tp in fit.profile.tps:
            columns += _of_instance(fit, pool, tp, bins)
    return tuple(columns)


def _of_instance(fit: ProfileFit, pool: str, tp: int, bins: Sequence[float]) -> list[Column]:
    """Columns of one kind of instance, by rising load; each draws more than the one before it."""
    top = fit.max_rate_rps(pool, tp)
    if top <= 0:
        return []
    columns: list[Column] = []
    knees = (curve.max_rate_rps for curve in fit.clocks(pool, tp))
    for rate in sorted({*(top * share for share in bins), *knees}):
        best: Column | None = None
        for curve in fit.clocks(pool, tp):
            power = curve.power_w(rate) if curve.max_rate_rps > 0 and curve.max_rate_rps >= rate else None
            if power is not None and (best is None or power < best.power_w):
                best = Column(pool, tp, curve.mhz, rate, power)
        if best is not None:
            # What carries less and draws as much is of no use.
            columns = [c for c in columns if c.power_w < best.power_w]
            columns.append(best)
    return columns
