"""The processes of one fleet on this machine, and the configuration each of them gets.

Two emulated GPU hosts with an agent each, a controller with a database, a gateway. Everything is configured by files
like those of a real fleet, written to the run's folder; only periods and engine start times are shortened.
"""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigModel
from common.config_sample import to_toml
from common.errors import EXIT_ALREADY_RUNNING, UserError
from controller.config import (
    AgentAddress,
    ControllerConfig,
    KnobsConfig,
    LeaseConfig,
    PeriodsConfig,
    PlanningConfig,
    StalenessConfig,
)
from controller.gateway.config import GatewayConfig
from controller.store.engine import open_engine
from controller.store.migrate import upgrade
from nodeagent.config import EngineConfig, ListenConfig, MetricsConfig, NodeAgentConfig, TelemetryConfig
from simulator.demo.supervisor import Part
from simulator.host.nvml.build import ensure_library
from simulator.host.nvml.state import STATE_VARIABLE, Board, HostState
from simulator.host.vllm import PHYSICS_VARIABLE, START_VARIABLE
from simulator.physics import Physics

HOSTS = 2
GPUS_PER_HOST = 8
MODEL = "llama-70b"

# What is shortened for a demonstration of minutes, in seconds; production's defaults are 1800, 300, 5 and 20, and an
# engine takes one to five minutes to start.
PERIODS = PeriodsConfig(cluster_s=20.0, pool_s=5.0, instance_s=1.0)
LEASE = LeaseConfig(ttl_s=4.0, rpc_deadline_s=0.8)
ENGINE_START_S = 3.0
FORECAST_HALF_LIFE_S = 25.0  # production: 300
STALENESS = StalenessConfig(stale_s=3.0, lost_s=12.0, hold_s=60.0, load_window_s=5.0)

CONTROL = KnobsConfig()
STATIC = KnobsConfig(pools=False, instances=False, sharding=False, clocks=False, standby=False)


@dataclass(frozen=True)
class Host:
    """One emulated GPU host."""

    node_id: str
    agent: str  # gRPC address
    gpus: Path  # state file that stands for its GPUs
    config: Path
    state_dir: Path


@dataclass(frozen=True)
class Fleet:
    """A fleet that is configured and ready to be started."""

    name: str
    folder: Path
    hosts: tuple[Host, ...]
    controller: str  # gRPC address
    gateway: str  # http://host:port
    database: Path
    parts: tuple[Part, ...]

    @property
    def agents(self) -> Mapping[str, str]:
        return {host.node_id: host.agent for host in self.hosts}


def lay_out(
    name: str,
    folder: Path,
    profile: Path,
    physics: str,
    knobs: KnobsConfig,
    initial_rps: Mapping[str, float],
    gateway_port: int = 0,
) -> Fleet:
    """Writes every file of a fleet under `folder`: GPU state, configurations, an empty database.

    Raises UserError when something cannot be made (no compiler, no permission, the gateway's port in use).
    """
    library = ensure_library()
    logs = folder / "logs"
    logs.mkdir(parents=True)
    ports = free_ports(HOSTS + 2, gateway_port)
    environment = {"LD_LIBRARY_PATH": str(library)}
    hosts, parts = [], []
    for number in range(HOSTS):
        host = _make_host(f"host-{number + 1}", folder, ports[number + 2], physics)
        hosts.append(host)
        parts.append(
            Part(
                name=f"agent-{host.node_id}",
                command=_program("dynamollm-nodeagent", "run", host.config),
                log=logs / f"agent-{host.node_id}.log",
                environment={**environment, STATE_VARIABLE: str(host.gpus)},
                after_death=_program("dynamollm-nodeagent", "restore", host.config),
            )
        )
    database = folder / "dynamollm.db"
    url = f"sqlite:///{database}"
    engine = open_engine(url, create=True)
    upgrade(engine)
    engine.dispose()
    controller, gateway = f"127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[0]}"
    controller_file, gateway_file = folder / "controller.toml", folder / "gateway.toml"
    _write(
        controller_file,
        ControllerConfig(
            controller_id="demo",
            listen=controller,
            database_url=url,
            spool_dir=folder / "spool",
            profile=profile,
            model=MODEL,
            telemetry_interval_s=0.5,
            telemetry_window_s=10.0,
            agents=[AgentAddress(node_id=host.node_id, address=host.agent) for host in hosts],
            periods=PERIODS,
            lease=LEASE,
            planning=PlanningConfig(
                forecast_half_life_s=FORECAST_HALF_LIFE_S,
                start_s=ENGINE_START_S,
                min_dwell_s=PERIODS.pool_s,
                gpus_per_node=GPUS_PER_HOST,
                initial_rps=dict(initial_rps),
            ),
            staleness=STALENESS,
            knobs=knobs,
        ),
    )
    _write(gateway_file, GatewayConfig(gateway_id="demo", listen=gateway, controller=controller))
    parts.append(Part("controller", _program("dynamollm-controller", "run", controller_file), logs / "controller.log"))
    parts.append(Part("gateway", _program("dynamollm-gateway", "run", gateway_file), logs / "gateway.log"))
    return Fleet(name, folder, tuple(hosts), controller, f"http://{gateway}", database, tuple(parts))


def _make_host(node_id: str, folder: Path, port: int, physics: str) -> Host:
    home = folder / node_id
    home.mkdir()
    host = Host(node_id, f"127.0.0.1:{port}", home / "gpus", home / "nodeagent.toml", home / "agent")
    twin = Physics.from_text(physics)
    # What a GPU draws without work follows from the same physics as what the engines make it draw.
    board = Board(
        power_bare_w=twin.idle_w(twin.clocks_mhz[0], context=False),
        idle_power_w=[(mhz, twin.idle_w(mhz, context=True)) for mhz in twin.clocks_mhz],
    )
    HostState.create(host.gpus, GPUS_PER_HOST, node=node_id, board=board).close()
    _write(
        host.config,
        NodeAgentConfig(
            node_id=node_id,
            state_dir=host.state_dir,
            listen=ListenConfig(unix_socket="", tcp=host.agent),
            telemetry=TelemetryConfig(interval_s=0.25),
            engine=EngineConfig(
                launcher="process",
                command=(sys.executable, "-m", "simulator.host.vllm"),
                env={START_VARIABLE: str(ENGINE_START_S), PHYSICS_VARIABLE: physics},
            ),
            metrics=MetricsConfig(listen=""),
        ),
    )
    return host


def _program(name: str, verb: str, config: Path) -> Sequence[str]:
    """The installed command, as a service unit would run it."""
    return (str(Path(sys.executable).with_name(name)), verb, "--config", str(config))


def _write(path: Path, config: ConfigModel) -> None:
    path.write_text(to_toml(config, comments=False), encoding="utf-8")


# Below the range from which the kernel takes ports for outgoing connections: the port of a part that is being
# restarted must not be taken by a neighbour's connection.
_PORTS = range(20_000, 32_000)


def free_ports(count: int, first: int = 0) -> list[int]:
    """Different TCP ports of the loopback interface that nobody listens on; `first`, if not 0, is the first of them.

    Raises UserError when `first` is in use.
    """
    ports = []
    if first:
        if not _is_free(first):
            raise UserError(
                f"--port {first}: the port is in use.",
                "Choose another, or leave it out for any free one.",
                EXIT_ALREADY_RUNNING,
            )
        ports.append(first)
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            return ports
        if port != first and _is_free(port):
            ports.append(port)
    raise UserError("No free TCP port between 20000 and 32000.", "Stop what uses them.", EXIT_ALREADY_RUNNING)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
