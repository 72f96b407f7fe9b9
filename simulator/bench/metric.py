"""What a benchmark says: metrics with their spread and target, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    """`spread` is largest less smallest of the repeats, in the metric's unit; `target` None where there is none."""

    name: str
    value: float
    unit: str
    spread: float = 0.0
    target: float | None = None


def of_repeats(name: str, values: list[float], unit: str, target: float | None = None) -> Metric:
    """The median of several runs."""
    return Metric(name, median(values), unit, max(values) - min(values), target)


def report(benchmark: str, metrics: list[Metric]) -> dict[str, Any]:
    """The one JSON object of a benchmark."""
    return {
        "benchmark": benchmark,
        "machine": machine(),
        "version": version("dynamollm"),
        "metrics": [asdict(metric) for metric in metrics],
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
