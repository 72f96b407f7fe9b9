"""What a picker keeps of a request once it is chosen for: a stream only where the answer is shown, no long prompt, and
nothing that has to be walked through for each of thousands."""

from __future__ import annotations

import json

import pytest
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2 as mode
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext

from controller.gateway.asked import EXACT_CHARACTERS
from controller.gateway.brain import Outcome
from controller.picker.exchange import Desk, Exchange
from controller.picker.held import Held
from tests.gateway_stand_ins import MODEL
from tests.unit.test_gateway_choices import asked, gateway
from tests.unit.test_picker_emergency import desk_with

MODES = mode.ProcessingMode.BodySendMode


def head(shown: int | None, path: str = "/v1/completions") -> ext.ProcessingRequest:
    """The first message; `shown`: the mode in which Envoy says it will send the answer's body, None from an old one."""
    message = ext.ProcessingRequest(request_headers=ext.HttpHeaders())
    for name, value in ((":path", path), (":method", "POST")):
        added = message.request_headers.headers.headers.add()
        added.key, added.raw_value = name, value.encode()
    if shown is not None:
        message.protocol_config.response_body_mode = shown
    return message


def body(prompt: str = "hello") -> ext.ProcessingRequest:
    content = json.dumps({"model": MODEL, "prompt": prompt}).encode()
    return ext.ProcessingRequest(request_body=ext.HttpBody(body=content, end_of_stream=True))


@pytest.mark.parametrize(("shown", "over"), [(MODES.NONE, True), (MODES.STREAMED, False), (None, False)])
async def test_a_stream_ends_with_the_decision_unless_the_answer_may_be_shown_on_it(
    shown: int | None, over: bool
) -> None:
    desk = await desk_with(None)
    exchange = Exchange(desk)
    assert exchange.handle(head(shown)) == []
    assert not exchange.over
    assert len(exchange.handle(body())) == 2
    assert exchange.over == over
    assert len(desk.held) == 1  # until the access log speaks of it


async def test_so_many_answers_are_looked_at_at_a_time() -> None:
    desk = await desk_with(None, shown_at_once=2)
    exchanges = [Exchange(desk) for _ in range(4)]
    for exchange in exchanges[:3]:
        exchange.handle(head(MODES.STREAMED))
        exchange.handle(body())
    assert [exchange.over for exchange in exchanges] == [False, False, True, False]
    for exchange in exchanges[:3]:
        exchange.close()
        exchange.close()
    assert desk.shown == 0
    for message in (head(MODES.STREAMED), body()):
        exchanges[3].handle(message)
    assert not exchanges[3].over


async def test_a_refusal_ends_it_too() -> None:
    exchange = Exchange(await desk_with(None))
    (reply,) = exchange.handle(head(MODES.STREAMED, "/tokenize"))
    assert reply.immediate_response.status.code == 404
    assert exchange.over


def test_a_long_prompt_is_not_kept_while_its_request_runs() -> None:
    brain, _ = gateway()
    for characters, kept in ((EXACT_CHARACTERS, 1), (EXACT_CHARACTERS + 1, 0)):
        ticket = brain.arrive(asked("x" * characters))
        assert len(ticket.asked.texts) == kept  # counts of short ones still teach what the engine adds
        assert ticket.features.input_tokens == ticket.classified.input_tokens > 0
        brain.done(ticket, Outcome.SERVED)


def hold(held: Held, desk: Desk) -> str:
    ticket = desk.brain.arrive(asked("hello"))
    instance = desk.brain.choose(ticket)
    assert instance is not None
    return held.hold(ticket, instance)


async def test_tickets_are_forgotten_in_the_order_in_which_they_were_last_heard_of() -> None:
    desk = await desk_with(None)
    clock, held = desk.brain.clock, desk.held
    names = []
    for _ in range(4):
        names.append(hold(held, desk))
        clock.advance(10)
    assert held.hear(names[0]) is not None  # the oldest is now the one heard of last
    clock.advance(25)
    held.sweep()
    # 60 s are given: at 65 s the second has been silent for 55.
    assert len(held) == 4
    clock.advance(10)
    held.sweep()
    assert [name for name in names if held.hear(name) is not None] == [names[0], names[2], names[3]]


async def test_prompts_of_which_no_first_token_is_told_count_as_read_when_it_is_due() -> None:
    desk = await desk_with(None)
    brain, clock = desk.brain, desk.brain.clock
    name = hold(desk.held, desk)
    gone = hold(desk.held, desk)
    desk.held.end(gone, Outcome.SERVED)
    clock.advance(0.2)
    desk.held.sweep()
    assert brain.dispatcher.unread_at_risk(clock.monotonic_s()).total() == 1
    clock.advance(0.1)  # a short prompt has 250 ms
    desk.held.sweep()
    assert brain.dispatcher.unread_at_risk(clock.monotonic_s()).total() == 0
    assert desk.held.hear(name) is not None
