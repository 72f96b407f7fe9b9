"""What Envoy's access log tells while an answer runs: longer than its class, although it was not shown."""

from __future__ import annotations

import pytest
from envoy.service.accesslog.v3 import als_pb2 as als
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext

from controller.gateway.access import Access
from controller.gateway.brain import Outcome
from controller.gateway.config import LimitsConfig, PickerConfig
from controller.picker import access_log
from controller.picker.addresses import Addresses
from controller.picker.exchange import TICKET_KEY, TICKET_NAMESPACE, Desk, Exchange
from controller.picker.held import Held
from tests.unit.test_gateway_choices import asked, gateway

EVENT = b'data: {"choices":[{"index":0,"text":"w "}]}\n\n'


@pytest.fixture
def desk() -> Desk:
    brain, _ = gateway()
    return Desk(brain, Held(brain, 60), Addresses(), LimitsConfig(), PickerConfig(), Access(None), "")


def hold(desk: Desk, max_tokens: int) -> str:
    """A stream on its way to an instance; the name of its ticket."""
    ticket = desk.brain.arrive(asked("hello", stream=True, max_tokens=max_tokens))
    instance = desk.brain.choose(ticket)
    assert instance is not None
    return desk.held.hold(ticket, instance)


def show(desk: Desk, name: str, tokens: int) -> None:
    """The answer as Envoy shows a sample of them."""
    exchange = Exchange(desk)
    exchange._name = name  # of the decision, which another test makes
    headers = ext.HttpHeaders()
    added = headers.headers.headers.add()
    added.key, added.raw_value = ":status", b"200"
    exchange.handle(ext.ProcessingRequest(response_headers=headers))
    for _ in range(tokens):
        exchange.handle(ext.ProcessingRequest(response_body=ext.HttpBody(body=EVENT)))
    exchange.handle(ext.ProcessingRequest(response_body=ext.HttpBody(body=b"data: [DONE]\n\n", end_of_stream=True)))


def entry(name: str, sent_bytes: int, over: bool) -> als.StreamAccessLogsMessage:
    message = als.StreamAccessLogsMessage()
    added = message.http_logs.log_entry.add()
    added.common_properties.metadata.filter_metadata[TICKET_NAMESPACE].update({TICKET_KEY: name})
    added.common_properties.intermediate_log_entry = not over
    added.response.response_code.value = 200
    added.response.response_body_bytes = sent_bytes
    return message


def test_an_answer_that_is_not_shown_is_noticed_when_its_bytes_outgrow_its_class(desk: Desk) -> None:
    short = 50  # at most so many tokens: routed as S, below 100
    unseen, shown = hold(desk, short), hold(desk, short)
    access_log.take(desk, entry(unseen, 200 * len(EVENT), over=False))
    assert desk.brain.outgrown == 0  # what a token weighs is not known yet
    show(desk, shown, 20)
    desk.held.end(shown, Outcome.SERVED)
    access_log.take(desk, entry(unseen, 60 * len(EVENT), over=False))
    assert desk.brain.outgrown == 0
    access_log.take(desk, entry(unseen, 130 * len(EVENT), over=False))
    assert desk.brain.outgrown == 1
    assert len(desk.held) == 1  # it still runs
    access_log.take(desk, entry(unseen, 150 * len(EVENT), over=True))
    assert desk.brain.outgrown == 1  # counted once
    assert len(desk.held) == 0


def test_first_tokens_that_are_shown_take_their_prompt_off_the_instance(desk: Desk) -> None:
    name = hold(desk, 50)
    held = desk.held.hear(name)
    assert held is not None
    chosen = held.instance.instance_id
    prompt = held.ticket.request.prompt_tokens
    pending = desk.brain.dispatcher._pending_tokens
    assert pending[chosen] == prompt > 0
    show(desk, name, 3)
    assert pending.get(chosen, 0) == 0


def test_prompts_that_are_not_shown_count_as_read_when_they_should_be(desk: Desk) -> None:
    name = hold(desk, 50)
    held = desk.held.hear(name)
    assert held is not None
    pending = desk.brain.dispatcher._pending_tokens
    desk.held.sweep()
    assert pending[held.instance.instance_id] > 0
    desk.brain.clock.advance(0.3)  # type: ignore[attr-defined] # a VirtualClock
    desk.held.sweep()
    assert pending.get(held.instance.instance_id, 0) == 0
