"""The way of one request: queue -> engine -> client, with fail-over until the first byte.

Holds the parts together (dispatcher, classifier, load meter, connections) and knows no HTTP server: a request comes in
as an `Inbound`, and the answer leaves through the callables of a `Client`. After the first byte a request is never
repeated: a break then is told to the client.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from common.clock import Clock
from common.http1 import Headers
from common.logs import get_logger
from controller.domain.classes import RequestClass
from controller.domain.slo import Slo
from controller.fleet.port import RoutedInstance, RoutingTable
from controller.gateway.classify import Classified, Classifier, PromptSize, TokenEstimator
from controller.gateway.config import LimitsConfig
from controller.gateway.dispatcher import Dispatcher, QueuedRequest
from controller.gateway.load import LoadMeter
from controller.gateway.upstream import Answer, UpstreamFailed, Upstreams

_log = get_logger(__name__)
# Of an engine's answer these reach the client; hop-by-hop headers and the engine's own name do not.
PASSED_HEADERS = frozenset({b"content-type", b"x-request-id", b"retry-after", b"cache-control"})


class Outcome(StrEnum):
    """How a request ended. Metric label."""

    SERVED = "served"
    REJECTED = "rejected"  # the engine found fault with the request (4xx)
    FAILED = "failed"  # engines failed, before or within the answer
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    CLIENT_LEFT = "client_left"


@dataclass(frozen=True, slots=True)
class Inbound:
    """A checked request. `body` goes to the engine as it came."""

    target: str  # /v1/completions or /v1/chat/completions
    model: str
    prompt: PromptSize
    output_limit_tokens: int | None
    stream: bool
    usage_wanted: bool
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Refusal(Exception):
    """An answer of our own in place of an engine's. `code` is one of OpenAI's or an Outcome."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class Client(Protocol):
    """Where an answer goes. Calls return when the client can take more."""

    async def begin(self, status: int, headers: Headers) -> None: ...

    async def write(self, data: bytes) -> None: ...

    async def end(self, data: bytes = b"") -> None: ...


