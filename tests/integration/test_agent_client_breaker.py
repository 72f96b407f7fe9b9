"""The controller's client against a real gRPC server that hangs, goes away and comes back: who waits, and who does not.

The client's clock stands still unless a test moves it, so that no circuit closes because a machine is slow.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.clock import VirtualClock
from controller.fleet.breaker import FAILED_CALLS
from controller.fleet.grpc import AgentClient
from controller.fleet.port import (
    ApplyCaps,
    ApplyClocks,
    CapTarget,
    ClockTarget,
    EffectDone,
    Event,
    NodeEffect,
    ReleaseClocks,
)
from controller.loop.failing import UNSENT
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from tests.many_agents import Agent

DEADLINE_S = 1.5


class TroubledAgent(Agent):
    """`hangs`: it reports, but leaves calls unanswered. `refuses`: it answers that it will not."""

    def __init__(self) -> None:
        super().__init__(0)
        self.hangs = self.refuses = False
        self.calls = 0

    async def ApplyControls(self, request: pb.ApplyControlsRequest, context: Any) -> pb.ApplyControlsResponse:
        await self._trouble(context)
        return await super().ApplyControls(request, context)

    async def ReleaseControls(self, request: pb.ReleaseControlsRequest, context: Any) -> pb.ReleaseControlsResponse:
        await self._trouble(context)
        return await super().ReleaseControls(request, context)

    async def _trouble(self, context: Any) -> None:
        self.calls += 1
        if self.hangs:
            await asyncio.sleep(3600)
        if self.refuses:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no longer the leader")


class Scene:
    """An agent, the controller's client of it, and what the client has told."""

    def __init__(self, folder: Path) -> None:
        made: Any = TroubledAgent  # calls that it has no method for are refused by gRPC
        self.agent: TroubledAgent = made()
        self.address = f"unix:{folder}/agent"
        self.clock = VirtualClock()
        self.seen: list[Event] = []
        self.client = AgentClient(
            "node-0",
            self.address,
            self.seen.append,
            self.clock,
            owner="ctl",
            term=1,
            interval_s=0.05,
            deadline_s=DEADLINE_S,
            chance=lambda: 1.0,
        )
        self._server: grpc.aio.Server | None = None
        self._effects = 0

    async def serve(self) -> None:
        self._server = grpc.aio.server()
        rpc.add_NodeAgentServicer_to_server(self.agent, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def ask(self, count: int = 1, kind: type[NodeEffect] = ApplyClocks) -> list[EffectDone]:
        """The outcomes of so many calls, all at once."""
        return list(await asyncio.gather(*(self.client.execute(self._effect(kind)) for _ in range(count))))

    def _effect(self, kind: type[NodeEffect]) -> NodeEffect:
        self._effects += 1
        effect_id, uuids = f"e{self._effects}", ("GPU-0-0",)
        if kind is ApplyCaps:
            return ApplyCaps(effect_id, "node-0", (CapTarget(uuids, 400.0),), ttl_s=20.0, reason="test")
        if kind is ReleaseClocks:
            return ReleaseClocks(effect_id, "node-0", uuids, reason="test")
        return ApplyClocks(effect_id, "node-0", (ClockTarget(uuids, 1200),), ttl_s=20.0, reason="test")

    async def sample(self) -> None:
        """Waits for three more samples."""
        before = len(self.seen)
        while len(self.seen) < before + 3:  # noqa: ASYNC110 - the test's own time limit ends it
            await asyncio.sleep(0.02)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with _scene(tmp_path) as made:
        yield made


@asynccontextmanager
async def _scene(folder: Path) -> AsyncIterator[Scene]:
    made = Scene(folder)
    await made.serve()
    try:
        yield made
    finally:
        await made.client.close()
        await made.stop()


async def test_an_agent_that_hangs_is_not_waited_for_until_a_trial_is_answered(scene: Scene) -> None:
    assert [done.ok for done in await scene.ask()] == [True]
    scene.agent.hangs = True
    assert all("DEADLINE_EXCEEDED" in done.detail for done in await scene.ask(FAILED_CALLS))
    assert scene.client.circuit_open
    calls = scene.agent.calls
    refused = await scene.ask(50)
    assert not any(done.ok for done in refused)
    assert {done.detail for done in refused} == {
        "not sent: node-0 left the last 3 calls unanswered; one is tried now and then until it answers or reports again"
    }
    assert all(done.detail.startswith(UNSENT) for done in refused), "as the runtime tells them from failures"
    assert scene.agent.calls == calls  # nothing was sent, so nobody has waited

    scene.clock.advance(DEADLINE_S)
    trial, *others = await scene.ask(10)
    assert "DEADLINE_EXCEEDED" in trial.detail
    assert all("not sent" in done.detail for done in others)
    assert scene.agent.calls == calls + 1

    scene.agent.hangs = False
    scene.clock.advance(DEADLINE_S)
    assert "not sent" in (await scene.ask())[0].detail  # for twice as long now
    scene.clock.advance(DEADLINE_S)
    assert (await scene.ask())[0].ok
    assert not scene.client.circuit_open
    assert all(done.ok for done in await scene.ask(10))


async def test_a_cap_that_guards_a_budget_is_always_tried_and_its_answer_closes_the_circuit(scene: Scene) -> None:
    scene.agent.hangs = True
    await scene.ask(FAILED_CALLS)
    scene.agent.hangs = False
    assert "not sent" in (await scene.ask())[0].detail
    assert (await scene.ask(kind=ApplyCaps))[0].ok
    assert (await scene.ask())[0].ok


async def test_answers_that_refuse_never_open_it(scene: Scene) -> None:
    scene.agent.refuses = True
    for _ in range(2):
        assert all("FAILED_PRECONDITION" in done.detail for done in await scene.ask(2 * FAILED_CALLS))
    assert not scene.client.circuit_open


async def test_an_agent_that_is_back_is_called_as_soon_as_it_reports(scene: Scene) -> None:
    scene.client.start()
    await scene.sample()
    await scene.stop()
    assert not any(done.ok for done in await scene.ask(FAILED_CALLS))
    assert "not sent" in (await scene.ask())[0].detail
    await scene.serve()
    await scene.sample()
    assert (await scene.ask())[0].ok  # although no time has passed


async def test_one_that_reports_all_the_time_and_hangs_in_every_call_is_sent_nothing_but_its_clocks(
    scene: Scene,
) -> None:
    scene.client.start()
    await scene.sample()
    scene.agent.hangs = True
    await scene.ask(FAILED_CALLS)
    await scene.sample()
    assert scene.client.circuit_open  # samples that never stopped prove nothing
    assert "not sent" in (await scene.ask(kind=ReleaseClocks))[0].detail
    calls = scene.agent.calls
    assert "DEADLINE_EXCEEDED" in (await scene.ask())[0].detail  # slow or not: it may lock what it is told
    assert scene.agent.calls == calls + 1
    scene.agent.hangs = False
    assert (await scene.ask())[0].ok
    assert (await scene.ask(kind=ReleaseClocks))[0].ok


async def test_a_silence_that_ends_on_the_same_stream_closes_it(scene: Scene) -> None:
    scene.client.start()
    await scene.sample()
    scene.agent.hangs = True
    await scene.ask(FAILED_CALLS)
    assert scene.client.circuit_open
    scene.clock.advance(10.0)  # as over a stall of the network
    await scene.sample()
    assert not scene.client.circuit_open
