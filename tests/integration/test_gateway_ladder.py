"""The emergency ladder end to end: a real gateway before an emulated engine, the controller's own core deciding on what
the gateway reports. Under a spike each stage is decided and every request gets one whole answer or one clear error;
without the controller the orders end by themselves."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import httpx
import pytest

from common.clock import SystemClock
from controller.api.wire import loads_from_wire
from controller.domain.decision import Decision
from controller.domain.reasons import Level
from controller.fleet.port import (
    EffectDone,
    Event,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    PublishRouting,
    Solve,
    StartInstance,
    Tick,
)
from controller.loop.core import Core
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from dynamollm.v1 import controller_pb2 as pb
from tests.gateway_stand_ins import MODEL, StandInController, controlling, gateway_process, until, until_healthy
from tests.integration.test_gateway_emulator import emulators
from tests.synthetic_profile import synthetic_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
PROMPT_TOKENS, OUTPUT_TOKENS = 3000, 12  # about 0.15 s to read; its first token is due after 2 s
SPIKE_RPS, SPIKE_S = 25.0, 12.0


class Loop(StandInController):
    """The core of the loop over one engine, driven by the gateway's reports; a tick a second."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        settings = LoopSettings(
            model=MODEL, cluster_s=3600, pool_s=3600, instance_s=1, lease_ttl_s=3.5, rpc_deadline_s=0.5
        )
        self.core = Core(settings, synthetic_profile(), term=1, expected_nodes=1)
        self.decisions: list[Decision] = []
        self._gpus = tuple(GpuObservation(f"gpu-{i}", i, True, 100.0, 0.0, 1980, None) for i in range(8))
        self._endpoint = endpoint
        self._instances: tuple[InstanceObservation, ...] = ()
        self._clock = SystemClock()

    async def run(self) -> None:
        while True:
            self._send(NodeSeen(NodeObservation("n", self._clock.monotonic_s(), self._gpus, self._instances)))
            self._send(Tick(Level.INSTANCE))
            await asyncio.sleep(1.0)

    async def ReportLoad(
        self, request: pb.ReportLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReportLoadResponse:
        for report in loads_from_wire(request, self._clock.monotonic_s()):
            self._send(LoadSeen(report))
        return await super().ReportLoad(request, context)

    def _send(self, event: Event) -> None:
        step = self.core.handle(Instant(self._clock.monotonic_s(), self._clock.wall_s()), event)
        self.decisions += step.decisions
        for effect in step.effects:
            done = EffectDone(effect.effect_id, ok=True)
            match effect:
                case Solve():
                    done = EffectDone(effect.effect_id, ok=True, solution=plan_for(effect.problem))
                case PublishRouting():
                    self.publish(effect.table)
                case StartInstance():
                    assert len(effect.gpu_uuids) == 8
                    self._instances = (
                        InstanceObservation(
                            effect.instance_id,
                            MODEL,
                            effect.pool,
                            effect.gpu_uuids,
                            InstanceState.READY,
                            self._endpoint,
                        ),
                    )
                case _:
                    pass
            self._send(done)

    def counted(self, name: str) -> int:
        """Over all classes, by the newest report."""
        return sum(getattr(load, name) for load in self.reports[-1].classes)

    @property
    def stages(self) -> list[str]:
        return [str(decision.outcome["stage"]) for decision in self.decisions if "stage" in decision.outcome]


async def ask(client: httpx.AsyncClient) -> tuple[int, str, str]:
    """Status, error code and Retry-After of one streamed request; a 200 is a whole answer."""
    body = {"model": MODEL, "prompt": [7] * PROMPT_TOKENS, "max_tokens": OUTPUT_TOKENS, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as answer:
        text = (await answer.aread()).decode()
    if answer.status_code == 200:
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        assert sum(bool(json.loads(event)["choices"][0]["text"]) for event in events[:-1]) == OUTPUT_TOKENS
        return 200, "", ""
    return answer.status_code, json.loads(text)["error"]["code"], answer.headers.get("retry-after", "")


async def test_a_spike_climbs_the_ladder_and_every_request_hears_one_thing(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        ((endpoint, _),) = await stack.enter_async_context(emulators(tmp_path / "gpus", 1, gpus=8))
        loop = Loop(endpoint)
        control = AsyncExitStack()
        port = await control.enter_async_context(controlling(loop))
        stack.push_async_callback(control.aclose)
        gateway = await stack.enter_async_context(gateway_process(port, report_interval_s=0.2, limits__queue_s=20))
        ticking = asyncio.create_task(loop.run())
        stack.callback(ticking.cancel)
        await until_healthy(gateway)
        limits = httpx.Limits(max_connections=1000)
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=gateway.url, timeout=60, limits=limits))
        asked = []
        for _ in range(int(SPIKE_RPS * SPIKE_S)):
            asked.append(asyncio.create_task(ask(client)))
            await asyncio.sleep(1 / SPIKE_RPS)
        answers = Counter(await asyncio.gather(*asked))
        # One stage after the other, each once on the way up.
        assert loop.stages[:4] == ["reorder", "full_clock", "move", "refuse"]
        assert answers[200, "", ""] > 0
        refused = {key: count for key, count in answers.items() if key[0] != 200}
        assert set(refused) == {(503, "too_late", "15")}
        # What was refused is in the reports, as failed and by its reason.
        total = sum(refused.values())
        served = answers[200, "", ""]
        await until(lambda: loop.counted("failed") == total and loop.counted("completed") == served)
        assert [dict(queue.refused) for queue in loop.reports[-1].queues] == [{"too_late": total}]

        # The controller goes away with the order standing: within its 3.5 s the gateway is back to what it does alone.
        assert loop.stages[-1] == "refuse"
        ticking.cancel()
        await control.aclose()
        await asyncio.sleep(4.0)
        late = Counter(await asyncio.gather(*(ask(client) for _ in range(40))))  # six seconds of work, due after two
        assert late == {(200, "", ""): 40}
