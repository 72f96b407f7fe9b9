"""Real controllers over real agents on emulated hosts, without a gateway: the test reports the load itself.

    with ControllerRig(folder, database_url) as rig:
        leader = rig.start("a")
        rig.serve_load(2.0)              # requests/s, reported once a second from then on
        rig.wait(lambda: rig.ready(leader), 30, "an instance is ready")

Periods are those of the demonstration: 20 s, 5 s, 1 s; an engine starts in 3 s.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from controller.domain.reasons import Mode
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import controller_pb2_grpc as rpc
from dynamollm.v1 import node_agent_pb2 as agent_pb
from dynamollm.v1 import node_agent_pb2_grpc as agent_rpc
from dynamollm.v1 import types_pb2 as types
from simulator.demo.fleet import CONTROL, MODEL, Fleet, free_ports, lay_out
from simulator.host.nvml.state import HostState
from tests.synthetic_profile import synthetic_profile

DEADLINE_S = 5.0


@dataclass
class Controller:
    """One controller process."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def call(self, method: str, request: Any, deadline_s: float = DEADLINE_S) -> Any:
        with grpc.insecure_channel(self.address) as channel:
            return getattr(rpc.ControllerStub(channel), method)(request, timeout=deadline_s)

    def status(self) -> pb.GetStatusResponse | None:
        """None while it does not answer."""
        try:
            answer: pb.GetStatusResponse = self.call("GetStatus", pb.GetStatusRequest(), 1.0)
        except grpc.RpcError:
            return None
        return answer

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class ControllerRig:
    """Agents on two emulated hosts, and as many controllers as are started."""

    def __init__(self, folder: Path, database_url: str = "") -> None:
        self.folder = folder
        profile = folder / "profile.json"
        profile.write_text(replace(synthetic_profile(), model=MODEL).to_json(), encoding="utf-8")
        self.fleet: Fleet = lay_out("rig", folder / "fleet", profile, "base", CONTROL, {"MS": 1.0, "LM": 0.5})
        self.database_url = database_url or f"sqlite:///{self.fleet.database}"
        self._config = self.fleet.folder / "controller.toml"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._controllers: dict[str, Controller] = {}
        self._load: threading.Thread | None = None
        self._ended = threading.Event()
        self._arrived = 0.0
        self.agents: dict[str, subprocess.Popen[bytes]] = {}  # by node
        self.agent_metrics = {h.node_id: f"127.0.0.1:{p}" for h, p in zip(self.fleet.hosts, free_ports(2), strict=True)}
        for host in self.fleet.hosts:
            self.start_agent(host.node_id)

    def start_agent(self, node_id: str) -> None:
        part = next(part for part in self.fleet.parts if part.name == f"agent-{node_id}")
        with part.log.open("ab") as log:
            settings = {
                "DYNAMOLLM_NODEAGENT__METRICS__LISTEN": self.agent_metrics[node_id],
                "DYNAMOLLM_NODEAGENT__SECURITY__LOOPBACK_SCOPE": "admin",  # tests act as operators too
            }
            environment = {**os.environ, **settings, **part.environment}
            process = subprocess.Popen(part.command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.agents[node_id] = process
        self._processes.append(process)

    # ---------------------------------------------------------------------------------------------- controllers

    def start(self, name: str, *, spool: str = "", **settings: str) -> Controller:
        """`settings` go into the environment: DYNAMOLLM_CONTROLLER__NAME."""
        (port,) = free_ports(1)
        log = self.folder / f"{name}.log"
        environment = {
            "DYNAMOLLM_CONTROLLER__CONTROLLER_ID": name,
            "DYNAMOLLM_CONTROLLER__DATABASE_URL": self.database_url,
            "DYNAMOLLM_CONTROLLER__SPOOL_DIR": str(self.folder / (spool or f"spool-{name}")),
            **{f"DYNAMOLLM_CONTROLLER__{key.upper()}": value for key, value in settings.items()},
        }
        command = [str(Path(sys.executable).with_name("dynamollm-controller")), "run", "--config", str(self._config)]
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*command, "--listen", f"127.0.0.1:{port}"],
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._processes.append(process)
        controller = Controller(name, f"127.0.0.1:{port}", process, log)
        self._controllers[name] = controller
        return controller

    def start_gateway(self, controller: Controller) -> str:
        """The fleet's gateway in front of it; returns its address."""
        part = next(part for part in self.fleet.parts if part.name == "gateway")
        environment = {**os.environ, **part.environment, "DYNAMOLLM_GATEWAY__CONTROLLER": controller.address}
        with part.log.open("ab") as log:
            self._processes.append(
                subprocess.Popen(part.command, stdout=log, stderr=log, env=environment, start_new_session=True)
            )
        return self.fleet.gateway.removeprefix("http://")

    def leaders(self) -> list[Controller]:
        """Those that answer: a standby does not listen."""
        return [c for c in self._controllers.values() if c.process.poll() is None and c.status() is not None]

    # ----------------------------------------------------------------------------------------------------- load

    def serve_load(self, rate_rps: float, every_s: float = 1.0) -> None:
        """Reports to every controller that listens, once a second, as one gateway that completes all in SLO."""

        def run() -> None:
            while not self._ended.wait(every_s):
                self._arrived += rate_rps * every_s
                done = int(self._arrived)
                request = pb.ReportLoadRequest(
                    gateway_id="test",
                    epoch="1",
                    classes=[
                        pb.ClassLoad(
                            model=MODEL,
                            request_class=name,
                            arrived=done,
                            completed=done,
                            in_slo=done,
                            input_tokens=500 * done,
                            output_tokens=150 * done,
                        )
                        for name in ("MS", "LM")
                    ],
                )
                for controller in list(self._controllers.values()):
                    if controller.process.poll() is None:
                        try:
                            controller.call("ReportLoad", request, 0.5)
                        except grpc.RpcError:
                            continue

        self._load = threading.Thread(target=run, daemon=True)
        self._load.start()

    # ------------------------------------------------------------------------------------------------- the hosts

    def locked(self) -> set[str]:
        """GPUs with a locked clock, as every NVML client sees them."""
        found = set()
        for host in self.fleet.hosts:
            state = HostState.open(host.gpus)
            try:
                found |= {
                    gpu.uuid for gpu in (state.observe(i) for i in range(state.gpu_count)) if gpu.lock_mhz is not None
                }
            finally:
                state.close()
        return found

    def instances(self) -> list[types.Instance]:
        found: list[types.Instance] = []
        for host in self.fleet.hosts:
            with grpc.insecure_channel(host.agent) as channel:
                stub = agent_rpc.NodeAgentStub(channel)
                found += stub.ListInstances(agent_pb.ListInstancesRequest(), timeout=DEADLINE_S).instances
        return found

    @staticmethod
    def ready(controller: Controller) -> int:
        """Instances that serve, as the controller sees them."""
        status = controller.status()
        if status is None:
            return 0
        return sum(i.state == types.INSTANCE_STATE_READY for pool in status.pools for i in pool.instances)

    @staticmethod
    def mode(controller: Controller) -> Mode | None:
        status = controller.status()
        return None if status is None else Mode(pb.Mode.Name(status.mode).removeprefix("MODE_").lower())

    def wait(self, condition: Callable[[], Any], timeout_s: float, what: str) -> float:
        """Seconds that it took."""
        began_s = time.monotonic()
        while not condition():
            logs = "\n".join(c.said[-1500:] for c in self._controllers.values())
            assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s:g} s: {what}\n{logs}"
            time.sleep(0.05)
        return time.monotonic() - began_s

    def __enter__(self) -> ControllerRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._load is not None:
            self._load.join(5)
        pids = [instance.pid for instance in self._instances_quietly() if instance.pid]
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(10)
        for pid in pids:  # engines outlive their agents, on purpose
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _instances_quietly(self) -> list[types.Instance]:
        try:
            return self.instances()
        except grpc.RpcError:
            return []
