"""One telemetry sample as plain values: what the sampler makes, the stream hands out and the metrics page shows."""

from __future__ import annotations

from dataclasses import dataclass

from nodeagent.engine.lifecycle import State
from nodeagent.engine.vllm import EngineReading
from nodeagent.gpu.driver import GpuHealth, GpuReading


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU. The reading is empty while the GPU does not answer."""

    uuid: str
    index: int
    health: GpuHealth
    reading: GpuReading
    energy_j: float | None
    energy_is_integrated: bool
    locked_mhz: int | None
    drift_mhz: int | None = None
    """SM clock outside the lock: above positive, below negative; None without a lock."""
    alarms: tuple[str, ...] = ()
    """What an operator should look at (control/drift.py)."""

    @property
    def healthy(self) -> bool:
        return self.health is GpuHealth.OK


@dataclass(frozen=True, slots=True)
class InstanceSample:
    """One engine instance; `engine` is None while it does not answer."""

    instance_id: str
    state: State
    engine: EngineReading | None
    prompt_tokens_per_s: float | None = None
    """Since the sample before; None in the first one and after a restart of the engine."""
    generation_tokens_per_s: float | None = None
    power_w: float | None = None
    """What its GPUs draw together, asleep too; None while another instance is on one of them."""


@dataclass(frozen=True, slots=True)
class HostSample:
    """The host itself."""

    cpu_utilization_ratio: float
    memory_used_ratio: float
    memory_available_bytes: int = 0
    numa_free_bytes: tuple[tuple[int, int], ...] = ()
    """Node id and free memory."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Everything at (nearly) one instant."""

    wall_s: float
    monotonic_s: float
    gpus: tuple[GpuSample, ...]
    instances: tuple[InstanceSample, ...]
    host: HostSample
    alarms: tuple[str, ...] = ()
    """What an operator should look at that belongs to no single GPU."""
    draining: bool = False
    """The node is out of service."""
