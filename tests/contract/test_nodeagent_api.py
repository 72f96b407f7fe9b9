"""The API's contract for controls, over gRPC against a real agent process and the emulated NVML."""

from __future__ import annotations

import itertools
import stat
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from simulator.host.nvml.state import Calls, NvmlError
from tests.nodehost import NodeHost, refused, until
from tests.nvml_client import NvmlClient

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeHost]:
    config = {"gpu": {"call_deadline_s": 0.3, "recovery_interval_s": 0.1}, "controls": {"restore_retry_s": 0.2}}
    with NodeHost(tmp_path_factory.mktemp("host"), config=config) as host:
        host.start()
        yield host


@pytest.fixture
def host(running: NodeHost) -> Iterator[NodeHost]:
    """The shared host, with every control released and every fault gone afterwards."""
    yield running
    for index in range(running.gpus.gpu_count):
        running.gpus.clear_fault(index)
    for kind in (types.OWNER_KIND_OPERATOR, types.OWNER_KIND_CONTROLLER):
        term = running.stub.GetNode(pb.GetNodeRequest()).term
        running.stub.ReleaseControls(
            pb.ReleaseControlsRequest(
                request_id=running.request_id(), owner=types.Owner(kind=kind, name="ctl"), term=term, reason="tidy up"
            )
        )
    until(lambda: running.locks() == [None] * 8)


def term_of(host: NodeHost) -> int:
    return host.stub.GetNode(pb.GetNodeRequest()).term


def apply(host: NodeHost, *controls: pb.ControlRequest, request_id: str = "", **lease: Any) -> pb.ApplyControlsResponse:
    fields: dict[str, Any] = {
        "owner": types.Owner(kind=types.OWNER_KIND_CONTROLLER, name="ctl"),
        "reason": "r",
        "ttl_s": 30.0,
    }
    fields |= {"term": term_of(host)} | lease
    request = pb.ApplyControlsRequest(
        request_id=request_id or host.request_id(),
        lease=types.Lease(**fields),
        controls=controls,
    )
    return host.stub.ApplyControls(request, timeout=10)


def clock(host: NodeHost, gpu: int, mhz: int) -> pb.ControlRequest:
    return pb.ControlRequest(gpu_uuid=host.uuids[gpu], clock_lock=pb.ClockLock(min_mhz=mhz, max_mhz=mhz))


def test_the_node_describes_itself(host: NodeHost) -> None:
    node = host.stub.GetNode(pb.GetNodeRequest(), timeout=10)
    assert node.node_id == "node-0"
    assert [gpu.uuid for gpu in node.gpus] == list(host.uuids)
    gpu = node.gpus[0]
    assert (gpu.min_sm_mhz, gpu.max_sm_mhz, len(gpu.sm_clocks_mhz)) == (210, 1980, 119)
    assert (gpu.min_power_limit_w, gpu.max_power_limit_w, gpu.default_power_limit_w) == (200, 700, 700)
    assert gpu.health == pb.GPU_HEALTH_OK
    assert node.cpu_count > 0
    assert node.memory_bytes > 0
    assert len(node.boot_id) > 10
    assert set(node.capabilities) >= {"clock_lock", "memory_clock_lock", "power_limit", "guard", "instances"}


def test_both_listeners_serve_and_the_socket_is_not_for_everybody(host: NodeHost) -> None:
    mode = stat.S_IMODE(host.socket.stat().st_mode)
    assert mode == 0o660
    with grpc.insecure_channel(host.addresses()["tcp"]) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="dynamollm.v1.NodeAgent"), timeout=10
        )
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(iter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=10)))
        assert "dynamollm.v1.NodeAgent" in {service.name for service in answer.list_services_response.service}


def test_a_lock_reaches_the_gpu_and_is_listed(host: NodeHost) -> None:
    (result,) = apply(host, clock(host, 2, 1000)).results
    assert result.code == pb.CONTROL_CODE_APPLIED
    assert result.requested.clock_lock.max_mhz == 1000
    assert result.applied.clock_lock.max_mhz == 990
    assert host.locks()[2] == (990, 990)
    (held,) = host.stub.ListControls(pb.ListControlsRequest(), timeout=10).controls
    assert held.control.gpu_uuid == host.uuids[2]
    assert held.lease.owner.name == "ctl"
    assert 0 < held.remaining_s <= 30


