"""`simulator/steady.py` at speed: what calibration measures thousands of operating points with.

The same instances, picks and window. Gaps are those of bins of 0.1 ms; whether queues only grow is looked at seldom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.fast.layout import gap_centres_s
from simulator.fast.static import static_engines
from simulator.physics import Physics
from simulator.steady import GIVE_UP_WAITING, Outcome, Steady
from simulator.traces import Request, Trace

_LOOKS = 64  # for queues that only grow


def serve_fast(
    physics: Physics, tp: int, mhz: int, instances: int, requests: Sequence[Request], warm_up_share: float = 0.1
) -> Steady:
    """As `serve_steadily` without a power cap."""
    at_s, inputs, outputs = (np.array(column) for column in zip(*requests, strict=True))
    trace = Trace("steady", float(at_s[-1]), at_s.astype(np.float64), inputs, outputs)
    engines = static_engines(physics, trace, instances, tp, mhz)
    first = int(len(at_s) * warm_up_share)
    open_s, close_s = float(at_s[first]), float(at_s[-1])
    gave_up = False
    opened = None
    for until_s in (open_s, *np.linspace(open_s, close_s, _LOOKS + 1)[1:].tolist()):
        engines.advance(until_s)
        if opened is None:
            opened = engines.energy_j().sum(), engines.running_s(), engines.gaps.copy()
        if max(engines.shown().waiting) > GIVE_UP_WAITING:
            gave_up = True
            break
    assert opened is not None
    before_j, before_s, before_gaps = opened
    end_s = engines.now_s
    joules = float(engines.energy_j().sum() - before_j)
    running_s, gaps = engines.running_s() - before_s, (engines.gaps - before_gaps).sum(axis=1)
    window_s = (end_s - open_s) * instances
    if not gave_up:
        engines.finish()  # what is left, so that its latency is known
    running_s[0] = max(0.0, window_s - running_s.sum())
    centres_s = gap_centres_s()
    arrived = min(max(engines.arrived, first + 1), len(at_s))
    window = slice(first, arrived)
    first_s, finished_s = engines.results["first_s"][window], engines.results["finished_s"][window]
    return Steady(
        outcomes=tuple(
            _outcome(*row, end_s)
            for row in zip(
                at_s[window].tolist(),
                inputs[window].tolist(),
                outputs[window].tolist(),
                first_s.tolist(),
                finished_s.tolist(),
                strict=True,
            )
        ),
        power_w=joules / window_s if window_s > 0 else 0.0,
        running_seconds={int(batch): float(running_s[batch]) for batch in np.flatnonzero(running_s)},
        gaps={float(centres_s[gap]): int(gaps[gap]) for gap in np.flatnonzero(gaps)},
        gave_up=gave_up or open_s >= end_s,
    )


def _outcome(
    arrival_s: float, input_tokens: int, output_tokens: int, first_s: float, finished_s: float, now_s: float
) -> Outcome:
    """Times that have not come are NaN: what was waited for so far is their lower bound."""
    if first_s != first_s:
        return Outcome(input_tokens, (now_s - arrival_s) * 1e3, 0.0, served=False)
    ttft_ms = (first_s - arrival_s) * 1e3
    if finished_s != finished_s:
        return Outcome(input_tokens, ttft_ms, 0.0, served=False)
    gaps = output_tokens - 1
    return Outcome(input_tokens, ttft_ms, (finished_s - first_s) * 1e3 / gaps if gaps else 0.0, served=True)
