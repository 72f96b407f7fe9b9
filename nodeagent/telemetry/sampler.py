"""The one sampling loop: reads every GPU, scrapes every engine, looks at the host, publishes the sample.

GPUs and engines are asked at the same time, each under its own deadline, so that a hung one costs its own values only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil

from common.clock import Clock
from common.logs import get_logger
from nodeagent.config import TelemetryConfig
from nodeagent.control.controls import Controls
from nodeagent.control.drift import drift_mhz
from nodeagent.engine.instances import Instances
from nodeagent.gpu.driver import GpuError, GpuReading
from nodeagent.gpu.inventory import Inventory
from nodeagent.gpu.worker import GpuWorker
from nodeagent.host import HostFacts, numa_free_bytes
from nodeagent.telemetry.energy import EnergyMeter
from nodeagent.telemetry.sample import GpuSample, HostSample, InstanceSample, Sample
from nodeagent.telemetry.stream import SampleStream

log = get_logger(__name__)


class Sampler:
    """Fills a SampleStream."""

    def __init__(
        self,
        inventory: Inventory,
        controls: Controls,
        instances: Instances,
        stream: SampleStream,
        clock: Clock,
        config: TelemetryConfig,
        host: HostFacts,
        node: Callable[[], tuple[tuple[str, ...], bool]] = lambda: ((), False),
    ) -> None:
        """`node` tells the alarms of the node as a whole, and whether it is out of service."""
        self._inventory = inventory
        self._controls = controls
        self._instances = instances
        self._stream = stream
        self._clock = clock
        self._config = config
        self._host = host
        self._node = node
        self._tokens: dict[str, tuple[float, float | None, float | None]] = {}
        self._meters: dict[str, EnergyMeter] = {}
        self.last_beat_s = clock.monotonic_s()
        """When the loop last finished a sample; the watchdog looks at it."""
        psutil.cpu_percent()  # the first call only sets the mark that the next one measures from

    async def run(self) -> None:
        """Samples for ever, at the pace of the fastest reader but no slower than configured."""
        due_s = self._clock.monotonic_s()
        while True:
            self._stream.changed.clear()
            self._stream.publish(await self.sample())
            self.last_beat_s = self._clock.monotonic_s()
            interval_s = min(self._config.interval_s, self._stream.fastest_s(self._config.interval_s))
            due_s = max(due_s + interval_s, self.last_beat_s)
            try:
                async with asyncio.timeout(due_s - self.last_beat_s):
                    await self._stream.changed.wait()
                due_s = self._clock.monotonic_s()  # a new reader: sample at once, keep time from here
            except TimeoutError:
                pass

    async def sample(self) -> Sample:
        """One sample, now."""
        gpus, instances = await asyncio.gather(
            asyncio.gather(*(self._gpu(worker) for worker in self._inventory.workers if worker.uuid)),
            self._instances.scrape(self._config.scrape_timeout_s),
        )
        memory = psutil.virtual_memory()
        numa = numa_free_bytes(self._host.numa)
        host = HostSample(psutil.cpu_percent() / 100, memory.percent / 100, memory.available, numa)
        now_s = self._clock.monotonic_s()
        alarms, draining = self._node()
        told = self._with_rates(now_s, gpus, instances)
        return Sample(self._clock.wall_s(), now_s, tuple(gpus), told, host, alarms, draining)

    def _with_rates(
        self, now_s: float, gpus: Sequence[GpuSample], instances: Sequence[InstanceSample]
    ) -> tuple[InstanceSample, ...]:
        """The instances with what takes more than one look: token rates, and power of GPUs that are theirs alone."""
        power_w = {gpu.uuid: gpu.reading.power_w for gpu in gpus}
        alive = {sample.instance_id for sample in instances}
        specs = {view.record.spec.instance_id: view.record.spec.gpu_uuids for view in self._instances.views()}
        users = Counter(uuid for name, uuids in specs.items() if name in alive for uuid in uuids)
        before, self._tokens = self._tokens, {}
        told = []
        for sample in instances:
            uuids = specs.get(sample.instance_id, ())
            watts = [power_w.get(uuid) if users[uuid] == 1 else None for uuid in uuids]
            known = [value for value in watts if value is not None]
            prompt_s = generation_s = None
            if sample.engine is not None:
                prompt, generation = sample.engine.prompt_tokens_total, sample.engine.generation_tokens_total
                at_s, old_prompt, old_generation = before.get(sample.instance_id, (now_s, None, None))
                prompt_s = _rate(old_prompt, prompt, now_s - at_s)
                generation_s = _rate(old_generation, generation, now_s - at_s)
                self._tokens[sample.instance_id] = (now_s, prompt, generation)
            total_w = sum(known) if uuids and len(known) == len(uuids) else None
            told.append(
                replace(sample, prompt_tokens_per_s=prompt_s, generation_tokens_per_s=generation_s, power_w=total_w)
            )
        return tuple(told)

    async def _gpu(self, worker: GpuWorker) -> GpuSample:
        try:
            reading = await worker.call(lambda device: device.read())
        except GpuError:
            reading = GpuReading()
        meter = self._meters.setdefault(worker.uuid, EnergyMeter())
        energy_j, integrated = meter.update(reading.energy_counter_j, reading.power_w, self._clock.monotonic_s())
        alarms = self._controls.observe(worker, reading)
        lock = self._controls.locked(worker.uuid)
        drift = None if lock is None or reading.sm_mhz is None else drift_mhz(reading.sm_mhz, lock)
        return GpuSample(
            worker.uuid,
            worker.index,
            worker.health,
            reading,
            energy_j,
            integrated,
            None if lock is None else lock.max_mhz,
            drift,
            alarms,
        )


def _rate(before: float | None, now: float | None, seconds: float) -> float | None:
    """Of a counter that only rises; None where it began anew."""
    if before is None or now is None or now < before or seconds <= 0:
        return None
    return (now - before) / seconds
