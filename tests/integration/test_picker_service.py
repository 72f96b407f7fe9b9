"""`Route` and `ReportCompletion` of a real gateway process, for tools that carry requests themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common.errors import UserError
from controller.domain.classes import by_input
from controller.gateway.config import GatewayConfig, PickerConfig, PickerTls
from dynamollm.v1 import gateway_pb2 as pb
from dynamollm.v1 import gateway_pb2_grpc as rpc
from tests.certificates import Authority
from tests.gateway_stand_ins import (
    LONG,
    MODEL,
    SHORT,
    StandInController,
    controlling,
    gateway_process,
    table,
    until,
    until_healthy,
)

ALL = by_input("all", "SML")


@asynccontextmanager
async def service(
    running: dict[str, float] | None = None, **settings: object
) -> AsyncIterator[tuple[rpc.GatewayStub, StandInController]]:
    """`running`: requests that the engines say they have."""
    controller = StandInController()
    controller.running = running or {}
    settings = {"picker__listen": "127.0.0.1:0", "report_interval_s": 0.05, **settings}
    async with controlling(controller) as port, gateway_process(port, **settings) as gateway:
        short = {"a": "http://127.0.0.1:1", "b": "http://127.0.0.1:2"}
        controller.publish(table((SHORT, short), (LONG, {"c": "http://127.0.0.1:3"}), max_in_flight=2))
        await until_healthy(gateway)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.picker_port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            yield rpc.GatewayStub(channel), controller


def report(controller: StandInController, field: str) -> int:
    return sum(getattr(each, field) for each in controller.reports[-1].classes) if controller.reports else 0


async def test_a_routed_request_is_counted_until_it_is_reported(tmp_path: Path) -> None:
    async with service(picker__overcommit=1) as (stub, controller):
        routed = await stub.Route(pb.RouteRequest(model=MODEL, input_tokens=50))
        assert (routed.pool, routed.instance_id, routed.endpoint) == ("short", "a", "http://127.0.0.1:1")
        assert list(routed.alternative_endpoints) == ["http://127.0.0.1:2", "http://127.0.0.1:3"]
        assert routed.request_class == "SL"  # nothing is known yet: the longest output
        assert 0 < routed.confidence < 1
        long = await stub.Route(pb.RouteRequest(model=MODEL, prompt_bytes=40_000))
        assert (long.pool, long.request_class) == ("long", "LL")
        await until(lambda: bool(controller.reports) and sum(q.in_flight for q in controller.reports[-1].queues) == 2)
        done = pb.ReportCompletionRequest(
            ticket=routed.ticket,
            outcome=pb.COMPLETION_OUTCOME_SERVED,
            input_tokens=50,
            output_tokens=40,
            time_to_first_token_s=0.1,
            total_s=0.9,
        )
        running = pb.ReportCompletionRequest(ticket=routed.ticket, outcome=pb.COMPLETION_OUTCOME_RUNNING)
        assert (await stub.ReportCompletion(running)).known
        assert (await stub.ReportCompletion(done)).known
        assert not (await stub.ReportCompletion(done)).known  # repeating it changes nothing
        failed = pb.ReportCompletionRequest(ticket=long.ticket, outcome=pb.COMPLETION_OUTCOME_FAILED)
        assert (await stub.ReportCompletion(failed)).known
        await until(lambda: report(controller, "completed") == 1 and report(controller, "failed") == 1)
        assert report(controller, "output_tokens") == 40
        assert report(controller, "in_slo") == 1
        assert sum(q.in_flight for q in controller.reports[-1].queues) == 0


async def test_what_cannot_be_routed_says_why() -> None:
    async with service(picker__overcommit=1) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Route(pb.RouteRequest(model="other", input_tokens=5))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        routed = [await stub.Route(pb.RouteRequest(model=MODEL, input_tokens=5)) for _ in range(6)]
        assert {each.instance_id for each in routed} == {"a", "b", "c"}  # the last two spilled to the larger pool
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Route(pb.RouteRequest(model=MODEL, input_tokens=5))
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ReportCompletion(pb.ReportCompletionRequest(ticket="x"))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        endless = pb.ReportCompletionRequest(
            ticket=routed[0].ticket, outcome=pb.COMPLETION_OUTCOME_SERVED, output_tokens=4_000_000_000
        )
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ReportCompletion(endless)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_what_is_never_reported_is_forgotten() -> None:
    async with service(picker__overcommit=1, picker__forget_s=0.5) as (stub, controller):
        for _ in range(6):
            await stub.Route(pb.RouteRequest(model=MODEL, input_tokens=5))
        await until(lambda: report(controller, "failed") == 6)
        await stub.Route(pb.RouteRequest(model=MODEL, input_tokens=5))


async def test_after_a_restart_what_engines_say_they_have_takes_its_room() -> None:
    """Streams that their carrier brings to an end, sent by an earlier life of the gateway: it has no ticket of them."""
    async with service({"a": 2, "b": 0, "c": 5}, picker__overcommit=1) as (stub, controller):  # of two each
        await until(lambda: controller.asked_status >= 2, timeout_s=30)  # what it was told first is in force
        routed = [await stub.Route(pb.RouteRequest(model=MODEL, input_tokens=5)) for _ in range(4)]
        # One always, lest a wrong figure keeps an instance empty.
        assert sorted(each.instance_id for each in routed) == ["a", "b", "b", "c"]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Route(pb.RouteRequest(model=MODEL, input_tokens=5))
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_gateway_that_starts_without_its_controller_serves_by_the_last_table(tmp_path: Path) -> None:
    controller = StandInController()
    async with controlling(controller) as port, gateway_process(port, state_dir=tmp_path) as gateway:
        controller.publish(table((ALL, {"a": "http://127.0.0.1:1"}), term=4, version=9))
        await until_healthy(gateway)
    async with gateway_process(port, state_dir=tmp_path) as gateway:  # nobody listens there any more
        await until_healthy(gateway)
        async with httpx.AsyncClient() as client:
            health = (await client.get(f"{gateway.url}/health")).json()
        assert (health["routing_term"], health["routing_version"], health["instances"]) == (4, 9, 1)


METHODS = {
    "/envoy.service.ext_proc.v3.ExternalProcessor/Process": "envoy",
    "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs": "envoy",
    "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints": "envoy",
    "/dynamollm.v1.Gateway/Route": "tool",
    "/dynamollm.v1.Gateway/ReportCompletion": "tool",
}
OPEN = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def services(channel: grpc.aio.Channel) -> set[str]:
    """As reflection lists them."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    async for answer in stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])):
        return {each.name for each in answer.list_services_response.service}
    return set()


