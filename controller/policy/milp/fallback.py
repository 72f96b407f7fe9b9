"""What to run when the MILP has no answer: the last layout repaired, else SinglePool.

Serves as much as possible and says so: the result may carry less than the demand, and then says how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from controller.domain.reasons import Reason
from controller.policy.milp.problem import WORTH_RESTARTING, PlanProblem, PoolDemand

Counts = dict[tuple[str, int], int]


@dataclass(frozen=True, slots=True)
class FallbackPlan:
    pools: tuple[str, ...]
    counts: Mapping[tuple[str, int], int]
    carries: bool
    served_ratio: float  # worst pool: capacity over demand, at most 1
    # SOLVER_FAILED when the demand is carried all the same; else why it is not: NO_LOAD_DATA (the demand is no number),
    # NO_PROFILE (nothing is known to serve a pool within the SLO), NO_CAPACITY (not enough GPUs).
    reason: Reason
    sentence: str


def fall_back(problem: PlanProblem) -> FallbackPlan:
    """A feasible plan for `problem`, whose `current` counts are the layout to repair."""
    capacity = _capacities(problem)
    options = [
        option
        for option in (_last_repaired(problem, capacity), _single_pool(problem, capacity))
        if option is not None and option[1]
    ]
    if not options:
        # The pools stay named although nothing stands in them: their demand is missed, not gone.
        partition = _present(problem) or next(iter(problem.partitions), ())
        pools = tuple(demand.pool for demand in partition)
        return FallbackPlan(pools, {}, False, 0.0, Reason.NO_CAPACITY, "There is no GPU group that holds an instance.")
    partition, counts, name = max(
        options,
        # The last layout comes first and stays unless the other serves clearly more.
        key=lambda o: _served(o[0], o[1], capacity) * (WORTH_RESTARTING if o is options[0] else 1.0),
    )
    served = _served(partition, counts, capacity)
    carries = served >= 1.0
    what = ", ".join(f"{n} x {pool} TP{tp}" for (pool, tp), n in sorted(counts.items()))
    reason, tail = _outcome(partition, capacity, served)
    return FallbackPlan(
        pools=tuple(demand.pool for demand in partition),
        counts=dict(sorted(counts.items())),
        carries=carries,
        served_ratio=served,
        reason=reason,
        sentence=f"No plan was found; {name} ({what}) {tail}.",
    )


def _outcome(
    partition: tuple[PoolDemand, ...], capacity: Mapping[tuple[str, int], float], served: float
) -> tuple[Reason, str]:
    """What the plan does for the demand, and as the end of a sentence."""
    for demand in partition:
        if not _is_rate(demand.rate_rps):
            return Reason.NO_LOAD_DATA, f"is safe: the demand of pool {demand.pool} is {demand.rate_rps} requests/s"
    if served >= 1.0:
        return Reason.SOLVER_FAILED, "carries the demand"
    measured = {pool for pool, _ in capacity}
    for demand in partition:
        if demand.rate_rps > 0 and demand.pool not in measured:
            return Reason.NO_PROFILE, f"is tried: no operating point of pool {demand.pool} is known to meet the SLO"
    return Reason.NO_CAPACITY, f"carries {served:.0%} of the demand of its worst pool"


def _is_rate(rate_rps: object) -> bool:
    return isinstance(rate_rps, int | float) and isfinite(rate_rps) and rate_rps >= 0


_Option = tuple[tuple[PoolDemand, ...], Counts, str]


def _capacities(problem: PlanProblem) -> dict[tuple[str, int], float]:
    """Largest load in SLO of one instance by (pool, tp)."""
    capacity: dict[tuple[str, int], float] = {}
    for column in problem.columns:
        if 1 <= column.tp <= min(problem.gpus_per_node, problem.gpus) and _is_rate(column.rate_rps):
            key = column.pool, column.tp
            capacity[key] = max(capacity.get(key, 0.0), column.rate_rps)
    return {key: rate for key, rate in capacity.items() if rate > 0}


def _served(partition: tuple[PoolDemand, ...], counts: Counts, capacity: Mapping[tuple[str, int], float]) -> float:
    """Worst pool's capacity over its demand, at most 1. A demand that is no rate counts as unknown: not served."""
    worst = 1.0
    for demand in partition:
        have = sum(n * capacity.get(key, 0.0) for key, n in counts.items() if key[0] == demand.pool)
        if not _is_rate(demand.rate_rps):
            return 0.0
        if demand.rate_rps > 0:
            worst = min(worst, have / demand.rate_rps)
    return worst