def test_a_power_limit_is_clamped_observed_and_put_back(host: NodeHost) -> None:
    limit = pb.ControlRequest(gpu_uuid=host.uuids[1], power_limit=pb.PowerLimit(limit_w=50))
    (result,) = apply(host, limit).results
    assert result.applied.power_limit.limit_w == 200
    assert result.observed_power_limit_w == 200
    release = pb.ReleaseControlsRequest(
        request_id=host.request_id(),
        owner=types.Owner(kind=types.OWNER_KIND_CONTROLLER, name="ctl"),
        term=term_of(host),
        reason="r",
    )
    (released,) = host.stub.ReleaseControls(release, timeout=10).results
    assert released.code == pb.CONTROL_CODE_APPLIED
    assert host.gpus.power_limit_w(1) == 700


def test_a_lease_ends_by_itself(host: NodeHost) -> None:
    apply(host, *(clock(host, gpu, 990) for gpu in range(8)), ttl_s=0.5)
    assert host.locks() == [(990, 990)] * 8
    until(lambda: host.locks() == [None] * 8, 5.0)


def test_a_repeated_request_gets_the_first_answer_and_does_nothing(host: NodeHost) -> None:
    first = apply(host, clock(host, 0, 990), request_id="same", ttl_s=0.5)
    until(lambda: host.locks()[0] is None, 5.0)
    assert apply(host, clock(host, 0, 990), request_id="same", ttl_s=0.5) == first
    assert host.locks()[0] is None
    with refused(INVALID, "used before"):
        apply(host, clock(host, 0, 1200), request_id="same", ttl_s=0.5)


def test_an_older_term_is_refused_everywhere(host: NodeHost) -> None:
    term = term_of(host) + 5
    apply(host, clock(host, 0, 990), term=term)
    old = term - 1
    failed = grpc.StatusCode.FAILED_PRECONDITION
    with refused(failed, f"term {old} is older than {term}"):
        apply(host, clock(host, 0, 1980), term=old)
    with refused(failed, "older"):
        host.launch("late", [0], term=old)
    with refused(failed, "older"):
        host.stop("late", term=old)
    with refused(failed, "older"):
        host.drain("late", term=old)
    assert host.locks()[0] == (990, 990)


@pytest.mark.parametrize(
    ("lease", "complaint"),
    [
        ({"ttl_s": 0.0}, "ttl_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"ttl_s": 1e9}, "ttl_s"),
        ({"reason": ""}, "reason"),
        ({"owner": types.Owner(name="x")}, "owner.kind"),
        ({"owner": types.Owner(kind=types.OWNER_KIND_CONTROLLER)}, "owner.name"),
        ({"owner": types.Owner(kind=types.OWNER_KIND_GUARD, name="x")}, "guard"),
    ],
)
def test_a_malformed_lease_is_refused(host: NodeHost, lease: dict[str, Any], complaint: str) -> None:
    with refused(INVALID, complaint):
        apply(host, clock(host, 0, 990), **lease)
    assert host.locks()[0] is None


def test_malformed_batches_are_refused(host: NodeHost) -> None:
    with refused(INVALID, "controls"):
        apply(host)
    with refused(INVALID, "neither clock_lock nor power_limit"):
        apply(host, pb.ControlRequest(gpu_uuid=host.uuids[0]))
    with refused(INVALID, "request_id"):
        host.stub.ApplyControls(pb.ApplyControlsRequest(), timeout=10)


def test_results_come_per_gpu(host: NodeHost) -> None:
    host.gpus.deny_writes(1)
    host.gpus.set_mig(3, True)
    host.stub.GetNode(pb.GetNodeRequest(), timeout=10)  # facts are read anew
    nowhere = pb.ControlRequest(gpu_uuid="GPU-nowhere", clock_lock=pb.ClockLock(min_mhz=990, max_mhz=990))
    codes = [result.code for result in apply(host, nowhere, *(clock(host, gpu, 990) for gpu in (0, 1, 3))).results]
    host.gpus.set_mig(3, False)
    host.stub.GetNode(pb.GetNodeRequest(), timeout=10)
    assert codes == [
        pb.CONTROL_CODE_UNKNOWN_GPU,
        pb.CONTROL_CODE_APPLIED,
        pb.CONTROL_CODE_NO_PERMISSION,
        pb.CONTROL_CODE_MIG_ENABLED,
    ]


def test_a_hung_gpu_leaves_the_others_alone_and_comes_back(host: NodeHost) -> None:
    host.gpus.hang(4, Calls.CLOCK_WRITE)
    results = apply(host, *(clock(host, gpu, 990) for gpu in range(8))).results
    assert [result.code for result in results] == [pb.CONTROL_CODE_APPLIED] * 4 + [pb.CONTROL_CODE_GPU_UNRESPONSIVE] + [
        pb.CONTROL_CODE_APPLIED
    ] * 3
    sample = next(iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.1), timeout=10)))
    assert [gpu.health for gpu in sample.gpus].count(pb.GPU_HEALTH_UNRESPONSIVE) == 1
    assert not sample.gpus[4].HasField("power_w")
    assert sample.gpus[5].HasField("power_w")
    host.gpus.clear_fault(4)
    # The stuck write went through after all; nobody holds a lease for it, so it is undone.
    until(lambda: host.locks()[4] is None and apply(host, clock(host, 4, 990)).results[0].code == 1, 10.0)


