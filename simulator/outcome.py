"""What came of one system over one load, in the ledger's terms, and whether that meets the SLO.

Every run, under the loop or static, ends in a `SystemRun`; `judge` and `energies` read nothing else, so that all
systems are counted alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.domain.classes import ALL_CLASSES, Bucket, ClassScheme
from controller.domain.slo import Slo
from simulator.fast.static import gap_quantile_s
from simulator.traces import Trace

WARM_UP_S = 300.0
# Classes with fewer requests in the window are judged within their whole input bucket.
LEAST_REQUESTS = 1000
LEAST_SHOWN = 100  # fewer requests have no P99

# Host beside the GPUs: CPU, fans, NICs of a node that is on draw 2.0 kW, and up to 2.9 kW when its GPUs draw all they
# may (H100 reference data, docs/physics.md). An empty node is switched off after a while, and pays both ways.
HOST_EMPTY_W = 2000.0
HOST_FULL_W = 2900.0
GPU_LIMIT_W = 700.0
OFF_AFTER_S = 600.0
SHUTDOWN_S = 60.0
BOOT_S = 180.0
_J_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class SystemRun:
    """Requests in the order of the trace; energy and times of the window, which opens `warm_up_s` into the trace."""

    trace: Trace
    warm_up_s: float
    ttft_s: NDArray[np.float64]  # NaN: never answered
    tbt_s: NDArray[np.float64]
    finished: NDArray[np.bool_]
    queue_s: NDArray[np.float64]
    gaps: NDArray[np.int64]  # by bin and class
    nodes: int
    gpus: int
    energy_j: Mapping[str, float]  # by GPU state, "parked" among them
    parked_gpu_s: float
    window_s: float
    off_node_s: float
    peak_gpus: int
    switches: int
    clock_changes: int
    layout: str
    spilled: int = 0  # requests that a larger pool than their own served
    mispredicted: int = 0  # routed for another output bucket than the true one
    outgrown: int = 0  # of these, for a shorter one
    series: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attainment and P99 token gap by judged class."""

    attainment: dict[str, float]
    gap_ms: dict[str, float]
    meets_slo: bool
    overall: float  # of all requests together

    @property
    def worst(self) -> float:
        return min(self.attainment.values(), default=1.0)


def classes_of(trace: Trace, scheme: ClassScheme) -> NDArray[np.int64]:
    """True class of every request, as an index into ALL_CLASSES."""
    inputs = np.searchsorted(scheme.input_cuts_tokens, trace.input_tokens, side="right")
    outputs = np.searchsorted(scheme.output_cuts_tokens, trace.output_tokens, side="right")
    found: NDArray[np.int64] = 3 * inputs + outputs
    return found


def judged_classes(classes: NDArray[np.int64], least: int = LEAST_REQUESTS) -> dict[str, list[int]]:
    """Which class numbers are judged together, by name."""
    counts = np.bincount(classes, minlength=len(ALL_CLASSES))
    groups = {str(c): [number] for number, c in enumerate(ALL_CLASSES) if counts[number] >= least}
    for rank, bucket in enumerate(Bucket):
        mine = range(3 * rank, 3 * rank + 3)
        if any(0 < counts[number] < least for number in mine):
            groups[bucket.value] = list(mine)
    return groups


def judge(run: SystemRun, slo: Slo, scheme: ClassScheme) -> Verdict:
    """By the true class. Whoever was not served to the end is a miss."""
    classes = classes_of(run.trace, scheme)
    inside = run.trace.arrival_s >= run.warm_up_s
    good = _good(run, slo, classes)
    attainment: dict[str, float] = {}
    gap_ms: dict[str, float] = {}
    for name, numbers in judged_classes(classes[inside]).items():
        attainment[name] = float(good[inside & np.isin(classes, numbers)].mean())
        gap_ms[name] = gap_quantile_s(run.gaps[:, numbers], 0.99) * 1e3
    meets = all(a >= slo.attainment for a in attainment.values()) and all(
        g <= slo.token_gap_p99_ms for g in gap_ms.values()
    )
    return Verdict(attainment, gap_ms, meets, float(good[inside].mean()) if inside.any() else 1.0)


HOUR_S = 3600.0


