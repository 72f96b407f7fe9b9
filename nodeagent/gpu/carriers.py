"""The threads that carry calls to the GPUs. Each GPU has a lane: its calls run in order and never two at once.

There are as many threads as lanes and any thread may serve any lane, so a lane that hangs inside the driver costs one
thread and no other lane its own. While the driver is quick one thread carries all that was asked for at one go:
waking a thread takes longer than such a call. Beyond STAGGER_S each waiting lane has a thread woken for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

STAGGER_S = 0.002
"""A driver call takes microseconds, or it takes milliseconds. Beyond this GPUs no longer wait for each other's."""


class Job:
    """One call on its way: work for a lane, and where its answer goes."""

    __slots__ = ("answer", "bounded", "claim", "group", "work")

    def __init__(self, work: Callable[[], object], loop: asyncio.AbstractEventLoop, bounded: bool = True) -> None:
        self.work = work
        self.bounded = bounded
        """Whether the answer is a TimeoutError once the deadline has passed."""
        self.answer: asyncio.Future[Any] = loop.create_future()
        self.group: _Group | None = None
        self.claim = threading.Lock()
        """Taken once and never given back: by the thread that begins the call, or by the caller that gives it up."""


class _Group:
    """Jobs that were asked for at one go, with one timer for all: STAGGER_S, then what is left of the deadline.

    Until it is open the first is still to come: answers may wait for that.
    """

    __slots__ = ("open", "timer", "unanswered")

    def __init__(self, jobs: int) -> None:
        self.open = jobs == 1
        self.unanswered = jobs
        self.timer: asyncio.TimerHandle | None = None

    def answered(self) -> None:
        """One job more is; after the last the timer has nothing left to do."""
        self.unanswered -= 1
        if not self.unanswered and self.timer is not None:
            self.timer.cancel()


class Lane:
    """One GPU's calls."""

    __slots__ = ("asked", "ended", "jobs", "served")

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.served = False
        """Whether it waits for a thread or has one."""
        self.asked = 0  # written by the loop's thread only
        self.ended = 0  # written by the thread that serves the lane only

    @property
    def idle(self) -> bool:
        """Whether no call is under way or waits, given-up ones included."""
        return self.asked == self.ended


class Carriers:
    """Lanes and threads of one event loop. For the loop's thread."""

    def __init__(self, deadline_s: float) -> None:
        """`deadline_s` is how long the answer of a bounded job may take."""
        self.deadline_s = deadline_s
        self._mutex = threading.Lock()
        """Guards `_ready` and every lane's `jobs` and `served`."""
        self._ready: deque[Lane] = deque()
        """Lanes that wait for a thread, longest first."""
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """A True wakes a thread to carry what is ready. There are never fewer than ready lanes, except that a group
        younger than STAGGER_S has one for all its lanes."""
        self._asked: list[tuple[Lane, Job]] = []
        self._answered: deque[tuple[Job, object, BaseException | None]] = deque()
        self._called = False

    def lane(self) -> Lane:
        """A new lane, and one more thread."""
        # A daemon thread: a call stuck in the kernel must not keep the process from ending.
        threading.Thread(target=self._run, name="gpu", daemon=True).start()
        return Lane()

    def close(self, lane: Lane) -> None:
        """Lets one thread end, after what was asked for before. Nothing more may be asked for in this lane."""
        self._turns.put(False)

    def ask(self, lane: Lane, job: Job) -> None:
        """Queues a job. What is asked for in one turn of the loop is carried together."""
        lane.asked += 1
        if not self._asked:
            job.answer.get_loop().call_soon(self._send)
        self._asked.append((lane, job))

    def _send(self) -> None:
        asked, self._asked = self._asked, []
        jobs = [job for _, job in asked]
        group = _Group(len(jobs))
        waiting = 0
        with self._mutex:
            for lane, job in asked:
                job.group = group
                lane.jobs.append(job)
                if not lane.served:
                    lane.served = True
                    self._ready.append(lane)
                    waiting += 1
        if waiting:
            self._turns.put(True)
        loop = jobs[0].answer.get_loop()
        if group.open:
            group.timer = loop.call_later(self.deadline_s, _expire, jobs)
        else:
            group.timer = loop.call_later(STAGGER_S, self._spread, group, jobs, waiting - 1)

    def _spread(self, group: _Group, jobs: list[Job], lanes: int) -> None:
        """From here on none of this group waits for another: neither a lane for a thread nor an answer for the next."""
        group.open = True
        for _ in range(min(lanes, len(self._ready))):
            self._turns.put(True)
        group.timer = jobs[0].answer.get_loop().call_later(self.deadline_s - STAGGER_S, _expire, jobs)
        self._hand_out()

    def _hand_out(self) -> None:
        self._called = False  # before looking: what comes from here on calls again
        while self._answered:
            job, result, error = self._answered.popleft()
            if job.group is not None:
                job.group.answered()
            if job.answer.done():
                continue
            if error is None:
                job.answer.set_result(result)
            else:
                job.answer.set_exception(error)

    # In the threads

    def _run(self) -> None:
        while self._turns.get():
            lane = self._take()
            while lane is not None:
                lane = self._carry(lane)

    def _take(self) -> Lane | None:
        with self._mutex:
            return self._ready.popleft() if self._ready else None

    def _carry(self, lane: Lane) -> Lane | None:
        """Does a lane's next job and returns the lane to serve after it."""
        job = lane.jobs[0]
        if job.claim.acquire(blocking=False):
            result, failure = None, None
            try:
                result = job.work()
            except BaseException as error:  # whatever a driver throws belongs to the caller, never to this thread
                failure = RuntimeError(repr(error)) if isinstance(error, StopIteration) else error
            lane.ended += 1
            self._answered.append((job, result, failure))
            del result, failure  # an error holds on to this frame
        else:
            lane.ended += 1
        following = self._pass_on(lane)
        # Left for later only what a timer will find, and only while there is more to carry along.
        if self._answered and (following is None or job.group is None or job.group.open) and not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                job.answer.get_loop().call_soon_threadsafe(self._hand_out)
        return following

    def _pass_on(self, lane: Lane) -> Lane | None:
        """Puts a lane back, or at rest, and takes the one that waits longest."""
        with self._mutex:
            lane.jobs.popleft()
            if lane.jobs:
                self._ready.append(lane)
                if len(self._ready) > 1:  # this thread goes elsewhere first: another must come for what is left here
                    self._turns.put(True)
            else:
                lane.served = False
            return self._ready.popleft() if self._ready else None


def _expire(jobs: list[Job]) -> None:
    for job in jobs:
        if job.bounded and not job.answer.done():
            job.answer.set_exception(TimeoutError())
