"""Energy by what a GPU was doing: differences of its energy counter, booked on the state it was in.

Takes the same node observations as the core. Counters survive the death of an agent or controller, so a gap in the
observations loses no energy: it is booked on the state seen before the gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from controller.fleet.port import InstanceObservation, InstanceState, NodeObservation


class GpuUse(StrEnum):
    """What a GPU's watts went into."""

    SERVING = "serving"
    IDLE = "idle"  # an engine is ready, nothing runs
    LOADING = "loading"
    DRAINING = "draining"
    ASLEEP = "asleep"
    PARKED = "parked"  # no engine
    QUARANTINED = "quarantined"


_USE_OF_STATE = {
    InstanceState.STARTING: GpuUse.LOADING,
    InstanceState.WARMING: GpuUse.LOADING,
    InstanceState.DRAINING: GpuUse.DRAINING,
    InstanceState.STOPPING: GpuUse.DRAINING,
    InstanceState.ASLEEP: GpuUse.ASLEEP,
    InstanceState.QUARANTINED: GpuUse.QUARANTINED,
}


def use_of(instance: InstanceObservation | None) -> GpuUse:
    """The use of the GPUs of `instance`; None means that no engine holds them."""
    if instance is None or instance.state in (InstanceState.STOPPED, InstanceState.FAILED):
        return GpuUse.PARKED
    if instance.state is InstanceState.READY:
        return GpuUse.SERVING if instance.running else GpuUse.IDLE
    return _USE_OF_STATE[instance.state]


@dataclass(frozen=True, slots=True)
class EnergyEntry:
    """Energy of one GPU over one span, booked on one use."""

    node_id: str
    gpu_uuid: str
    pool: str
    tp: int
    use: GpuUse
    start_s: float
    seconds: float
    energy_j: float
    sm_mhz: int | None


@dataclass(slots=True)
class EnergyBook:
    """Feed it every observation; it yields what each GPU spent since the one before."""

    _last: dict[str, tuple[float, float, str, int, GpuUse, int | None]] = field(default_factory=dict)

    def add(self, seen: NodeObservation) -> Iterator[EnergyEntry]:
        holder = {uuid: instance for instance in seen.instances for uuid in instance.gpu_uuids if _holds(instance)}
        for gpu in seen.gpus:
            if gpu.energy_j is None:
                continue  # unknown is not zero: the next reading covers this span too
            instance = holder.get(gpu.uuid)
            before = self._last.get(gpu.uuid)
            self._last[gpu.uuid] = (
                seen.observed_at_s,
                gpu.energy_j,
                instance.pool if instance else "",
                instance.tp if instance else 0,
                use_of(instance),
                gpu.sm_mhz,
            )
            if before is None:
                continue
            start_s, energy_j, pool, tp, use, sm_mhz = before
            seconds = seen.observed_at_s - start_s
            if seconds > 0 and gpu.energy_j >= energy_j:
                spent_j = gpu.energy_j - energy_j
                yield EnergyEntry(seen.node_id, gpu.uuid, pool, tp, use, start_s, seconds, spent_j, sm_mhz)


def _holds(instance: InstanceObservation) -> bool:
    return instance.state not in (InstanceState.STOPPED, InstanceState.FAILED)