def _last_repaired(problem: PlanProblem, capacity: Mapping[tuple[str, int], float]) -> _Option | None:
    """The present counts, cut to the GPUs that are there and grown into free ones where a pool is short."""
    partition = _present(problem)
    if partition is None:
        return None
    counts: Counts = {}
    free = _Free(problem)
    # Widest first: they are the hardest to fit.
    for key, n in sorted(_standing(problem).items(), key=lambda item: (-item[0][1], item[0][0])):
        fits = free.take(key[1], n)
        if fits:
            counts[key] = fits
    _grow(partition, counts, capacity, free)
    return partition, counts, "the last layout, repaired"


def _standing(problem: PlanProblem) -> Counts:
    return {(pool, tp): n for (pool, tp), n in problem.current.items() if n > 0 and tp > 0}


def _present(problem: PlanProblem) -> tuple[PoolDemand, ...] | None:
    """The partition that stands now; None when there is none."""
    pools = {pool for pool, _ in _standing(problem)}
    return next((p for p in problem.partitions if pools <= {demand.pool for demand in p}), None) if pools else None


def _grow(
    partition: tuple[PoolDemand, ...], counts: Counts, capacity: Mapping[tuple[str, int], float], free: _Free
) -> None:
    """Adds instances to the worst served pool until all are served or nothing fits."""
    while True:
        short = sorted(
            (_served((demand,), counts, capacity), demand.pool)
            for demand in partition
            if _served((demand,), counts, capacity) < 1.0
        )
        for _, pool in short:
            kinds = sorted((-rate / tp, -tp, (name, tp)) for (name, tp), rate in capacity.items() if name == pool)
            key = next((key for _, _, key in kinds if free.take(key[1], 1)), None)
            if key is not None:
                counts[key] = counts.get(key, 0) + 1
                break
        else:
            return


def _single_pool(problem: PlanProblem, capacity: Mapping[tuple[str, int], float]) -> _Option | None:
    """One pool of the widest instances everywhere; with no single pool among the partitions, all pools grown."""
    partition = next((p for p in problem.partitions if len(p) == 1), None)
    if partition is None:
        if not problem.partitions:
            return None
        counts: Counts = {}
        _grow(problem.partitions[0], counts, capacity, _Free(problem))
        return problem.partitions[0], counts, "every pool grown to its demand"
    pool = partition[0].pool
    tps = [tp for name, tp in capacity if name == pool]
    # Without a profile nothing tells what fits the model: the whole node does if anything does.
    tp = max(tps, default=max(1, problem.gpus_per_node))
    n = _Free(problem).take(tp, problem.gpus // tp)
    return partition, {(pool, tp): n} if n else {}, f"SinglePool, TP{tp} everywhere,"


class _Free:
    """Free GPUs of equal nodes, counted in aligned groups: widest first packs without a rest."""

    def __init__(self, problem: PlanProblem) -> None:
        size = max(1, problem.gpus_per_node)
        nodes, rest = divmod(max(0, problem.gpus), size)
        self.nodes = [size] * nodes + ([rest] if rest else [])

    def take(self, tp: int, n: int) -> int:
        """Takes up to `n` groups of `tp`; how many it got."""
        taken = 0
        for i, free in enumerate(self.nodes):
            got = max(0, min(n - taken, free // tp))
            self.nodes[i] -= got * tp
            taken += got
        return taken
