"""The way of one request: queue -> engine -> client, with fail-over until the first byte.

Holds the parts together (dispatcher, classifier, load meter, connections) and knows no HTTP server: a request comes in
as an `Inbound`, and the answer leaves through the callables of a `Client`. After the first byte a request is never
repeated: a break then is told to the client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from common.http1 import Headers
from common.logs import get_logger
from controller.fleet.port import PoolOrder, RoutedInstance, RoutingTable
from controller.gateway.asked import Asked
from controller.gateway.brain import Brain, Outcome, Ticket, count
from controller.gateway.config import LimitsConfig
from controller.gateway.refusal import Refusal, error_body, too_late
from controller.gateway.upstream import Answer, UpstreamFailed, Upstreams

_log = get_logger(__name__)
# Of an engine's answer these reach the client; hop-by-hop headers and the engine's own name do not.
PASSED_HEADERS = frozenset({b"content-type", b"x-request-id", b"retry-after", b"cache-control"})


@dataclass(frozen=True, slots=True)
class Inbound:
    """A checked request. `body` goes to the engine as it came."""

    asked: Asked
    headers: tuple[tuple[str, str], ...]
    body: bytes
    energy_wanted: bool = False  # at the end of a stream


class Client(Protocol):
    """Where an answer goes. Calls return when the client can take more."""

    async def begin(self, status: int, headers: Headers) -> None: ...

    async def write(self, data: bytes) -> None: ...

    async def end(self, data: bytes = b"") -> None: ...


class Relay:
    """All requests of one gateway. Single event loop."""

    def __init__(self, limits: LimitsConfig, brain: Brain) -> None:
        self.brain = brain
        self.upstreams = Upstreams(limits.connect_s, brain.clock.monotonic_s)
        self._limits = limits
        self._clock = brain.clock

    def update_routing(self, table: RoutingTable) -> None:
        self.upstreams.keep_only(i.endpoint for pool in table.pools for i in pool.instances)
        self.brain.update_routing(table)

    def sweep(self) -> None:
        """Periodic: gives up silent answers and wakes what waited for a suspect instance."""
        self.upstreams.abort_silent(self._limits.silent_s)
        self.brain.sweep()

    async def serve(self, inbound: Inbound, client: Client) -> None:
        """Brings one request to its end. Raises Refusal as long as nothing was written to the client; cancelling the
        task is the client's leaving and reaches the engine."""
        ticket = self.brain.arrive(inbound.asked)
        outcome = Outcome.CLIENT_LEFT
        try:
            outcome = await self._serve(inbound, client, ticket)
        except Refusal as refusal:
            outcome = Outcome(refusal.code)
            raise
        finally:
            self.brain.done(ticket, outcome)

    # ----------------------------------------------------------------------------------------------- internals

    async def _serve(self, inbound: Inbound, client: Client, ticket: Ticket) -> Outcome:
        asked, dispatcher = inbound.asked, self.brain.dispatcher
        slot = _slot()
        if not self.brain.wait(ticket, _into(slot), _refused(slot)):
            raise Refusal(429, Outcome.QUEUE_FULL, "Too many requests are waiting.", retry_after_s=1)
        failure = ""
        for attempt in range(self._limits.attempts):
            if attempt:
                slot = _slot()
                self.brain.wait_on(ticket, _into(slot), _refused(slot))
            instance = await self._given(slot, ticket)
            queue_s = self._clock.monotonic_s() - ticket.arrived_s
            self.brain.runs_on(ticket, instance)
            try:
                answer = await self.upstreams.open(instance.endpoint, asked.target, inbound.headers, inbound.body)
                try:
                    whole = None
                    if answer.status >= 500:
                        raise UpstreamFailed(f"the engine answered {answer.status}")
                    if asked.stream and answer.opens_with_error:
                        raise UpstreamFailed("the engine's first event was an error")
                    if not asked.stream or answer.status != 200:
                        whole = await answer.read_all(self._limits.answer_bytes)
                    # A stream is opened by its first event, a whole answer is there: either way the prompt is read.
                    self.brain.first_token(ticket)
                    headers = self._headers(answer, ticket, instance, queue_s)
                    if whole is None:
                        return await self._stream(client, ticket, answer, headers, instance, inbound.energy_wanted)
                    return await self._send_whole(client, ticket, answer, headers, whole)
                finally:
                    self.upstreams.release(instance.endpoint, answer)
            except UpstreamFailed as error:
                failure = str(error)
                self.brain.stops(ticket)
                _log.warning("engine_failed", instance=instance.instance_id, endpoint=instance.endpoint, reason=failure)
                dispatcher.fail_over(ticket.id, self._clock.monotonic_s())
        raise Refusal(
            502,
            Outcome.FAILED,
            f"{self._limits.attempts} instances failed the request; last: {failure}.",
            retry_after_s=1,
        )

    async def _given(self, slot: asyncio.Future[RoutedInstance], ticket: Ticket) -> RoutedInstance:
        """Waits for the dispatcher's choice."""
        if slot.done():
            return slot.result()
        try:
            async with asyncio.timeout(ticket.arrived_s + self._limits.queue_s - self._clock.monotonic_s()):
                return await slot
        except TimeoutError:
            why = "No instance was free" if self.brain.models() else "No instances are known yet"
            raise Refusal(
                503, Outcome.QUEUE_TIMEOUT, f"{why} within {self._limits.queue_s:g} s.", retry_after_s=5
            ) from None

    async def _stream(
        self,
        client: Client,
        ticket: Ticket,
        answer: Answer,
        headers: Headers,
        instance: RoutedInstance,
        energy_wanted: bool,
    ) -> Outcome:
        """Passes chunks on as they come. The first one is there already, so the client hears nothing before it."""
        await client.begin(answer.status, headers)
        bound = self.brain.output_bound_tokens(ticket)
        try:
            while data := await answer.read():
                await client.write(data)
                if answer.events > bound and not ticket.outgrown:
                    self.brain.outgrew(ticket)
        except UpstreamFailed as error:
            # Too late for another instance: what has been sent cannot be taken back.
            _log.warning("engine_failed_mid_answer", instance=instance.instance_id, reason=str(error))
            self.brain.suspect(instance.instance_id)
            await client.end(_error_event("The engine failed within the answer."))
            return Outcome.FAILED
        if (complaint := answer.complaint()) is not None:
            _log.warning("engine_failed_mid_answer", instance=instance.instance_id, reason=complaint)
            # An error event of the engine's own has reached the client already.
            await client.end(b"" if answer.ended_with_done else _error_event("The engine ended its answer early."))
            return Outcome.FAILED
        energy_j = self.brain.stops(ticket)
        # A comment, which clients of server-sent events skip; only for those who ask: the head has long been sent.
        await client.end(b"" if energy_j is None or not energy_wanted else b": dynamollm joules=%.1f\n\n" % energy_j)
        usage = answer.usage() if ticket.asked.usage_wanted else None
        # A chat stream opens with an event that names the role only.
        lead = int(ticket.asked.chat)
        tokens = count(usage, "completion_tokens") or answer.token_events(usage is not None) - lead
        if tokens > 0:
            # What comes after the last token (usage, [DONE]) is no gap; an event may carry several tokens.
            gaps_s = answer.gaps_s[lead : lead + tokens - 1]
            self.brain.completed(ticket, tokens, usage, answer.first_event_s - ticket.arrived_s, gaps_s)
        return Outcome.SERVED

    async def _send_whole(
        self, client: Client, ticket: Ticket, answer: Answer, headers: Headers, whole: bytes
    ) -> Outcome:
        energy_j = self.brain.stops(ticket)
        if energy_j is not None:
            headers = [*headers, (b"x-dynamollm-joules", b"%.1f" % energy_j)]
        await client.begin(answer.status, [*headers, (b"content-length", str(len(whole)).encode())])
        await client.end(whole)
        if answer.status != 200:
            return Outcome.REJECTED
        usage = _usage(whole)
        if tokens := count(usage, "completion_tokens"):
            self.brain.completed_whole(ticket, tokens, usage, answer.touched_s - ticket.arrived_s)
        return Outcome.SERVED

    def _headers(self, answer: Answer, ticket: Ticket, instance: RoutedInstance, queue_s: float) -> Headers:
        passed = [(name, value) for name, value in answer.headers if name in PASSED_HEADERS]
        return [
            *passed,
            (b"x-dynamollm-pool", self.brain.pool_of(ticket).encode()),
            (b"x-dynamollm-class", str(ticket.classified.routing).encode()),
            (b"x-dynamollm-instance", instance.instance_id.encode()),
            (b"x-dynamollm-queue-ms", f"{queue_s * 1e3:.1f}".encode()),
        ]


def _slot() -> asyncio.Future[RoutedInstance]:
    return asyncio.get_running_loop().create_future()


def _into(slot: asyncio.Future[RoutedInstance]) -> Callable[[RoutedInstance], None]:
    """A slot that was given up a moment ago takes nothing; its ticket's end gives the instance back."""

    def take(instance: RoutedInstance) -> None:
        if not slot.done():
            slot.set_result(instance)

    return take


def _refused(slot: asyncio.Future[RoutedInstance]) -> Callable[[PoolOrder], None]:
    def refuse(order: PoolOrder) -> None:
        if not slot.done():
            slot.set_exception(too_late(order.retry_after_s))

    return refuse


def _error_event(message: str) -> bytes:
    return b"data: " + error_body(502, "engine_failed", message) + b"\n\n"


def _usage(whole: bytes) -> Mapping[str, Any] | None:
    try:
        usage = json.loads(whole).get("usage")
    except (ValueError, AttributeError, RecursionError):
        return None
    return usage if isinstance(usage, dict) else None
