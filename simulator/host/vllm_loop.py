"""The real-time heart of the emulated engine: physics time anchored to the host's clock.

An iteration begins at the end of the one before or at the arrival that woke the engine, never "now", and ends its
physics seconds later. A late event loop therefore never slows the emulated hardware: it catches up, and every token
carries the instant at which it left the GPU. Clock lock and power limit are read before each iteration, power is
written with it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from simulator.engine import Engine
from simulator.host.vllm_gpus import GpuGroup
from simulator.host.vllm_metrics import EngineMetrics
from simulator.iteration import Iteration, TokenEvent

_CATCH_UP_ITERATIONS = 8


class Listener(Protocol):
    """Takes the tokens of one request. Called from the event loop; must not block."""

    def token(self, at_s: float, index: int, last: bool) -> None:
        """A token left the GPU at `at_s` (seconds since the epoch)."""
        ...

    def failed(self) -> None:
        """The engine stops; there will be no more."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the HTTP side hands it over."""

    request_id: str
    input_tokens: int
    output_tokens: int
    max_tokens: int
    finish_reason: str
    listener: Listener
    priority: int = 0


class RealTimeEngine:
    """Drives an `Engine` by the monotonic clock. One event loop, no locks."""

    def __init__(self, engine: Engine, gpus: GpuGroup, metrics: EngineMetrics) -> None:
        self._engine = engine
        self._gpus = gpus
        self._metrics = metrics
        self._jobs: dict[str, Job] = {}
        self._inbox: deque[tuple[float, Job]] = deque()  # arrivals that no iteration has seen yet, oldest first
        self._end_s = 0.0
        self._wake = asyncio.Event()
        self._stopped = False
        self._paused = False
        self._at_rest = asyncio.Event()
        # One offset for all stamps: monotonic differences stay exact when the wall clock steps.
        self._epoch_s = time.time() - time.monotonic()

    @property
    def by_priority(self) -> bool:
        return self._engine.by_priority

    def submit(self, job: Job) -> float:
        """Queues a request; returns the instant of its arrival (seconds since the epoch)."""
        now = time.monotonic()
        if self._stopped:
            job.listener.failed()
        else:
            self._jobs[job.request_id] = job
            self._inbox.append((now, job))
            self._metrics.queued_outside = len(self._inbox)
            self._wake.set()
        return self._epoch_s + now

    def abort(self, request_id: str) -> None:
        """Forgets a request whose client is gone; one that has ended is no error."""
        if self._jobs.pop(request_id, None) is None or self._engine.abort(request_id):
            return
        self._inbox = deque(entry for entry in self._inbox if entry[1].request_id != request_id)
        self._metrics.queued_outside = len(self._inbox)

    def stop(self) -> None:
        """Fails what runs and ends `run`."""
        self._stopped = True
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.listener.failed()
        self._wake.set()

    async def pause(self) -> None:
        """Ends when all that runs is done; what comes later waits for `resume`."""
        self._paused = True
        self._at_rest.clear()
        self._wake.set()
        await self._at_rest.wait()

    def resume(self) -> None:
        """Goes on with what has waited; no iteration begins before now."""
        self._paused = False
        self._at_rest.clear()
        self._end_s = max(self._end_s, time.monotonic())
        self._wake.set()

    async def run(self) -> None:
        """Until `stop`."""
        behind = 0
        try:
            while not self._stopped:
                iteration = self._begin()
                if iteration is None:
                    if not self._at_rest.is_set():  # asleep, others say what its GPUs do
                        self._gpus.rest()
                    if self._paused:
                        self._at_rest.set()
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self._gpus.work(iteration)
                left_s = iteration.end_s - time.monotonic()
                if left_s > 0:
                    behind = 0
                    # The loop's timers have milliseconds; a token must not leave before its time.
                    await asyncio.sleep(ceil(left_s * 1000) / 1000)
                else:
                    behind += 1
                    if behind % _CATCH_UP_ITERATIONS == 0:
                        await asyncio.sleep(0)  # let tokens out while catching up
                if not self._stopped:
                    self._finish(iteration)
        finally:
            self._gpus.rest()

    def _begin(self) -> Iteration | None:
        """The next iteration with everything that had arrived when it begins."""
        if self._paused and self._engine.idle:
            self._metrics.queued_outside = len(self._inbox)
            return None
        if self._engine.idle and self._inbox:
            self._end_s = max(self._end_s, self._inbox[0][0])
        while not self._paused and self._inbox and self._inbox[0][0] <= self._end_s:
            arrived_s, job = self._inbox.popleft()
            self._engine.add(job.request_id, job.input_tokens, job.output_tokens, arrived_s, priority=job.priority)
        self._metrics.queued_outside = len(self._inbox)
        return self._engine.begin_iteration(self._end_s, self._gpus.clock_mhz(), self._gpus.power_limit_w())

    def _finish(self, iteration: Iteration) -> None:
        events = self._engine.finish_iteration(iteration)
        self._end_s = iteration.end_s
        at_s = self._epoch_s + iteration.end_s
        histograms = self._metrics.histograms
        histograms.iteration_tokens_total.observe(iteration.batch + iteration.prefill_tokens)
        gaps = 0
        for event in events:
            if event.gap_s == iteration.gap_s:
                gaps += 1
            else:
                self._note_other_than_gap(event)
            job = self._jobs.get(event.request_id)
            if job is None:
                continue
            job.listener.token(at_s, event.last_index, event.finished)
            if event.finished:
                del self._jobs[event.request_id]
                self._metrics.request_finished(event.request, job.finish_reason, job.max_tokens)
        if gaps:
            histograms.inter_token_latency_seconds.observe(iteration.gap_s, gaps)

    def _note_other_than_gap(self, event: TokenEvent) -> None:
        histograms, request = self._metrics.histograms, event.request
        if event.gap_s is not None:  # the first token after a preemption
            histograms.inter_token_latency_seconds.observe(event.gap_s)
        elif request.first_token_s is not None:
            histograms.time_to_first_token_seconds.observe(request.first_token_s - request.arrived_s)
