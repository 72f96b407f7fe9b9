"""The controller's API over mutual TLS: gateway and command line are let in by their certificates, others are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from common.clock import SystemClock
from common.errors import UserError
from common.tls import ClientTls, channel_credentials
from controller.api.gate import NEEDS, asker
from controller.cli.shared import call
from controller.config import ServerTls
from controller.daemon import open_api
from controller.gateway.client import ControllerClient
from controller.gateway.load import LoadMeter
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import controller_pb2_grpc as rpc
from simulator.demo.fleet import free_ports
from tests.certificates import Authority, Pair

NAME = "controller.fleet"
SCOPES = ServerTls(scopes={"gateway": "control", "viewer": "read", "ada": "admin"})


class Told(rpc.ControllerServicer):
    """Answers what these tests ask; stands behind the real gate."""

    def __init__(self) -> None:
        self.reports = 0
        self.askers: list[str] = []

    async def GetStatus(self, request: pb.GetStatusRequest, context: object) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(holder="me")

    async def ReportLoad(self, request: pb.ReportLoadRequest, context: object) -> pb.ReportLoadResponse:
        self.reports += 1
        return pb.ReportLoadResponse()

    async def SetMode(self, request: pb.SetModeRequest, context: object) -> pb.SetModeResponse:
        self.askers.append(asker(request.who))
        return pb.SetModeResponse()

    async def PlanNow(self, request: pb.PlanNowRequest, context: object) -> pb.PlanNowResponse:
        return pb.PlanNowResponse()

    async def ListNodes(self, request: pb.ListNodesRequest, context: object) -> pb.ListNodesResponse:
        return pb.ListNodesResponse()

    async def ListDecisions(self, request: pb.ListDecisionsRequest, context: object) -> pb.ListDecisionsResponse:
        return pb.ListDecisionsResponse()

    async def GetDecision(self, request: pb.GetDecisionRequest, context: object) -> pb.GetDecisionResponse:
        return pb.GetDecisionResponse()

    async def PreviewPlan(self, request: pb.PreviewPlanRequest, context: object) -> pb.PreviewPlanResponse:
        return pb.PreviewPlanResponse()

    async def WatchRouting(
        self, request: pb.WatchRoutingRequest, context: object
    ) -> AsyncIterator[pb.WatchRoutingResponse]:
        yield pb.WatchRoutingResponse(term=1, version=1)
        await asyncio.sleep(3600)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> ServerTls:
    server = authority.issue("controller", f"DNS:{NAME}")
    files = {"cert": str(server.cert), "key": str(server.key), "client_ca": str(authority.pair.cert)}
    return SCOPES.model_copy(update=files)


def files(authority: Authority, pair: Pair) -> ClientTls:
    return ClientTls(ca=str(authority.pair.cert), cert=str(pair.cert), key=str(pair.key))


def address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


async def refusal(at: str, client: ClientTls, method: str = "GetStatus", name: str = NAME) -> str:
    """The status code of one call; OK if it was served."""
    options = [("grpc.ssl_target_name_override", name)] if name else []
    async with grpc.aio.secure_channel(at, channel_credentials(client), options=options) as channel:
        try:
            await getattr(rpc.ControllerStub(channel), method)(getattr(pb, f"{method}Request")(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


def gateway(at: str, client: ClientTls) -> ControllerClient:
    return ControllerClient(
        at, "g", "e", SystemClock(), 0.1, LoadMeter(), lambda table: None, lambda: [], lambda now_s: {},
        lambda instances, now_s: None, tls=client, tls_name=NAME,
    )  # fmt: skip


def test_every_method_has_a_scope() -> None:
    assert set(NEEDS) == {method.name for method in pb.DESCRIPTOR.services_by_name["Controller"].methods}


async def test_each_name_may_do_what_its_scope_says(authority: Authority, tls: ServerTls) -> None:
    server = await open_api(at := address(), told := Told(), tls)
    try:
        for name, served in (
            ("viewer", {"GetStatus"}),
            ("gateway", {"GetStatus", "ReportLoad"}),
            ("ada", {"GetStatus", "ReportLoad", "SetMode", "PlanNow"}),
            ("nobody", set()),
        ):
            own = files(authority, authority.issue(name))
            for method in ("GetStatus", "ReportLoad", "SetMode", "PlanNow"):
                said = await refusal(at, own, method)
                assert said == ("OK" if method in served else "PERMISSION_DENIED"), (name, method)
        assert told.askers == ["ada as "]  # the history has the certificate's name, whatever name the request gives
    finally:
        await server.stop(None)


async def test_strangers_do_not_get_through(authority: Authority, tls: ServerTls, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other-ca")
    stranger, mine = other.issue("ada"), authority.issue("ada")
    server = await open_api(at := address(), Told(), tls)
    try:
        assert await refusal(at, files(authority, mine)) == "OK"
        assert await refusal(at, files(authority, stranger)) == "UNAVAILABLE"  # signed by another authority
        assert await refusal(at, files(other, mine)) == "UNAVAILABLE"  # the controller is not of theirs
        assert await refusal(at, files(authority, mine), name="another.fleet") == "UNAVAILABLE"
        only_ca = grpc.ssl_channel_credentials(authority.pair.cert.read_bytes())
        named = [("grpc.ssl_target_name_override", NAME)]
        for channel in (grpc.aio.insecure_channel(at), grpc.aio.secure_channel(at, only_ca, options=named)):
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await rpc.ControllerStub(channel).GetStatus(pb.GetStatusRequest(), timeout=10)
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(None)


async def until(met: object, what: str) -> None:
    for _ in range(200):
        if callable(met) and met():
            return
        await asyncio.sleep(0.05)
    pytest.fail(what)


async def test_a_gateway_follows_and_reports_and_takes_up_a_renewal(authority: Authority, tls: ServerTls) -> None:
    pair = authority.issue("viewer")
    told = Told()
    server = await open_api(at := address(), told, tls)
    client = gateway(at, files(authority, pair))
    running = asyncio.create_task(client.run())
    try:
        await until(lambda: client.connected and client.reports_failed, "viewer: follows, may not report")
        assert told.reports == 0
        renewed = authority.issue("gateway")
        pair.key.write_bytes(renewed.key.read_bytes())  # another name shows that this one is presented
        pair.cert.write_bytes(renewed.cert.read_bytes())
        await server.stop(None)
        server = await open_api(at, told, tls)
        await until(lambda: client.connected and told.reports, "the renewed certificate is not presented")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)


async def test_the_controllers_own_certificate_is_renewed_live(authority: Authority, tls: ServerTls) -> None:
    own = authority.issue("short-lived", f"DNS:{NAME}")
    mine = files(authority, authority.issue("ada"))
    changed = tls.model_copy(update={"cert": str(own.cert), "key": str(own.key)})
    server = await open_api(at := address(), Told(), changed)
    try:
        assert await refusal(at, mine) == "OK"
        renewed = authority.issue("renewed", "DNS:new.fleet")
        own.key.write_bytes(renewed.key.read_bytes())
        own.cert.write_bytes(renewed.cert.read_bytes())
        assert await refusal(at, mine, name="new.fleet") == "OK"
    finally:
        await server.stop(None)


async def test_the_command_line_finds_its_certificate_in_the_environment(
    authority: Authority, tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = authority.issue("viewer")
    server = await open_api(at := address(), Told(), tls)
    try:
        with pytest.raises(UserError, match="no controller answers"):
            await asyncio.to_thread(call, at, "GetStatus", pb.GetStatusRequest())
        monkeypatch.setenv("DYNAMOLLM_TLS_CA", str(authority.pair.cert))
        with pytest.raises(UserError, match="belong together"):
            call(at, "GetStatus", pb.GetStatusRequest())
        monkeypatch.setenv("DYNAMOLLM_TLS_CERT", str(pair.cert))
        monkeypatch.setenv("DYNAMOLLM_TLS_KEY", str(pair.key))
        monkeypatch.setenv("DYNAMOLLM_TLS_NAME", NAME)
        assert (await asyncio.to_thread(call, at, "GetStatus", pb.GetStatusRequest())).holder == "me"
        with pytest.raises(UserError, match="SetMode needs scope admin; viewer has read"):
            await asyncio.to_thread(call, at, "SetMode", pb.SetModeRequest())
    finally:
        await server.stop(None)
