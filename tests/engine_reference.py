"""One instance of the plain reference engine under arrivals and clock changes: what the fast one must reproduce."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simulator.engine import Engine
from simulator.iteration import Iteration
from simulator.physics import Physics
from simulator.traces import Trace
from simulator.virtual_node import MERGED_STEPS


def trace_of(rows: Sequence[tuple[float, int, int]], name: str = "made-up") -> Trace:
    """A trace from (arrival in s, tokens in, tokens out)."""
    arrivals, inputs, outputs = zip(*sorted(rows), strict=True) if rows else ((), (), ())
    return Trace(
        name,
        max(arrivals, default=0.0) + 1.0,
        np.array(arrivals, np.float64),
        np.array(inputs, np.int64),
        np.array(outputs, np.int64),
    )


@dataclass
class Served:
    """Instants are NaN for a request that has not come so far. Energy is per GPU."""

    first_s: NDArray[np.float64]
    finished_s: NDArray[np.float64]
    serving_j: float = 0.0
    idle_j: float = 0.0
    gaps: Counter[int] = field(default_factory=Counter)  # by 0.1 ms
    preemptions: int = 0
    most_running: int = 0
    end_s: float = 0.0


def serve_one(physics: Physics, tp: int, trace: Trace, clocks: Sequence[tuple[float, int]] = ()) -> Served:
    """Serves a trace to its end; the clock changes at the given instants, from full."""
    engine = Engine(physics, tp)
    served = Served(np.full(len(trace), np.nan), np.full(len(trace), np.nan))
    happenings = sorted(
        [(at_s, 0, number) for number, at_s in enumerate(trace.arrival_s.tolist())]
        + [(at_s, 1, mhz) for at_s, mhz in clocks]
    )
    mhz, now_s = physics.clocks_mhz[-1], 0.0
    flight: Iteration | None = None

    def run_until(until_s: float) -> None:
        nonlocal flight, now_s
        while flight is not None and flight.end_s < until_s:
            now_s = flight.end_s
            served.serving_j += flight.joules_per_gpu
            for gap_s, count in flight.gaps:
                served.gaps[round(gap_s * 1e4)] += count
            served.most_running = max(served.most_running, engine.running)
            for event in engine.finish_iteration(flight, every_token=False):
                number = int(event.request_id)
                if event.first:
                    served.first_s[number] = now_s
                elif event.last_index == event.request.generated - 1 and event.gap_s not in (None, flight.gap_s):
                    assert event.gap_s is not None
                    served.gaps[round(event.gap_s * 1e4)] += 1  # it came back from a preemption
                if event.finished:
                    served.finished_s[number] = now_s
            flight = engine.begin_iteration(now_s, mhz, max_steps=MERGED_STEPS)

    for at_s, kind, what in happenings:
        run_until(at_s)
        if flight is None:
            served.idle_j += physics.idle_w(mhz, context=True) * (at_s - now_s)
            now_s = at_s
        if kind == 1:
            mhz = what
        else:
            engine.add(str(what), int(trace.input_tokens[what]), int(trace.output_tokens[what]), at_s)
        flight = engine.cut(at_s) if flight else engine.begin_iteration(at_s, mhz, max_steps=MERGED_STEPS)
    run_until(float("inf"))
    served.preemptions = engine.counters.preemptions
    served.end_s = now_s
    return served
