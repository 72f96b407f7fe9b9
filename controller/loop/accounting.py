"""Energy by what a GPU was doing: differences of its energy counter, booked on the state it was in.

Takes the same node observations as the core. Counters survive the death of an agent or controller, so a gap in the
observations loses no energy: it is booked on the state seen before the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from controller.domain.gpu_state import GpuState
from controller.fleet.port import GONE, InstanceObservation, InstanceState, NodeObservation

_GPU_STATE = {
    InstanceState.STARTING: GpuState.LOADING,
    InstanceState.WARMING: GpuState.LOADING,
    InstanceState.DRAINING: GpuState.DRAINING,
    InstanceState.STOPPING: GpuState.DRAINING,
    InstanceState.ASLEEP: GpuState.ASLEEP,
    InstanceState.QUARANTINED: GpuState.UNKNOWN,
}


def gpu_state(instance: InstanceObservation | None) -> GpuState:
    """What the GPUs of `instance` do; None means that no engine holds them."""
    if instance is None or instance.state in GONE:
        return GpuState.PARKED
    if instance.state is InstanceState.READY:
        return GpuState.SERVING if instance.running else GpuState.IDLE
    return _GPU_STATE[instance.state]


@dataclass(frozen=True, slots=True)
class EnergyEntry:
    """Energy of one GPU over one span, booked on one state."""

    node_id: str
    gpu_uuid: str
    pool: str
    instance_id: str
    tp: int
    state: GpuState
    start_s: float
    seconds: float
    energy_j: float
    sm_mhz: int | None


@dataclass(slots=True)
class EnergyBook:
    """Feed it every observation; it yields what each GPU spent since the one before.

    `pool_of` names the pool that an instance serves now, where that is not the one it was started for.
    """

    pool_of: Callable[[InstanceObservation], str] = attrgetter("pool")
    _last: dict[str, tuple[float, float, str, str, int, GpuState, int | None]] = field(default_factory=dict)

    def add(self, seen: NodeObservation) -> Iterator[EnergyEntry]:
        there = (*seen.instances, *seen.held)
        holder = {uuid: instance for instance in there for uuid in instance.gpu_uuids if _holds(instance)}
        for gpu in seen.gpus:
            if gpu.energy_j is None:
                continue  # unknown is not zero: the next reading covers this span too
            instance = holder.get(gpu.uuid)
            before = self._last.get(gpu.uuid)
            self._last[gpu.uuid] = (
                seen.observed_at_s,
                gpu.energy_j,
                self.pool_of(instance) if instance and not instance.held_by else "",
                instance.instance_id if instance else "",
                instance.tp if instance else 0,
                gpu_state(instance),
                gpu.sm_mhz,
            )
            if before is None:
                continue
            start_s, energy_j, pool, instance_id, tp, state, sm_mhz = before
            seconds = seen.observed_at_s - start_s
            if seconds > 0 and gpu.energy_j >= energy_j:
                spent_j = gpu.energy_j - energy_j
                yield EnergyEntry(
                    seen.node_id, gpu.uuid, pool, instance_id, tp, state, start_s, seconds, spent_j, sm_mhz
                )


def _holds(instance: InstanceObservation) -> bool:
    return instance.state not in GONE
