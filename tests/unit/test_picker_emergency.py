"""The emergency ladder through Envoy, where no queue is ours: choose, refuse, and the engine's own priority."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext

from controller.domain.reasons import Stage
from controller.gateway.access import Access
from controller.gateway.config import LimitsConfig, PickerConfig
from controller.picker.addresses import Addresses
from controller.picker.exchange import Desk, Exchange
from controller.picker.held import Held
from simulator.host.vllm_protocol import ApiError, parse
from tests.gateway_stand_ins import MODEL
from tests.unit.test_gateway_brain import brain
from tests.unit.test_gateway_dispatcher import ALL, instance, pool, table
from tests.unit.test_gateway_emergency import order


async def desk_with(stage: Stage | None, *, room: int = 8, **picker: Any) -> Desk:
    one, _ = brain(overcommit=1.5)
    routed = replace(pool(ALL, instance("127.0.0.1", room=room), model=MODEL), order=order(stage) if stage else None)
    one.update_routing(table(routed))
    addresses = Addresses()
    await addresses.resolve(["http://127.0.0.1:1"])
    return Desk(one, Held(one, 60), addresses, LimitsConfig(), PickerConfig(**picker), Access(None), "")


def send(desk: Desk, body: dict[str, object], lead: bytes = b"") -> list[Any]:
    exchange = Exchange(desk)
    headers = ext.HttpHeaders()
    for name, value in ((":path", "/v1/completions"), (":method", "POST")):
        added = headers.headers.headers.add()
        added.key, added.raw_value = name, value.encode()
    assert exchange.handle(ext.ProcessingRequest(request_headers=headers)) == []
    sent = ext.HttpBody(body=lead + json.dumps(body).encode(), end_of_stream=True)
    return exchange.handle(ext.ProcessingRequest(request_body=sent))


def body_of(replies: list[Any]) -> bytes:
    return b"".join(
        each.request_body.response.body_mutation.streamed_response.body
        for each in replies
        if each.WhichOneof("response") == "request_body"
    )


BODY: dict[str, object] = {"model": MODEL, "prompt": "hello"}


@pytest.mark.parametrize("stage", [None, Stage.REORDER, Stage.MOVE])
async def test_in_an_emergency_the_due_time_is_the_engines_priority(stage: Stage | None) -> None:
    desk = await desk_with(stage, engine_priority=True)
    first, later = (body_of(send(desk, BODY, lead=b" \n")) for _ in range(2))
    if stage is None:
        assert first == b" \n" + json.dumps(BODY).encode()  # byte for byte
        return
    due_ms = json.loads(first).pop("priority")
    assert json.loads(first) == {**BODY, "priority": due_ms}
    assert due_ms == pytest.approx(1e3 * desk.brain.clock.wall_s() + 250, abs=1)
    assert json.loads(later)["priority"] >= due_ms
    assert json.loads(body_of(send(desk, {**BODY, "priority": 7})))["priority"] == 7  # a client's own stays
    # What the engine makes of it.
    assert parse(first, False, (MODEL,), 4096, by_priority=True).priority == due_ms
    with pytest.raises(ApiError, match="Priority scheduling is not enabled"):
        parse(first, False, (MODEL,), 4096)


async def test_engines_without_priorities_get_bodies_as_they_came() -> None:
    desk = await desk_with(Stage.REFUSE)
    assert body_of(send(desk, BODY)) == json.dumps(BODY).encode()


@pytest.mark.parametrize(("stage", "status", "code"), [(Stage.MOVE, 0, ""), (Stage.REFUSE, 503, "too_late")])
async def test_at_the_last_stage_nothing_goes_beyond_the_limits(stage: Stage, status: int, code: str) -> None:
    desk = await desk_with(stage, room=2)
    for _ in range(2):
        assert body_of(send(desk, BODY))
    replies = send(desk, BODY)
    answer = replies[0].immediate_response
    assert answer.status.code == status
    if status:
        assert json.loads(answer.body)["error"]["code"] == code
        headers = {each.header.key: each.header.raw_value for each in answer.headers.set_headers}
        assert headers["retry-after"] == b"15"
        assert desk.brain.queues(desk.brain.clock.monotonic_s())["all"].refused == {code: 1}
