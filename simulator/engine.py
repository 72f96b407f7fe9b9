"""Continuous batching: what one vLLM instance schedules, iteration by iteration.

A synchronous state machine without a clock of its own. The real-time emulator (`simulator/host/vllm.py`) and the
virtual fleet drive it the same way: `add` requests, `begin_iteration` at some instant, `finish_iteration` when its
seconds have passed. Scheduling follows vLLM v1: decodes first, then prefill chunks up to a token budget, first come
first served, preemption by recomputation of the last admitted when the KV cache is full. With `Physics.prefill_first`
it follows vLLM v0: an iteration takes prompts alone as long as there are any, and whoever decodes waits meanwhile. KV
is counted in tokens (vLLM: in blocks of 16), a prompt is admitted when the whole of it fits, prefixes are not cached.

While only decodes run, `max_steps > 1` merges iterations up to the next finish: the result is the same as stepping
(iteration time is affine in context), but costs one call. `cut` shortens such a run when something happens meanwhile.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from math import inf

from simulator.iteration import EngineRequest, Iteration, Phase, TokenEvent, steps_until, with_steps
from simulator.physics import Physics

DEFAULT_CHUNK_TOKENS = 1024
# Prompts are to be taken whole there: only a longer one is cut.
PREFILL_FIRST_TOKENS = 8192
DEFAULT_MAX_RUNNING = 256


def token_budget(physics: Physics) -> int:
    """Tokens of an iteration at most, where nothing else is asked for."""
    return PREFILL_FIRST_TOKENS if physics.prefill_first else DEFAULT_CHUNK_TOKENS


@dataclass(slots=True)
class EngineCounters:
    """Cumulative, with the meaning of vLLM's counters of the same names."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0


