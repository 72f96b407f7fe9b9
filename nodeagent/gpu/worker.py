"""One lane per GPU: calls run in order, each under a deadline, and a GPU that hangs hurts nobody else.

A call that has not begun when its deadline passes never will. One that hangs inside the driver keeps its lane; the
GPU is then `unresponsive`, later calls fail at once, and a probe queued behind the stuck call brings it back when
that one returns. A GPU is never called twice at once, so a late write cannot overtake a restore.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from nodeagent.gpu.carriers import Carriers, Job
from nodeagent.gpu.driver import (
    GpuDevice,
    GpuDriver,
    GpuError,
    GpuFacts,
    GpuHealth,
    GpuLost,
    GpuUnresponsive,
)

T = TypeVar("T")
OPEN_DEADLINE_FACTOR = 5
"""Opening a GPU makes a dozen driver calls where any other job makes one to eight."""


class GpuWorker:
    """A GPU as the rest of the agent sees it. All methods are for the event loop's thread."""

    def __init__(
        self,
        driver: GpuDriver,
        index: int,
        carriers: Carriers,
        on_health: Callable[[GpuWorker], None] | None = None,
        taken: Callable[[str], bool] = lambda uuid: False,
    ) -> None:
        """`taken` tells whether another worker has a GPU already: indices move when GPUs come and go."""
        self.index = index
        self.uuid = ""
        """Empty until the GPU has answered once."""
        self.facts: GpuFacts | None = None
        self.health = GpuHealth.LOST
        self.detail = "not opened yet"
        self.generation = 0
        """Rises whenever what was written to the GPU may have been lost; earlier writes then count as unknown."""
        self._driver = driver
        self._on_health = on_health
        self._taken = taken
        self._device: GpuDevice | None = None
        self._carriers = carriers
        self._lane = carriers.lane()
        self._probe: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """First contact. Never raises: a GPU that does not answer is left unhealthy and looked for again."""
        self.recover()
        if self._probe is not None:
            await asyncio.wait([self._probe], timeout=OPEN_DEADLINE_FACTOR * self._carriers.deadline_s)
            if not self._probe.done():
                self._set_health(GpuHealth.UNRESPONSIVE, "the driver does not answer")

    async def call(self, job: Callable[[GpuDevice], T]) -> T:
        """Runs `job` in the GPU's lane. Raises GpuError; GpuUnresponsive and GpuLost at once while it is so."""
        if self.health is GpuHealth.UNRESPONSIVE:
            raise GpuUnresponsive(self.detail)
        if self.health is GpuHealth.LOST:
            raise GpuLost(self.detail)
        try:
            return await self._do(lambda: job(self._opened()))
        except TimeoutError:
            detail = f"no answer from the driver within {self._carriers.deadline_s:g} s"
            self._set_health(GpuHealth.UNRESPONSIVE, detail)
            self.recover()
            raise GpuUnresponsive(self.detail) from None
        except GpuLost as error:
            self._set_health(GpuHealth.LOST, str(error))
            raise
        except GpuError:
            raise
        except Exception as error:  # a driver binding can fail in its own ways; callers handle one family of errors
            raise GpuError(f"the driver binding failed: {error!r}") from error

    def recover(self) -> None:
        """Starts a probe unless the GPU is well or a probe is under way: finds it by UUID, reads its facts."""
        if self.health is GpuHealth.OK or (self._probe is not None and not self._probe.done()):
            return
        self._probe = asyncio.get_running_loop().create_task(self._find())

    async def refresh_facts(self) -> GpuFacts | None:
        """The facts read anew; the last known ones when the GPU does not answer."""
        with contextlib.suppress(GpuError):
            self.facts = await self.call(lambda device: device.facts())
        return self.facts

    @property
    def idle(self) -> bool:
        """Whether no call of this worker is inside the driver."""
        return self._lane.idle

    def close(self) -> None:
        """Lets a thread end after what is queued."""
        if self._probe is not None:
            self._probe.cancel()
        self._carriers.close(self._lane)

    async def _find(self) -> None:
        def find() -> tuple[GpuDevice, GpuFacts]:
            device = self._driver.open_uuid(self.uuid) if self.uuid else self._driver.open_index(self.index)
            return device, device.facts()

        try:
            device, facts = await self._do(find, bounded=False)
        except Exception as error:
            self._set_health(GpuHealth.LOST, str(error) or repr(error))
            return
        if not self.uuid and self._taken(facts.uuid):
            self._set_health(GpuHealth.LOST, f"index {self.index} is {facts.uuid} now, which is known already")
            return
        self._device, self.facts = device, facts
        self.uuid, self.index = facts.uuid, facts.index
        self.generation += 1
        self._set_health(GpuHealth.OK, "")

    def _opened(self) -> GpuDevice:
        if self._device is None:
            raise GpuLost("not opened yet")
        return self._device

    async def _do(self, work: Callable[[], T], bounded: bool = True) -> T:
        """Runs `work` in the GPU's lane. Raises what it raises, and TimeoutError if it is bounded."""
        job = Job(work, asyncio.get_running_loop(), bounded)
        self._carriers.ask(self._lane, job)
        try:
            result: T = await job.answer
            return result
        finally:
            job.claim.acquire(blocking=False)  # one that has not begun never will

    def _set_health(self, health: GpuHealth, detail: str) -> None:
        changed = health is not self.health
        self.health, self.detail = health, detail
        if changed and self._on_health is not None:
            self._on_health(self)
