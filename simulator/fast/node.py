"""A GPU host of the fast fleet: which GPU holds which instance, locks with leases, energy counters, observations.

The counterpart of `simulator/virtual_node.py`; what its engines do happens in `FastEngines`, which also owns the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from controller.fleet.port import GpuObservation, InstanceObservation, InstanceState, NodeObservation
from simulator.fast.engines import FastEngines, Shown
from simulator.fast.layout import NONE


@dataclass(slots=True)
class Gpu:
    """`energy_j` is what it drew until `since_s`: from then on it is parked, or an instance's share."""

    uuid: str
    index: int
    energy_j: float = 0.0
    since_s: float = 0.0
    held: bool = False
    lock_mhz: int | None = None
    lock_until_s: float = -inf


@dataclass(slots=True)
class Hosted:
    instance_id: str
    model: str
    pool: str
    gpus: tuple[Gpu, ...]
    gpu_uuids: tuple[str, ...]
    endpoint: str
    row: int
    mhz: int
    state: InstanceState
    since_s: float
    step_seconds: dict[str, float] = field(default_factory=dict)


class Node:
    """One host. All of its methods act at the engines' present instant."""

    def __init__(self, node_id: str, engines: FastEngines, gpus: int) -> None:
        self.node_id = node_id
        self.gpus = {
            uuid: Gpu(uuid, index) for index, uuid in enumerate(f"GPU-{node_id}-{index}" for index in range(gpus))
        }
        self.instances: dict[str, Hosted] = {}
        self._engines = engines
        self._full_mhz = engines.physics.clocks_mhz[-1]
        self._parked_w = engines.physics.idle_w(self._full_mhz, context=False)
        self._parked_s = 0.0  # of GPUs that are held now, before they were

    # ------------------------------------------------------------------------------------------------- engines

    def start(self, instance_id: str, model: str, pool: str, gpu_uuids: tuple[str, ...]) -> str:
        """Begins a start; returns what is wrong, "" for nothing."""
        if instance_id in self.instances:
            return ""
        if not set(gpu_uuids) <= self.gpus.keys():
            return f"{self.node_id} has no such GPU"
        gpus = tuple(self.gpus[uuid] for uuid in gpu_uuids)
        if any(gpu.held for gpu in gpus):
            return f"a GPU of {instance_id} is held by another instance"
        now_s = self._engines.now_s
        for gpu in gpus:
            gpu.energy_j += self._parked_w * (now_s - gpu.since_s)
            self._parked_s += now_s - gpu.since_s
            gpu.since_s, gpu.held = now_s, True
        hosted = Hosted(
            instance_id,
            model,
            pool,
            gpus,
            gpu_uuids,
            f"virtual://{self.node_id}/{instance_id}",
            NONE,
            self._full_mhz,
            InstanceState.STARTING,
            now_s,
        )
        hosted.mhz = self._mhz(hosted)
        hosted.row = self._engines.start(len(gpus), hosted.mhz)
        self.instances[instance_id] = hosted
        return ""

    def ready(self, hosted: Hosted) -> None:
        hosted.step_seconds["start"] = self._engines.now_s - hosted.since_s
        self._engines.ready(hosted.row)
        self._enter(hosted, InstanceState.READY)

    def drain(self, instance_id: str) -> str:
        hosted = self.instances.get(instance_id)
        if hosted is None or hosted.state is not InstanceState.READY:
            return f"{instance_id} is not ready, so it cannot drain"
        self._engines.drain(hosted.row)
        self._enter(hosted, InstanceState.DRAINING)
        return ""

    def stop(self, instance_id: str) -> str:
        hosted = self.instances.get(instance_id)
        if hosted is None:
            return f"there is no instance {instance_id}"
        if not self._engines.is_empty(hosted.row):
            return f"{instance_id} still has work"
        self._engines.stop(hosted.row)
        self._enter(hosted, InstanceState.STOPPING)
        return ""

    def stopped(self, hosted: Hosted) -> None:
        drawn_j = self._engines.remove(hosted.row)
        for gpu in hosted.gpus:
            gpu.energy_j += drawn_j
            gpu.since_s, gpu.held = self._engines.now_s, False
        del self.instances[hosted.instance_id]

    def _enter(self, hosted: Hosted, state: InstanceState) -> None:
        hosted.state, hosted.since_s = state, self._engines.now_s

    # -------------------------------------------------------------------------------------------------- clocks

    def lock(self, gpu_uuids: tuple[str, ...], mhz: int, until_s: float) -> None:
        for uuid in gpu_uuids:
            gpu = self.gpus[uuid]
            gpu.lock_mhz, gpu.lock_until_s = mhz, until_s

    def release(self, gpu_uuids: tuple[str, ...]) -> None:
        for uuid in gpu_uuids:
            self.gpus[uuid].lock_mhz = None

    def _mhz(self, hosted: Hosted) -> int:
        """The clock its GPUs run at: a TP group is as fast as its slowest GPU."""
        now_s, mhz = self._engines.now_s, self._full_mhz
        for gpu in hosted.gpus:
            if gpu.lock_mhz is not None and gpu.lock_until_s > now_s:
                mhz = min(mhz, gpu.lock_mhz)
        return mhz

    def clocks_changed(self) -> None:
        """Lets locks take effect that were set, released or have run out."""
        hosted = list(self.instances.values())
        for one in hosted:
            one.mhz = self._mhz(one)
        self._engines.lock([one.row for one in hosted], [one.mhz for one in hosted])

    # -------------------------------------------------------------------------------------------- observations

    def parked_gpu_s(self) -> float:
        """For how long its GPUs were held by no instance, all of them together, since the beginning."""
        now_s = self._engines.now_s
        return self._parked_s + sum(now_s - gpu.since_s for gpu in self.gpus.values() if not gpu.held)

    def observe(self, shown: Shown) -> NodeObservation:
        now_s = self._engines.now_s
        of = {gpu.uuid: hosted for hosted in self.instances.values() for gpu in hosted.gpus}
        gpus = []
        for gpu in self.gpus.values():
            hosted = of.get(gpu.uuid)
            if hosted is None:
                power_w, energy_j = self._parked_w, gpu.energy_j + self._parked_w * (now_s - gpu.since_s)
            else:
                power_w, energy_j = shown.power_w[hosted.row], gpu.energy_j + shown.energy_j[hosted.row]
            locked_mhz = gpu.lock_mhz if gpu.lock_until_s > now_s else None
            gpus.append(
                GpuObservation(gpu.uuid, gpu.index, True, power_w, energy_j, hosted.mhz if hosted else None, locked_mhz)
            )
        instances = tuple(
            InstanceObservation(
                hosted.instance_id,
                hosted.model,
                hosted.pool,
                hosted.gpu_uuids,
                hosted.state,
                hosted.endpoint,
                float(shown.running[hosted.row]),
                float(shown.waiting[hosted.row]),
                shown.kv_usage_ratio[hosted.row],
                "",
                dict(hosted.step_seconds),
            )
            for hosted in self.instances.values()
        )
        return NodeObservation(self.node_id, now_s, tuple(gpus), instances)
