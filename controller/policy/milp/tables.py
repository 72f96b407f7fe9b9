"""Small fleets of many pools, solved without branching: each pool's plans are tabulated, then the tables are joined.

Pools meet in one thing only: how many instances of each tp there are in all (GPU cap, packing, starts, retirements).
So a pool's table holds its least power for every vector of counts by tp, and joining them over the totals is exact.
Loads are rounded to cells, in the plan's favour for the bound and against it for the plan: both are true, their gap is
proven. Where the fleet is too large or the gap too wide, the MILP (milp/model.py) decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil, floor, inf, isfinite, prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from controller.policy.milp.problem import Column, PlanProblem, PoolDemand

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Cells of a pool's demand: an instance is taken for at most one cell more, or less, than it carries.
BOUND_CELLS = 2048
PLAN_CELLS = 8192
# Beyond these the MILP is faster: vectors of total counts, vectors of one pool, and pairs of both to be looked at.
MAX_TOTALS = 40_000
MAX_VECTORS = 600
MAX_PAIRS = 40_000_000


# A table goes up to `ratio` times the GPUs that carry the demand, and `gpus` more; what lies beyond is bounded. The
# wider the room, the longer the tables and the better that bound.
class Room(NamedTuple):
    ratio: float
    gpus: int


ROOMS = (Room(2.0, 8), Room(3.0, 12))
STEPS = 30
# The bound's rounding may have favoured a vector too much: then it is tried again without that.
ATTEMPTS = 4
# Solvers take a demand for met when this little is missing, so the bound does too.
TOLERANCE = 1e-6


class Tabulated(NamedTuple):
    used: list[tuple[Column, int]]
    bound_w: float  # no plan has a lower objective


def tabulate(
    problem: PlanProblem,
    partition: Sequence[PoolDemand],
    columns: Sequence[Column],
    groups: Mapping[int, int],
    least: Mapping[int, int],
    room: Room = ROOMS[0],
) -> Tabulated | None:
    """A plan of one partition and a bound on all its plans; None where the problem is too large for tables or they
    hold no plan.

    `groups` tells by tp how many aligned groups the nodes hold, `least` how many instances must exist. The plan keeps
    every constraint named here; others (a caller's own) are the caller's to check, the bound holds with them too.
    """
    tps = sorted({column.tp for column in columns})
    if not tps:
        return None
    shape = tuple(problem.gpus // tp + 1 for tp in tps)
    if prod(shape) > MAX_TOTALS:
        return None
    pools = []
    for demand in partition:
        pool = _pool(problem, demand, tps, [c for c in columns if c.pool == demand.pool], room)
        if pool is None:
            return None
        pools.append(pool)
    if sum(len(pool.watts) for pool in pools) * prod(shape) > MAX_PAIRS:
        return None
    totals = np.indices(shape)
    allowed = _allowed(problem, tps, totals, groups, least)
    coupling_w = np.where(allowed, _switch_w(problem, tps, totals), inf)
    apart_w = problem.parked_w * problem.gpus + _gone_w(problem, tps)
    found, best_w = _search(pools, tps, coupling_w, apart_w, problem.gap)
    if found is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # absurd watts make no bound
        bound_w = min(best_w, _beyond(pools, tps, problem.gpus, totals, coupling_w, best_w))
    return Tabulated(found, bound_w + apart_w) if isfinite(bound_w + apart_w) else None


# --------------------------------------------------------------------------------------------- one pool's table


class _Pool(NamedTuple):
    demand: PoolDemand
    columns: list[Column]
    freed_w: float
    room: int  # GPUs up to which the table goes
    vectors: Ints  # [vector, tp]: counts
    watts: Floats  # least power of each over the same GPUs parked, by the rounding in favour


def _pool(
    problem: PlanProblem, demand: PoolDemand, tps: list[int], columns: list[Column], wanted: Room
) -> _Pool | None:
    """The table of a pool; None when it would be too long, or when no vector carries the demand."""
    tops = [max((c.rate_rps for c in columns if c.tp == tp), default=0.0) for tp in tps]
    densest = max(top / tp for top, tp in zip(tops, tps, strict=True))
    if densest <= 0 and demand.rate_rps > 0:
        return None
    need = demand.rate_rps / densest if demand.rate_rps > 0 else 0.0
    need = max(need, demand.min_instances * min(tps))
    if need > problem.gpus:
        return None
    room = min(problem.gpus, int(wanted.ratio * need) + wanted.gpus)
    if _vectors_within(room, sorted({c.tp for c in columns})) > MAX_VECTORS:
        return None
    rows = np.full((1, _cells(demand, BOUND_CELLS) + 1), inf)
    rows[0, 0] = 0.0
    vectors = np.zeros((1, len(tps)), dtype=np.int64)
    for i, tp in enumerate(tps):
        steps = _steps(demand, columns, tp, problem.freed_w, BOUND_CELLS, in_favour=True)
        layers, their_vectors = [rows], [vectors]
        while steps:
            fits = their_vectors[-1] @ np.array(tps) + tp <= room
            if not fits.any():
                break
            grown = their_vectors[-1][fits]
            grown[:, i] += 1
            their_vectors.append(grown)
            layers.append(_with_one_more(layers[-1][fits], steps))
        rows, vectors = np.concatenate(layers), np.concatenate(their_vectors)
    carries = (
        np.isfinite(rows[:, -1])
        & ((vectors * np.array(tops)).sum(axis=1) >= demand.rate_rps * (1 - TOLERANCE) - TOLERANCE)
        & (vectors.sum(axis=1) >= demand.min_instances)
    )
    if not carries.any():
        return None
    return _Pool(demand, columns, problem.freed_w, room, vectors[carries], rows[carries, -1])


def _vectors_within(gpus: int, tps: Sequence[int]) -> int:
    """How many vectors of counts take at most so many GPUs."""
    exactly = [1] + [0] * gpus
    for tp in tps:
        for taken in range(tp, gpus + 1):
            exactly[taken] += exactly[taken - tp]
    return sum(exactly)


class _Step(NamedTuple):
    """What one more instance on a column brings."""

    cells: int
    watts: float
    column: Column


def _cells(demand: PoolDemand, cells: int) -> int:
    return cells if _needed_rps(demand) > 0 else 0


def _needed_rps(demand: PoolDemand) -> float:
    return demand.priced_rps * (1 - TOLERANCE) - TOLERANCE


def _steps(
    demand: PoolDemand, columns: Sequence[Column], tp: int, freed_w: float, cells: int, in_favour: bool
) -> list[_Step]:
    """The columns of one tp in cells, without those that another one beats."""
    cells = _cells(demand, cells)
    needed_rps = _needed_rps(demand) if in_favour else demand.priced_rps
    steps = []
    for column in columns:
        if column.tp != tp:
            continue
        carried = min(float(cells), column.rate_rps / needed_rps * cells) if cells else 0.0
        rounded = ceil(carried) if in_favour else floor(carried * (1 + 1e-12))
        steps.append(_Step(rounded, column.power_w - tp * freed_w, column))
    kept: list[_Step] = []
    for step in sorted(steps, key=lambda s: (-s.cells, s.watts)):
        if not kept or step.watts < kept[-1].watts:
            kept.append(step)
    return kept


def _with_one_more(rows: Floats, steps: Sequence[_Step]) -> Floats:
    """`rows` hold the least watts that carry at least so many cells; the same with one instance more."""
    last = rows.shape[1] - 1
    padded = np.concatenate([np.repeat(rows[:, :1], last, axis=1), rows], axis=1)
    best, tried = np.full_like(rows, inf), np.empty_like(rows)
    for step in steps:
        np.add(padded[:, last - step.cells : 2 * last + 1 - step.cells], step.watts, out=tried)
        np.minimum(best, tried, out=best)
    return best


def _plan(pool: _Pool, tps: list[int], counts: Ints) -> tuple[list[tuple[Column, int]], float]:
    """The columns of least power for so many instances of each tp, and that power; it is infinite when rounding leaves
    no plan."""
    cells = _cells(pool.demand, PLAN_CELLS)
    row = np.full((1, cells + 1), inf)
    row[0, 0] = 0.0
    added: list[tuple[list[_Step], Floats]] = []  # the choice of each instance, and the row before it
    for tp, count in zip(tps, counts.tolist(), strict=True):
        steps = _steps(pool.demand, pool.columns, tp, pool.freed_w, PLAN_CELLS, in_favour=False)
        for _ in range(count):
            added.append((steps, row))
            row = _with_one_more(row, steps)
    if row[0, -1] == inf:
        return [], inf
    used: Counter[Column] = Counter()
    left, watts = cells, row[0, -1]
    for steps, before in reversed(added):
        # The very sum that made the row is found again, so equality is exact.
        step = next(s for s in steps if before[0, max(0, left - s.cells)] + s.watts == watts)
        left = max(0, left - step.cells)
        watts = before[0, left]
        used[step.column] += 1
    return list(used.items()), float(row[0, -1])


# ------------------------------------------------------------------------------------------- all pools together


def _search(
    pools: Sequence[_Pool], tps: list[int], coupling_w: Floats, apart_w: float, gap: float
) -> tuple[list[tuple[Column, int]] | None, float]:
    """A plan within the tables (None when there is none) and a bound on all such plans, both less `apart_w`."""
    watts = [pool.watts.copy() for pool in pools]
    plan, plan_w, bound_w = None, inf, inf
    for attempt in range(ATTEMPTS):
        joined = _join(pools, watts, coupling_w.shape)
        objective_w = joined[-1] + coupling_w
        at = np.unravel_index(int(objective_w.argmin()), coupling_w.shape)
        if objective_w[at] == inf:
            break
        if attempt == 0:
            bound_w = float(objective_w[at])
        chosen = _split(pools, watts, joined, at)
        parts = [_plan(pool, tps, pool.vectors[i]) for pool, i in zip(pools, chosen, strict=True)]
        total_w = sum(part_w for _, part_w in parts) + float(coupling_w[at])
        if total_w < plan_w:
            plan, plan_w = [entry for used, _ in parts for entry in used], total_w
        if plan_w - bound_w <= gap / 4 * abs(plan_w + apart_w):
            break
        # What a vector's plan really takes stands in for the estimate from now on.
        for row, i, (_, part_w) in zip(watts, chosen, parts, strict=True):
            row[i] = part_w
    return plan, bound_w


def _join(pools: Sequence[_Pool], watts: Sequence[Floats], shape: tuple[int, ...]) -> list[Floats]:
    """Least watts of the first 0, 1, ... pools by the total counts of each tp."""
    start = np.full(shape, inf)
    start[(0,) * len(shape)] = 0.0
    joined = [start]
    for pool, its_watts in zip(pools, watts, strict=True):
        best = np.full(shape, inf)
        for vector, more_w in zip(pool.vectors.tolist(), its_watts.tolist(), strict=True):
            there = tuple(slice(n, None) for n in vector)
            before = tuple(slice(0, size - n) for n, size in zip(vector, shape, strict=True))
            np.minimum(best[there], joined[-1][before] + more_w, out=best[there])
        joined.append(best)
    return joined


def _split(
    pools: Sequence[_Pool], watts: Sequence[Floats], joined: list[Floats], totals: tuple[np.intp, ...]
) -> list[int]:
    """Which of its vectors each pool has in the totals."""
    left = np.array(totals)
    chosen = []
    for pool, its_watts, before, after in reversed(list(zip(pools, watts, joined[:-1], joined[1:], strict=True))):
        fits = np.flatnonzero((pool.vectors <= left).all(axis=1))
        rest = left - pool.vectors[fits]
        # The very sum that made the total is found again, so equality is exact.
        makes = before[tuple(rest.T)] + its_watts[fits] == after[tuple(left)]
        chosen.append(int(fits[int(makes.argmax())]))
        left = left - pool.vectors[chosen[-1]]
    return chosen[::-1]


def _allowed(
    problem: PlanProblem, tps: list[int], totals: Ints, groups: Mapping[int, int], least: Mapping[int, int]
) -> NDArray[np.bool_]:
    allowed: NDArray[np.bool_] = np.tensordot(np.array(tps), totals, 1) <= problem.gpus
    for i, tp in enumerate(tps):
        taken = sum(wide // tp * totals[j] for j, wide in enumerate(tps) if wide % tp == 0)
        allowed &= (taken <= groups[tp]) & (totals[i] >= least.get(tp, 0))
    return allowed


def _switch_w(problem: PlanProblem, tps: list[int], totals: Ints) -> Floats:
    watts = np.zeros(totals.shape[1:])
    for i, tp in enumerate(tps):
        more = totals[i] - _there(problem, tp)
        watts += np.maximum(0, more) * problem.start_j.get(tp, 0.0) / problem.horizon_s
        watts += np.maximum(0, -more) * problem.retire_j.get(tp, 0.0) / problem.horizon_s
    return watts


def _there(problem: PlanProblem, tp: int) -> int:
    return sum(n for (_, width), n in problem.current.items() if width == tp)


def _gone_w(problem: PlanProblem, tps: list[int]) -> float:
    """Retirement of what no column has any more."""
    gone_j = sum(n * problem.retire_j.get(tp, 0.0) for (_, tp), n in problem.current.items() if tp not in tps)
    return gone_j / problem.horizon_s


# ------------------------------------------------------------------------------------------- beyond the tables


def _beyond(
    pools: Sequence[_Pool], tps: list[int], gpus: int, totals: Ints, coupling_w: Floats, best_w: float
) -> float:
    """A bound on plans in which some pool has more GPUs than its table goes up to.

    With a price on every instance of each tp, pools and totals are apart and each may take its own minimum (Lagrangian
    relaxation). Any prices give a bound; good ones are found by Polyak's steps towards the least power inside the
    tables, which is known.
    """
    if all(pool.room >= gpus for pool in pools):
        return inf
    counts = np.concatenate([pool.vectors for pool in pools]).T.astype(np.float64)
    watts = np.concatenate([pool.watts for pool in pools])
    ends = np.cumsum([len(pool.watts) for pool in pools]).tolist()
    starts = [0, *ends[:-1]]
    allowed = np.flatnonzero(np.isfinite(coupling_w))
    total_counts = totals.reshape(len(tps), -1)[:, allowed].astype(np.float64)
    total_watts = coupling_w.ravel()[allowed]
    prices = np.zeros(len(tps))
    bound, bound_prices = -inf, prices
    for _ in range(STEPS):
        priced = _priced(watts, counts, prices)
        apart = _priced(total_watts, total_counts, -prices)
        at = int(apart.argmin())
        value = float(np.minimum.reduceat(priced, starts).sum() + apart[at])
        if value > bound:
            bound, bound_prices = value, prices
        chosen = [a + int(priced[a:b].argmin()) for a, b in zip(starts, ends, strict=True)]
        towards = counts[:, chosen].sum(axis=1) - total_counts[:, at]
        if not towards.any() or best_w - bound <= 1e-9 * abs(best_w):
            break
        prices = prices + (best_w - value) / float((towards * towards).sum()) * towards
    inside = np.minimum.reduceat(_priced(watts, counts, bound_prices), starts)
    each = dict(zip(tps, bound_prices.tolist(), strict=True))
    outside = np.array([_beyond_one(pool, gpus, each) for pool in pools])
    # One pool at least is outside; the others are where it is cheaper.
    cheaper = np.minimum(inside, outside)
    return bound + float((cheaper - inside).sum() + (outside - cheaper).min())


def _priced(watts: Floats, counts: Floats, prices: Floats) -> Floats:
    """Added up tp by tp: a matrix product may round differently from machine to machine."""
    priced = watts.copy()
    for row, price in zip(counts, prices.tolist(), strict=True):
        priced += row * price
    return priced


def _beyond_one(pool: _Pool, gpus: int, prices: Mapping[int, float]) -> float:
    """The same of one pool, over loads and GPUs that may be split at will: the Lagrangian dual of that relaxation, at
    some values of the price of load."""
    if pool.room >= gpus or not pool.columns:
        return inf  # its table holds every plan
    rate = np.array([c.rate_rps for c in pool.columns])
    widths = np.array([c.tp for c in pool.columns])
    watts = np.array([c.power_w - c.tp * pool.freed_w + prices[c.tp] for c in pool.columns])
    needed_rps = max(0.0, _needed_rps(pool.demand))
    dearest = float((watts[rate > 0] / rate[rate > 0]).max(initial=0.0))
    load_prices = np.linspace(0.0, max(0.0, dearest), 64)
    per_gpu = ((watts - load_prices[:, None] * rate) / widths).min(axis=1)
    bounds = load_prices * needed_rps + np.where(per_gpu >= 0, per_gpu * (pool.room + 1), per_gpu * gpus)
    return float(bounds.max())
