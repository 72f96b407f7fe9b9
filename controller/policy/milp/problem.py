"""The planning problem and its solution as plain values: what the MILP is given and what it answers.

One problem covers one model. The cluster manager's problem has several partitions (ways to cut the classes into
pools) over the whole fleet; a pool manager's has one partition of one pool over its grant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

# Where not all of the load fits, what has to restart instances must serve so many times what the present ones do, grown
# into free GPUs: while they restart they serve nothing.
WORTH_RESTARTING = 1.1


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

    Where empty hosts are switched off, every GPU that an instance holds costs `host_share_w` besides: its share of the
    host. It weighs in the objective and is no part of a result's `power_w`, which is that of the GPUs.

    `budget_w` bounds what the GPUs' power caps must add up to: an instance needs a cap for what it draws, and no GPU,
    empty ones neither, can be capped below `cap_floor_w`. Where the whole demand does not fit, the largest share of it
    that does is planned for (milp/budget.py).
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
    host_share_w: float = 0.0
    budget_w: float | None = None
    cap_floor_w: float = 0.0
    gap: float = 0.005
    node_limit: int = 20_000
    time_limit_s: float = 10.0

    @property
    def freed_w(self) -> float:
        """What remains of a GPU's cost when no instance holds it, its host's share taken off; may be negative."""
        return self.parked_w - self.host_share_w


class Way(StrEnum):
    """How a partition was solved."""

    MILP = "milp"
    TABLES = "tables"
    ROUNDED = "lp+neighbourhood"  # the relaxation, and whole instances around its fractions
    NONE = ""  # no answer


@dataclass(frozen=True, slots=True)
class ShadowPrices:
    """At the margin of a plan (milp/prices.py)."""

    # By pool: watts for one equivalent request/s more. 0: what stands there in any case serves it.
    w_per_rps: Mapping[str, float]
    gpu_saves_w: float  # what one GPU more would save; negative: it would only draw its parked watts

    def more_rps(self, pool: str, watts: float) -> float | None:
        """Equivalent requests/s of a pool that so many watts more would serve; None where load costs nothing."""
        each = self.w_per_rps.get(pool, 0.0)
        return watts / each if each > 0 else None


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
    way: Way = Way.NONE
    prices: ShadowPrices | None = None  # of the chosen one, and of the best with the pools that are there

    @property
    def is_feasible(self) -> bool:
        return self.status in ("optimal", "feasible")


@dataclass(frozen=True, slots=True)
class PlanSolution:
    """`chosen` is None when no partition is feasible; then the caller falls back (policy/milp/fallback.py)."""

    problem_id: str
    solver: str
    chosen: PartitionResult | None
    rejected: tuple[PartitionResult, ...]
    # Of the expected load and of the reserve beyond it, what was planned for: less where not all fits the GPUs
    # (milp/shortage.py) or, the first, a power budget (milp/budget.py).
    served_share: float = 1.0
    reserve_share: float = 1.0

    @property
    def is_short(self) -> bool:
        return self.served_share < 1.0 or self.reserve_share < 1.0
