"""Settings of the loop as plain values; controller/config.py builds them from TOML, the simulator by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controller.domain.classes import DEFAULT_GROUPS, DEFAULT_PARTITIONS, ClassGroup, RequestClass
from controller.policy.provision import ProvisionSettings


@dataclass(frozen=True, slots=True)
class Knobs:
    """What the loop may steer. All off is SinglePool: one pool, TP8 on every GPU, full clock."""

    pools: bool = True  # cut the classes into pools, and change the cut
    instances: bool = True  # change how many instances run
    sharding: bool = True  # use other tensor parallelism than the widest
    clocks: bool = True  # lock clocks
    standby: bool = True  # let instances that the load does not need stand by, loaded and without requests
    emergency: bool = True  # climb the emergency ladder when waiting requests are about to miss their deadlines


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Periods, horizons and limits. `3 * instance_s <= lease_ttl_s` is checked at construction."""

    model: str
    cluster_s: float = 1800.0
    pool_s: float = 300.0
    instance_s: float = 5.0
    lease_ttl_s: float = 20.0
    rpc_deadline_s: float = 4.0
    gpus_per_node: int = 8
    widest_tp: int = 8
    # Quantile of the forecast that capacity is provisioned for, and the share of a pool's profiled SLO capacity that
    # a plan may fill: what is left absorbs bursts within the epoch.
    quantile: float = 0.95
    fill: float = 0.85
    # Memory of the forecast's level and trend: load this old counts half.
    forecast_half_life_s: float = 300.0
    # What a start is priced at before any was measured.
    start_s: float = 180.0
    min_dwell_s: float = 60.0
    max_starts_at_once: int = 4
    # The same share where instances may stand by: a reserve costs little then, and a load that rises faster than an
    # instance starts finds it.
    reserve_fill: float = 0.85
    # How often the forecast is held against what is planned, between two plans: what would not carry it is planned anew
    # at once. So a plan must carry the load only for this long, and for a start.
    look_ahead_s: float = 60.0
    # Share of its largest load in SLO that an instance is filled to before one more is taken from standby, or a higher
    # clock is chosen. That load keeps a margin below the measured knee already (profile/fit.py).
    serve_fill: float = 1.0
    # Deviations of the load from one five seconds to the next, beyond those of independent arrivals, that instances
    # are there for, serving or on call: a burst waits neither for a tick nor for a start.
    burst_deviations: float = 7.0
    # Of what bursts may add, the share that instances serve and choose clocks for where others stand by on call and
    # first tokens are not urgent: the rest reaches those at once, and clocks follow with the next load report. A low
    # share fills batches and saves clocks, and moves first tokens nearer to the SLO.
    serve_burst_share: float = 0.1
    # The load that decides who stands by is the larger of that over `load_window_s` and over this window.
    serve_window_s: float = 60.0
    # Window for the load that clocks are chosen for, and the age from which an observation is stale, then lost.
    load_window_s: float = 15.0
    stale_s: float = 15.0
    lost_s: float = 60.0
    # With no load data at all: hold the plan for this long, then full clocks.
    hold_s: float = 600.0
    # Load to plan for before the first report, requests/s by class; empty means the whole fleet as SinglePool.
    initial_rps: Mapping[RequestClass, float] = field(default_factory=dict)
    groups: tuple[ClassGroup, ...] = DEFAULT_GROUPS
    partitions: tuple[tuple[str, ...], ...] = DEFAULT_PARTITIONS
    min_instances: int = 1
    # For a fleet whose instances do not scale (`knobs.instances` off): instances of the widest tensor parallelism by
    # pool. With `knobs.sharding` a pool may cut the same GPUs into more instances, or make them narrower, never fewer.
    # Empty: one pool over every GPU, as SinglePool.
    fixed: Mapping[str, int] = field(default_factory=dict)
    knobs: Knobs = field(default_factory=Knobs)
    # The configured nodes, so that one that was never seen counts in a budget; and named sets of them with budgets of
    # their own, as behind one breaker.
    node_ids: tuple[str, ...] = ()
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # What a host is taken to draw beside its GPUs, and the range of power caps of GPUs that do not tell theirs.
    host_w: float = 0.0
    # Somebody switches empty hosts off: instances gather on few of them, and hosts weigh in plans. An emptied one still
    # draws for `host_cycle_s` in all, before it is down and while it comes up again.
    hosts_off: bool = False
    host_cycle_s: float = 840.0
    # From the decision to retire an instance until its GPUs are parked: it drains and stops.
    retire_s: float = 30.0
    cap_range_w: tuple[float, float] = (200.0, 700.0)
    # Turning nodes off and on; None: they stay on.
    provision: ProvisionSettings | None = None

    @property
    def host_share_w(self) -> float:
        """What a GPU that is held costs besides its own watts, per GPU of a host."""
        return self.host_w / self.gpus_per_node if self.hosts_off else 0.0

    def __post_init__(self) -> None:
        if 3 * self.instance_s > self.lease_ttl_s:
            raise ValueError(
                f"lease ttl of {self.lease_ttl_s} s is too short: it must be at least three instance periods "
                f"({3 * self.instance_s} s), or a single late tick would let every lock expire"
            )
        if self.rpc_deadline_s >= self.instance_s:
            raise ValueError(
                f"rpc deadline of {self.rpc_deadline_s} s must be shorter than the instance period "
                f"({self.instance_s} s), or calls pile up behind a slow agent"
            )
        if not self.instance_s <= self.pool_s <= self.cluster_s:
            raise ValueError("periods must not fall from instance to pool to cluster")
        if not 0 < self.fill <= 1 or not 0.5 <= self.quantile < 1:
            raise ValueError("fill must be in (0, 1] and quantile in [0.5, 1)")
