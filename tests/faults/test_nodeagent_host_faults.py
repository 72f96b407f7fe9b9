"""What happens to hosts: the driver is loaded anew, GPUs change places, the disk is full, other tools write limits."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from simulator.host.nvml.state import Calls
from tests.nodehost import NodeHost, until

CONFIG = {
    "gpu": {"call_deadline_s": 0.5, "recovery_interval_s": 0.1, "facts_interval_s": 0.2},
    "controls": {"restore_retry_s": 0.2, "stop_deadline_s": 1.0},
    "telemetry": {"interval_s": 0.1},
}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[NodeHost]:
    with NodeHost(tmp_path, gpus=4, config=CONFIG) as made:
        made.start()
        yield made


def health(host: NodeHost) -> dict[str, tuple[int, int]]:
    """By UUID: health and index."""
    gpus = host.stub.GetNode(pb.GetNodeRequest(), timeout=10).gpus
    return {gpu.uuid: (gpu.health, gpu.index) for gpu in gpus}


def all_well(host: NodeHost) -> bool:
    return all(state == pb.GPU_HEALTH_OK for state, _ in health(host).values())


def limit(host: NodeHost, gpu: int, watts: float, protects: bool = False) -> pb.ControlResult:
    owner = types.Owner(kind=types.OWNER_KIND_CONTROLLER, name="ctl")
    lease = types.Lease(owner=owner, reason="test", ttl_s=60, term=1)
    wish = pb.ControlRequest(gpu_uuid=host.uuids[gpu], power_limit=pb.PowerLimit(limit_w=watts, protects=protects))
    request = pb.ApplyControlsRequest(request_id=host.request_id(), lease=lease, controls=[wish])
    return host.stub.ApplyControls(request, timeout=10).results[0]


def metrics(host: NodeHost) -> str:
    with urllib.request.urlopen(host.addresses()["metrics"], timeout=10) as page:
        return str(page.read(), "utf-8")


def test_a_driver_reload_is_survived_and_gpus_are_matched_by_uuid(host: NodeHost) -> None:
    limit(host, 1, 400.0, protects=True)
    host.lock(range(4), 990)
    host.gpus.unload_driver()
    until(lambda: all(state == pb.GPU_HEALTH_LOST for state, _ in health(host).values()))
    time.sleep(0.3)  # some looks in vain
    host.gpus.load_driver(order=[2, 3, 0, 1])
    until(lambda: all_well(host))
    found = health(host)
    assert len(found) == 4
    assert [found[uuid][1] for uuid in host.uuids] == [2, 3, 0, 1]
    assert host.locks() == [None] * 4
    until(lambda: host.gpus.observe(1).power_limit_w == 400.0)  # the cap is there again without being asked for
    (result,) = host.lock([0], 990)
    assert result.code == pb.CONTROL_CODE_APPLIED
    assert host.locks() == [(990, 990), None, None, None]  # this GPU, not the one that has its index now
    assert host.terminate() == 0


def test_mig_that_is_switched_on_later_is_respected(host: NodeHost) -> None:
    host.gpus.set_mig(2, True)
    until(lambda: host.lock([2], 990)[0].code == pb.CONTROL_CODE_MIG_ENABLED)


def test_another_writer_of_a_limit_is_named(host: NodeHost) -> None:
    limit(host, 0, 500.0)
    _write_limit(host, 0, 620.0)
    until(lambda: 'alarm="foreign_power_limit"' in metrics(host))
    assert limit(host, 0, 500.0).code == pb.CONTROL_CODE_FOREIGN_WRITER
    assert host.gpus.observe(0).power_limit_w == 500.0
    until(lambda: 'alarm="foreign_power_limit"' not in metrics(host))


def test_a_cap_that_protects_is_defended(host: NodeHost) -> None:
    limit(host, 0, 400.0, protects=True)
    _write_limit(host, 0, 700.0)
    until(lambda: host.gpus.observe(0).power_limit_w == 400.0)


def test_a_lock_that_somebody_resets_under_load_is_named(host: NodeHost) -> None:
    host.lock([0], 990)
    host.gpus.set_activity(0, 500.0, 95)
    _nvml(host, "pynvml.nvmlDeviceResetGpuLockedClocks(pynvml.nvmlDeviceGetHandleByIndex(0))")
    until(lambda: 'alarm="foreign_clock_lock"' in metrics(host))
    assert host.lock([0], 990)[0].code == pb.CONTROL_CODE_FOREIGN_WRITER
    assert host.locks()[0] == (990, 990)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_under_the_journal(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=2, config=CONFIG) as host:
        host.state_dir.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(host.state_dir)], capture_output=True, check=False
        )
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
        try:
            _on_a_full_disk(host)
        finally:
            host.close()
            subprocess.run(["umount", "-l", str(host.state_dir)], check=False)


def _on_a_full_disk(host: NodeHost) -> None:
    host.start()
    rules = pb.SetGuardRequest(
        request_id="rules", term=1, watts_floor=pb.WattsFloorRule(enabled=True, limit_w=300.0), reason="test"
    )
    host.stub.SetGuard(rules, timeout=10)
    host.lock([0], 990)
    ballast = host.state_dir / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass
    (result,) = host.lock([1], 990)
    assert result.code == pb.CONTROL_CODE_JOURNAL_FAILED
    assert host.locks() == [(990, 990), None]
    # An emergency does not wait for the disk.
    host.stub.TripGuard(pb.TripGuardRequest(request_id="trip", trip=True, reason="test"), timeout=10)
    assert [host.gpus.observe(index).power_limit_w for index in range(2)] == [300.0, 300.0]
    host.kill()
    host.restore()
    assert host.locks() == [None, None]  # unlocking needs no room
    ballast.unlink()
    host.start()
    assert host.lock([1], 990)[0].code == pb.CONTROL_CODE_APPLIED
    assert host.terminate() == 0
    assert host.locks() == [None, None]


def test_an_emergency_while_one_gpu_hangs(host: NodeHost) -> None:
    rules = pb.SetGuardRequest(
        request_id="rules", term=1, watts_floor=pb.WattsFloorRule(enabled=True, limit_w=300.0), reason="test"
    )
    host.stub.SetGuard(rules, timeout=10)
    host.gpus.hang(2, Calls.ALL)
    host.stub.TripGuard(pb.TripGuardRequest(request_id="trip", trip=True, reason="test"), timeout=20)
    limits = [host.gpus.observe(index).power_limit_w for index in range(4)]
    assert limits == [300.0, 300.0, 700.0, 300.0]
    host.gpus.clear_fault(2)
    until(lambda: host.gpus.observe(2).power_limit_w == 300.0)  # as soon as it answers
    host.kill()
    host.start()
    assert [host.gpus.observe(index).power_limit_w for index in range(4)] == [300.0] * 4


def test_a_lost_heartbeat_caps_the_node_without_anybody(host: NodeHost) -> None:
    floor = pb.WattsFloorRule(enabled=True, limit_w=300.0, heartbeat_age_s=0.5)
    host.stub.SetGuard(pb.SetGuardRequest(request_id="rules", term=1, watts_floor=floor, reason="test"), timeout=10)
    for _ in range(5):
        host.lock([0], 990)
        time.sleep(0.2)
    assert not host.stub.GetGuard(pb.GetGuardRequest(), timeout=10).status.floor_tripped
    until(lambda: [host.gpus.observe(index).power_limit_w for index in range(4)] == [300.0] * 4)
    status = host.stub.GetGuard(pb.GetGuardRequest(), timeout=10).status
    assert status.last_act == "watts floor tripped: no controller has called for 0.5 s"


def _write_limit(host: NodeHost, gpu: int, watts: float) -> None:
    handle = f"pynvml.nvmlDeviceGetHandleByIndex({gpu})"
    _nvml(host, f"pynvml.nvmlDeviceSetPowerManagementLimit({handle}, {round(watts * 1000)})")


def _nvml(host: NodeHost, call: str) -> None:
    """Another NVML client on the host."""
    import sys

    code = f"import pynvml; pynvml.nvmlInit(); {call}"
    subprocess.run([sys.executable, "-c", code], env=host.environment, check=True, timeout=30)