def test_a_lost_gpu_is_told_apart_and_found_again(host: NodeHost) -> None:
    host.gpus.lose(6)
    code = 0

    def lost() -> bool:
        nonlocal code
        code = apply(host, clock(host, 6, 990)).results[0].code
        return code == pb.CONTROL_CODE_GPU_LOST

    until(lost, 10.0)
    host.gpus.clear_fault(6)
    until(lambda: apply(host, clock(host, 6, 990)).results[0].code == pb.CONTROL_CODE_APPLIED, 10.0)
    assert host.locks()[6] == (990, 990)


def test_driver_errors_are_reported_and_undone(host: NodeHost) -> None:
    host.gpus.set_fault(7, Calls.CLOCK_WRITE, error=NvmlError.UNKNOWN)
    assert apply(host, clock(host, 7, 990)).results[0].code == pb.CONTROL_CODE_DRIVER_ERROR
    host.gpus.clear_fault(7)
    until(lambda: "control restored" in host.log(), 10.0)
    assert host.locks()[7] is None


class TestTelemetry:
    def test_samples_come_at_the_pace_asked_for(self, host: NodeHost) -> None:
        host.gpus.set_activity(0, 650.0, 97)
        apply(host, clock(host, 0, 1200))
        stream = iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.05), timeout=30))
        samples = [next(stream) for _ in range(10)]
        host.gpus.set_activity(0, 0.0)
        assert [sample.sequence for sample in samples] == list(range(10))
        first, last = samples[0].gpus[0], samples[-1].gpus[0]
        assert first.uuid == host.uuids[0]
        assert (first.power_w, first.utilization_ratio, first.locked_mhz) == (650.0, 0.97, 1200)
        assert first.sm_mhz == 1200
        assert not samples[0].gpus[1].HasField("locked_mhz")
        assert not first.energy_is_integrated
        seconds = samples[-1].sampled_at.ToNanoseconds() / 1e9 - samples[0].sampled_at.ToNanoseconds() / 1e9
        assert last.energy_j - first.energy_j == pytest.approx(650.0 * seconds, rel=0.2)
        assert 0 <= samples[0].host.memory_used_ratio <= 1

    def test_two_readers_have_their_own_pace(self, host: NodeHost) -> None:
        fast = iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.05), timeout=30))
        slow = iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.4), timeout=30))
        times = []
        for _ in range(4):
            times.append(next(slow).sampled_at.ToNanoseconds() / 1e9)
        assert all(later - earlier >= 0.3 for earlier, later in itertools.pairwise(times))
        assert sum(1 for _ in zip(range(10), fast, strict=False)) == 10

    @pytest.mark.parametrize("interval_s", [0.0, 0.01, 61.0, float("nan")])
    def test_a_senseless_pace_is_refused(self, host: NodeHost, interval_s: float) -> None:
        with refused(INVALID, "interval_s"):
            next(iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=interval_s), timeout=10)))

    def test_a_counter_reset_is_bridged(self, host: NodeHost) -> None:
        stream = iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.05), timeout=30))
        before = next(stream).gpus[5].energy_j
        host.gpus.reset_energy(5)
        energies = [next(stream).gpus[5].energy_j for _ in range(5)]
        assert energies == sorted(energies)
        assert energies[0] >= before

    def test_metrics_can_be_scraped(self, host: NodeHost) -> None:
        apply(host, clock(host, 0, 1200))
        labels = f'{{gpu="0",gpu_uuid="{host.uuids[0]}"}}'
        lines: dict[str, str] = {}

        def sampled() -> bool:
            page = urllib.request.urlopen(host.addresses()["metrics"], timeout=10).read().decode()
            lines.update(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
            return lines.get(f"dynamollm_gpu_locked_clock_hertz{labels}") == "1.2e+09"

        until(sampled)
        assert float(lines[f"dynamollm_gpu_up{labels}"]) == 1
        assert float(lines[f"dynamollm_gpu_locked_clock_hertz{labels}"]) == 1.2e9
        assert float(lines[f"dynamollm_gpu_power_watts{labels}"]) > 50
        assert float(lines[f"dynamollm_gpu_energy_joules_total{labels}"]) > 0
        assert float(lines["dynamollm_agent_unrestored_controls"]) == 0
        assert float(lines['dynamollm_agent_control_results_total{code="applied",control="clock_lock"}']) >= 1


def test_the_listen_file_goes_with_the_agent(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=1) as host:
        host.start()
        assert set(host.addresses()) == {"unix", "tcp", "metrics"}
        assert host.terminate() == 0
        assert host.addresses() == {}
        assert not host.socket.exists()


def operator() -> types.Owner:
    return types.Owner(kind=types.OWNER_KIND_OPERATOR, name="ada")


def rules(host: NodeHost, reason: str = "test", **fields: Any) -> pb.SetGuardRequest:
    return pb.SetGuardRequest(request_id=host.request_id(), reason=reason, **fields)


def test_an_operator_needs_no_term_and_a_controller_needs_its_own(host: NodeHost) -> None:
    term = term_of(host) + 5
    apply(host, clock(host, 0, 990), term=term)
    host.stub.SetGuard(rules(host, owner=operator()), timeout=10)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "older than"):
        host.stub.SetGuard(rules(host, term=term - 1), timeout=10)
    other = types.Owner(kind=types.OWNER_KIND_CONTROLLER, name="usurper")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "'ctl' holds this node"):
        host.stub.SetGuard(rules(host, term=term, owner=other), timeout=10)
    with refused(INVALID, "nobody may speak for it"):
        guard = types.Owner(kind=types.OWNER_KIND_GUARD, name="x")
        host.stub.SetGuard(rules(host, term=term, owner=guard), timeout=10)
    with refused(grpc.StatusCode.NOT_FOUND):  # let through, and there is no such instance
        request = pb.StopInstanceRequest(request_id=host.request_id(), owner=operator(), instance_id="none")
        host.stub.StopInstance(request, timeout=10)
    assert term_of(host) == term