class Relay:
    """All requests of one gateway. Single event loop."""

    def __init__(self, limits: LimitsConfig, slo: Slo, output_quantile: float, clock: Clock) -> None:
        self.dispatcher = Dispatcher(limits.waiting)
        self.meter = LoadMeter(slo)
        self.upstreams = Upstreams(limits.connect_s, clock.monotonic_s)
        self.outcomes: Counter[tuple[Outcome, str]] = Counter()  # by outcome and routing class
        self._classifier = Classifier(quantile=output_quantile)
        self._estimator = TokenEstimator()
        self._limits = limits
        self._slo = slo
        self._clock = clock
        self._ids = itertools.count(1)
        self._slots: dict[str, asyncio.Future[RoutedInstance]] = {}

    def update_routing(self, table: RoutingTable) -> None:
        if table.scheme != self._classifier.scheme:
            self._classifier.use_scheme(table.scheme)
        self.dispatcher.update_routing(table)
        self.upstreams.keep_only(i.endpoint for pool in table.pools for i in pool.instances)
        self.pump()

    def models(self) -> list[str]:
        """Models of the routing table, each once."""
        table = self.dispatcher.table
        return sorted({pool.model for pool in table.pools}) if table else []

    def pump(self) -> None:
        """Gives waiting requests to instances with room; to be called whenever either may have changed."""
        for request, instance in self.dispatcher.dispatch(self._clock.monotonic_s()):
            slot = self._slots.pop(request.request_id, None)
            if slot is None or slot.done():
                self.dispatcher.cancel(request.request_id)
            else:
                slot.set_result(instance)

    def sweep(self) -> None:
        """Periodic: gives up silent answers and wakes what waited for a suspect instance."""
        self.upstreams.abort_silent(self._limits.silent_s)
        self.pump()

    async def serve(self, inbound: Inbound, client: Client) -> None:
        """Brings one request to its end. Raises Refusal as long as nothing was written to the client; cancelling the
        task is the client's leaving and reaches the engine."""
        arrived_s = self._clock.monotonic_s()
        input_tokens = self._estimator.input_tokens(inbound.model, inbound.prompt)
        classified = self._classifier.classify(input_tokens, inbound.output_limit_tokens)
        self.meter.arrived(inbound.model, classified.load, input_tokens)
        request = QueuedRequest(
            request_id=str(next(self._ids)),
            model=inbound.model,
            request_class=classified.routing,
            deadline_s=arrived_s + self._slo.ttft_ms(classified.routing.input) / 1e3,
        )
        outcome = Outcome.CLIENT_LEFT
        try:
            outcome = await self._serve(inbound, client, request, classified, arrived_s)
        except Refusal as refusal:
            outcome = Outcome(refusal.code)
            raise
        finally:
            self._slots.pop(request.request_id, None)
            self.dispatcher.cancel(request.request_id)
            self.outcomes[outcome, str(classified.routing)] += 1
            if outcome in (Outcome.FAILED, Outcome.QUEUE_FULL, Outcome.QUEUE_TIMEOUT):
                self.meter.failed(inbound.model, classified.load)
            self.pump()

    # ----------------------------------------------------------------------------------------------- internals

    async def _serve(
        self, inbound: Inbound, client: Client, request: QueuedRequest, classified: Classified, arrived_s: float
    ) -> Outcome:
        if not self.dispatcher.offer(request, arrived_s):
            raise Refusal(429, Outcome.QUEUE_FULL, "Too many requests are waiting.", retry_after_s=1)
        failure = ""
        for _ in range(self._limits.attempts):
            instance = await self._instance_for(request, arrived_s)
            queue_s = self._clock.monotonic_s() - arrived_s
            try:
                answer = await self.upstreams.open(instance.endpoint, inbound.target, inbound.headers, inbound.body)
                try:
                    whole = None
                    if answer.status >= 500:
                        raise UpstreamFailed(f"the engine answered {answer.status}")
                    if inbound.stream and answer.opens_with_error:
                        raise UpstreamFailed("the engine's first event was an error")
                    if not inbound.stream or answer.status != 200:
                        whole = await answer.read_all(self._limits.answer_bytes)
                    headers = self._headers(answer, request, classified, instance, queue_s)
                    if whole is None:
                        return await self._stream(inbound, client, classified, arrived_s, answer, headers, instance)
                    return await self._send_whole(inbound, client, classified, arrived_s, answer, headers, whole)
                finally:
                    self.upstreams.release(instance.endpoint, answer)
            except UpstreamFailed as error:
                failure = str(error)
                _log.warning("engine_failed", instance=instance.instance_id, endpoint=instance.endpoint, reason=failure)
                self.dispatcher.fail_over(request.request_id, self._clock.monotonic_s())
        raise Refusal(502, Outcome.FAILED, f"{self._limits.attempts} instances failed the request; last: {failure}.")

    async def _instance_for(self, request: QueuedRequest, arrived_s: float) -> RoutedInstance:
        """Waits for the dispatcher's choice."""
        slot: asyncio.Future[RoutedInstance] = asyncio.get_running_loop().create_future()
        self._slots[request.request_id] = slot
        self.pump()
        if slot.done():
            return slot.result()
        try:
            async with asyncio.timeout(arrived_s + self._limits.queue_s - self._clock.monotonic_s()):
                return await slot
        except TimeoutError:
            why = "No instance was free" if self.models() else "No instances are known yet"
            raise Refusal(
                503, Outcome.QUEUE_TIMEOUT, f"{why} within {self._limits.queue_s:g} s.", retry_after_s=5
            ) from None

    async def _stream(
        self,
        inbound: Inbound,
        client: Client,
        classified: Classified,
        arrived_s: float,
        answer: Answer,
        headers: Headers,
        instance: RoutedInstance,
    ) -> Outcome:
        """Passes chunks on as they come. The first one is there already, so the client hears nothing before it."""
        await client.begin(answer.status, headers)
        try:
            while data := await answer.read():
                await client.write(data)
        except UpstreamFailed as error:
            # Too late for another instance: what has been sent cannot be taken back.
            _log.warning("engine_failed_mid_answer", instance=instance.instance_id, reason=str(error))
            self.dispatcher.suspect(instance.instance_id, self._clock.monotonic_s())
            await client.end(_error_event("The engine failed within the answer."))
            return Outcome.FAILED
        if (complaint := answer.complaint()) is not None:
            _log.warning("engine_failed_mid_answer", instance=instance.instance_id, reason=complaint)
            # An error event of the engine's own has reached the client already.
            await client.end(b"" if answer.ended_with_done else _error_event("The engine ended its answer early."))
            return Outcome.FAILED
        await client.end()
        usage = answer.usage() if inbound.usage_wanted else None
        # A chat stream opens with an event that names the role only.
        lead = int("chat" in inbound.target)
        tokens = _count(usage, "completion_tokens") or answer.token_events(usage is not None) - lead
        if tokens > 0:
            # What comes after the last token (usage, [DONE]) is no gap; an event may carry several tokens.
            request_class = self._learn(inbound, classified, tokens, usage)
            self.meter.completed(
                inbound.model,
                request_class,
                tokens,
                answer.first_event_s - arrived_s,
                answer.gaps_s[lead : lead + tokens - 1],
            )
        return Outcome.SERVED

    async def _send_whole(
        self,
        inbound: Inbound,
        client: Client,
        classified: Classified,
        arrived_s: float,
        answer: Answer,
        headers: Headers,
        whole: bytes,
    ) -> Outcome:
        await client.begin(answer.status, [*headers, (b"content-length", str(len(whole)).encode())])
        await client.end(whole)
        if answer.status != 200:
            return Outcome.REJECTED
        usage = _usage(whole)
        tokens = _count(usage, "completion_tokens")
        if tokens:
            request_class = self._learn(inbound, classified, tokens, usage)
            total_s = answer.touched_s - arrived_s
            self.meter.completed_whole(inbound.model, request_class, tokens, total_s)
        return Outcome.SERVED

    def _learn(
        self, inbound: Inbound, classified: Classified, tokens: int, usage: Mapping[str, Any] | None
    ) -> RequestClass:
        """Feeds the truth back; returns the true class."""
        input_tokens = classified.input_tokens
        if counted := _count(usage, "prompt_tokens"):
            self._estimator.calibrate(inbound.model, inbound.prompt, counted)
            input_tokens = counted
        self._classifier.observe(input_tokens, tokens)
        return self._classifier.scheme.classify(input_tokens, tokens)

    def _headers(
        self,
        answer: Answer,
        request: QueuedRequest,
        classified: Classified,
        instance: RoutedInstance,
        queue_s: float,
    ) -> Headers:
        passed = [(name, value) for name, value in answer.headers if name in PASSED_HEADERS]
        return [
            *passed,
            (b"x-dynamollm-pool", (self.dispatcher.pool_of(request.request_id) or "").encode()),
            (b"x-dynamollm-class", str(classified.routing).encode()),
            (b"x-dynamollm-instance", instance.instance_id.encode()),
            (b"x-dynamollm-queue-ms", f"{queue_s * 1e3:.1f}".encode()),
        ]


def error_body(status: int, code: str, message: str, param: str | None = None) -> bytes:
    """An error as OpenAI's clients understand it."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


def _error_event(message: str) -> bytes:
    return b"data: " + error_body(502, "engine_failed", message) + b"\n\n"


def _usage(whole: bytes) -> Mapping[str, Any] | None:
    try:
        usage = json.loads(whole).get("usage")
    except (ValueError, AttributeError, RecursionError):
        return None
    return usage if isinstance(usage, dict) else None


def _count(usage: Mapping[str, Any] | None, name: str) -> int:
    value = usage.get(name) if usage else None
    return value if isinstance(value, int) and value > 0 else 0
