"""A static fleet: equal instances of one pool at one clock, ready from the beginning, and how its requests fared.

What the ledger's SinglePool, its largest load and the benchmark are made of; no controller has a part in it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.domain.classes import ALL_CLASSES
from controller.fleet.port import RoutedInstance, RoutedPool
from simulator.fast.engines import FastEngines
from simulator.fast.layout import gap_centres_s
from simulator.physics import Physics
from simulator.traces import Trace

# More than any instance ever holds: nothing waits at the gateway.
UNLIMITED = 1 << 40


def static_engines(
    physics: Physics,
    trace: Trace,
    instances: int,
    tp: int = 8,
    mhz: int | None = None,
    *,
    max_in_flight: int = UNLIMITED,
    choices: int | None = None,
    seed: int = 0,
) -> FastEngines:
    """`instances` of `tp` GPUs at `mhz` (by default full clock), routed to and idle; `advance` serves the trace."""
    engines = FastEngines(physics, trace, choices=choices, seed=seed)
    rows = {f"i{number:05d}": engines.start(tp, mhz or physics.clocks_mhz[-1]) for number in range(instances)}
    for row in rows.values():
        engines.ready(row)
    members = tuple(RoutedInstance(name, "", tp, max_in_flight, 1.0, accepts_new=True) for name in rows)
    engines.route([RoutedPool("all", "", frozenset(ALL_CLASSES), members)], rows)
    return engines


def gap_quantile_s(gaps: NDArray[np.int64], quantile: float) -> float:
    """The smallest token gap that at least `quantile` of all do not exceed, to the width of its bin.

    `gaps` counts by bin, or by bin and class; 0 without any.
    """
    counts = gaps.reshape(len(gaps), -1).sum(axis=1)
    total = int(counts.sum())
    if not total:
        return 0.0
    return float(gap_centres_s()[np.searchsorted(np.cumsum(counts), quantile * total)])