def attainment_by_hour(run: SystemRun, slo: Slo, scheme: ClassScheme) -> list[float]:
    """Of each whole hour of the window the worst attainment of what has enough requests in it to be judged: a class
    with 1,000, else its input bucket. A shorter window, or one without such an hour, gives none."""
    classes = classes_of(run.trace, scheme)
    good = _good(run, slo, classes)
    hour = np.floor((run.trace.arrival_s - run.warm_up_s) / HOUR_S).astype(np.int64)
    # Arrivals are in order: an hour is a slice.
    edges = np.searchsorted(hour, np.arange(int(run.window_s // HOUR_S) + 1))
    found = []
    for begin, end in pairwise(edges):
        mine, kept = classes[begin:end], good[begin:end]
        shares = [
            float(kept[among].mean())
            for numbers in judged_classes(mine).values()
            if (among := np.isin(mine, numbers)).sum() >= LEAST_REQUESTS
        ]
        if shares:
            found.append(min(shares))
    return found


def _good(run: SystemRun, slo: Slo, classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    bounds_s = np.array([slo.ttft_ms(bucket) / 1e3 for bucket in Bucket])[classes // 3]
    with np.errstate(invalid="ignore"):
        return np.asarray(run.finished & (run.ttft_s <= bounds_s) & (run.tbt_s <= slo.tbt_ms / 1e3))


def energies_kwh(run: SystemRun) -> dict[str, float]:
    """The three accountings: freed GPUs at nothing; parked; and with hosts, wholly empty nodes off."""
    parked_j = sum(run.energy_j.values())
    off_j = parked_j - run.energy_j["parked"]
    parked_w = run.energy_j["parked"] / run.parked_gpu_s if run.parked_gpu_s else 0.0
    gpus_per_node = run.gpus / run.nodes
    on_j = parked_j - parked_w * gpus_per_node * run.off_node_s
    on_node_s = run.nodes * run.window_s - run.off_node_s
    host_j = HOST_EMPTY_W * on_node_s + (HOST_FULL_W - HOST_EMPTY_W) * on_j / (GPU_LIMIT_W * gpus_per_node)
    return {
        "energy_off_kwh": off_j / _J_PER_KWH,
        "energy_parked_kwh": parked_j / _J_PER_KWH,
        "wall_kwh": (on_j + host_j) / _J_PER_KWH,
    }


def node_off_s(empty_s: tuple[float, float], open_s: float, close_s: float) -> float:
    """Seconds of the window that a node which holds nothing over `empty_s` is off: it is switched off only after a
    while, and is on again before the end of that span. Shutdown and boot are paid for even where the window ends."""
    begin_s, end_s = empty_s[0] + OFF_AFTER_S + SHUTDOWN_S, empty_s[1] - BOOT_S
    return max(0.0, min(end_s, close_s) - max(begin_s, open_s))


def figures(run: SystemRun, slo: Slo, scheme: ClassScheme) -> dict[str, Any]:
    """All that the ledger says about one run, but for what compares it with others."""
    verdict = judge(run, slo, scheme)
    hours = attainment_by_hour(run, slo, scheme)
    inside = run.trace.arrival_s >= run.warm_up_s
    served = inside & run.finished
    ttft_ms, tbt_ms = run.ttft_s * 1e3, run.tbt_s * 1e3
    held_gpu_s = run.gpus * run.window_s - run.parked_gpu_s
    classes = classes_of(run.trace, scheme)

    def latency(mine: NDArray[np.bool_]) -> dict[str, float | int | None]:
        answered = served & mine
        return {
            "requests": int((inside & mine).sum()),
            "ttft_p50_ms": _quantile(ttft_ms[answered], 0.5),
            "ttft_p99_ms": _quantile(ttft_ms[answered], 0.99),
            "tbt_p50_ms": _quantile(tbt_ms[answered], 0.5),
            "tbt_p99_ms": _quantile(tbt_ms[answered], 0.99),
        }

    counts = np.bincount(classes[inside], minlength=len(ALL_CLASSES))
    by_class = {
        str(c): {**latency(classes == number), "gap_p99_ms": gap_quantile_s(run.gaps[:, number], 0.99) * 1e3}
        for number, c in enumerate(ALL_CLASSES)
        if counts[number] >= LEAST_SHOWN
    }
    return {
        "layout": run.layout,
        **energies_kwh(run),
        "attainment": verdict.worst,
        "attainment_overall": verdict.overall,
        "attainment_worst_hour": min(hours, default=None),
        "hours_judged": len(hours),
        "hours_missed": sum(hour < slo.attainment for hour in hours),
        "attainment_by_class": verdict.attainment,
        "gap_by_class_ms": verdict.gap_ms,
        "meets_slo": verdict.meets_slo,
        "ttft_p50_ms": _quantile(ttft_ms[served], 0.5),
        "ttft_p99_ms": _quantile(ttft_ms[served], 0.99),
        "tbt_p50_ms": _quantile(tbt_ms[served], 0.5),
        "tbt_p99_ms": _quantile(tbt_ms[served], 0.99),
        "gap_p99_ms": gap_quantile_s(run.gaps, 0.99) * 1e3,
        "queue_p99_ms": _quantile(run.queue_s[served] * 1e3, 0.99),
        "gpu_hours": held_gpu_s / 3600,
        "gpu_hours_freed": run.parked_gpu_s / 3600,
        "mean_gpus": held_gpu_s / run.window_s,
        "peak_gpus": run.peak_gpus,
        "switches": run.switches,
        "clock_changes": run.clock_changes,
        "requests": int(inside.sum()),
        "lost": int((inside & ~run.finished).sum()),
        "spilled": run.spilled,
        "mispredicted": run.mispredicted,
        "outgrown": run.outgrown,
        "energy_by_state_kwh": {state: joules / _J_PER_KWH for state, joules in run.energy_j.items()},
        "latency_by_input": {bucket.value: latency(classes // 3 == rank) for rank, bucket in enumerate(Bucket)},
        "latency_by_class": by_class,
    }


def _quantile(values: NDArray[np.float64], quantile: float) -> float | None:
    return float(np.quantile(values, quantile)) if len(values) else None
