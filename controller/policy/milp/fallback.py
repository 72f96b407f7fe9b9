"""What to run when the MILP has no answer: the last layout repaired, else SinglePool.

Serves as much as possible and says so: the result may carry less than the demand, and then says how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from controller.domain.reasons import Reason
from controller.policy.milp.problem import PlanProblem, PoolDemand

# A layout that serves this much more than the last one is worth restarting everything for.
WORTH_RESTARTING = 1.1

Counts = dict[tuple[str, int], int]


@dataclass(frozen=True, slots=True)
class FallbackPlan:
    pools: tuple[str, ...]
    counts: Mapping[tuple[str, int], int]
    carries: bool
    served_ratio: float  # worst pool: capacity over demand, at most 1
    reason: Reason  # SOLVER_FAILED when the demand is carried all the same, else NO_CAPACITY
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
        return FallbackPlan((), {}, False, 0.0, Reason.NO_CAPACITY, "There is no GPU group that holds an instance.")
    partition, counts, name = max(
        options,
        # The last layout comes first and stays unless the other serves clearly more.
        key=lambda o: _served(o[0], o[1], capacity) * (WORTH_RESTARTING if o is options[0] else 1.0),
    )
    served = _served(partition, counts, capacity)
    carries = served >= 1.0
    what = ", ".join(f"{n} x {pool} TP{tp}" for (pool, tp), n in sorted(counts.items()))
    tail = "carries the demand" if carries else f"carries {served:.0%} of the demand of its worst pool"
    return FallbackPlan(
        pools=tuple(demand.pool for demand in partition),
        counts=dict(sorted(counts.items())),
        carries=carries,
        served_ratio=served,
        reason=Reason.SOLVER_FAILED if carries else Reason.NO_CAPACITY,
        sentence=f"No plan was found; {name} ({what}) {tail}.",
    )


_Option = tuple[tuple[PoolDemand, ...], Counts, str]


def _capacities(problem: PlanProblem) -> dict[tuple[str, int], float]:
    """Largest load in SLO of one instance by (pool, tp)."""
    capacity: dict[tuple[str, int], float] = {}
    for column in problem.columns:
        if column.tp <= min(problem.gpus_per_node, problem.gpus):
            key = column.pool, column.tp
            capacity[key] = max(capacity.get(key, 0.0), column.rate_rps)
    return {key: rate for key, rate in capacity.items() if rate > 0}


def _served(partition: tuple[PoolDemand, ...], counts: Counts, capacity: Mapping[tuple[str, int], float]) -> float:
    """Worst pool's capacity over its demand, at most 1. A demand that is no number counts as unknown: not served."""
    worst = 1.0
    for demand in partition:
        have = sum(n * capacity.get(key, 0.0) for key, n in counts.items() if key[0] == demand.pool)
        if not isfinite(demand.rate_rps):
            return 0.0
        if demand.rate_rps > 0:
            worst = min(worst, have / demand.rate_rps)
    return worst


def _last_repaired(problem: PlanProblem, capacity: Mapping[tuple[str, int], float]) -> _Option | None:
    """The present counts, cut to the GPUs that are there and grown into free ones where a pool is short."""
    pools = {pool for (pool, _), n in problem.current.items() if n > 0}
    partition = next((p for p in problem.partitions if pools <= {d.pool for d in p}), None)
    if partition is None or not pools:
        return None
    counts: Counts = {}
    free = _Free(problem)
    # Widest first: they are the hardest to fit.
    for key, n in sorted(problem.current.items(), key=lambda item: (-item[0][1], item[0][0])):
        fits = free.take(key[1], n)
        if fits:
            counts[key] = fits
    _grow(partition, counts, capacity, free)
    return partition, counts, "the last layout, repaired"


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
    tp = max(tps, default=problem.gpus_per_node)
    n = _Free(problem).take(tp, problem.gpus // tp if tp else 0)
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