async def allowed(channel: grpc.aio.Channel) -> set[str]:
    """The methods that this caller is not turned away from. Empty bytes are a message of every kind, and nobody's
    body ends here: an exchange without a message is over at once."""
    found = set()
    for method in METHODS:
        unary = method.startswith("/dynamollm")
        try:
            if unary:
                await channel.unary_unary(method)(b"", timeout=5)
            else:
                await anext(aiter(channel.stream_stream(method)(iter(()), timeout=5)), None)
            found.add(method)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
                found.add(method)
    return found


async def test_over_mutual_tls_each_name_may_call_what_its_scope_says(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    server, client, stranger = ours.issue("gateway", "IP:127.0.0.1"), ours.issue("tool"), theirs.issue("tool")
    envoy, unlisted = ours.issue("edge-7", "URI:spiffe://site/envoy"), ours.issue("laptop")
    settings = {
        "picker__listen": "127.0.0.1:0",
        "picker__tls__cert": server.cert,
        "picker__tls__key": server.key,
        "picker__tls__client_ca": ours.pair.cert,
        "picker__tls__scopes": '{"tool": "tool", "spiffe://site/envoy": "envoy"}',
    }
    controller = StandInController()
    async with controlling(controller) as port, gateway_process(port, **settings) as gateway:
        controller.publish(table((ALL, {"a": "http://127.0.0.1:1"})))
        await until_healthy(gateway)
        for pair, let_in in ((client, True), (stranger, False), (None, False)):
            parts = (pair.key.read_bytes(), pair.cert.read_bytes()) if pair is not None else (None, None)
            credentials = grpc.ssl_channel_credentials(ours.pair.cert.read_bytes(), *parts)
            async with grpc.aio.secure_channel(f"127.0.0.1:{gateway.picker_port}", credentials) as channel:
                call = rpc.GatewayStub(channel).Route(pb.RouteRequest(model=MODEL, input_tokens=5), timeout=5)
                if let_in:
                    assert (await call).instance_id == "a"
                else:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await call
                    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        for pair, scope in ((client, "tool"), (envoy, "envoy"), (unlisted, "")):
            credentials = grpc.ssl_channel_credentials(
                ours.pair.cert.read_bytes(), pair.key.read_bytes(), pair.cert.read_bytes()
            )
            async with grpc.aio.secure_channel(f"127.0.0.1:{gateway.picker_port}", credentials) as channel:
                assert {method.split("/")[1] for method in METHODS} | OPEN == await services(channel)
                assert await allowed(channel) == {method for method, needs in METHODS.items() if needs == scope}
        assert sum('"denied"' in line and "laptop" in line for line in gateway.log) == 1
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.picker_port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await rpc.GatewayStub(channel).Route(pb.RouteRequest(model=MODEL, input_tokens=5), timeout=5)


def test_plain_text_stays_on_this_machine_and_half_a_tls_is_refused() -> None:
    with pytest.raises(ValueError, match="set tls, or listen on loopback"):
        GatewayConfig(picker=PickerConfig(listen="0.0.0.0:8801"))
    with pytest.raises(ValueError, match="belong together"):
        PickerConfig.model_validate({"listen": "0.0.0.0:8801", "tls": {"cert": "a.pem"}})
    files = {"cert": "/nowhere/a.pem", "key": "/nowhere/a.key", "client_ca": "/nowhere/ca.pem"}
    with pytest.raises(ValueError, match="scopes say who may call"):
        PickerTls.model_validate(files)
    with pytest.raises(ValueError, match="scopes say who may call"):
        PickerTls(scopes={"a": "envoy"})
    tls = PickerTls.model_validate(files | {"scopes": {"a": "envoy"}})
    assert GatewayConfig(picker=PickerConfig(listen="0.0.0.0:8801", tls=tls)).picker.tls.on
    with pytest.raises(UserError, match=r"picker\.tls\.client_ca: /nowhere/ca\.pem"):
        tls.check()
