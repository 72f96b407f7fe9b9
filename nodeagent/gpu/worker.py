"""One thread per GPU: calls run in order, each under a deadline, and a GPU that hangs hurts nobody else.

A call that has not begun when its deadline passes never will. One that hangs inside the driver keeps the thread; the
GPU is then `unresponsive`, later calls fail at once, and a probe queued behind the stuck call brings it back when
that one returns. No second thread ever touches the same GPU, so a late write cannot overtake a restore.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

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
STAGGER_S = 0.002
"""A driver call takes microseconds, or it takes milliseconds. Beyond this GPUs no longer wait for each other's."""
OPEN_DEADLINE_FACTOR = 5
"""Opening a GPU makes a dozen driver calls where any other job makes one to eight."""


class _Job:
    """One call on its way: work for the GPU's thread, and where its answer goes."""

    __slots__ = ("answer", "claim", "round", "work")

    def __init__(self, work: Callable[[], object], loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.answer: asyncio.Future[Any] = loop.create_future()
        self.round: _Round | None = None
        self.claim = threading.Lock()
        """Taken once and never given back: by the thread that begins the call, or by the caller that gives it up."""

    def expire(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(TimeoutError())


class _Round:
    """Jobs for several GPUs that were asked for at one go.

    While the driver is quick their threads run one after the other, each waking the next: all at once they would mostly
    wait for each other, and for the interpreter. After STAGGER_S nobody waits for anybody any more.
    """

    def __init__(self, waking: Iterable[Callable[[], None]]) -> None:
        self._waking = deque(waking)
        self.open = False
        """Every thread is awake; answers go out one by one."""

    def wake_next(self) -> bool:
        """Whether there was one. From any thread."""
        try:
            wake = self._waking.popleft()
        except IndexError:
            return False
        wake()
        return True

    def wake_all(self) -> None:
        self.open = True
        while self.wake_next():
            pass


class _Exchange:
    """Between the loop and the GPUs' threads. What comes together is carried together: eight answers wake the loop
    once, not eight times."""

    def __init__(self) -> None:
        self._asked: list[tuple[_Job, Callable[[], None]]] = []
        self._answered: deque[tuple[_Job, object, BaseException | None]] = deque()
        self._called = False

    def ask(self, job: _Job, wake: Callable[[], None]) -> None:
        """Has the thread woken that `job` was queued for, with all others that are asked in this turn of the loop."""
        if not self._asked:
            job.answer.get_loop().call_soon(self._send)
        self._asked.append((job, wake))

    def answer(self, job: _Job, result: object, error: BaseException | None) -> None:
        """From any thread."""
        self._answered.append((job, result, error))
        self.go_on(job)

    def go_on(self, job: _Job) -> None:
        """The turn of the next thread, or of the loop. From any thread."""
        more = job.round is not None and job.round.wake_next()
        # An answer that is left to wait here was put before the round was opened: the loop finds it when it opens it.
        if (not more or job.round is None or job.round.open) and not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                job.answer.get_loop().call_soon_threadsafe(self._hand_out)

    def _send(self) -> None:
        asked, self._asked = self._asked, []
        together = _Round(wake for _, wake in asked)
        for job, _ in asked:
            job.round = together
        together.wake_next()
        if len(asked) > 1:
            asked[0][0].answer.get_loop().call_later(STAGGER_S, self._open, together)

    def _open(self, together: _Round) -> None:
        together.wake_all()
        self._hand_out()

    def _hand_out(self) -> None:
        self._called = False  # before looking: what comes from here on calls again
        while self._answered:
            job, result, error = self._answered.popleft()
            if job.answer.done():
                continue
            if error is None:
                job.answer.set_result(result)
            else:
                job.answer.set_exception(error)


_exchanges: WeakKeyDictionary[asyncio.AbstractEventLoop, _Exchange] = WeakKeyDictionary()


class GpuWorker:
    """A GPU as the rest of the agent sees it. All methods are for the event loop's thread."""

    def __init__(
        self,
        driver: GpuDriver,
        index: int,
        deadline_s: float,
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
        self._deadline_s = deadline_s
        self._on_health = on_health
        self._taken = taken
        self._device: GpuDevice | None = None
        self._jobs: deque[tuple[_Job, _Exchange]] = deque()
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """One True for each job, when it is its turn: they run in the order in which they were asked for."""
        self._probe: asyncio.Task[None] | None = None
        # Each written by one thread only: this one, and the GPU's.
        self._submitted = 0
        self._finished = 0
        # A daemon thread: a call stuck in the kernel must not keep the process from ending.
        threading.Thread(target=self._run, name=f"gpu-{index}", daemon=True).start()

    async def open(self) -> None:
        """First contact. Never raises: a GPU that does not answer is left unhealthy and looked for again."""
        self.recover()
        if self._probe is not None:
            await asyncio.wait([self._probe], timeout=OPEN_DEADLINE_FACTOR * self._deadline_s)
            if not self._probe.done():
                self._set_health(GpuHealth.UNRESPONSIVE, "the driver does not answer")

    async def call(self, job: Callable[[GpuDevice], T]) -> T:
        """Runs `job` in the GPU's thread. Raises GpuError; GpuUnresponsive and GpuLost at once while it is so."""
        if self.health is GpuHealth.UNRESPONSIVE:
            raise GpuUnresponsive(self.detail)
        if self.health is GpuHealth.LOST:
            raise GpuLost(self.detail)
        try:
            return await self._do(lambda: job(self._opened()), self._deadline_s)
        except TimeoutError:
            self._set_health(GpuHealth.UNRESPONSIVE, f"no answer from the driver within {self._deadline_s:g} s")
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
        return self._submitted == self._finished

    def close(self) -> None:
        """Lets the thread end after what is queued."""
        if self._probe is not None:
            self._probe.cancel()
        self._turns.put(False)

    async def _find(self) -> None:
        def find() -> tuple[GpuDevice, GpuFacts]:
            device = self._driver.open_uuid(self.uuid) if self.uuid else self._driver.open_index(self.index)
            return device, device.facts()

        try:
            device, facts = await self._do(find, None)
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

    async def _do(self, work: Callable[[], T], deadline_s: float | None) -> T:
        """Runs `work` in the GPU's thread. Raises what it raises, and TimeoutError."""
        loop = asyncio.get_running_loop()
        exchange = _exchanges.get(loop)
        if exchange is None:
            exchange = _exchanges[loop] = _Exchange()
        job = _Job(work, loop)
        self._submitted += 1
        self._jobs.append((job, exchange))
        exchange.ask(job, self._wake)
        timer = None if deadline_s is None else loop.call_later(deadline_s, job.expire)
        try:
            result: T = await job.answer
            return result
        finally:
            if timer is not None:
                timer.cancel()
            job.claim.acquire(blocking=False)  # one that has not begun never will

    def _set_health(self, health: GpuHealth, detail: str) -> None:
        changed = health is not self.health
        self.health, self.detail = health, detail
        if changed and self._on_health is not None:
            self._on_health(self)

    def _wake(self) -> None:
        self._turns.put(True)

    def _run(self) -> None:
        while self._turns.get():
            job, exchange = self._jobs.popleft()
            if not job.claim.acquire(blocking=False):
                self._finished += 1
                exchange.go_on(job)
                continue
            result, failure = None, None
            try:
                result = job.work()
            except BaseException as error:  # whatever a driver throws belongs to the caller, never to this thread
                failure = RuntimeError(repr(error)) if isinstance(error, StopIteration) else error
            self._finished += 1
            exchange.answer(job, result, failure)
            del job, result, failure  # nothing of the last call is kept alive while waiting for the next
