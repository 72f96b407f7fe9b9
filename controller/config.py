"""Configuration of `dynamollm-controller`: `/etc/dynamollm/controller.toml` < environment < flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from common.config import ConfigModel
from common.tls import ClientTls, check_pem
from common.tls_server import stays_here
from controller.domain.classes import RequestClass
from controller.domain.reasons import Mode
from controller.fleet.provisioner import PowerHook
from controller.loop.settings import Knobs, LoopSettings
from controller.policy.provision import ProvisionSettings
from controller.store.retention import Limits

Seconds = Annotated[float, Field(gt=0)]


class AgentAddress(ConfigModel):
    """One node agent."""

    node_id: str
    address: str = Field(description="gRPC target: host:port or unix:/path/to/socket")
    tls: bool = Field(default=True, description="over TLS if [agent_tls] is set; unix sockets never are")
    tls_name: str = Field(default="", description="name in the agent's certificate; empty: the address's host")


class ServerTls(ConfigModel):
    """Mutual TLS on `listen`: gateways and operators need certificates. Files all three or none."""

    cert: str = Field(default="", description="The controller's certificate, PEM. Renewals are taken up live.")
    key: str = Field(default="", description="Its private key, PEM.")
    client_ca: str = Field(default="", description="Authority whose client certificates are let in, PEM.")
    scopes: dict[str, Literal["read", "control", "admin"]] = Field(
        default={},
        description="Scope by the name (CN) or alternative name (URI, DNS) of a client certificate: `read` looks, "
        "`control` is for gateways, `admin` for operators. Names not listed may do nothing.",
    )

    @property
    def on(self) -> bool:
        return bool(self.cert)

    def check(self) -> None:
        """Raises UserError for files that no caller could be served with."""
        if self.on:
            check_pem({"tls.client_ca": self.client_ca}, {"tls.cert": self.cert}, {"tls.key": self.key})

    @model_validator(mode="after")
    def _whole(self) -> ServerTls:
        given = [bool(value) for value in (self.cert, self.key, self.client_ca)]
        if any(given) and not all(given):
            raise ValueError("cert, key and client_ca belong together; set all of them or none")
        return self


class PeriodsConfig(ConfigModel):
    """How often each level decides."""

    cluster_s: Seconds = 1800.0
    pool_s: Seconds = 300.0
    instance_s: Seconds = 5.0


class LeaseConfig(ConfigModel):
    """Every clock lock is a lease: 3 x instance period <= ttl_s, rpc_deadline_s < instance period."""

    ttl_s: Seconds = 20.0
    rpc_deadline_s: Seconds = 4.0


class PlanningConfig(ConfigModel):
    """How much capacity a plan provides, and when switching pays."""

    quantile: float = Field(default=0.95, ge=0.5, lt=1, description="quantile of the forecast to provision for")
    fill: float = Field(default=0.85, gt=0, le=1, description="share of the profiled SLO capacity a plan may fill")
    forecast_half_life_s: Seconds = Field(default=300.0, description="load this old counts half in the forecast")
    start_s: Seconds = Field(default=180.0, description="price of an instance start before one was measured")
    min_dwell_s: float = Field(default=60.0, ge=0, description="no new layout sooner than this after the last")
    max_starts_at_once: int = Field(default=4, ge=1)
    min_instances: int = Field(default=1, ge=1, description="per pool")
    widest_tp: Literal[1, 2, 4, 8] = 8
    gpus_per_node: int = Field(default=8, ge=1)
    initial_rps: dict[str, float] = Field(
        default_factory=dict, description="requests/s by class (e.g. SM = 1.5) to plan for before the first report"
    )

    @field_validator("initial_rps")
    @classmethod
    def _classes(cls, value: dict[str, float]) -> dict[str, float]:
        for name, rate in value.items():
            RequestClass.parse(name)
            if not 0 <= rate < 1e6:
                raise ValueError(f"{name} = {rate}: a rate must be between 0 and 1e6 requests/s")
        return value


class StalenessConfig(ConfigModel):
    """From which age data is stale, a node lost, and a plan without load data abandoned for full clocks."""

    stale_s: Seconds = 15.0
    lost_s: Seconds = 60.0
    hold_s: Seconds = 600.0
    load_window_s: Seconds = Field(default=15.0, description="load that clocks are chosen for is the mean over this")


class PowerConfig(ConfigModel):
    """What power budgets (`dynamollm budget`) are reckoned with."""

    host_w: float = Field(
        default=0.0,
        ge=0,
        description="what a host draws beside its GPUs: counts in budgets, and in plans where nodes are turned off",
    )
    min_cap_w: float = Field(default=200.0, gt=0, description="lowest power cap of GPUs that do not tell theirs")
    max_cap_w: float = Field(default=700.0, gt=0, description="highest; also what an unseen GPU is taken to draw")
    rows: dict[str, list[str]] = Field(
        default_factory=dict, description="nodes by row: those behind one breaker, which may have a budget of their own"
    )


class ProvisionerConfig(ConfigModel):
    """Turns whole nodes off when they are not needed, and on ahead of need. Off unless both commands are given."""

    on: list[str] = Field(
        default_factory=list,
        description='command and arguments, {node} is the node_id: ["/usr/local/sbin/bmc", "{node}", "on"]; no shell',
    )
    off: list[str] = Field(default_factory=list, description="the same to turn it off")
    timeout_s: Seconds = Field(default=60.0, description="a command that takes longer is killed, and has failed")
    spare_nodes: int = Field(default=1, ge=0, description="nodes that stay on beyond what is needed")
    min_on_s: float = Field(default=1800.0, ge=0, description="a node stays on at least for so long")
    boot_s: Seconds = Field(default=300.0, description="until its agent reports, before that was measured")
    off_s: Seconds = Field(default=60.0, description="until it is off, before that was measured")
    boot_w: float = Field(default=0.0, ge=0, description="what a booting node draws; 0: as much as an empty one")
    give_up_s: Seconds = Field(default=900.0, description="a node that has not come by then has failed")

    @model_validator(mode="after")
    def _both(self) -> ProvisionerConfig:
        if bool(self.on) != bool(self.off):
            raise ValueError("on and off belong together; set both or none")
        if any(command and not any("{node}" in part for part in command) for command in (self.on, self.off)):
            raise ValueError("on and off need {node} in an argument, or nobody knows which node is meant")
        return self

    def hook(self) -> PowerHook | None:
        return PowerHook(tuple(self.on), tuple(self.off), self.timeout_s) if self.on else None

    def settings(self) -> ProvisionSettings | None:
        if not self.on:
            return None
        return ProvisionSettings(self.spare_nodes, self.min_on_s, self.boot_s, self.off_s, self.boot_w, self.give_up_s)


class RetentionConfig(ConfigModel):
    """How many days rows of the history are kept, table by table. 0 keeps them for ever."""

    decisions: float = Field(default=400.0, ge=0, description="with their outcomes")
    actions: float = Field(default=90.0, ge=0)
    transitions: float = Field(default=400.0, ge=0)
    plans: float = Field(default=90.0, ge=0, description="the last one always stays")
    orders: float = Field(default=1000.0, ge=0, description="the last of each scope always stays")
    choices: float = Field(default=31.0, ge=0, description="the gateways' sample of theirs")
    telemetry: float = Field(default=400.0, ge=0)
    load: float = Field(default=400.0, ge=0, description="also of the SLO rows")
    forecasts: float = Field(default=400.0, ge=0, description="beside what came")
    inputs: float = Field(default=31.0, ge=0, description="what a replay needs: the bulk of the history")
    hourly_after: float = Field(
        default=8.0, ge=0.05, description="windows of telemetry, load and SLO older than this are summed into hours"
    )

    def limits(self) -> Limits:
        days = {
            "decisions": self.decisions,
            "actions": self.actions,
            "transitions": self.transitions,
            "plans": self.plans,
            "orders": self.orders,
            "choices": self.choices,
            "telemetry_minute": self.telemetry,
            "load_minute": self.load,
            "slo_minute": self.load,
            "forecasts": self.forecasts,
            # Before the frames: which snapshots are needed depends on them.
            "input_snapshots": self.inputs,
            "input_frames": self.inputs,
        }
        keep_s = {table: kept * 86_400.0 for table, kept in days.items() if kept}
        return Limits(keep_s, self.hourly_after * 86_400.0)


class SavingsConfig(ConfigModel):
    """What a saved kWh is worth; `dynamollm savings` takes courses over time as CSV."""

    usd_per_kwh: float = Field(default=0.12, ge=0)
    g_per_kwh: float = Field(default=450.0, ge=0, description="grams of CO2")


class KnobsConfig(ConfigModel):
    """What the loop may steer. All false is the static full-clock fleet."""

    pools: bool = True
    instances: bool = True
    sharding: bool = True
    clocks: bool = True
    standby: bool = Field(default=True, description="instances that the load does not need stand by, without requests")
    emergency: bool = Field(
        default=True, description="reorder, full clock, move, refuse when waiting requests are about to be late"
    )


class ControllerConfig(ConfigModel):
    """Everything the controller needs to know."""

    controller_id: str = Field(default="", description="name in leases and the history; empty: the host's name")
    listen: str = Field(
        default="127.0.0.1:7700", description="gRPC address; beyond loopback and unix sockets only with [tls]"
    )
    metrics_listen: str = Field(default="", description="host:port of /metrics; empty means none")
    database_url: str = Field(
        default="sqlite:////var/lib/dynamollm/controller.db",
        description="sqlite:////absolute/path.db or postgresql://user@host:5432/name; `dynamollm db upgrade` makes it",
    )
    spool_dir: Path = Field(
        default=Path("/var/lib/dynamollm/spool"), description="history waits here while the database is down"
    )
    profile: Path = Field(description="profile file, made by `dynamollm calibrate`")
    model: str = Field(description="model name as the engines serve it")
    mode: Mode = Field(
        default=Mode.ACTIVE, description="active; advisory: decides and records, touches nothing; paused"
    )
    telemetry_interval_s: Seconds = Field(default=1.0, description="how often agents send samples")
    telemetry_window_s: Seconds = Field(default=60.0, description="length of the rows of energy, load and SLO history")
    agents: list[AgentAddress] = Field(min_length=1, description="the fleet's nodes")
    agent_tls: ClientTls = Field(
        default=ClientTls(),
        description="Mutual TLS to the agents; they let this certificate's name in by their scopes.",
    )
    tls: ServerTls = ServerTls()
    periods: PeriodsConfig = PeriodsConfig()
    lease: LeaseConfig = LeaseConfig()
    planning: PlanningConfig = PlanningConfig()
    staleness: StalenessConfig = StalenessConfig()
    knobs: KnobsConfig = KnobsConfig()
    power: PowerConfig = PowerConfig()
    provisioner: ProvisionerConfig = ProvisionerConfig()
    retention: RetentionConfig = RetentionConfig()
    savings: SavingsConfig = SavingsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> ControllerConfig:
        ids = [agent.node_id for agent in self.agents]
        if len(set(ids)) < len(ids):
            raise ValueError("agents: every node_id must be unique")
        for row, nodes in self.power.rows.items():
            unknown = sorted(set(nodes) - set(ids))
            if unknown or not nodes:
                raise ValueError(f"power.rows.{row}: {', '.join(unknown) or 'nothing'} is no node_id of agents")
        if self.power.min_cap_w > self.power.max_cap_w:
            raise ValueError("power.min_cap_w is above power.max_cap_w")
        if not self.tls.on and not stays_here(self.listen):
            raise ValueError(
                f"listen: {self.listen} is not a loopback address; without [tls] the API is served on this machine only"
            )
        self.loop_settings()  # raises ValueError with the broken inequality
        return self

    @classmethod
    def sample(cls) -> ControllerConfig:
        """Defaults, with made-up values for the keys that have none."""
        return cls(
            profile=Path("/var/lib/dynamollm/profile.json"),
            model="meta-llama/Llama-3.1-70B-Instruct",
            agents=[AgentAddress(node_id="gpu-1", address="127.0.0.1:7701")],
        )

    def loop_settings(self) -> LoopSettings:
        planning, staleness = self.planning, self.staleness
        return LoopSettings(
            model=self.model,
            cluster_s=self.periods.cluster_s,
            pool_s=self.periods.pool_s,
            instance_s=self.periods.instance_s,
            lease_ttl_s=self.lease.ttl_s,
            rpc_deadline_s=self.lease.rpc_deadline_s,
            gpus_per_node=planning.gpus_per_node,
            widest_tp=planning.widest_tp,
            quantile=planning.quantile,
            fill=planning.fill,
            forecast_half_life_s=planning.forecast_half_life_s,
            start_s=planning.start_s,
            min_dwell_s=planning.min_dwell_s,
            max_starts_at_once=planning.max_starts_at_once,
            min_instances=planning.min_instances,
            load_window_s=staleness.load_window_s,
            stale_s=staleness.stale_s,
            lost_s=staleness.lost_s,
            hold_s=staleness.hold_s,
            initial_rps={RequestClass.parse(name): rate for name, rate in planning.initial_rps.items()},
            knobs=Knobs(**self.knobs.model_dump()),
            node_ids=tuple(agent.node_id for agent in self.agents),
            rows={name: tuple(nodes) for name, nodes in sorted(self.power.rows.items())},
            host_w=self.power.host_w,
            hosts_off=bool(self.provisioner.on),
            host_cycle_s=self.provisioner.off_s + self.provisioner.boot_s,
            cap_range_w=(self.power.min_cap_w, self.power.max_cap_w),
            provision=self.provisioner.settings(),
        )
