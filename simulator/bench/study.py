"""How long the ledger takes: the hour's six-system comparison, first with nothing on disk, then as every later time."""

from __future__ import annotations

import resource
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
    """Seconds on the wall and of the processor, and what the comparison found."""
    with tempfile.TemporaryDirectory() as folder:
        six = Study("conv", NODES, U, tuple(SYSTEMS), bound=False, seeds=1, cache=Path(folder))
        say("calibration, the largest load, six systems")
        cold_s, cold_cpu_s, _ = _timed(six)
        say("six systems")
        warm = [_timed(six) for _ in range(REPEATS)]
        say("all systems, the bound and three seeds")
        first_s, _, _ = _timed(replace(six, systems=ALL_SYSTEMS, bound=True, seeds=3))
        again_s, _, result = _timed(replace(six, systems=ALL_SYSTEMS, bound=True, seeds=3))
    metrics = [
        Metric("six_systems_hour_cold_s", cold_s, "s"),
        Metric("six_systems_hour_cold_cpu_s", cold_cpu_s, "s"),
        of_repeats("six_systems_hour_s", [wall_s for wall_s, _, _ in warm], "s", TARGET_S),
        of_repeats("six_systems_hour_cpu_s", [cpu_s for _, cpu_s, _ in warm], "s"),
        Metric("all_systems_three_seeds_cold_s", first_s, "s"),
        Metric("all_systems_three_seeds_s", again_s, "s"),
        Metric("bound_saved_parked", result["bound_saved_parked"], "ratio"),
    ]
    for name, system in result["systems"].items():
        spread = system["spread"]
        metrics.append(Metric(f"saved_parked.{name}", system["saved_parked"], "ratio", spread["saved_parked"]))
        metrics.append(Metric(f"attainment.{name}", system["attainment"], "ratio", spread["attainment"], 0.99))
    return metrics


def _timed(study: Study) -> tuple[float, float, dict[str, Any]]:
    began_s, before_s = perf_counter(), _processor_s()
    result = run_study(study)
    return perf_counter() - began_s, _processor_s() - before_s, result


def _processor_s() -> float:
    """Of this process and of the workers that have ended, which other work on the machine disturbs little."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
