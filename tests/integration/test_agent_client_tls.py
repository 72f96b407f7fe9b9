"""The controller's client against a real agent that demands mutual TLS: let in by its certificate's scope only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.clock import SystemClock
from common.tls import ClientTls
from controller.fleet.grpc import AgentClient
from controller.fleet.port import ApplyClocks, ClockTarget, EffectDone, Event, NodeSeen
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from tests.certificates import Authority, Pair
from tests.nodehost import NodeHost
from tests.vllm_emulator import free_port


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[NodeHost]:
    server = authority.issue("agent", "DNS:gpu-1.fleet")
    listen = {
        "tls_cert": str(server.cert),
        "tls_key": str(server.key),
        "tls_client_ca": str(authority.pair.cert),
        "tcp": f"0.0.0.0:{free_port()}",  # the same after a restart
    }
    scopes = {"scopes": {"controller": "control", "viewer": "read"}}
    with NodeHost(tmp_path_factory.mktemp("host"), gpus=2, config={"listen": listen, "security": scopes}) as made:
        made.start()
        yield made


def files(authority: Authority, pair: Pair) -> ClientTls:
    return ClientTls(ca=str(authority.pair.cert), cert=str(pair.cert), key=str(pair.key))


class Talk:
    """A client and what it has told."""

    def __init__(self, host: NodeHost, tls: ClientTls | None, name: str = "gpu-1.fleet") -> None:
        self.events: list[Event] = []
        self.client = AgentClient(
            "node-0",
            f"127.0.0.1:{host.addresses()['tcp'].rpartition(':')[2]}",
            self.events.append,
            SystemClock(),
            owner="ctl",
            term=1,
            interval_s=0.1,
            deadline_s=3.0,
            tls=tls,
            tls_name=name,
        )
        self._effects = 0

    async def lock(self, host: NodeHost, mhz: int) -> EffectDone:
        self._effects += 1
        target = ClockTarget((host.uuids[0],), mhz)
        return await self.client.execute(
            ApplyClocks(f"e{self._effects}", "node-0", targets=(target,), ttl_s=20.0, reason="test")
        )

    async def seen(self, healthy: bool = True) -> bool:
        """Whether a sample with such GPUs comes within a few seconds."""
        for _ in range(100):
            await asyncio.sleep(0.05)
            last = next((event for event in reversed(self.events) if isinstance(event, NodeSeen)), None)
            if last is not None and all(gpu.healthy is healthy for gpu in last.observation.gpus):
                return True
        return False


async def test_a_controller_with_a_certificate_observes_and_steers(host: NodeHost, authority: Authority) -> None:
    talk = Talk(host, files(authority, authority.issue("controller")))
    talk.client.start()
    assert await talk.seen()
    done = await talk.lock(host, 1200)
    assert done.ok, done.detail
    assert host.locks()[0] == (1200, 1200)
    await talk.client.close()


async def test_samples_that_have_waited_are_taken_for_as_old_as_they_are(host: NodeHost, authority: Authority) -> None:
    talk = Talk(host, files(authority, authority.issue("controller")))
    talk.client.start()
    assert await talk.seen()
    before = len(talk.events)
    time.sleep(2.5)  # noqa: ASYNC251 - a controller that is busy, and reads nothing
    woke_s = time.monotonic()

    def taken_s() -> list[float]:
        return [event.observation.observed_at_s for event in talk.events[before:] if isinstance(event, NodeSeen)]

    for _ in range(200):
        await asyncio.sleep(0.1)
        if any(at_s > woke_s for at_s in taken_s()):
            break
    assert max(taken_s()) > woke_s
    assert min(taken_s()) < woke_s - 1.0
    assert taken_s() == sorted(taken_s())
    await talk.client.close()


async def test_without_one_or_with_too_little_scope_nothing_is_changed(
    host: NodeHost, authority: Authority, tmp_path: Path
) -> None:
    before = host.locks()
    stranger = Authority(tmp_path, "other-ca").issue("controller")
    for tls, name, said in (
        (None, "", "UNAVAILABLE"),
        (files(authority, stranger), "gpu-1.fleet", "UNAVAILABLE"),
        (files(authority, authority.issue("controller")), "", "UNAVAILABLE"),  # the agent is not who it should be
        (files(authority, authority.issue("viewer")), "gpu-1.fleet", "PERMISSION_DENIED"),
    ):
        talk = Talk(host, tls, name)
        done = await talk.lock(host, 600)
        assert not done.ok
        assert said in done.detail
        await talk.client.close()
    assert host.locks() == before


async def test_a_node_out_of_service_offers_no_gpu(host: NodeHost, authority: Authority) -> None:
    talk = Talk(host, files(authority, authority.issue("controller")))
    talk.client.start()
    assert await talk.seen()
    owner = types.Owner(kind=types.OWNER_KIND_OPERATOR, name="ada")
    host.stub.DrainNode(pb.DrainNodeRequest(request_id=host.request_id(), owner=owner, reason="new fans"), timeout=10)
    assert await talk.seen(healthy=False)
    host.stub.ResumeNode(pb.ResumeNodeRequest(request_id=host.request_id(), owner=owner, reason="done"), timeout=10)
    assert await talk.seen()
    await talk.client.close()


async def test_a_renewed_certificate_is_taken_up_when_the_agent_comes_back(
    host: NodeHost, authority: Authority
) -> None:
    pair = authority.issue("controller")
    talk = Talk(host, files(authority, pair))
    talk.client.start()
    assert await talk.seen()
    viewer = authority.issue("viewer")
    pair.key.write_bytes(viewer.key.read_bytes())  # another name, which shows that it is this one that is presented
    pair.cert.write_bytes(viewer.cert.read_bytes())
    host.terminate()
    host.start()
    for _ in range(100):
        await asyncio.sleep(0.1)
        if "PERMISSION_DENIED" in (await talk.lock(host, 600)).detail:
            break
    else:
        pytest.fail("the old certificate is still presented")
    await talk.client.close()