def test_a_late_reader_gets_the_past_first(host: NodeHost) -> None:
    watch = pb.WatchTelemetryRequest(interval_s=0.05)
    for number, _ in enumerate(host.stub.WatchTelemetry(watch, timeout=20)):
        if number == 10:
            break
    past = pb.WatchTelemetryRequest(interval_s=0.05, history_samples=5)
    seen = list(itertools.islice(host.stub.WatchTelemetry(past, timeout=20), 7))
    assert [one.replayed for one in seen] == [True] * 5 + [False] * 2
    assert [one.sequence for one in seen] == list(range(7))
    times = [one.sampled_at.ToNanoseconds() for one in seen]
    assert times == sorted(times)


def test_samples_tell_of_memory_temperature_numa_and_alarms(host: NodeHost) -> None:
    with NvmlClient(host.gpus.path) as client:
        client.call("nvmlDeviceSetPersistenceMode", 0, gpu=3)
        host.stub.GetNode(pb.GetNodeRequest(), timeout=10)  # reads the facts anew
        one = next(iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.2), timeout=10)))
        for _ in range(2):  # the sample before may have been under way
            one = next(iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.2), timeout=10)))
        client.call("nvmlDeviceSetPersistenceMode", 1, gpu=3)
        host.stub.GetNode(pb.GetNodeRequest(), timeout=10)
    assert all(20 <= gpu.memory_temperature_c < 120 for gpu in one.gpus)
    assert [list(gpu.alarms) for gpu in one.gpus] == [["persistence_off"] if gpu == 3 else [] for gpu in range(8)]
    assert one.host.memory_available_bytes > 0
    nodes = host.stub.GetNode(pb.GetNodeRequest(), timeout=10).numa_nodes
    assert [node.id for node in nodes] == [node.id for node in one.host.numa]
    assert all(0 < free.memory_free_bytes <= node.memory_bytes for free, node in zip(one.host.numa, nodes, strict=True))
    assert list(one.alarms) == []
