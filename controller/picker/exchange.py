"""One request on its way through Envoy: what the external processor is told, and what it answers.

    headers -> body … -> (end) decision: headers with the endpoint, the body back untouched
    [response headers -> response body … -> (end) counted]      only where Envoy is configured to show answers

Synchronous and without gRPC, so that every turn can be tested by itself. The endpoint goes where the Gateway API
Inference Extension's protocol wants it: into a header and into Envoy's dynamic metadata (`envoy.lb`), the first choice
first and then those to retry on. The ticket's name goes into metadata only, for the access log to give back: no client
can forge it and no engine sees it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from envoy.config.core.v3 import base_pb2 as core
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2 as mode
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext
from envoy.type.v3 import http_status_pb2 as http_status

from controller.gateway.access import Access
from controller.gateway.asked import GENERATING, Asked, read_request
from controller.gateway.brain import Brain, Outcome, Ticket, count
from controller.gateway.config import LimitsConfig, PickerConfig
from controller.gateway.refusal import Refusal, too_late
from controller.gateway.upstream import EventMeter
from controller.picker.addresses import Addresses
from controller.picker.held import Held

NOT_SHOWN = mode.ProcessingMode.BodySendMode.NONE
ENDPOINT_KEY = "x-gateway-destination-endpoint"
ENDPOINT_NAMESPACE = "envoy.lb"
TICKET_KEY = "ticket"
TICKET_NAMESPACE = "dynamollm"
# What the access log says of answers that are the picker's own begins so.
OUR_DETAILS = "dynamollm_"
# The body goes back in pieces: one message of many megabytes would have to be held whole by every hop.
PIECE_BYTES = 64 * 1024
# Share of the newest answer in the running estimate of a token's bytes.
NEWEST = 0.05

Reply = Any  # ext.ProcessingResponse; the generated module has no types


class Desk:
    """What all exchanges share."""

    def __init__(
        self,
        brain: Brain,
        held: Held,
        addresses: Addresses,
        limits: LimitsConfig,
        picker: PickerConfig,
        access: Access,
        tenant_header: str,
    ) -> None:
        self.brain = brain
        self.held = held
        self.addresses = addresses
        self.limits = limits
        self.picker = picker
        self.access = access
        self.tenant_header = tenant_header.lower()
        self.shown = 0  # answers that are being shown
        # Answers that were not shown, by model, for which the next one that is shown speaks as well.
        self.unseen: dict[str, int] = {}
        # Bytes that a token of a stream takes, by model and whether it is a chat: learnt from answers that are shown.
        self.token_bytes: dict[tuple[str, bool], float] = {}

    def tokens_in(self, asked: Asked, sent_bytes: int) -> float:
        """About how many tokens a stream has brought that was not shown; 0 while nothing like it was."""
        size = self.token_bytes.get((asked.model, asked.chat)) if asked.stream else None
        return sent_bytes / size if size else 0.0


class Exchange:
    """`handle` each message in turn, until it is `over`. An exchange that ends before its decision holds nothing."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._tenant = ""
        self._target = ""
        self._request_id = ""
        self._body: list[bytes] = []
        self._size = 0
        self._name: str | None = None  # of the ticket held, once an instance is chosen
        self._shown: bool | None = None  # whether the answer will be; None: Envoy does not say
        self._looking = False  # it is one of `Desk.shown`
        self._answered = False  # by us: what still comes of the request was on its way by then, and asks for nothing
        self._meter: EventMeter | None = None
        self._whole: list[bytes] = []
        self._answer_bytes = 0
        self._status = 0

    @property
    def over(self) -> bool:
        """Nothing more will be said, so that the stream may end here, which costs less than to wait for the other end
        of it."""
        return self._answered or (self._name is not None and self._shown is False)

    def close(self) -> None:
        """To be called at its end, however it came."""
        self._desk.shown -= self._looking
        self._looking = False

    def handle(self, message: Any) -> list[Reply]:
        """Replies to send, in order. Refusals are replies too."""
        if self._answered:
            return []
        kind = message.WhichOneof("request")
        try:
            if kind == "request_headers":
                if message.HasField("protocol_config"):  # Envoy says so with the first message, where it is new enough
                    self._shown = message.protocol_config.response_body_mode != NOT_SHOWN
                return self._request_headers(message.request_headers)
            if kind == "request_body":
                return self._request_body(message.request_body)
            if kind == "request_trailers":
                trailers = ext.ProcessingResponse(request_trailers=ext.TrailersResponse())
                return [*self._decide(), trailers]
        except Refusal as refusal:
            self._answered = True
            return [_refused(refusal)]
        if kind == "response_headers":
            return self._response_headers(message.response_headers)
        if kind == "response_body":
            return self._response_body(message.response_body)
        return [ext.ProcessingResponse(response_trailers=ext.TrailersResponse())]

    # -------------------------------------------------------------------------------------------------- request

    def _request_headers(self, message: Any) -> list[Reply]:
        headers = _headers(message)
        self._target = headers.get(":path", "").partition("?")[0]
        self._request_id = headers.get("x-request-id", "")
        self._tenant = self._desk.access.tenant(
            headers.get("authorization", ""), headers.get(self._desk.tenant_header, "")
        )
        method = headers.get(":method", "")
        if method == "GET" and self._target == "/v1/models":
            self._answered = True
            return [_answered(self._models())]
        if self._target not in GENERATING:
            raise Refusal(404, "not_found", f"There is no {self._target[:200]} here.")
        if method != "POST":
            raise Refusal(405, "method_not_allowed", f"{self._target} takes POST only.")
        if message.end_of_stream:
            raise Refusal(400, "invalid_json", "The request body is not valid JSON.")
        return []  # until the body has told what is asked

    def _request_body(self, message: Any) -> list[Reply]:
        self._size += len(message.body)
        if self._size > (limit := self._desk.limits.body_bytes):
            raise Refusal(413, "request_too_large", f"The request body exceeds {limit} bytes.")
        if message.body:
            self._body.append(message.body)
        return self._decide() if message.end_of_stream else []

    def _decide(self) -> list[Reply]:
        body = b"".join(self._body)
        self._body.clear()
        asked = read_request(self._target, body, self._desk.brain.models(), self._tenant)
        ticket = self._desk.brain.arrive(asked)
        try:
            endpoints = self._choose(ticket)
        except Refusal as refusal:
            self._desk.brain.done(ticket, Outcome(refusal.code))
            raise
        if self._shown:
            # Every token of a shown answer passes here. Who leaves now does not see it, and Envoy goes on alone.
            self._shown = self._looking = self._desk.shown < self._desk.picker.shown_at_once
            self._desk.shown += self._looking
        return [
            _chosen(
                endpoints,
                self._name or "",
                str(ticket.classified.routing),
                self._desk.brain.pool_of(ticket),
                keeps_key=not self._desk.access.checks,
            ),
            *_body_back(self._with_priority(ticket, body)),
        ]

    def _choose(self, ticket: Ticket) -> str:
        brain, addresses = self._desk.brain, self._desk.addresses
        if not brain.models():
            raise Refusal(503, Outcome.QUEUE_TIMEOUT, "No instances are known yet.", retry_after_s=5)
        instance = brain.choose(ticket)
        if instance is None:
            if (order := brain.refusing(ticket)) is not None:
                raise too_late(order.retry_after_s)
            raise Refusal(429, Outcome.QUEUE_FULL, "All instances are full.", retry_after_s=1)
        first = addresses.of(instance.endpoint)
        if first is None:
            brain.suspect(instance.instance_id)
            raise Refusal(503, Outcome.FAILED, "The instance chosen has no address yet.", retry_after_s=1)
        others = (
            addresses.of(each.endpoint) for each in brain.alternatives(ticket, instance, self._desk.picker.alternatives)
        )
        self._name = self._desk.held.hold(ticket, instance, self._request_id)
        return ",".join([first, *(other for other in others if other is not None)])

    def _with_priority(self, ticket: Ticket, body: bytes) -> bytes:
        """The order of the emergency ladder for the engine's own queue, where it has one to put in order. In front of
        all else in the body: a priority of the client's own comes later and so wins."""
        due_ms = self._desk.brain.due_ms(ticket) if self._desk.picker.engine_priority else None
        if due_ms is None:
            return body
        start = body.index(b"{") + 1
        return b'%b"priority":%d,%b' % (body[:start], due_ms, body[start:])

    def _models(self) -> bytes:
        data = [{"id": name, "object": "model", "owned_by": "dynamollm"} for name in self._desk.brain.models()]
        return json.dumps({"object": "list", "data": data}).encode()

    # ------------------------------------------------------------------------------------------------- response

    def _response_headers(self, message: Any) -> list[Reply]:
        self._status = int(_headers(message).get(":status", "0"))
        self._meter = EventMeter(self._desk.brain.clock.monotonic_s)
        return [ext.ProcessingResponse(response_headers=ext.HeadersResponse())]

    def _response_body(self, message: Any) -> list[Reply]:
        meter = self._meter
        held = self._desk.held.hear(self._name) if self._name is not None else None
        if meter is not None and held is not None and self._status == 200:
            if message.body:
                if not meter.events:
                    self._desk.brain.first_token(held.ticket)
                meter.passed(message.body)
                self._answer_bytes += len(message.body)
                if not held.ticket.asked.stream:
                    self._whole.append(message.body)
            if meter.events > self._desk.brain.output_bound_tokens(held.ticket):
                self._desk.brain.outgrew(held.ticket)
            if message.end_of_stream:
                held.observed = self._count(held.ticket, meter)
        return [ext.ProcessingResponse(response_body=ext.BodyResponse())]

    def _count(self, ticket: Ticket, meter: EventMeter) -> bool:
        """The whole answer has passed; it speaks for those that were not shown, too."""
        brain, asked = self._desk.brain, ticket.asked
        times = 1 + self._desk.unseen.get(asked.model, 0)
        usage: Mapping[str, Any] | None
        if asked.stream:
            usage = meter.usage() if asked.usage_wanted else None
            lead = int(asked.chat)  # a chat stream opens with an event that names the role only
            tokens = count(usage, "completion_tokens") or meter.token_events(usage is not None) - lead
            if meter.complaint() is not None or tokens < 1:
                return False
            known, size = self._desk.token_bytes, self._answer_bytes / tokens
            before = known.get((asked.model, asked.chat), size)
            known[asked.model, asked.chat] = before + NEWEST * (size - before)
            gaps_s = meter.gaps_s[lead : lead + tokens - 1]
            brain.completed(ticket, tokens, usage, meter.first_event_s - ticket.arrived_s, gaps_s, times)
        else:
            usage = _usage(b"".join(self._whole))
            tokens = count(usage, "completion_tokens")
            if not tokens:
                return False
            brain.completed_whole(ticket, tokens, usage, meter.touched_s - ticket.arrived_s, times)
        self._desk.unseen.pop(asked.model, None)
        return True


