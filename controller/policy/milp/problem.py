"""The planning problem and its solution as plain values: what the MILP is given and what it answers.

One problem covers one model. The cluster manager's problem has several partitions (ways to cut the classes into
pools) over the whole fleet; a pool manager's has one partition of one pool over its grant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Column:
    """One way to run one instance: carries up to `rate_rps` equivalent requests/s within the SLO at `power_w`
    for the whole instance. `mhz` is the clock of least power there: a price, not a command."""

    pool: str
    tp: int
    mhz: int
    rate_rps: float
    power_w: float


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """`rate_rps` in equivalent requests/s (profile/table.py) at the provisioned quantile: what the pool's instances
    must be able to carry. `expected_rps`, where it is less: what they are expected to carry and are priced for, since
    the load does not need all of them all the time and the others stand by (policy/idle.py). None: `rate_rps`."""

    pool: str
    rate_rps: float
    min_instances: int = 1
    expected_rps: float | None = None

    @property
    def priced_rps(self) -> float:
        return self.rate_rps if self.expected_rps is None else min(self.expected_rps, self.rate_rps)


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """Minimise  sum n_col * power_w  +  parked_w * empty GPUs  +  start_j / horizon_s * started instances
    +  retire_j / horizon_s * retired instances  over integer n_col >= 0, within `gpus`, each pool's expected rate and
    minimum met by the columns' loads, and its rate by what its instances can carry.

    `current` counts the instances that exist now by (pool, tp). An instance may change its pool without a restart,
    so per tp only what exceeds it in all pays `start_j[tp]`, and only what falls short of it pays `retire_j[tp]`
    (what an instance draws from its last use to its end). With `keep_current` none retires where a plan without
    that exists: for when capacity is short, since what must first make room serves nothing meanwhile.
    Limits are deterministic (nodes and gap); `time_limit_s` is the last resort.
    """

    problem_id: str
    gpus: int
    gpus_per_node: int
    parked_w: float
    horizon_s: float
    partitions: tuple[tuple[PoolDemand, ...], ...]
    columns: tuple[Column, ...]
    current: Mapping[tuple[str, int], int] = field(default_factory=dict)
    start_j: Mapping[int, float] = field(default_factory=dict)
    retire_j: Mapping[int, float] = field(default_factory=dict)
    keep_current: bool = False
    gap: float = 0.005
    node_limit: int = 20_000
    time_limit_s: float = 10.0


@dataclass(frozen=True, slots=True)
class PartitionResult:
    """How one partition came out; `reason` says why it was not taken ("" for the chosen one)."""

    pools: tuple[str, ...]
    status: str  # optimal | feasible | infeasible | error
    power_w: float
    objective_w: float
    bound_w: float
    gap: float
    solve_ms: float
    counts: Mapping[tuple[str, int], int]
    used: tuple[tuple[Column, int], ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PlanSolution:
    """`chosen` is None when no partition is feasible; then the caller falls back (policy/milp/fallback.py)."""

    problem_id: str
    solver: str
    chosen: PartitionResult | None
    rejected: tuple[PartitionResult, ...]
