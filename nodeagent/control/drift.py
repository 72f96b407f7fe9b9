"""Compares what GPUs show with what should be in force, and names what does not fit.

Success is not obedience: a lock cannot be read back, so the clocks seen over several samples must speak for it. A
clock below its lock is explained by the driver's own reasons; a clock above it, or below it under load for no reason,
means that another program writes. Values only; control/controls.py feeds it with every telemetry sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nodeagent.control.results import Observed
from nodeagent.control.settings import ClockLock, ControlKind, PowerLimit, Setting
from nodeagent.gpu.driver import GpuReading
from nodeagent.gpu.worker import GpuWorker

SAMPLES = 5
"""Samples in a row that a clock must stray before it is held against anybody."""
LIMIT_SAMPLES = 2
TOLERANCE_MHZ = 30
"""Two steps of the grid: the clock moves by a step with temperature."""
TOLERANCE_W = 0.5
BUSY_RATIO = 0.5
"""Below this utilisation a GPU may clock as it likes."""

HARDWARE_ALARMS = frozenset({"hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"})
"""Reasons to look at the machine. The software power cap is the cap doing its work."""

EXPLAINS = HARDWARE_ALARMS | {"sw_power_cap", "gpu_idle", "sync_boost"}
"""Reasons for a clock below its lock."""


@dataclass(slots=True)
class _Track:
    clock: int = 0
    limit: int = 0
    foreign: set[ControlKind] = field(default_factory=set)
    told: set[ControlKind] = field(default_factory=set)


class DriftWatch:
    """One track per GPU."""

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}

    def look(
        self, worker: GpuWorker, reading: GpuReading, lock: ClockLock | None, limit_w: float | None
    ) -> tuple[str, ...]:
        """The alarms that stand after this reading, sorted."""
        track = self._tracks.setdefault(worker.uuid, _Track())
        strays = lock is not None and clock_strays(reading, lock)
        track.clock = track.clock + 1 if strays else 0
        moved = limit_w is not None and reading.power_limit_w is not None
        moved = moved and abs((reading.power_limit_w or 0.0) - (limit_w or 0.0)) > TOLERANCE_W
        track.limit = track.limit + 1 if moved else 0
        for kind, count, enough in (
            (ControlKind.CLOCK_LOCK, track.clock, SAMPLES),
            (ControlKind.POWER_LIMIT, track.limit, LIMIT_SAMPLES),
        ):
            if count >= enough:
                track.foreign.add(kind)
            elif count == 0:
                track.foreign.discard(kind)
                track.told.discard(kind)
        alarms = {reason for reason in reading.event_reasons if reason in HARDWARE_ALARMS}
        alarms |= {f"foreign_{kind.value}" for kind in track.foreign}
        if lock is not None and reading.sm_mhz is not None and drift_mhz(reading.sm_mhz, lock) < -TOLERANCE_MHZ:
            explained = EXPLAINS & set(reading.event_reasons)
            if explained & HARDWARE_ALARMS:
                alarms.add("clock_drift")
        if worker.facts is not None and not worker.facts.persistence_enabled:
            alarms.add("persistence_off")
        return tuple(sorted(alarms))

    def new_foreign(self, uuid: str) -> list[ControlKind]:
        """Controls found to be written by somebody else since the last call."""
        track = self._tracks.get(uuid)
        if track is None:
            return []
        new = track.foreign - track.told
        track.told |= new
        return sorted(new, key=lambda kind: kind.value)

    def foreign(self, worker: GpuWorker, kind: ControlKind, setting: Setting, seen: Observed) -> str:
        """One phrase when somebody else has moved a control that was in force; empty otherwise."""
        if isinstance(setting, PowerLimit) and seen.power_limit_w is not None:
            if abs(seen.power_limit_w - setting.limit_w) > TOLERANCE_W:
                return f"the limit was {seen.power_limit_w:g} W instead of {setting.limit_w:g} W"
            return ""
        track = self._tracks.get(worker.uuid)
        if track is not None and kind in track.foreign:
            return f"the clock does not follow the lock of {setting}"
        return ""

    def forget(self, uuid: str, kind: ControlKind) -> None:
        """A control was just written: judge it anew."""
        track = self._tracks.get(uuid)
        if track is not None:
            track.foreign.discard(kind)
            track.told.discard(kind)
            if kind is ControlKind.CLOCK_LOCK:
                track.clock = 0
            elif kind is ControlKind.POWER_LIMIT:
                track.limit = 0


def drift_mhz(sm_mhz: int, lock: ClockLock) -> int:
    """How far a clock is outside its lock: above is positive, below negative, 0 inside."""
    return max(sm_mhz - lock.max_mhz, 0) + min(sm_mhz - lock.min_mhz, 0)


def clock_strays(reading: GpuReading, lock: ClockLock) -> bool:
    """Whether nothing but another writer explains this clock."""
    if reading.sm_mhz is None:
        return False
    drift = drift_mhz(reading.sm_mhz, lock)
    if drift > TOLERANCE_MHZ:
        return True
    busy = reading.utilization_ratio is not None and reading.utilization_ratio >= BUSY_RATIO
    return drift < -TOLERANCE_MHZ and busy and not EXPLAINS & set(reading.event_reasons)
