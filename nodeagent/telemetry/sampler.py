"""The one sampling loop: reads every GPU, scrapes every engine, looks at the host, publishes the sample.

GPUs and engines are asked at the same time, each under its own deadline, so that a hung one costs its own values only.
"""

from __future__ import annotations

import asyncio

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
from nodeagent.telemetry.energy import EnergyMeter
from nodeagent.telemetry.sample import GpuSample, HostSample, Sample
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
    ) -> None:
        self._inventory = inventory
        self._controls = controls
        self._instances = instances
        self._stream = stream
        self._clock = clock
        self._config = config
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
        host = HostSample(psutil.cpu_percent() / 100, psutil.virtual_memory().percent / 100)
        return Sample(self._clock.wall_s(), self._clock.monotonic_s(), tuple(gpus), instances, host)

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
