"""A GPU host and its engines in virtual time: what an agent, its GPUs and vLLM are in the real world.

Energy is exact: an iteration's joules while one runs, idle and parked watts in between. Clock locks are leases and
run out. Driven by simulator/fleet.py, which owns the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from controller.fleet.port import GpuObservation, InstanceObservation, InstanceState, NodeObservation
from simulator.engine import Engine
from simulator.iteration import EngineRequest, Iteration
from simulator.physics import Physics

# Long enough to merge a whole answer: arrivals and clock changes cut it short.
MERGED_STEPS = 1_000_000
# Without work, what they draw follows the clock.
_IDLING = (InstanceState.READY, InstanceState.DRAINING, InstanceState.ASLEEP)
_ANSWERING = (InstanceState.READY, InstanceState.DRAINING)


@dataclass(slots=True)
class VirtualGpu:
    """Energy up to `at_s`; from there `power_w` runs."""

    uuid: str
    index: int
    energy_j: float = 0.0
    power_w: float = 0.0
    at_s: float = 0.0
    lock_mhz: int | None = None
    lock_until_s: float = 0.0
    cap_w: float | None = None

    def energy_at(self, now_s: float) -> float:
        return self.energy_j + self.power_w * (now_s - self.at_s)

    def run_at(self, now_s: float, power_w: float) -> None:
        self.energy_j, self.at_s, self.power_w = self.energy_at(now_s), now_s, power_w


@dataclass(slots=True)
class VirtualInstance:
    instance_id: str
    model: str
    pool: str
    gpus: tuple[VirtualGpu, ...]
    engine: Engine
    state: InstanceState
    since_s: float
    step_seconds: dict[str, float] = field(default_factory=dict)
    to_sleep: bool = False  # it drains to sleep
    copying: bool = False  # empty, its weights on their way to host memory
    iteration: Iteration | None = None
    # Rises whenever the iteration in flight is replaced, so that its old end is ignored.
    version: int = 0

    @property
    def answers(self) -> bool:
        """False: its port is closed."""
        return self.state in _ANSWERING and not self.copying


class VirtualNode:
    """One host of the virtual fleet."""

    def __init__(self, node_id: str, physics: Physics, gpus: int, start_s: float) -> None:
        self.node_id = node_id
        self._physics = physics
        self._full_mhz = physics.clocks_mhz[-1]
        self.gpus = {
            f"GPU-{node_id}-{index}": VirtualGpu(
                f"GPU-{node_id}-{index}", index, power_w=physics.idle_w(self._full_mhz, context=False), at_s=start_s
            )
            for index in range(gpus)
        }
        self.instances: dict[str, VirtualInstance] = {}
        self.reports = True
        self._booting = False
        self._dark_since_s: float | None = None
        self._dark_s = 0.0

    # ---------------------------------------------------------------------------------------------- the whole node

    def go_dark(self, now_s: float) -> None:
        """It has gone off; one that was ordered on again meanwhile stays on."""
        if not self.reports and not self._booting and self._dark_since_s is None:
            self._dark_since_s = now_s
            for gpu in self.gpus.values():
                gpu.run_at(now_s, 0.0)

    def boot(self, now_s: float) -> None:
        self._dark_s, self._dark_since_s, self._booting = self.off_for_s(now_s), None, True
        for gpu in self.gpus.values():
            gpu.run_at(now_s, self._physics.idle_w(self._full_mhz, context=False))

    def booted(self) -> None:
        self.reports, self._booting = True, False

    def off_for_s(self, now_s: float) -> float:
        """For how long it has drawn nothing, since the beginning."""
        return self._dark_s + (now_s - self._dark_since_s if self._dark_since_s is not None else 0.0)

    # ------------------------------------------------------------------------------------------------- engines

    def start(self, instance_id: str, model: str, pool: str, gpu_uuids: tuple[str, ...], now_s: float) -> str:
        """Begins a start; returns what is wrong, "" for nothing."""
        before = self.instances.get(instance_id)
        if before is not None and before.state is not InstanceState.FAILED:
            return ""
        if not set(gpu_uuids) <= self.gpus.keys():
            return f"{self.node_id} has no such GPU"
        taken = {gpu.uuid for other in self.instances.values() if _holds(other) for gpu in other.gpus}
        if taken & set(gpu_uuids):
            return f"a GPU of {instance_id} is held by another instance"
        gpus = tuple(self.gpus[uuid] for uuid in gpu_uuids)
        engine = Engine(self._physics, len(gpus))
        self.instances[instance_id] = VirtualInstance(
            instance_id, model, pool, gpus, engine, InstanceState.STARTING, now_s
        )
        self._load(self.instances[instance_id], now_s)
        return ""

    def ready(self, instance: VirtualInstance, now_s: float) -> None:
        instance.step_seconds["start"] = now_s - instance.since_s
        self._enter(instance, InstanceState.READY, now_s)
        self._idle(instance, now_s)

    def drain(self, instance_id: str, now_s: float) -> str:
        instance = self.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.READY:
            return f"{instance_id} is not ready, so it cannot drain"
        self._enter(instance, InstanceState.DRAINING, now_s)
        return ""

    def stop(self, instance_id: str, now_s: float) -> str:
        instance = self.instances.get(instance_id)
        if instance is None or instance.state is InstanceState.FAILED:
            return f"there is no instance {instance_id}"
        if not instance.engine.idle:
            return f"{instance_id} still has work"
        self._enter(instance, InstanceState.STOPPING, now_s)
        return ""

    def stopped(self, instance: VirtualInstance, now_s: float) -> None:
        self._enter(instance, InstanceState.STOPPED, now_s)
        for gpu in instance.gpus:
            gpu.run_at(now_s, self._physics.idle_w(self._full_mhz, context=False))
        del self.instances[instance.instance_id]

    # ----------------------------------------------------------------------------------------------- incidents

    def holder(self, gpu: int) -> VirtualInstance | None:
        """The instance that holds the GPU of that index, and can still be hit."""
        for instance in self.instances.values():
            hit = _holds(instance) and instance.state is not InstanceState.STOPPING
            if hit and any(held.index == gpu for held in instance.gpus):
                return instance
        return None

    def crash(self, instance: VirtualInstance, now_s: float) -> list[EngineRequest]:
        """Its process dies: returns what it held. Its GPUs are not proven free yet."""
        self._enter(instance, InstanceState.STOPPING, now_s)
        instance.iteration = None
        instance.version += 1
        for gpu in instance.gpus:
            gpu.run_at(now_s, self._physics.idle_w(self._full_mhz, context=False))
        return instance.engine.crash()

    def failed(self, instance: VirtualInstance, now_s: float) -> None:
        """Its GPUs are free; it is reported until it is started again."""
        self._enter(instance, InstanceState.FAILED, now_s)

    def drain_to_sleep(self, instance: VirtualInstance, now_s: float) -> bool:
        """False for one that is not ready."""
        if instance.state is not InstanceState.READY:
            return False
        self._enter(instance, InstanceState.DRAINING, now_s)
        instance.to_sleep = True
        return True

    def copy_out(self, now_s: float) -> list[VirtualInstance]:
        """Those that have drained to sleep begin to copy their weights to host memory."""
        drained = (i for i in self.instances.values() if i.to_sleep and i.state is InstanceState.DRAINING)
        empty = [i for i in drained if not i.copying and i.engine.idle]
        for instance in empty:
            instance.copying = True
            self._load(instance, now_s)
        return empty

    def slept(self, instance: VirtualInstance, now_s: float) -> bool:
        """False where something else has become of it meanwhile."""
        if instance.state is not InstanceState.DRAINING:
            return False
        instance.to_sleep = instance.copying = False
        self._enter(instance, InstanceState.ASLEEP, now_s)
        self._idle(instance, now_s)
        return True

    def wake(self, instance: VirtualInstance, now_s: float) -> bool:
        if instance.state is not InstanceState.ASLEEP:
            return False
        self._enter(instance, InstanceState.WARMING, now_s)
        self._load(instance, now_s)
        return True

    def woken(self, instance: VirtualInstance, now_s: float) -> bool:
        if instance.state is not InstanceState.WARMING:
            return False
        self._enter(instance, InstanceState.READY, now_s)
        self._idle(instance, now_s)
        return True

    def _load(self, instance: VirtualInstance, now_s: float) -> None:
        for gpu in instance.gpus:
            gpu.run_at(now_s, self._physics.loading_w)

    def _enter(self, instance: VirtualInstance, state: InstanceState, now_s: float) -> None:
        instance.state, instance.since_s = state, now_s

    # --------------------------------------------------------------------------------------------------- clocks

    def mhz_of(self, instance: VirtualInstance, now_s: float) -> int:
        """The clock its GPUs run at: a TP group is as fast as its slowest GPU."""
        locks = [gpu.lock_mhz for gpu in instance.gpus if gpu.lock_mhz is not None and gpu.lock_until_s > now_s]
        return min(locks, default=self._full_mhz)

    def lock(self, gpu_uuids: tuple[str, ...], mhz: int, until_s: float) -> None:
        for uuid in gpu_uuids:
            gpu = self.gpus[uuid]
            gpu.lock_mhz, gpu.lock_until_s = mhz, until_s

    def release(self, gpu_uuids: tuple[str, ...]) -> None:
        for uuid in gpu_uuids:
            self.gpus[uuid].lock_mhz = None

    def cap(self, gpu_uuids: tuple[str, ...], watts: float | None) -> None:
        """From the next iteration on; None takes the cap away."""
        for uuid in gpu_uuids:
            self.gpus[uuid].cap_w = watts

    def clock_changed(self, instance: VirtualInstance, now_s: float) -> bool:
        """Lets a new clock take effect; True when the iteration in flight now ends at another time."""
        if instance.iteration is not None:
            return self.cut(instance, now_s)
        if instance.state in _IDLING and not instance.copying:
            self._idle(instance, now_s)
        return False

    # ----------------------------------------------------------------------------------------------- iterations

    def begin(self, instance: VirtualInstance, now_s: float) -> Iteration | None:
        """Starts the next iteration, if there is work and none is in flight."""
        if instance.iteration is not None:
            return instance.iteration
        caps_w = [gpu.cap_w for gpu in instance.gpus if gpu.cap_w is not None]
        iteration = instance.engine.begin_iteration(
            now_s, self.mhz_of(instance, now_s), min(caps_w, default=None), max_steps=MERGED_STEPS
        )
        instance.iteration = iteration
        instance.version += 1
        if iteration is None:
            self._idle(instance, now_s)
        else:
            for gpu in instance.gpus:
                gpu.run_at(now_s, iteration.watts_per_gpu)
        return iteration

    def cut(self, instance: VirtualInstance, now_s: float) -> bool:
        """Shortens a merged run to the step under way, because something happened; True when it was."""
        before = instance.iteration
        if before is None or before.steps == 1:
            return False
        after = instance.engine.cut(now_s)
        if after is before:
            return False
        instance.iteration = after
        instance.version += 1
        for gpu in instance.gpus:
            # The run so far had the longer run's mean watts; begin it anew with its own.
            gpu.energy_j, gpu.at_s = gpu.energy_at(now_s), now_s
            drawn_j = before.watts_per_gpu * (now_s - after.start_s)
            left_s = after.end_s - now_s
            gpu.power_w = (after.joules_per_gpu - drawn_j) / left_s if left_s > 0 else after.watts_per_gpu
        return True

    def _idle(self, instance: VirtualInstance, now_s: float) -> None:
        watts = self._physics.idle_w(self.mhz_of(instance, now_s), context=True)
        for gpu in instance.gpus:
            gpu.run_at(now_s, watts)

    # --------------------------------------------------------------------------------------------- observations

    def observe(self, now_s: float) -> NodeObservation:
        busy = {gpu.uuid: instance for instance in self.instances.values() if _holds(instance) for gpu in instance.gpus}
        return NodeObservation(
            self.node_id,
            now_s,
            tuple(
                GpuObservation(
                    gpu.uuid,
                    gpu.index,
                    True,
                    gpu.power_w,
                    gpu.energy_at(now_s),
                    self.mhz_of(busy[gpu.uuid], now_s) if gpu.uuid in busy else None,
                    gpu.lock_mhz if gpu.lock_until_s > now_s else None,
                    gpu.cap_w,
                )
                for gpu in self.gpus.values()
            ),
            tuple(
                InstanceObservation(
                    instance.instance_id,
                    instance.model,
                    instance.pool,
                    tuple(gpu.uuid for gpu in instance.gpus),
                    instance.state,
                    f"virtual://{self.node_id}/{instance.instance_id}",
                    float(instance.engine.running),
                    float(instance.engine.waiting),
                    instance.engine.kv_usage_ratio,
                    "",
                    dict(instance.step_seconds),
                )
                for instance in self.instances.values()
            ),
        )


def _holds(instance: VirtualInstance) -> bool:
    return instance.state not in (InstanceState.STOPPED, InstanceState.FAILED)
