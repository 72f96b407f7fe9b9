"""A GPU host of the fast fleet: which GPU holds which instance, locks with leases, energy counters, observations.

The counterpart of `simulator/virtual_node.py`; what its engines do happens in `FastEngines`, which also owns the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from controller.fleet.port import GpuObservation, InstanceObservation, InstanceState, NodeObservation
from simulator.engine import token_budget
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
    cap_w: float | None = None


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
    to_sleep: bool = False  # it drains to sleep
    copying: bool = False  # empty, its weights on their way to host memory


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
        self.reports = True
        self._booting = False
        self._dark_since_s: float | None = None
        self._dark_s = 0.0

    # ---------------------------------------------------------------------------------------------- the whole node

    def go_dark(self) -> None:
        """It has gone off; one that was ordered on again meanwhile stays on."""
        if not self.reports and not self._booting and self._dark_since_s is None:
            now_s = self._engines.now_s
            for gpu in self.gpus.values():
                gpu.energy_j += self._parked_w * (now_s - gpu.since_s)
                self._parked_s += now_s - gpu.since_s
            self._dark_since_s = now_s

    def boot(self) -> None:
        now_s = self._engines.now_s
        self._dark_s, self._booting = self.off_for_s(), True
        if self._dark_since_s is not None:
            for gpu in self.gpus.values():
                gpu.since_s = now_s
        self._dark_since_s = None

    def booted(self) -> None:
        self.reports, self._booting = True, False

    def off_for_s(self) -> float:
        """For how long it has drawn nothing, since the beginning."""
        return self._dark_s + (self._engines.now_s - self._dark_since_s if self._dark_since_s is not None else 0.0)

    # ------------------------------------------------------------------------------------------------- engines

    def start(self, instance_id: str, model: str, pool: str, gpu_uuids: tuple[str, ...]) -> str:
        """Begins a start; returns what is wrong, "" for nothing."""
        before = self.instances.get(instance_id)
        if before is not None and before.state is not InstanceState.FAILED:
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
        if hosted is None or hosted.state is InstanceState.FAILED:
            return f"there is no instance {instance_id}"
        if not self._engines.is_empty(hosted.row):
            return f"{instance_id} still has work"
        self._engines.stop(hosted.row)
        self._enter(hosted, InstanceState.STOPPING)
        return ""

    def stopped(self, hosted: Hosted) -> None:
        self._free(hosted)
        del self.instances[hosted.instance_id]

    def _free(self, hosted: Hosted) -> None:
        drawn_j = self._engines.remove(hosted.row)
        for gpu in hosted.gpus:
            gpu.energy_j += drawn_j
            gpu.since_s, gpu.held = self._engines.now_s, False
        hosted.row = NONE

    # ----------------------------------------------------------------------------------------------- incidents

    def holder(self, gpu: int) -> Hosted | None:
        """The instance that holds the GPU of that index, and can still be hit."""
        for hosted in self.instances.values():
            hit = hosted.row != NONE and hosted.state is not InstanceState.STOPPING
            if hit and any(held.index == gpu for held in hosted.gpus):
                return hosted
        return None

    def crash(self, hosted: Hosted) -> None:
        """Its process dies. Its GPUs are not proven free yet."""
        self._engines.crash(hosted.row)
        self._enter(hosted, InstanceState.STOPPING)

    def failed(self, hosted: Hosted) -> None:
        """Its GPUs are free; it is reported until it is started again."""
        self._free(hosted)
        self._enter(hosted, InstanceState.FAILED)

    def drain_to_sleep(self, hosted: Hosted) -> bool:
        """False for one that is not ready."""
        if self.drain(hosted.instance_id):
            return False
        hosted.to_sleep = True
        return True

    def copy_out(self) -> list[Hosted]:
        """Those that have drained to sleep begin to copy their weights to host memory."""
        if not self.instances:
            return []
        drained = (i for i in self.instances.values() if i.to_sleep and i.state is InstanceState.DRAINING)
        empty = [i for i in drained if not i.copying and self._engines.is_empty(i.row)]
        for hosted in empty:
            hosted.copying = True
            self._engines.copy(hosted.row)
        return empty

    def slept(self, hosted: Hosted) -> bool:
        """False where something else has become of it meanwhile."""
        if hosted.state is not InstanceState.DRAINING:
            return False
        hosted.to_sleep = hosted.copying = False
        self._engines.sleep(hosted.row)
        self._enter(hosted, InstanceState.ASLEEP)
        return True

    def wake(self, hosted: Hosted) -> bool:
        if hosted.state is not InstanceState.ASLEEP:
            return False
        self._engines.wake(hosted.row)
        self._enter(hosted, InstanceState.WARMING)
        return True

    def woken(self, hosted: Hosted) -> bool:
        if hosted.state is not InstanceState.WARMING:
            return False
        self._engines.ready(hosted.row)
        self._enter(hosted, InstanceState.READY)
        return True

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

    def cap(self, gpu_uuids: tuple[str, ...], watts: float | None) -> None:
        """None takes the cap away."""
        for uuid in gpu_uuids:
            self.gpus[uuid].cap_w = watts

    def _mhz(self, hosted: Hosted) -> int:
        """The clock its GPUs run at: a TP group is as fast as its slowest GPU. Under a cap it is at all
        times the one at which a full prefill, which draws most, keeps it: slower than a real board."""
        now_s, mhz = self._engines.now_s, self._full_mhz
        for gpu in hosted.gpus:
            if gpu.lock_mhz is not None and gpu.lock_until_s > now_s:
                mhz = min(mhz, gpu.lock_mhz)
        caps_w = [gpu.cap_w for gpu in hosted.gpus if gpu.cap_w is not None]
        if caps_w:
            physics, fill = self._engines.physics, ((token_budget(self._engines.physics), 0),)
            mhz = physics.effective_mhz(len(hosted.gpus), mhz, min(caps_w), 0, 0, fill)
        return mhz

    def clocks_changed(self) -> None:
        """Lets locks take effect that were set, released or have run out."""
        hosted = [one for one in self.instances.values() if one.row != NONE]
        for one in hosted:
            one.mhz = self._mhz(one)
        self._engines.lock([one.row for one in hosted], [one.mhz for one in hosted])

    # -------------------------------------------------------------------------------------------- observations

    def parked_gpu_s(self) -> float:
        """For how long its GPUs were held by no instance, all of them together, since the beginning."""
        now_s = self._engines.now_s
        if self._dark_since_s is not None:
            return self._parked_s
        return self._parked_s + sum(now_s - gpu.since_s for gpu in self.gpus.values() if not gpu.held)

    def observe(self, shown: Shown) -> NodeObservation:
        now_s, parked_w = self._engines.now_s, self._parked_w
        of = {gpu.uuid: hosted for hosted in self.instances.values() if hosted.row != NONE for gpu in hosted.gpus}
        gpus = []
        for gpu in self.gpus.values():
            hosted = of.get(gpu.uuid)
            if hosted is None:
                power_w, energy_j, mhz = parked_w, gpu.energy_j + parked_w * (now_s - gpu.since_s), None
            else:
                row, mhz = hosted.row, hosted.mhz
                power_w, energy_j = shown.power_w[row], gpu.energy_j + shown.energy_j[row]
            locked_mhz = gpu.lock_mhz if gpu.lock_until_s > now_s else None
            gpus.append(GpuObservation(gpu.uuid, gpu.index, True, power_w, energy_j, mhz, locked_mhz))
        instances = tuple(
            InstanceObservation(
                hosted.instance_id,
                hosted.model,
                hosted.pool,
                hosted.gpu_uuids,
                hosted.state,
                hosted.endpoint,
                float(shown.running[hosted.row]) if hosted.row != NONE else 0.0,
                float(shown.waiting[hosted.row]) if hosted.row != NONE else 0.0,
                shown.kv_usage_ratio[hosted.row] if hosted.row != NONE else 0.0,
                "",
                dict(hosted.step_seconds),
            )
            for hosted in self.instances.values()
        )
        return NodeObservation(self.node_id, now_s, tuple(gpus), instances)
