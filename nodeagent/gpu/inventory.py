"""The GPUs of this node: opens a worker for each, finds them by UUID, keeps looking for those that were lost."""

from __future__ import annotations

import asyncio

from common.logs import get_logger
from nodeagent.gpu.driver import GpuDriver, GpuHealth
from nodeagent.gpu.worker import GpuWorker

log = get_logger(__name__)


class Inventory:
    """All workers, in the order of the driver's indices."""

    def __init__(self, driver: GpuDriver, call_deadline_s: float) -> None:
        self._driver = driver
        self.driver_version = driver.version()
        self.workers = [GpuWorker(driver, index, call_deadline_s, _log_health) for index in range(driver.count())]

    async def open(self) -> None:
        """First contact with every GPU at once; one that does not answer delays the start by its deadline only."""
        await asyncio.gather(*(worker.open() for worker in self.workers))

    def find(self, uuid: str) -> GpuWorker | None:
        """The worker of a GPU. Workers are scanned, not indexed: a UUID may become known late."""
        return next((worker for worker in self.workers if worker.uuid == uuid), None) if uuid else None

    async def recover_forever(self, interval_s: float) -> None:
        """Looks again and again for GPUs that do not answer."""
        while True:
            for worker in self.workers:
                worker.recover()
            await asyncio.sleep(interval_s)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def _log_health(worker: GpuWorker) -> None:
    if worker.health is GpuHealth.OK:
        log.info("gpu answers", gpu=worker.uuid, index=worker.index)
    else:
        log.error(
            "gpu does not answer", gpu=worker.uuid, index=worker.index, health=worker.health.value, why=worker.detail
        )
