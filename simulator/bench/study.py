"""How long the ledger takes: the hour's six-system comparison, first with nothing on disk, then as every later time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from simulator.bench.metric import Metric, of_repeats
from simulator.ledger import run_study
from simulator.study import ALL_SYSTEMS, Study
from simulator.systems import SYSTEMS

NODES = 12
U = 0.6
REPEATS = 3
TARGET_S = 30.0


def measure(say: Callable[[str], None]) -> list[Metric]:
    """Seconds on the wall, and what the comparison found."""
    with tempfile.TemporaryDirectory() as folder:
        six = Study("conv", NODES, U, tuple(SYSTEMS), bound=False, seeds=1, cache=Path(folder))
        say("calibration, the largest load, six systems")
        cold_s, _ = _timed(six)
        say("six systems")
        warm_s = [_timed(six)[0] for _ in range(REPEATS)]
        say("all systems, the bound and three seeds")
        first_s, _ = _timed(replace(six, systems=ALL_SYSTEMS, bound=True, seeds=3))
        again_s, result = _timed(replace(six, systems=ALL_SYSTEMS, bound=True, seeds=3))
    metrics = [
        Metric("six_systems_hour_cold_s", cold_s, "s"),
        of_repeats("six_systems_hour_s", warm_s, "s", TARGET_S),
        Metric("all_systems_three_seeds_cold_s", first_s, "s"),
        Metric("all_systems_three_seeds_s", again_s, "s"),
        Metric("bound_saved_parked", result["bound_saved_parked"], "ratio"),
    ]
    for name, system in result["systems"].items():
        spread = system["spread"]
        metrics.append(Metric(f"saved_parked.{name}", system["saved_parked"], "ratio", spread["saved_parked"]))
        metrics.append(Metric(f"attainment.{name}", system["attainment"], "ratio", spread["attainment"], 0.99))
    return metrics


def _timed(study: Study) -> tuple[float, dict[str, Any]]:
    began = perf_counter()
    result = run_study(study)
    return perf_counter() - began, result
