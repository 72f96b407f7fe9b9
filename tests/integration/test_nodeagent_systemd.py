"""The agent under the real systemd as PID 1: install, start, stop, kill, watchdog, engines as units, remove.

The emulated GPUs live outside, so their clocks can be looked at whatever happens inside.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import psutil
import pytest

from common.config_sample import to_toml
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types
from nodeagent.config import NodeAgentConfig
from simulator.host.nvml.build import ensure_library
from simulator.host.nvml.state import STATE_VARIABLE, HostState
from tests.nodehost import MODEL, until
from tests.realsystemd import Machine, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no machine with systemd: it {missing()}")

TOP = Path(__file__).parents[2]
AGENT = "dynamollm-nodeagent.service"
SOCKET = "/run/dynamollm/nodeagent.sock"
READY, FAILED, STOPPED = (
    types.INSTANCE_STATE_READY,
    types.INSTANCE_STATE_FAILED,
    types.INSTANCE_STATE_STOPPED,
)
GPUS = 4


class Node:
    """A machine with the agent installed, and its GPUs."""

    def __init__(self, machine: Machine, gpus: HostState) -> None:
        self.machine = machine
        self.gpus = gpus
        self._ids = itertools.count()

    @property
    def stub(self) -> rpc.NodeAgentStub:
        return rpc.NodeAgentStub(grpc.insecure_channel(f"unix:{self.machine.path(SOCKET)}"))

    def request(self) -> dict[str, object]:
        return {"request_id": f"{os.getpid()}-{next(self._ids)}", "term": 1, "reason": "test"}

    def locks(self) -> list[tuple[int, int] | None]:
        # Not `observe`: it would take processes of the other pid namespace for dead and drop them.
        return [self.gpus.lock(index) for index in range(GPUS)]

    def lock(self, mhz: int = 990) -> None:
        lease = types.Lease(
            owner=types.Owner(kind=types.OWNER_KIND_CONTROLLER, name="ctl"), reason="test", ttl_s=100, term=1
        )
        lock = pb.ClockLock(min_mhz=mhz, max_mhz=mhz)
        controls = [pb.ControlRequest(gpu_uuid=uuid, clock_lock=lock) for uuid in self.gpus.uuids]
        request = pb.ApplyControlsRequest(request_id=str(next(self._ids)), lease=lease, controls=controls)
        results = self.stub.ApplyControls(request, timeout=10).results
        assert all(result.code == pb.CONTROL_CODE_APPLIED for result in results), results
        assert self.locks() == [(mhz, mhz)] * GPUS

    def main_pid(self) -> int:
        return int(self.machine.show(AGENT, "MainPID"))

    def outside(self, pid: int) -> int:
        """The pid by which this host knows a process of the machine."""
        for process in psutil.Process(self.machine.pid).children(recursive=True):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == str(pid):
                return process.pid
        raise AssertionError(f"no process {pid} in the machine")

    def serves(self, other_than: int = 0) -> bool:
        return (
            self.machine.show(AGENT, "ActiveState") == "active"
            and self.main_pid() != other_than
            and Path(self.machine.path(SOCKET)).exists()
        )

    def launch(self, name: str, gpus: Sequence[int]) -> None:
        spec = types.InstanceSpec(instance_id=name, model=MODEL, gpu_uuids=[self.gpus.uuids[gpu] for gpu in gpus])
        self.stub.StartInstance(pb.StartInstanceRequest(**self.request(), spec=spec), timeout=30)

    def instance(self, name: str) -> types.Instance:
        listed = self.stub.ListInstances(pb.ListInstancesRequest(), timeout=10).instances
        return next(instance for instance in listed if instance.spec.instance_id == name)

    def wait_state(self, name: str, state: int) -> types.Instance:
        until(lambda: self.instance(name).state == state, 40, lambda: f"{self.instance(name)}{self.journal()}")
        return self.instance(name)

    def journal(self) -> str:
        return self.machine.journal(AGENT)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    shared = tmp_path_factory.mktemp("systemd")
    gpus = HostState.create(shared / "gpus", GPUS)
    seen = {
        STATE_VARIABLE: "/srv/test/gpus",
        "LD_LIBRARY_PATH": str(ensure_library()),
        "PYTHONPATH": f"{TOP}:{TOP}/proto",
        "DYNAMOLLM_EMULATED_START_S": "0.3",
    }
    engine = {"command": [sys.executable, "-m", "simulator.host.vllm"], "env": seen, "drain_interval_s": 0.05}
    config = NodeAgentConfig.model_validate({"node_id": "node-0", "engine": engine})
    # What a drop-in would do on a real host for its own folders.
    environment = "".join(f"Environment={name}={value}\n" for name, value in seen.items() if name != "PYTHONPATH")
    site = f"[Service]\n{environment}ReadWritePaths=/srv/test\n"
    (shared / "agent.conf").write_text(f"{site}WatchdogSec=3\n")
    (shared / "engine.conf").write_text("[Service]\nReadWritePaths=/srv/test\nUser=root\nGroup=root\n")
    (shared / "nodeagent.toml").write_text(to_toml(config, comments=False))
    own = tuple(path for path in (TOP, Path(sys.prefix)) if path.stat().st_dev != Path("/").stat().st_dev)
    with Machine(shared, own) as machine:
        machine.run("mkdir", "-p", "/etc/dynamollm")
        machine.run("cp", "/srv/test/nodeagent.toml", "/etc/dynamollm/nodeagent.toml")
        for name, source in ((AGENT, "agent.conf"), ("dynamollm-vllm@.service", "engine.conf")):
            machine.run("mkdir", "-p", f"/etc/systemd/system/{name}.d")
            machine.run("cp", f"/srv/test/{source}", f"/etc/systemd/system/{name}.d/site.conf")
        node = Node(machine, gpus)
        done = machine.run(
            "env", f"PYTHON={sys.executable}", str(TOP / "scripts" / "install-node"), "install", "--linked", check=False
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{node.journal()}"
        yield node


def test_installed_it_is_ready_and_only_its_group_may_talk_to_it(node: Node) -> None:
    assert node.serves()
    assert node.machine.show(AGENT, "StatusText").startswith("serving 4 GPUs")
    assert node.machine.run("stat", "-c", "%a %U %G", SOCKET).stdout.split() == ["660", "root", "dynamollm"]
    assert node.machine.show(AGENT, "UnitFileState") == "enabled"
    assert node.stub.GetNode(pb.GetNodeRequest(), timeout=10).node_id == "node-0"


def test_a_stop_restores_the_clocks(node: Node) -> None:
    node.lock()
    node.machine.run("systemctl", "stop", AGENT)
    assert node.locks() == [None] * GPUS
    assert node.machine.show(AGENT, "Result") == "success"
    node.machine.run("systemctl", "start", AGENT)  # returns at READY=1
    assert node.serves()


def test_a_killed_agent_leaves_no_clock_behind_and_comes_back(node: Node) -> None:
    node.lock()
    before = node.main_pid()
    node.machine.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", AGENT)
    until(lambda: node.locks() == [None] * GPUS)
    until(lambda: node.serves(other_than=before))
    assert int(node.machine.show(AGENT, "NRestarts")) >= 1


def test_a_stuck_agent_is_killed_by_the_watchdog(node: Node) -> None:
    node.lock()
    before = node.main_pid()
    os.kill(node.outside(before), signal.SIGSTOP)
    until(lambda: node.locks() == [None] * GPUS, 20)
    until(lambda: node.serves(other_than=before))
    assert "watchdog" in node.machine.run("journalctl", "-q", "--no-pager", "-u", AGENT).stdout.lower()


def test_engines_are_units_that_outlive_the_agent(node: Node) -> None:
    node.launch("a", [0, 1])
    first = node.wait_state("a", READY)
    unit = "dynamollm-vllm@a.service"
    assert int(node.machine.show(unit, "MainPID")) == first.pid
    assert node.machine.run("ps", "-o", "ppid=", "-p", str(first.pid)).stdout.strip() == "1"
    command = node.machine.run("cat", f"/proc/{first.pid}/cmdline").stdout.split("\0")
    assert command[:5] == [sys.executable, "-m", "simulator.host.vllm", "serve", MODEL]
    for way in (("restart",), ("kill", "--kill-whom=main", "-s", "KILL")):
        before = node.main_pid()
        node.machine.run("systemctl", *way, AGENT)
        until(lambda before=before: node.serves(other_than=before))  # type: ignore[misc] # bound here on purpose
        again = node.wait_state("a", READY)
        assert (again.pid, again.endpoint) == (first.pid, first.endpoint)


def test_an_engine_unit_is_restarted_with_other_gpus_then_drained_and_stopped(node: Node) -> None:
    first = node.instance("a").pid
    request = pb.RestartInstanceRequest(**node.request(), instance_id="a", gpu_uuids=node.gpus.uuids)
    begun = node.stub.RestartInstance(request, timeout=10)
    until(lambda: len(node.instance("a").spec.gpu_uuids) == GPUS, 40)
    after = node.wait_state("a", READY)
    assert begun.transaction_id in after.detail
    assert after.pid != first
    node.stub.DrainInstance(pb.DrainInstanceRequest(**node.request(), instance_id="a"), timeout=10)
    until(lambda: node.instance("a").detail.startswith("drained"))
    node.stub.StopInstance(pb.StopInstanceRequest(**node.request(), instance_id="a"), timeout=10)
    node.wait_state("a", STOPPED)
    assert node.machine.show("dynamollm-vllm@a.service", "ActiveState") == "inactive"


def test_an_engine_unit_that_dies_is_told_with_its_cause(node: Node) -> None:
    node.launch("b", [2, 3])
    pid = node.wait_state("b", READY).pid
    node.machine.run("kill", "-9", str(pid))
    assert "killed by signal 9" in node.wait_state("b", FAILED).detail
    node.launch("c", [2, 3])
    node.wait_state("c", READY)


def test_it_is_upgraded_under_running_engines_and_removed_only_without(node: Node) -> None:
    pid, agent = node.wait_state("c", READY).pid, node.main_pid()
    install = ("env", f"PYTHON={sys.executable}", str(TOP / "scripts" / "install-node"))
    assert "kept    /etc/dynamollm/nodeagent.toml" in node.machine.run(*install, "install", "--linked").stdout
    assert node.main_pid() != agent
    assert node.wait_state("c", READY).pid == pid
    refused = node.machine.run(*install, "remove", check=False)
    assert refused.returncode == 1
    assert "dynamollm-vllm@c.service" in refused.stderr
    assert node.serves()
    node.lock()
    node.machine.run(*install, "remove", "--force", "--purge")
    assert node.locks() == [None] * GPUS
    left = node.machine.run(
        "find", "/etc", "/usr/lib", "/usr/bin", "/usr/share", "/var/lib", "/run",
        *("-path", "*dynamollm*", "-not", "-path", "*.d/site.conf", "-not", "-path", "*service.d", "-xdev"),
        check=False,
    ).stdout.split()  # fmt: skip
    assert [path for path in left if str(TOP) not in path and "site-packages" not in path] == []
    assert node.machine.show(AGENT, "LoadState") == "not-found"
