"""A whole fleet on a network of its own (tests/netlab.py): Postgres, two controllers, four emulated hosts, one gateway.

    with NetRig(folder) as rig:
        rig.start("a"); rig.start("b")
        rig.ask_always()                    # requests through the gateway from then on, each must be answered
        rig.cable["host-1"].unplug()

Every program is the real one and speaks mutual TLS. The test watches the hosts past the network: GPUs through their
NVML state, agents through their unix sockets, which no pulled cable cuts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import httpx

from common.config_sample import to_toml
from common.tls import ClientTls
from controller.config import AgentAddress, ControllerConfig, PlanningConfig, ServerTls
from controller.gateway.config import GatewayConfig
from controller.store import migrate
from controller.store.engine import open_engine
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import controller_pb2_grpc as rpc
from dynamollm.v1 import node_agent_pb2 as agent_pb
from dynamollm.v1 import node_agent_pb2_grpc as agent_rpc
from dynamollm.v1 import types_pb2 as types
from nodeagent.config import (
    EngineConfig,
    ListenConfig,
    MetricsConfig,
    NodeAgentConfig,
    SecurityConfig,
    TelemetryConfig,
)
from simulator.demo.fleet import ENGINE_START_S, GPUS_PER_HOST, LEASE, MODEL, PERIODS, STALENESS, free_ports
from simulator.host.nvml.build import ensure_library
from simulator.host.nvml.state import STATE_VARIABLE, Board, HostState
from simulator.host.vllm import PHYSICS_VARIABLE, START_VARIABLE
from simulator.physics import Physics
from tests.certificates import Authority, Pair
from tests.netlab import Namespace, NetLab
from tests.pg import Postgres
from tests.synthetic_profile import synthetic_profile

HOSTS = 4
AGENT_PORT, CONTROLLER_PORT = 7701, 7700
AGENT_NAME, CONTROLLER_NAME = "agent.fleet", "controller.fleet"
PATIENCE_S = 30.0
ANSWERS = (200, 429, 502, 503)  # an answer, or a clear error


@dataclass
class Controller:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    address: str
    began: int  # where its log began

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[self.began :]


@dataclass
class HostNow:
    """One host as it is, whatever its cable does."""

    term: int
    locked: set[str]  # GPUs, as every NVML client sees them
    leased: set[str]  # GPUs with a clock lock whose lease lives
    owners: dict[str, list[str]]  # GPU -> instances that hold it


class NetRig:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: list[str] = []
        self.answers: Counter[int] = Counter()
        self.unanswered: list[str] = []
        self.not_served_s: list[float] = []  # when
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._terms: dict[str, int] = {}
        # Paths of unix sockets must be short.
        self._sockets = Path(tempfile.mkdtemp(prefix="dl-"))
        self.lab = NetLab()
        try:
            self.cable = {name: self.lab.host(name) for name in ("db", "a", "b", *self.host_names)}
            self._authority = Authority(folder / "pki")
            self.tls = self._client("operator")
            self.server = Postgres(self.cable["db"].enter, self.cable["db"].address)
            self.database_url = self.server.new_database()
            engine = open_engine(self.database_url)
            migrate.upgrade(engine)
            engine.dispose()
            for name in self.host_names:
                self._start_agent(name)
            self._write_controllers()
            self._start_gateway()
        except BaseException:
            self.close()
            raise

    host_names = tuple(f"host-{number + 1}" for number in range(HOSTS))

    # ------------------------------------------------------------------------------------------------ its parts

    def _client(self, name: str) -> ClientTls:
        return _tls(self._authority, self._authority.issue(name))

    def _start_agent(self, name: str) -> None:
        cable, home = self.cable[name], self.folder / name
        home.mkdir()
        twin = Physics.from_text("base")
        board = Board(
            power_bare_w=twin.idle_w(twin.clocks_mhz[0], context=False),
            idle_power_w=[(mhz, twin.idle_w(mhz, context=True)) for mhz in twin.clocks_mhz],
        )
        HostState.create(home / "gpus", GPUS_PER_HOST, node=name, board=board).close()
        own = self._authority.issue(name, f"DNS:{AGENT_NAME}")
        config = NodeAgentConfig(
            node_id=name,
            state_dir=home / "agent",
            listen=ListenConfig(
                unix_socket=str(self._sockets / name),
                tls_cert=str(own.cert),
                tls_key=str(own.key),
                tls_client_ca=str(self._authority.pair.cert),
                tcp=f"{cable.address}:{AGENT_PORT}",
            ),
            security=SecurityConfig(scopes={"a": "control", "b": "control"}),
            telemetry=TelemetryConfig(interval_s=0.5),
            engine=EngineConfig(
                launcher="process",
                command=(sys.executable, "-m", "simulator.host.vllm"),
                env={START_VARIABLE: str(ENGINE_START_S), PHYSICS_VARIABLE: "base"},
                listen_host=cable.address,
            ),
            metrics=MetricsConfig(listen=""),
        )
        (home / "nodeagent.toml").write_text(to_toml(config, comments=False), encoding="utf-8")
        environment = {"LD_LIBRARY_PATH": str(ensure_library()), STATE_VARIABLE: str(home / "gpus")}
        command = [*cable.enter, _program("dynamollm-nodeagent"), "run", "--config", str(home / "nodeagent.toml")]
        self._run(command, home / "log", environment)

    def _write_controllers(self) -> None:
        profile = self.folder / "profile.json"
        profile.write_text(replace(synthetic_profile(), model=MODEL).to_json(), encoding="utf-8")
        for name in ("a", "b"):
            own = self._authority.issue(f"controller-{name}", f"DNS:{CONTROLLER_NAME}")
            config = ControllerConfig(
                controller_id=name,
                listen=f"{self.cable[name].address}:{CONTROLLER_PORT}",
                database_url=self.database_url,
                spool_dir=self.folder / f"spool-{name}",
                profile=profile,
                model=MODEL,
                telemetry_interval_s=0.5,
                telemetry_window_s=10.0,
                agents=[
                    AgentAddress(node_id=host, address=f"{self.cable[host].address}:{AGENT_PORT}", tls_name=AGENT_NAME)
                    for host in self.host_names
                ],
                agent_tls=self._client(name),
                tls=ServerTls(
                    cert=str(own.cert),
                    key=str(own.key),
                    client_ca=str(self._authority.pair.cert),
                    scopes={"operator": "admin", "gateway": "control"},
                ),
                periods=PERIODS,
                lease=LEASE,
                planning=PlanningConfig(
                    forecast_half_life_s=10.0,
                    start_s=ENGINE_START_S,
                    min_dwell_s=PERIODS.pool_s,
                    gpus_per_node=GPUS_PER_HOST,
                    # Enough for an instance on more than one host.
                    initial_rps={"MS": 6.0, "LM": 5.0},
                ),
                staleness=STALENESS,
            )
            (self.folder / f"{name}.toml").write_text(to_toml(config, comments=False), encoding="utf-8")

    def _start_gateway(self) -> None:
        (port,) = free_ports(1)
        self.gateway = f"http://127.0.0.1:{port}"
        config = GatewayConfig(
            gateway_id="g",
            listen=f"127.0.0.1:{port}",
            controller=f"ipv4:{self.address('a')},{self.address('b')}",
            controller_tls=self._client("gateway"),
            controller_tls_name=CONTROLLER_NAME,
        )
        (self.folder / "gateway.toml").write_text(to_toml(config, comments=False), encoding="utf-8")
        self._run(
            [_program("dynamollm-gateway"), "run", "--config", str(self.folder / "gateway.toml")],
            self.folder / "gateway.log",
        )

    def start(self, name: str) -> Controller:
        log = self.folder / f"{name}.log"
        began = log.stat().st_size if log.exists() else 0
        command = [*self.cable[name].enter, _program("dynamollm-controller"), "run"]
        process = self._run([*command, "--config", str(self.folder / f"{name}.toml")], log)
        return Controller(name, process, log, self.address(name), began)

    def address(self, name: str) -> str:
        return f"{self.cable[name].address}:{CONTROLLER_PORT}"

    def _run(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, **(environment or {})}, start_new_session=True
            )
        self._processes.append(process)
        return process

    # -------------------------------------------------------------------------------------------- what one sees

    def status(self, controller: Controller, deadline_s: float = 1.0) -> pb.GetStatusResponse | None:
        """None while it does not answer."""
        with grpc_channel(controller.address, self.tls) as channel:
            try:
                answer: pb.GetStatusResponse = rpc.ControllerStub(channel).GetStatus(
                    pb.GetStatusRequest(), timeout=deadline_s
                )
            except grpc.RpcError:
                return None
            return answer

    def ready_on(self, controller: Controller) -> set[str]:
        """Hosts on which instances serve, as the controller sees them."""
        status = self.status(controller)
        if status is None:
            return set()
        return {i.node_id for pool in status.pools for i in pool.instances if i.state == types.INSTANCE_STATE_READY}

    def now(self, name: str) -> HostNow:
        with grpc.insecure_channel(f"unix:{self._sockets / name}") as channel:
            stub = agent_rpc.NodeAgentStub(channel)
            term = stub.GetNode(agent_pb.GetNodeRequest(), timeout=5).term
            held = stub.ListControls(agent_pb.ListControlsRequest(), timeout=5).controls
            listed = stub.ListInstances(agent_pb.ListInstancesRequest(), timeout=5).instances
        owners: dict[str, list[str]] = {}
        for instance in listed:
            if instance.state not in (types.INSTANCE_STATE_STOPPED, types.INSTANCE_STATE_FAILED):
                for uuid in instance.spec.gpu_uuids:
                    owners.setdefault(uuid, []).append(instance.spec.instance_id)
        leased = {c.control.gpu_uuid for c in held if c.control.HasField("clock_lock") and c.remaining_s > 0}
        return HostNow(term, self.locked(name), leased, owners)

    def locked(self, name: str) -> set[str]:
        state = HostState.open(self.folder / name / "gpus")
        try:
            views = [state.observe(i) for i in range(state.gpu_count)]
        finally:
            state.close()
        return {view.uuid for view in views if view.lock_mhz is not None}

    def all_locked(self) -> set[str]:
        return {uuid for name in self.host_names for uuid in self.locked(name)}

    # ------------------------------------------------------------------------------------------ what must hold

    def watch_always(self) -> None:
        """The invariants of the hosts, several times a second, until the end."""
        self._thread(self._watch)

    def _watch(self) -> None:
        bare_since_s: dict[tuple[str, str], float] = {}  # host and GPU that is locked without a lease
        while not self._ended.wait(0.25):
            for name in self.host_names:
                try:
                    now = self.now(name)
                except grpc.RpcError as error:
                    self.broken.append(f"{name}: its agent does not answer: {error}")
                    return
                if now.term < self._terms.get(name, 0):
                    self.broken.append(f"{name}: went back to term {now.term} from {self._terms[name]}")
                self._terms[name] = now.term
                self.broken += [f"{name}: {u} belongs to {o}" for u, o in now.owners.items() if len(o) > 1]
                bare = {(name, uuid) for uuid in now.locked - now.leased}
                bare_since_s = {k: v for k, v in bare_since_s.items() if k[0] != name or k in bare}
                for key in bare:
                    # The two were not read at the same instant.
                    if time.monotonic() - bare_since_s.setdefault(key, time.monotonic()) > 1.0:
                        self.broken.append(f"{name}: {key[1]} is locked without a lease")

    def ask_always(self, in_parallel: int = 4) -> None:
        """Requests through the gateway, one after the other from each of some clients."""
        for number in range(in_parallel):
            self._thread(self._ask, number)

    def _ask(self, number: int) -> None:
        body = {"model": MODEL, "prompt": f"client {number} " + "word " * 300, "max_tokens": 20}
        with httpx.Client(base_url=self.gateway, timeout=PATIENCE_S) as client:
            while not self._ended.wait(0.1):
                began_s = time.monotonic()
                try:
                    status = client.post("/v1/completions", json=body).status_code
                except httpx.HTTPError as error:
                    self.unanswered.append(f"after {time.monotonic() - began_s:.1f} s: {error!r}")
                    continue
                self.answers[status] += 1
                if status != 200:
                    self.not_served_s.append(time.monotonic())
                    time.sleep(0.5)

    def _thread(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def wait(self, condition: Callable[[], Any], timeout_s: float, what: str) -> float:
        """Seconds that it took."""
        began_s = time.monotonic()
        while not condition():
            assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s:g} s: {what}\n{self.logs()}"
            time.sleep(0.05)
        return time.monotonic() - began_s

    def logs(self) -> str:
        files = [self.folder / f"{name}.log" for name in ("a", "b", "gateway")]
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-2500:]}" for f in files if f.exists())

    # ------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE_S + 5)
        engines = self._engines()
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(10)
        for pid in engines:  # they outlive their agents, on purpose
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if hasattr(self, "server"):
            self.server.close()
        self.lab.close()
        for socket in self._sockets.iterdir():
            socket.unlink()
        self._sockets.rmdir()

    def _engines(self) -> list[int]:
        found: list[int] = []
        for name in self.host_names:
            with grpc.insecure_channel(f"unix:{self._sockets / name}") as channel:
                try:
                    stub = agent_rpc.NodeAgentStub(channel)
                    listed = stub.ListInstances(agent_pb.ListInstancesRequest(), timeout=2).instances
                except grpc.RpcError:
                    continue
                found += [instance.pid for instance in listed if instance.pid]
        return found

    def __enter__(self) -> NetRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def grpc_channel(address: str, tls: ClientTls) -> Any:
    credentials = grpc.ssl_channel_credentials(*(Path(p).read_bytes() for p in (tls.ca, tls.key, tls.cert)))
    return grpc.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", CONTROLLER_NAME)])


def _tls(authority: Authority, own: Pair) -> ClientTls:
    return ClientTls(ca=str(authority.pair.cert), cert=str(own.cert), key=str(own.key))


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


__all__ = ["ANSWERS", "Controller", "HostNow", "Namespace", "NetRig"]
