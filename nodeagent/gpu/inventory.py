"""The GPUs of this node: opens a worker for each, finds them by UUID, keeps looking for those that were lost.

When none answers any more the driver itself may have been loaded anew; the library is then started again and GPUs
are matched by UUID, under whatever index they have now. GPUs that were not there before get workers of their own.
"""

from __future__ import annotations

import asyncio

from common.logs import get_logger
from nodeagent.gpu.carriers import Carriers
from nodeagent.gpu.driver import DriverUnavailable, GpuDriver, GpuError, GpuHealth
from nodeagent.gpu.worker import GpuWorker

log = get_logger(__name__)

RELOAD_DEADLINE_S = 10.0


class Inventory:
    """All workers, in the order in which they were found."""

    def __init__(self, driver: GpuDriver, call_deadline_s: float) -> None:
        self._driver = driver
        self._carriers = Carriers(call_deadline_s)
        self._reloading: asyncio.Future[int] | None = None
        self.driver_version = driver.version()
        self.workers = [self._worker(index) for index in range(driver.count())]

    async def open(self) -> None:
        """First contact with every GPU at once; one that does not answer delays the start by its deadline only."""
        await asyncio.gather(*(worker.open() for worker in self.workers))

    def find(self, uuid: str) -> GpuWorker | None:
        """The worker of a GPU. Workers are scanned, not indexed: a UUID may become known late."""
        return next((worker for worker in self.workers if worker.uuid == uuid), None) if uuid else None

    async def recover_forever(self, interval_s: float, facts_interval_s: float = 10.0) -> None:
        """Looks again and again for GPUs that do not answer; reads anew what an administrator may have changed."""
        facts_due_s = asyncio.get_running_loop().time() + facts_interval_s
        while True:
            await self.recover()
            if asyncio.get_running_loop().time() >= facts_due_s:
                await asyncio.gather(*(worker.refresh_facts() for worker in self.workers))
                facts_due_s = asyncio.get_running_loop().time() + facts_interval_s
            await asyncio.sleep(interval_s)

    async def recover(self) -> None:
        """One look for what is lost."""
        # Never while a call is inside the driver, and never while one GPU still answers: both would be cut off.
        if self.workers and all(worker.health is GpuHealth.LOST and worker.idle for worker in self.workers):
            await self._reload()
        for worker in self.workers:
            worker.recover()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    async def _reload(self) -> None:
        def reload() -> int:
            self._driver.reload()
            return self._driver.count()

        if self._reloading is None:
            self._reloading = asyncio.ensure_future(asyncio.to_thread(reload))
        try:
            async with asyncio.timeout(RELOAD_DEADLINE_S):
                count = await asyncio.shield(self._reloading)
        except TimeoutError:
            return  # asked again at the next look; a second start beside the first would help nobody
        except (DriverUnavailable, GpuError) as error:
            self._reloading = None
            log.debug("driver is not back yet", why=str(error))
            return
        self._reloading = None
        log.warning("driver library started again", gpus=count)
        for worker in self.workers:
            worker.recover()
        await asyncio.sleep(0)
        known = len(self.workers)
        for index in range(known, count):
            self.workers.append(self._worker(index))

    def _worker(self, index: int) -> GpuWorker:
        return GpuWorker(
            self._driver,
            index,
            self._carriers,
            _log_health,
            lambda uuid: self.find(uuid) is not None,
        )


def _log_health(worker: GpuWorker) -> None:
    if worker.health is GpuHealth.OK:
        log.info("gpu answers", gpu=worker.uuid, index=worker.index)
    else:
        log.error(
            "gpu does not answer", gpu=worker.uuid, index=worker.index, health=worker.health.value, why=worker.detail
        )