@dataclass(slots=True)
class Engine:
    """The scheduler's state. Times are seconds on the driver's clock, whatever its zero. Without `chunk_tokens` they
    are the `token_budget`."""

    physics: Physics
    tp: int
    chunk_tokens: int = 0
    max_running: int = DEFAULT_MAX_RUNNING
    by_priority: bool = False  # vLLM's --scheduling-policy priority; else first come, first served
    counters: EngineCounters = field(default_factory=EngineCounters)
    kv_capacity_tokens: int = field(init=False)
    _requests: dict[str, EngineRequest] = field(default_factory=dict, init=False)
    _waiting: deque[EngineRequest] = field(default_factory=deque, init=False)
    _prefilling: list[EngineRequest] = field(default_factory=list, init=False)
    _decoding: dict[str, EngineRequest] = field(default_factory=dict, init=False)
    _finishes: list[tuple[int, int, EngineRequest]] = field(default_factory=list, init=False)  # heap, stale allowed
    _joins: int = field(default=0, init=False)
    _step: int = field(default=0, init=False)
    _decode_kv: int = field(default=0, init=False)
    _prefill_kv: int = field(default=0, init=False)
    _in_flight: Iteration | None = field(default=None, init=False)
    # Prefills were taken before the decodes: until those go on, each has the instant of its last token.
    _paused: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.chunk_tokens = self.chunk_tokens or token_budget(self.physics)
        self.kv_capacity_tokens = self.physics.kv_capacity_tokens(self.tp)
        if self.chunk_tokens < self.max_running:
            raise ValueError(f"chunk_tokens ({self.chunk_tokens}) must be at least max_running ({self.max_running})")

    @property
    def running(self) -> int:
        """Requests in the batch: prefilling or decoding."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing to do: no request is running or waiting."""
        return not self._requests

    @property
    def kv_used_tokens(self) -> int:
        return self._decode_kv + self._prefill_kv

    @property
    def kv_usage_ratio(self) -> float:
        return self.kv_used_tokens / self.kv_capacity_tokens

    def add(
        self, request_id: str, input_tokens: int, output_tokens: int, now_s: float, priority: int = 0
    ) -> EngineRequest:
        """Queues a request. Raises ValueError when it could never run or its id is in use."""
        if request_id in self._requests:
            raise ValueError(f"request {request_id} is already here")
        if input_tokens < 1 or output_tokens < 1:
            raise ValueError(f"request {request_id}: needs at least one token in and one out")
        if input_tokens + output_tokens > self.kv_capacity_tokens:
            raise ValueError(
                f"request {request_id}: {input_tokens} + {output_tokens} tokens exceed the KV cache of "
                f"{self.kv_capacity_tokens}"
            )
        request = EngineRequest(
            request_id, input_tokens, output_tokens, now_s, prefill_target=input_tokens, priority=priority
        )
        self._requests[request_id] = request
        self._queue(request)
        return request

    def abort(self, request_id: str) -> bool:
        """Forgets a request at once, also out of an iteration in flight; False when it is not here."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        if request.phase is Phase.WAITING:
            self._waiting.remove(request)
        else:
            self._leave_batch(request)
        self._end(request)
        self.counters.aborted += 1
        return True

    def crash(self) -> list[EngineRequest]:
        """Forgets all requests, and returns them as they came."""
        gone = list(self._requests.values())
        for request in gone:
            self.abort(request.request_id)
        self._in_flight = None
        return gone

    def begin_iteration(
        self, now_s: float, mhz: int, power_limit_w: float | None = None, max_steps: int = 1
    ) -> Iteration | None:
        """Schedules the next iteration; None when there is nothing to run.

        `mhz` is the clock lock (full clock where there is none). More than `max_steps=1` allows merging.
        """
        if self._in_flight is not None:
            raise RuntimeError("an iteration is in flight: finish it first")
        preempted = self._make_room_for_decodes(now_s)
        chunks = self._schedule_prefill(now_s, admit=not preempted)
        batch = len(self._decoding)
        if not chunks and not batch:
            return None
        if chunks and batch and self.physics.prefill_first:
            self._pause(now_s)
            batch = 0
        context = self._decode_kv + batch if batch else 0
        capped = power_limit_w is not None and power_limit_w < self.physics.parameters.power_limit_w
        if not chunks and not capped:
            self._in_flight = self._plan_decode(now_s, mhz, batch, context, max_steps)
            return self._in_flight
        prefill = [(tokens, request.prefilled) for request, tokens in chunks]
        if capped and power_limit_w is not None:
            mhz = self.physics.effective_mhz(self.tp, mhz, power_limit_w, batch, context, prefill)
        seconds, watts = self.physics.iteration(self.tp, mhz, batch, context, prefill)
        joules = seconds * watts
        self._in_flight = Iteration(
            now_s, 1, seconds, joules, mhz, batch, context, tuple(chunks), seconds, 0.0, joules, 0.0
        )
        if self._paused and not chunks:
            self._in_flight = self._resumed(self._in_flight)
        return self._in_flight

    def cut(self, at_s: float) -> Iteration:
        """Ends the merged run in flight with the step that is under way at `at_s`; returns what is left of it."""
        run = self._in_flight
        if run is None:
            raise RuntimeError("no iteration is in flight")
        if run.steps > 1:
            steps = steps_until(run.step_s, run.step_growth_s, at_s - run.start_s, run.steps)
            if steps < run.steps:
                self._in_flight = run = with_steps(run, steps)
        return run

    def finish_iteration(self, iteration: Iteration, every_token: bool = True) -> list[TokenEvent]:
        """Ends the iteration in flight and returns the tokens it made, oldest sequence first.

        With `every_token=False` only first tokens, tokens after a preemption and last tokens are listed.
        """
        if iteration is not self._in_flight:
            raise RuntimeError("this iteration is not the one in flight")
        self._in_flight = None
        end_s, steps = iteration.end_s, iteration.steps if iteration.batch else 0
        self._step += steps
        decoding = len(self._decoding)  # less than iteration.batch where some were aborted meanwhile
        self._decode_kv += steps * decoding
        self.counters.generation_tokens += steps * decoding

        done: list[EngineRequest] = []
        finishes = self._finishes
        while finishes and finishes[0][0] <= self._step:
            _, join, request = heapq.heappop(finishes)
            if request.phase is Phase.DECODE and request.join == join:
                done.append(request)
        events: list[TokenEvent] = []
        gap_s = iteration.gap_s
        if every_token and steps:
            for request in self._decoding.values():
                index = self._generated(request) - 1
                gap_s = end_s - request.last_token_s if iteration.paused else iteration.gap_s
                events.append(TokenEvent(request, index, steps, gap_s, request.finish_step == self._step))
        else:
            events.extend(TokenEvent(request, request.output_tokens - 1, steps, gap_s, True) for request in done)
        for request in done:
            self._leave_batch(request)
            self._complete(request, end_s)
        for request, tokens in iteration.chunks:
            if request.phase is Phase.PREFILL:
                request.prefilled += tokens
                if request.prefilled == request.prefill_target:
                    events.append(self._first_after_prefill(request, end_s))
        return events

    # ---------------------------------------------------------------------------------------------- scheduling

    def _queue(self, request: EngineRequest) -> None:
        """Behind all that came before it; by priority, behind those of no higher number."""
        place = len(self._waiting)
        if self.by_priority:
            key = (request.priority, request.arrived_s)
            while place and key < (self._waiting[place - 1].priority, self._waiting[place - 1].arrived_s):
                place -= 1
        self._waiting.insert(place, request)

    def _make_room_for_decodes(self, now_s: float) -> bool:
        """Preempts the last admitted until every decoding sequence has room for its next token."""
        preempted = False
        while self._decoding and self.kv_capacity_tokens - self.kv_used_tokens < len(self._decoding):
            if self.by_priority:
                victim = max((*self._prefilling, *self._decoding.values()), key=lambda r: (r.priority, r.arrived_s))
            else:
                victim = self._prefilling[-1] if self._prefilling else next(reversed(self._decoding.values()))
            if victim.phase is Phase.DECODE and not self._paused:
                victim.last_token_s = now_s
            generated = self._generated(victim)
            self._leave_batch(victim)
            victim.generated = generated
            victim.phase = Phase.WAITING
            victim.prefill_target = victim.input_tokens + generated
            victim.prefilled = 0
            victim.preemptions += 1
            self.counters.preemptions += 1
            if self.by_priority:
                self._queue(victim)
            else:
                self._waiting.appendleft(victim)
            preempted = True
        return preempted

    def _schedule_prefill(self, now_s: float, admit: bool) -> list[tuple[EngineRequest, int]]:
        """Prefill chunks within the token budget: those under way first, then the queue in order."""
        budget = self.chunk_tokens - (0 if self.physics.prefill_first else len(self._decoding))
        chunks: list[tuple[EngineRequest, int]] = []
        for request in self._prefilling:
            if budget <= 0:
                return chunks
            tokens = min(request.prefill_target - request.prefilled, budget)
            chunks.append((request, tokens))
            budget -= tokens
        free = self.kv_capacity_tokens - self.kv_used_tokens - len(self._decoding)
        while admit and self._waiting and budget > 0 and self.running < self.max_running:
            request = self._waiting[0]
            if request.prefill_target > free:
                break
            self._waiting.popleft()
            request.phase = Phase.PREFILL
            if request.scheduled_s is None:
                request.scheduled_s = now_s
            self._prefilling.append(request)
            self._prefill_kv += request.prefill_target
            free -= request.prefill_target
            tokens = min(request.prefill_target, budget)
            chunks.append((request, tokens))
            budget -= tokens
        return chunks

    def _plan_decode(self, now_s: float, mhz: int, batch: int, context: int, max_steps: int) -> Iteration:
        line = self.physics.decode_line(self.tp, mhz, batch, context)
        step_s = line.seconds + line.seconds_per_context_token * context
        step_j = line.joules + line.joules_per_context_token * context
        run = Iteration(
            start_s=now_s,
            steps=1,
            seconds=step_s,
            joules_per_gpu=step_j,
            mhz=mhz,
            batch=batch,
            context_tokens=context,
            chunks=(),
            step_s=step_s,
            step_growth_s=line.seconds_per_context_token * batch,
            step_j=step_j,
            step_growth_j=line.joules_per_context_token * batch,
        )
        if self._paused:
            return self._resumed(run)
        if max_steps == 1:
            return run
        steps = min(
            max_steps,
            self._steps_to_next_finish(),
            (self.kv_capacity_tokens - self.kv_used_tokens) // batch,
        )
        if line.up_to_context_tokens != inf:
            steps = min(steps, int((line.up_to_context_tokens - context) // batch) + 1)
        return with_steps(run, steps) if steps > 1 else run

    def _pause(self, now_s: float) -> None:
        """Prefills go first now; those that joined meanwhile know their last token already."""
        if not self._paused:
            for request in self._decoding.values():
                request.last_token_s = now_s
        self._paused = True

    def _resumed(self, run: Iteration) -> Iteration:
        """The first step of decoding after a pause: its gaps are longer than itself."""
        self._paused = False
        waited = Counter(run.start_s - request.last_token_s for request in self._decoding.values())
        return replace(run, paused=tuple(waited.items()))

    def _steps_to_next_finish(self) -> int:
        finishes = self._finishes
        while True:
            step, join, request = finishes[0]
            if request.phase is Phase.DECODE and request.join == join:
                return step - self._step
            heapq.heappop(finishes)

    # ------------------------------------------------------------------------------------------- book-keeping

    def _generated(self, request: EngineRequest) -> int:
        if request.phase is Phase.DECODE:
            return request.generated + self._step - request.joined_step
        return request.generated

    def _first_after_prefill(self, request: EngineRequest, end_s: float) -> TokenEvent:
        gap_s = end_s - request.last_token_s if request.generated else None
        if request.first_token_s is None:
            request.first_token_s = end_s
            self.counters.prompt_tokens += request.input_tokens
        self.counters.generation_tokens += 1
        self._leave_batch(request)
        request.generated += 1
        finished = request.generated == request.output_tokens
        if finished:
            self._complete(request, end_s)
        else:
            request.phase = Phase.DECODE
            request.last_token_s = end_s
            request.joined_step = self._step
            request.finish_step = self._step + request.output_tokens - request.generated
            self._joins += 1
            request.join = self._joins
            heapq.heappush(self._finishes, (request.finish_step, self._joins, request))
            self._decoding[request.request_id] = request
            self._decode_kv += request.prefill_target
        return TokenEvent(request, request.generated - 1, 1, gap_s, finished)

    def _leave_batch(self, request: EngineRequest) -> None:
        """Takes a prefilling or decoding request out of the batch and frees its KV."""
        if request.phase is Phase.DECODE:
            del self._decoding[request.request_id]
            self._decode_kv -= request.prefill_target + self._step - request.joined_step
        else:
            self._prefilling.remove(request)
            self._prefill_kv -= request.prefill_target

    def _complete(self, request: EngineRequest, end_s: float) -> None:
        request.finished_s = end_s
        self._end(request)
        self.counters.finished += 1

    def _end(self, request: EngineRequest) -> None:
        request.generated = self._generated(request)
        request.phase = Phase.DONE
        del self._requests[request.request_id]
