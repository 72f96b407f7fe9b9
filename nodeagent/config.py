"""The agent's configuration, `/etc/dynamollm/nodeagent.toml`, as checked models.

Loaded by common/config.py (file < `DYNAMOLLM_NODEAGENT__…` < flag); `systemd/nodeagent.toml` is written from here.
"""

from __future__ import annotations

import ipaddress
import platform
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.config import ConfigModel

DEFAULT_PATH = Path("/etc/dynamollm/nodeagent.toml")
PART = "nodeagent"


def split_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` as host and port; ValueError with a reason otherwise."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ListenConfig(ConfigModel):
    """Where the gRPC API listens. At least one address is needed."""

    unix_socket: str = Field(
        default="/run/dynamollm/nodeagent.sock",
        description="Unix socket, created with mode 0660. Empty: none. At most 100 characters (a kernel limit).",
    )
    unix_group: str = Field(default="", description="Group that may use the socket. Empty: the agent's own group.")
    tls_cert: str = Field(default="", description="The agent's certificate for tcp, PEM. Renewals are taken up live.")
    tls_key: str = Field(default="", description="Its private key, PEM.")
    tls_client_ca: str = Field(
        default="", description="Authority whose client certificates are let in, PEM. What each may do: [security]."
    )
    tcp: str = Field(
        default="",
        description="HOST:PORT; beyond the loopback interface only with TLS. Port 0 takes a free one, see "
        "<state_dir>/listen. Empty: off.",
    )
    reflection: bool = Field(default=True, description="Let tools such as grpcurl ask for the API's definition.")

    @field_validator("unix_socket")
    @classmethod
    def _socket(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("must be an absolute path")
        if len(value) > 100:
            raise ValueError(f"is {len(value)} characters long; the kernel allows about 100")
        return value

    @field_validator("tcp")
    @classmethod
    def _tcp(cls, value: str, info: ValidationInfo) -> str:
        if value and not is_loopback(split_address(value)[0]) and not info.data.get("tls_cert"):
            raise ValueError(f"{value} is not a loopback address; without TLS the API is served on this machine only")
        return value

    @property
    def tls(self) -> bool:
        """Whether tcp is served over mutual TLS."""
        return bool(self.tls_cert)

    @model_validator(mode="after")
    def _secure(self) -> ListenConfig:
        given = [bool(value) for value in (self.tls_cert, self.tls_key, self.tls_client_ca)]
        if any(given) and not all(given):
            raise ValueError("tls_cert, tls_key and tls_client_ca belong together; set all of them or none")
        return self

    @model_validator(mode="after")
    def _somewhere(self) -> ListenConfig:
        if not self.unix_socket and not self.tcp:
            raise ValueError("neither unix_socket nor tcp is set; nobody could reach the agent")
        return self


ScopeName = Literal["none", "read", "control", "admin"]


class SecurityConfig(ConfigModel):
    """Who may do what. The unix socket may do everything; its mode and group guard it."""

    scopes: dict[str, ScopeName] = Field(
        default={},
        description="Scope by the name (CN) or alternative name (URI, DNS) of a client certificate: `read` looks, "
        "`control` is for controllers, `admin` for operators.",
    )
    default_scope: ScopeName = Field(
        default="none", description="Scope of a certificate of our authority that is not listed."
    )
    loopback_scope: ScopeName = Field(
        default="control", description="Scope of TCP callers on this machine where TLS is off: any local user."
    )
    audit_file: str = Field(
        default="", description="Every change and refused attempt, a JSON object a line. Empty: <state_dir>/audit.log."
    )
    audit_max_mib: int = Field(default=64, ge=1, le=10240, description="Size at which a new file begins; one is kept.")


class GuardConfig(ConfigModel):
    """The node's own emergency rules. The rules themselves come by SetGuard and are kept in the state directory."""

    trigger_file: str = Field(
        default="", description="While this file exists the watts floor trips, for scripts of a UPS or PDU. Empty: off."
    )

    @field_validator("trigger_file")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("must be an absolute path")
        return value


class GpuConfig(ConfigModel):
    """How the driver is called."""

    call_deadline_s: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="A driver call that takes longer makes its GPU `unresponsive`; the others work on.",
    )
    recovery_interval_s: float = Field(
        default=2.0, gt=0, le=600, description="How often a lost GPU is looked for again."
    )
    facts_interval_s: float = Field(
        default=10.0, gt=0, le=3600, description="How often MIG and persistence mode are read again."
    )


class ControlsConfig(ConfigModel):
    """What may be changed on a GPU, and for how long at most without a renewal."""

    clock_lock: bool = Field(default=True, description="Allow locking SM clocks. Safe state: unlocked.")
    memory_clock_lock: bool = Field(default=True, description="Allow locking memory clocks. Safe state: unlocked.")
    power_limit: bool = Field(
        default=True, description="Allow power limits. Safe state: the limit found before the first write."
    )
    max_ttl_controller_s: float = Field(default=120.0, gt=0, le=3600, description="Longest lease of a controller.")
    max_ttl_operator_s: float = Field(default=86400.0, gt=0, le=2_592_000, description="Longest lease of an operator.")
    restore_retry_s: float = Field(
        default=1.0, gt=0, le=60, description="Pause before a failed restore is tried again."
    )
    stop_deadline_s: float = Field(
        default=10.0,
        gt=0,
        le=300,
        description="How long a stop may take to restore all controls. Keep below TimeoutStopSec.",
    )


class TelemetryConfig(ConfigModel):
    """Sampling of GPUs, engines and host."""

    interval_s: float = Field(
        default=1.0, ge=0.05, le=60, description="Pace of the sampling loop; a stream that asks for less speeds it up."
    )
    queue_samples: int = Field(
        default=16, ge=1, le=10000, description="Samples kept for a slow reader before it loses the oldest."
    )
    history_samples: int = Field(
        default=120, ge=0, le=10000, description="Samples kept for readers that come late, about 25 kB each."
    )
    scrape_timeout_s: float = Field(
        default=0.5, gt=0, le=30, description="How long an engine may take to answer /metrics."
    )


class EngineConfig(ConfigModel):
    """How engine instances are started, watched and stopped."""

    launcher: Literal["auto", "process", "systemd"] = Field(
        default="auto",
        description="`systemd` runs every engine as a unit dynamollm-vllm@ID.service, `process` as a plain process; "
        "`auto` takes systemd when the agent itself is one of its services.",
    )
    command: tuple[str, ...] = Field(
        default=("vllm",),
        min_length=1,
        description="The engine's program; the agent appends `serve MODEL --tensor-parallel-size N --host H --port P`.",
    )
    args: tuple[str, ...] = Field(default=(), description="Arguments appended to every engine's command line.")
    env: dict[str, str] = Field(default={}, description="Environment added to the agent's own for every engine.")
    model_paths: dict[str, str] = Field(
        default={},
        description="Where a model's files lie, by model name; a model not named here is passed on as it is.",
    )
    listen_host: str = Field(default="127.0.0.1", description="Address the engines listen on.")
    advertise_host: str = Field(default="", description="Host name others reach the engines by. Empty: listen_host.")
    first_port: int = Field(
        default=0,
        ge=0,
        le=65000,
        description="Engines take the first free port from here on; 0: any free port of the kernel's.",
    )
    port_count: int = Field(default=64, ge=1, le=4096, description="How many ports from first_port on may be used.")
    log_dir: str = Field(default="", description="Where each instance's output is written. Empty: <state_dir>/logs.")
    start_timeout_s: float = Field(default=900.0, gt=0, description="From launch to the first good answer of /health.")
    warmup_timeout_s: float = Field(default=180.0, gt=0, description="How long the warm-up request may take.")
    warmup_tokens: int = Field(default=8, ge=1, le=4096, description="Tokens asked for by the warm-up request.")
    poll_interval_s: float = Field(
        default=0.25, gt=0, le=1, description="How often processes are looked at: a death is noticed within this time."
    )
    drain_scrapes: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Consecutive scrapes without running or waiting requests that prove a drain.",
    )
    drain_interval_s: float = Field(default=0.2, gt=0, le=10, description="Pause between these scrapes.")
    drain_deadline_s: float = Field(
        default=300.0,
        gt=0,
        description="How long a restart waits for its drain unless the caller says otherwise; work left then is lost.",
    )
    stop_timeout_s: float = Field(
        default=30.0, gt=0, description="From SIGTERM to SIGKILL of the engine's process group."
    )
    gpu_free_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="From the end of the processes until their GPUs must be proven free, else quarantine.",
    )
    gpu_free_memory_mib: int = Field(
        default=1024, ge=1, description="A GPU counts as free when no process is on it and less than this is in use."
    )
    read_ahead_gib: float = Field(
        default=512.0,
        ge=0,
        description="Weight files of a model in model_paths are read into the page cache while a restart drains: this "
        "much at most, and half of the free memory. 0: not at all.",
    )
    sleep_mode: bool = Field(
        default=False,
        description="Start engines so that they can be put to sleep (--enable-sleep-mode, VLLM_SERVER_DEV_MODE=1). "
        "Their HTTP API then has administrative calls: let only the gateway and this agent reach it.",
    )
    sleep_timeout_s: float = Field(default=120.0, gt=0, description="How long falling asleep or waking up may take.")
    sleep_host_memory_gib: float = Field(
        default=0.0,
        ge=0,
        description="Host memory for the weights of all sleeping engines together. 0: what is free, less the reserve.",
    )
    sleep_host_reserve_gib: float = Field(
        default=16.0, ge=0, description="Host memory that a sleeping engine must leave free."
    )
    keep_finished: int = Field(default=32, ge=0, le=1000, description="How many ended instances stay listed.")

    @field_validator("command")
    @classmethod
    def _program(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(part.strip() for part in value):
            raise ValueError("has an empty part")
        return value


class MetricsConfig(ConfigModel):
    """Prometheus endpoint."""

    listen: str = Field(
        default="127.0.0.1:9417", description="HOST:PORT of /metrics; port 0 takes a free one. Empty: none."
    )

    @field_validator("listen")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            split_address(value)
        return value


class LogsConfig(ConfigModel):
    """Logs go to stderr, that is to the journal under systemd."""

    form: Literal["text", "json"] = Field(default="text", description="`text` for people, `json` for collectors.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is written."
    )


class NodeAgentConfig(ConfigModel):
    """The whole file."""

    node_id: str = Field(default="", description="Name of this node in the fleet. Empty: the host name.")
    state_dir: Path = Field(
        default=Path("/var/lib/dynamollm"),
        description="Journal, leadership term, instance records. One agent owns it; it must survive a reboot.",
    )
    listen: ListenConfig = ListenConfig()
    security: SecurityConfig = SecurityConfig()
    guard: GuardConfig = GuardConfig()
    gpu: GpuConfig = GpuConfig()
    controls: ControlsConfig = ControlsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    engine: EngineConfig = EngineConfig()
    metrics: MetricsConfig = MetricsConfig()
    logs: LogsConfig = LogsConfig()

    @field_validator("node_id")
    @classmethod
    def _node_id(cls, value: str) -> str:
        if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.\-_]{0,252}", value):
            raise ValueError(f"{value!r} is not a usable node name (letters, digits, . - _)")
        return value

    @field_validator("state_dir")
    @classmethod
    def _state_dir(cls, value: Path) -> Path:
        if not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value

    @property
    def node_name(self) -> str:
        """The node's name in the fleet."""
        return self.node_id or platform.node()

    @property
    def instance_dir(self) -> Path:
        """Where the instance records are."""
        return self.state_dir / "instances"

    @property
    def engine_log_dir(self) -> Path:
        """Where the engines' output goes."""
        return Path(self.engine.log_dir) if self.engine.log_dir else self.state_dir / "logs"
