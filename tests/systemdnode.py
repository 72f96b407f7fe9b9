"""A machine with a real systemd and the node agent installed on it, over emulated GPUs that live outside.

with installed(shared, engine={...}) as node:
    node.launch("a", [0, 1])
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil

from common.config_sample import to_toml
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types
from nodeagent.config import NodeAgentConfig
from simulator.host.nvml.build import ensure_library
from simulator.host.nvml.state import STATE_VARIABLE, HostState
from tests.nodehost import MODEL, until
from tests.realsystemd import Machine, unseen

TOP = Path(__file__).parents[1]
INSTALL = ("env", f"PYTHON={sys.executable}", str(TOP / "scripts" / "install-node"))
AGENT = "dynamollm-nodeagent.service"
SOCKET = "/run/dynamollm/nodeagent.sock"
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
        # The pid first: right after a kill the unit still counts as active, and the dead agent's socket is there.
        return (
            self.main_pid() not in (0, other_than)
            and self.machine.show(AGENT, "ActiveState") == "active"
            and Path(self.machine.path(SOCKET)).exists()
        )

    def launch(self, name: str, gpus: Sequence[int], model: str = MODEL) -> None:
        spec = types.InstanceSpec(instance_id=name, model=model, gpu_uuids=[self.gpus.uuids[gpu] for gpu in gpus])
        self.stub.StartInstance(pb.StartInstanceRequest(**self.request(), spec=spec), timeout=30)

    def instance(self, name: str) -> types.Instance:
        listed = self.stub.ListInstances(pb.ListInstancesRequest(), timeout=10, wait_for_ready=True).instances
        return next(instance for instance in listed if instance.spec.instance_id == name)

    def wait_state(self, name: str, state: int, timeout_s: float = 40) -> types.Instance:
        ended = {types.INSTANCE_STATE_FAILED, types.INSTANCE_STATE_STOPPED} - {state}

        def reached() -> bool:
            found = self.instance(name)
            assert found.state not in ended, found
            return found.state == state

        until(reached, timeout_s, lambda: f"{self.instance(name)}{self.journal()}")
        return self.instance(name)

    def journal(self) -> str:
        return self.machine.journal(AGENT)


@contextmanager
def installed(
    shared: Path, engine: Mapping[str, Any], mounts: Sequence[Path] = (), watchdog_s: int = 5
) -> Iterator[Node]:
    """Boots a machine, installs the agent with its own script, and waits until it serves.

    `engine` is the section of its configuration; `mounts` are further folders of this host that it needs.
    """
    gpus = HostState.create(shared / "gpus", GPUS)
    seen = {
        STATE_VARIABLE: "/srv/test/gpus",
        "LD_LIBRARY_PATH": str(ensure_library()),
        "DYNAMOLLM_EMULATED_START_S": "0.3",
    }
    # What a drop-in would do on a real host for its own folders. The interpreter of these tests may lie in a home.
    needs = [TOP, Path(sys.prefix), Path(sys.base_prefix), ensure_library(), *mounts]
    environment = "".join(f"Environment={name}={value}\n" for name, value in seen.items())
    # The agent has a /tmp of its own, in which a checkout of the machine's /tmp does not show.
    bound = "".join(f"BindReadOnlyPaths={path}\n" for path in unseen(needs))
    (shared / "agent.conf").write_text(
        f"[Service]\n{environment}{bound}ReadWritePaths=/srv/test\nWatchdogSec={watchdog_s}\n"
    )
    (shared / "engine.conf").write_text("[Service]\nReadWritePaths=/srv/test\nUser=root\nGroup=root\nPrivateTmp=no\n")
    settings = dict(engine) | {"env": seen | dict(engine.get("env", {})), "drain_interval_s": 0.05}
    config = NodeAgentConfig.model_validate({"node_id": "node-0", "engine": settings})
    (shared / "nodeagent.toml").write_text(to_toml(config, comments=False))
    with Machine(shared, needs) as machine:
        machine.run("mkdir", "-p", "/etc/dynamollm")
        machine.run("cp", "/srv/test/nodeagent.toml", "/etc/dynamollm/nodeagent.toml")
        for name, source in ((AGENT, "agent.conf"), ("dynamollm-vllm@.service", "engine.conf")):
            machine.run("mkdir", "-p", f"/etc/systemd/system/{name}.d")
            machine.run("cp", f"/srv/test/{source}", f"/etc/systemd/system/{name}.d/site.conf")
        node = Node(machine, gpus)
        done = machine.run(*INSTALL, "install", "--linked", check=False)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{node.journal()}"
        yield node
