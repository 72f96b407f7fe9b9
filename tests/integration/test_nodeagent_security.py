"""Who may call what, over the real transports: unix socket, loopback TCP, TCP with mutual TLS; and what is written
down about it."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.scopes import Scope
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types
from nodeagent.security import MAX_REQUEST_BYTES, NEEDS
from tests.certificates import Authority, Pair
from tests.nodehost import NodeHost, refused, until

DENIED = grpc.StatusCode.PERMISSION_DENIED
CONTROLLER, OPERATOR = types.OWNER_KIND_CONTROLLER, types.OWNER_KIND_OPERATOR


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[NodeHost]:
    server = authority.issue("agent", "IP:127.0.0.1")
    config: dict[str, dict[str, Any]] = {
        "listen": {
            "tls_cert": str(server.cert),
            "tls_key": str(server.key),
            "tls_client_ca": str(authority.pair.cert),
            "tcp": "0.0.0.0:0",
        },
        "security": {"scopes": {"viewer": "read", "spiffe://fleet/controller": "control", "ada": "admin"}},
    }
    with NodeHost(tmp_path_factory.mktemp("host"), gpus=2, config=config) as made:
        made.start()
        yield made


def channel(host: NodeHost, authority: Authority, pair: Pair | None) -> grpc.Channel:
    port = host.addresses()["tcp"].rpartition(":")[2]
    credentials = grpc.ssl_channel_credentials(
        authority.pair.cert.read_bytes(),
        pair.key.read_bytes() if pair else None,
        pair.cert.read_bytes() if pair else None,
    )
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials)


def lock_request(host: NodeHost, kind: int = CONTROLLER, reason: str = "test") -> pb.ApplyControlsRequest:
    lease = types.Lease(owner=types.Owner(kind=kind, name="x"), reason=reason, ttl_s=30, term=1)
    lock = pb.ControlRequest(gpu_uuid=host.uuids[0], clock_lock=pb.ClockLock(min_mhz=990, max_mhz=990))
    return pb.ApplyControlsRequest(request_id=host.request_id(), lease=lease, controls=[lock])


def audit(host: NodeHost) -> list[dict[str, str]]:
    return [json.loads(line) for line in (host.state_dir / "audit.log").read_text().splitlines()]


def test_every_method_has_a_scope() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["NodeAgent"].methods}
    assert set(NEEDS) == methods
    assert all(scope > Scope.NONE for scope in NEEDS.values())


def test_a_reader_looks_and_changes_nothing(host: NodeHost, authority: Authority) -> None:
    with channel(host, authority, authority.issue("viewer")) as opened:
        stub = rpc.NodeAgentStub(opened)
        assert len(stub.GetNode(pb.GetNodeRequest(), timeout=10).gpus) == 2
        next(iter(stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=1), timeout=10)))
        with refused(DENIED, "ApplyControls needs scope control; viewer has read"):
            stub.ApplyControls(lock_request(host), timeout=10)
        with refused(DENIED):
            stub.TripGuard(pb.TripGuardRequest(request_id="a", trip=True, reason="test"), timeout=10)
        with refused(DENIED):
            stub.StopInstance(pb.StopInstanceRequest(request_id="b", instance_id="x", force=True), timeout=10)
    assert host.locks() == [None, None]


def test_a_controller_by_uri_steers_but_is_no_operator(host: NodeHost, authority: Authority) -> None:
    pair = authority.issue("some-pod", "URI:spiffe://fleet/controller")
    with channel(host, authority, pair) as opened:
        stub = rpc.NodeAgentStub(opened)
        (result,) = stub.ApplyControls(lock_request(host), timeout=10).results
        assert result.code == pb.CONTROL_CODE_APPLIED
        with refused(DENIED, "acting as an operator needs scope admin"):
            stub.ApplyControls(lock_request(host, OPERATOR), timeout=10)
        with refused(DENIED, "lifting the watts floor needs scope admin"):
            stub.TripGuard(pb.TripGuardRequest(request_id="lift", trip=False, reason="test"), timeout=10)
        owner = types.Owner(kind=CONTROLLER, name="x")
        stub.ReleaseControls(
            pb.ReleaseControlsRequest(request_id=host.request_id(), owner=owner, term=1, reason="test"), timeout=10
        )
    assert host.locks() == [None, None]


def test_an_operator_may_do_everything(host: NodeHost, authority: Authority) -> None:
    with channel(host, authority, authority.issue("ada")) as opened:
        stub = rpc.NodeAgentStub(opened)
        (result,) = stub.ApplyControls(lock_request(host, OPERATOR), timeout=10).results
        assert result.code == pb.CONTROL_CODE_APPLIED
        owner = types.Owner(kind=OPERATOR, name="x")
        stub.ReleaseControls(
            pb.ReleaseControlsRequest(request_id=host.request_id(), owner=owner, reason="test"), timeout=10
        )


def test_a_certificate_without_a_scope_sees_health_and_nothing_else(host: NodeHost, authority: Authority) -> None:
    with channel(host, authority, authority.issue("stranger")) as opened:
        with refused(DENIED, "stranger has none"):
            rpc.NodeAgentStub(opened).GetNode(pb.GetNodeRequest(), timeout=10)
        with refused(DENIED):
            next(iter(rpc.NodeAgentStub(opened).WatchTelemetry(pb.WatchTelemetryRequest(interval_s=1), timeout=10)))
        answer = health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_no_certificate_or_one_of_another_authority_does_not_get_in(
    host: NodeHost, authority: Authority, tmp_path: Path
) -> None:
    impostor = Authority(tmp_path, "other-ca").issue("ada")
    for pair in (None, impostor):
        with channel(host, authority, pair) as opened, refused(grpc.StatusCode.UNAVAILABLE):
            rpc.NodeAgentStub(opened).GetNode(pb.GetNodeRequest(), timeout=5)
    port = host.addresses()["tcp"].rpartition(":")[2]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as opened, refused(grpc.StatusCode.UNAVAILABLE):
        rpc.NodeAgentStub(opened).GetNode(pb.GetNodeRequest(), timeout=5)


def test_every_change_and_every_refusal_is_written_down(host: NodeHost, authority: Authority) -> None:
    before = len(audit(host))
    host.stub.ApplyControls(lock_request(host, OPERATOR, "trying things out"), timeout=10)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        host.stub.ApplyControls(pb.ApplyControlsRequest(request_id="empty"), timeout=10)
    with channel(host, authority, authority.issue("viewer")) as opened, refused(DENIED):
        rpc.NodeAgentStub(opened).ApplyControls(lock_request(host), timeout=10)
    host.stub.ListControls(pb.ListControlsRequest(), timeout=10)  # looking is not written down
    until(lambda: len(audit(host)) >= before + 3)  # a refusal is written right after its answer
    done, malformed, denied = audit(host)[before:]
    assert done["who"] == "unix socket as 'x'"
    assert done["why"] == "trying things out"
    assert done["what"].startswith("ApplyControls {")
    assert host.uuids[0] in done["what"]
    assert (done["outcome"], done["detail"]) == ("ok", "1 applied")
    assert malformed["outcome"] == "invalid_argument"
    assert (denied["who"], denied["what"], denied["outcome"]) == ("viewer", "ApplyControls", "permission_denied")
    assert stat.S_IMODE((host.state_dir / "audit.log").stat().st_mode) == 0o640
    owner = types.Owner(kind=OPERATOR, name="x")
    host.stub.ReleaseControls(
        pb.ReleaseControlsRequest(request_id=host.request_id(), owner=owner, reason="test"), timeout=10
    )


def test_requests_have_a_largest_size(host: NodeHost) -> None:
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        host.stub.ApplyControls(lock_request(host, reason="x" * MAX_REQUEST_BYTES), timeout=10)


def test_the_socket_is_for_its_group_only(host: NodeHost) -> None:
    assert stat.S_IMODE(host.socket.stat().st_mode) == 0o660


def test_a_renewed_certificate_is_served_without_a_restart(
    host: NodeHost, authority: Authority, tmp_path: Path
) -> None:
    def serial() -> str:
        import ssl

        port = int(host.addresses()["tcp"].rpartition(":")[2])
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=5)

    before = serial()
    authority.issue("agent", "IP:127.0.0.1")  # over the files the agent was told of
    until(lambda: serial() != before, 10)


class TestLoopback:
    @pytest.fixture
    def plain(self, tmp_path: Path) -> Iterator[NodeHost]:
        with NodeHost(tmp_path, gpus=1, config={"listen": {"reflection": False}}) as made:
            made.start()
            yield made

    def test_any_local_user_is_a_controller_at_most(self, plain: NodeHost) -> None:
        with grpc.insecure_channel(plain.addresses()["tcp"]) as opened:
            stub = rpc.NodeAgentStub(opened)
            (result,) = stub.ApplyControls(lock_request(plain), timeout=10).results
            assert result.code == pb.CONTROL_CODE_APPLIED
            with refused(DENIED, "acting as an operator"):
                stub.ApplyControls(lock_request(plain, OPERATOR), timeout=10)

    def test_reflection_can_be_switched_off(self, plain: NodeHost) -> None:
        from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

        stub = reflection_pb2_grpc.ServerReflectionStub(plain.channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        with refused(grpc.StatusCode.UNIMPLEMENTED):
            next(iter(stub.ServerReflectionInfo(iter([ask]), timeout=10)))