def _headers(message: Any) -> dict[str, str]:
    """Envoy gives names in lower case and values as bytes; of a name sent twice the last value."""
    return {each.key: (each.raw_value or each.value.encode()).decode("latin-1") for each in message.headers.headers}


def _usage(whole: bytes) -> Mapping[str, Any] | None:
    try:
        usage = json.loads(whole).get("usage")
    except (ValueError, AttributeError, RecursionError):
        return None
    return usage if isinstance(usage, dict) else None


def _option(name: str, value: str) -> Any:
    return core.HeaderValueOption(
        header=core.HeaderValue(key=name, raw_value=value.encode()),
        append_action=core.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _chosen(endpoints: str, name: str, request_class: str, pool: str, keeps_key: bool) -> Reply:
    first = endpoints.partition(",")[0]
    headers = ext.HeaderMutation(
        set_headers=[_option(ENDPOINT_KEY, first)],
        remove_headers=() if keeps_key else ("authorization",),  # our keys are nothing that engines should know
    )
    reply = ext.ProcessingResponse(
        request_headers=ext.HeadersResponse(response=ext.CommonResponse(header_mutation=headers))
    )
    reply.dynamic_metadata.update(
        {
            ENDPOINT_NAMESPACE: {ENDPOINT_KEY: endpoints},
            TICKET_NAMESPACE: {TICKET_KEY: name, "class": request_class, "pool": pool},
        }
    )
    return reply


def _body_back(body: bytes) -> Iterable[Reply]:
    for start in range(0, max(1, len(body)), PIECE_BYTES):
        piece = ext.StreamedBodyResponse(
            body=body[start : start + PIECE_BYTES], end_of_stream=start + PIECE_BYTES >= len(body)
        )
        common = ext.CommonResponse(body_mutation=ext.BodyMutation(streamed_response=piece))
        yield ext.ProcessingResponse(request_body=ext.BodyResponse(response=common))


def _refused(refusal: Refusal) -> Reply:
    headers = [_option("content-type", "application/json")]
    if refusal.retry_after_s is not None:
        headers.append(_option("retry-after", str(refusal.retry_after_s)))
    if refusal.status == 401:
        headers.append(_option("www-authenticate", "Bearer"))
    return _immediate(refusal.status, headers, refusal.body(), refusal.code)


def _answered(body: bytes) -> Reply:
    return _immediate(200, [_option("content-type", "application/json")], body, "answered")


def _immediate(status: int, headers: list[Any], body: bytes, details: str) -> Reply:
    return ext.ProcessingResponse(
        immediate_response=ext.ImmediateResponse(
            status=http_status.HttpStatus(code=status),
            headers=ext.HeaderMutation(set_headers=headers),
            body=body,
            details=f"{OUR_DETAILS}{details}",
        )
    )
