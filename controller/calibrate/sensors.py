"""Whether what a node's sensors said of a measurement may be believed. Calibration stops at the first doubt.

Pure: readings in, one sentence out. A profile is planned with for months; a point that was measured while a GPU
throttled, or against a counter that stood still, would never be noticed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# What slows a GPU down for reasons that the load and the lock do not explain. "sw_power_cap" is no such: large loads
# meet the board's limit at full clock, and caps are measured on purpose.
THROTTLING = frozenset({"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"})
FOREIGN = "foreign_"  # how alarms about other programs' clocks and limits begin
LONGEST_GAP_S = 5.0  # between samples, and that the energy counter may stand still while power is drawn
LEAST_POWER_W = 30.0  # no GPU that is on draws less
MOST_DRIFT_MHZ = 45  # three steps of the clock's grid
MOST_DRIFT_SHARE = 0.25  # of the samples


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One sample of one GPU. None: the driver did not say."""

    at_s: float  # monotonic
    uuid: str
    healthy: bool
    power_w: float | None
    energy_j: float | None
    integrated: bool  # the energy comes from integrated power: there is no counter
    reasons: tuple[str, ...]
    alarms: tuple[str, ...]
    drift_mhz: int | None


@dataclass(frozen=True, slots=True)
class GpuFacts:
    uuid: str
    index: int
    healthy: bool
    mig: bool
    detail: str = ""


def before(gpus: Iterable[GpuFacts], holders: Iterable[str]) -> str:
    """What is wrong with a node that is to be measured; "" for nothing. `holders`: engines that hold GPUs on it."""
    held = sorted(holders)
    if held:
        return f"it is not idle: {', '.join(held)} hold GPUs; drain and stop them first"
    for gpu in gpus:
        if gpu.mig:
            return f"GPU {gpu.index} is cut into MIG slices, whose power cannot be told apart; disable MIG"
        if not gpu.healthy:
            return f"GPU {gpu.index} is not healthy: {gpu.detail or 'no detail'}"
    return ""


def during(readings: Sequence[GpuReading]) -> str:
    """What is wrong with the readings of one measurement, oldest first; "" for nothing."""
    by_gpu: dict[str, list[GpuReading]] = {}
    for reading in readings:
        by_gpu.setdefault(reading.uuid, []).append(reading)
    if not by_gpu:
        return "no telemetry came from the node"
    for uuid, mine in sorted(by_gpu.items()):
        wrong = _of_one(mine)
        if wrong:
            return f"{uuid}: {wrong}"
    return ""


def _of_one(readings: Sequence[GpuReading]) -> str:
    if len(readings) < 2:
        return "only one sample of it came"
    for reading in readings:
        if not reading.healthy:
            return "it became unhealthy"
        throttled = sorted(THROTTLING & set(reading.reasons))
        if throttled:
            return f"it throttled ({', '.join(throttled)}); look at cooling and power supply"
        foreign = [alarm for alarm in reading.alarms if alarm.startswith(FOREIGN)]
        if foreign:
            return f"another program changes its clocks or limits ({foreign[0]})"
        if reading.energy_j is None:
            return "its energy counter did not answer"
        if reading.integrated:
            return "it has no energy counter, only integrated power, which is too coarse for a profile"
    gap_s = max(b.at_s - a.at_s for a, b in pairwise(readings))
    if gap_s > LONGEST_GAP_S:
        return f"no sample of it came for {gap_s:.1f} s"
    stale = _stale(readings)
    if stale:
        return stale
    drifts = [abs(r.drift_mhz) for r in readings if r.drift_mhz is not None]
    off = sum(drift > MOST_DRIFT_MHZ for drift in drifts)
    if drifts and off > MOST_DRIFT_SHARE * len(drifts):
        return f"its clock was not at the lock in {off} of {len(drifts)} samples, by up to {max(drifts)} MHz"
    return ""


def _stale(readings: Sequence[GpuReading]) -> str:
    """A counter that stands still, runs backwards, or does not fit the power that is shown."""
    since = readings[0]
    for reading in readings[1:]:
        now_j, then_j = reading.energy_j or 0.0, since.energy_j or 0.0
        if now_j < then_j:
            return "its energy counter ran backwards"
        if now_j > then_j:
            since = reading
        elif reading.at_s - since.at_s > LONGEST_GAP_S:
            return f"its energy counter stood still for {reading.at_s - since.at_s:.1f} s: a stale sensor"
    first, last = readings[0], readings[-1]
    seconds = last.at_s - first.at_s
    mean_w = ((last.energy_j or 0.0) - (first.energy_j or 0.0)) / seconds if seconds > 0 else 0.0
    if seconds >= LONGEST_GAP_S and mean_w < LEAST_POWER_W:
        return f"its energy counter says {mean_w:.0f} W on average, which no GPU that is on draws"
    return ""
