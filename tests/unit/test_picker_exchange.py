"""The order of an exchange's messages: after an answer of ours, what still comes of the request asks for nothing."""

from __future__ import annotations

import json
import random

import pytest
from envoy.service.accesslog.v3 import als_pb2 as als
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext

from controller.gateway.brain import Outcome
from controller.picker import access_log
from controller.picker.exchange import ENDPOINT_NAMESPACE, Exchange
from tests.gateway_stand_ins import MODEL
from tests.integration.test_gateway_hostile import mutated
from tests.unit.test_picker_emergency import body_of, desk_with

GOOD = json.dumps({"model": MODEL, "prompt": "hello"}).encode()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/tokenize", 404), ("GET", "/v1/models", 200), ("PUT", "/v1/completions", 405)],
)
async def test_the_body_of_a_head_that_was_answered_takes_no_instances_place(
    method: str, path: str, status: int
) -> None:
    desk = await desk_with(None)
    exchange = Exchange(desk)
    headers = ext.HttpHeaders()
    for name, value in ((":path", path), (":method", method)):
        added = headers.headers.headers.add()
        added.key, added.raw_value = name, value.encode()
    (answer,) = exchange.handle(ext.ProcessingRequest(request_headers=headers))
    assert answer.immediate_response.status.code == status
    assert exchange.handle(ext.ProcessingRequest(request_body=ext.HttpBody(body=GOOD, end_of_stream=True))) == []
    assert len(desk.held) == 0
    assert desk.brain.queues(desk.brain.clock.monotonic_s())["all"].in_flight == 0


async def test_broken_requests_in_any_pieces_are_sent_on_untouched_or_refused_once() -> None:
    desk, draw = await desk_with(None, room=100_000), random.Random(3)
    sent = 0
    for _ in range(1_500):
        body = draw.choice([GOOD, mutated(draw), mutated(draw)])
        if draw.random() < 0.01:
            body = b"x" * (desk.limits.body_bytes + 1)
        exchange = Exchange(desk)
        headers = ext.HttpHeaders()
        path, method = draw.choice(["/v1/completions"] * 3 + ["/v1/models", "/x"]), draw.choice(["POST"] * 5 + ["GET"])
        for name, value in ((":path", path), (":method", method), ("x-a", "\u00ff")):
            added = headers.headers.headers.add()
            added.key, added.raw_value = name, value.encode("latin-1")
        messages = [ext.ProcessingRequest(request_headers=headers)]
        cut, trailers = draw.randrange(len(body) + 1), draw.random() < 0.1
        for piece, last in ((body[:cut], False), (body[cut:], not trailers)):
            messages.append(ext.ProcessingRequest(request_body=ext.HttpBody(body=piece, end_of_stream=last)))
        if trailers:
            messages.append(ext.ProcessingRequest(request_trailers=ext.HttpTrailers()))
        replies = [reply for message in messages for reply in exchange.handle(message)]
        refused = [each for each in replies if each.WhichOneof("response") == "immediate_response"]
        chosen = [each for each in replies if ENDPOINT_NAMESPACE in each.dynamic_metadata]
        assert len(refused) + len(chosen) == 1
        sent += len(chosen)
        if chosen:
            assert path == "/v1/completions"
            assert body_of(replies) == body
        else:
            assert len(replies) == 1
            assert refused[0].immediate_response.status.code in (200, 400, 404, 405, 413)
        assert len(desk.held) == sent
    assert 150 < sent < 750


async def test_a_request_that_was_over_before_envoy_heard_the_choice_is_given_back() -> None:
    desk = await desk_with(None)
    exchange = Exchange(desk)
    headers = ext.HttpHeaders()
    for name, value in ((":path", "/v1/completions"), (":method", "POST"), ("x-request-id", "r-1")):
        added = headers.headers.headers.add()
        added.key, added.raw_value = name, value.encode()
    exchange.handle(ext.ProcessingRequest(request_headers=headers))
    exchange.handle(ext.ProcessingRequest(request_body=ext.HttpBody(body=GOOD, end_of_stream=True)))
    for details, over, request_id, held in (
        ("", False, "r-1", 1),  # still on its way
        ("dynamollm_not_found", True, "r-1", 1),  # another one, refused, that says it is this one
        ("downstream_remote_disconnect", True, "r-2", 1),
        ("downstream_remote_disconnect", True, "r-1", 0),
        ("downstream_remote_disconnect", True, "r-1", 0),
    ):
        message = als.StreamAccessLogsMessage()
        entry = message.http_logs.log_entry.add()
        entry.common_properties.intermediate_log_entry = not over
        entry.common_properties.response_flags.downstream_connection_termination = over
        entry.request.request_id, entry.response.response_code_details = request_id, details
        access_log.take(desk, message)
        assert len(desk.held) == held
    assert desk.brain.outcomes == {(Outcome.CLIENT_LEFT, "SL"): 1}
    assert desk.brain.queues(desk.brain.clock.monotonic_s())["all"].in_flight == 0
