"""The fault campaign: `scripts/bench faults` runs a thousand seeds of tests/faultrun.py and says what was broken;
then it plants the defects of tests/defects.py, one after the other, and says how many seeds each took to be found."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import structlog

from simulator.bench.metric import Metric
from tests.defects import DEFECTS, planted
from tests.faultrun import first_broken, run

SEEDS, CHUNK = 1000, 25


def measure(say: Callable[[str], None]) -> list[Metric]:
    began_s = time.monotonic()
    chunks = [range(first, first + CHUNK) for first in range(0, SEEDS, CHUNK)]
    broken: list[str] = []
    checks: Counter[str] = Counter()
    faults = events = 0
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1), initializer=_quietly) as pool:
        for number, found in enumerate(pool.map(first_broken, chunks), start=1):
            broken += found[0]
            faults += found[1]
            events += found[2]
            checks.update(found[3])
            say(f"{number * CHUNK} of {SEEDS} seeds, {len(broken)} broken")
        for what in broken[:10]:
            say(what)
        took_s = time.monotonic() - began_s
        needed = dict(zip(DEFECTS, pool.map(seeds_to_find, DEFECTS), strict=True))
    for name, seeds in needed.items():
        say(f"{name}: {f'found by seed {seeds - 1}' if seeds else f'not found in {SEEDS} seeds'}")
    found_in = [seeds for seeds in needed.values() if seeds]
    return [
        Metric("fault seeds", SEEDS, "runs", 0.0, 1000.0),
        Metric("fault seeds broken", len(broken), "runs", 0.0, 0.0),
        Metric("faults injected", faults, "faults", 0.0),
        Metric("events checked", events, "events", 0.0),
        Metric("rules with something to look at", sum(checks.values()), "looks", 0.0),
        Metric("fault campaign", took_s, "s", 0.0),
        Metric("defects planted", len(needed), "defects", 0.0),
        Metric("defects not found", len(needed) - len(found_in), "defects", 0.0, 0.0),
        Metric("seeds until a defect is found, at most", max(found_in, default=0), "runs", 0.0, float(SEEDS)),
    ]


def seeds_to_find(name: str) -> int:
    """How many seeds it takes until a run is broken by this defect; 0 when none is."""
    with planted(DEFECTS[name]):
        return next((seed + 1 for seed in range(SEEDS) if run(seed, journal=False).broken), 0)


def _quietly() -> None:
    """A thousand lives write a thousand logs."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
