"""What a plan is expected to do for its requests: the share in SLO under the expected load, as the profile has it.

Stands beside `stabilise.price`, which predicts watts; the slow loops record both with every plan.
"""

from __future__ import annotations

from collections.abc import Mapping

from controller.policy.idle import carried_share, choose_serving
from controller.profile.fit import ProfileFit


def predicted_attainment(
    fit: ProfileFit, counts: Mapping[tuple[str, int], int], rates_rps: Mapping[str, float]
) -> float | None:
    """Share of the requests in SLO, over all pools, weighted by their equivalent requests; of the input bucket that
    fares worst in each. `counts` by (pool, tp), `rates_rps` by pool. What is beyond the capacity counts as missed.
    None without any load, and where a pool's load is unknown to the profile.
    """
    total_rps = sum(rate for rate in rates_rps.values() if rate > 0)
    if total_rps <= 0:
        return None
    met_rps = 0.0
    for pool, rate in sorted(rates_rps.items()):
        if rate <= 0:
            continue
        serving = choose_serving(fit, pool, {tp: n for (name, tp), n in counts.items() if name == pool}, rate).counts
        tops = {tp: n * fit.max_rate_rps(pool, tp) for tp, n in serving.items() if n}
        capacity = sum(tops.values()) * carried_share(sum(serving.values()))
        if capacity <= 0:
            continue
        ratio = min(1.0, rate / capacity)
        for tp, top in tops.items():
            each = _attainment(fit, pool, tp, ratio * fit.max_rate_rps(pool, tp))
            if each is None:
                return None
            met_rps += min(rate, capacity) * top / sum(tops.values()) * each
    return met_rps / total_rps


def _attainment(fit: ProfileFit, pool: str, tp: int, rate_rps: float) -> float | None:
    """At the clock of least power in SLO there."""
    options = [
        (power, curve)
        for curve in fit.clocks(pool, tp)
        if 0 < curve.max_rate_rps >= rate_rps and (power := curve.power_w(rate_rps)) is not None
    ]
    return min(options, key=lambda option: (option[0], option[1].mhz))[1].attainment(rate_rps) if options else None
