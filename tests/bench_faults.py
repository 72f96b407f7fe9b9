"""The fault campaign: `scripts/bench faults` runs a thousand seeds of tests/faultrun.py and says what was broken."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from simulator.bench.metric import Metric
from tests.faultrun import first_broken

SEEDS, CHUNK = 1000, 25


def measure(say: Callable[[str], None]) -> list[Metric]:
    began_s = time.monotonic()
    chunks = [range(first, first + CHUNK) for first in range(0, SEEDS, CHUNK)]
    broken: list[str] = []
    faults = events = 0
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for number, (found, more_faults, more_events) in enumerate(pool.map(first_broken, chunks), start=1):
            broken += found
            faults += more_faults
            events += more_events
            say(f"{number * CHUNK} of {SEEDS} seeds, {len(broken)} broken")
    for what in broken[:10]:
        say(what)
    return [
        Metric("fault seeds", SEEDS, "runs", 0.0, 1000.0),
        Metric("fault seeds broken", len(broken), "runs", 0.0, 0.0),
        Metric("faults injected", faults, "faults", 0.0),
        Metric("events checked", events, "events", 0.0),
        Metric("fault campaign", time.monotonic() - began_s, "s", 0.0),
    ]
