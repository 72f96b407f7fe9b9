"""Power budgets: how the watts of a set of nodes are shared out as caps of its GPUs, and in which order caps may move.

A budget is held by caps that stay when the controller is gone; clocks only save below it. So the caps of its nodes
never add up to more than it, not even while they move: what is lowered is lowered first, and nothing is raised before
that is confirmed. Called by the loop (loop/budget.py) whenever budgets, nodes or the layout change. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf

# Watts by which a cap may be read back otherwise than it was asked for.
TOLERANCE_W = 0.5


@dataclass(frozen=True, slots=True)
class GpuPower:
    """One GPU as budgets see it. `ceiling_w` is the most that its cap may be just now, for all that is known, `floor_w`
    the least (where that is not the same); `held_w` the cap of ours that its agent has confirmed. One that is not
    `steerable` (its node is silent, or not to be touched) keeps what it has."""

    uuid: str
    node_id: str
    need_w: float  # what it is planned to draw
    min_w: float  # the range that its cap may be set in
    max_w: float
    ceiling_w: float
    held_w: float | None = None
    steerable: bool = True
    floor_w: float = inf

    @property
    def least_w(self) -> float:
        return min(self.floor_w, self.ceiling_w)


@dataclass(frozen=True, slots=True)
class NodesBudget:
    """Watts for the GPUs of some nodes."""

    scope: str
    watts: float
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Allocation:
    """Wanted caps by GPU, of those that are in a budget and steerable, and the budgets that no caps can keep."""

    caps_w: Mapping[str, float]
    unreachable: tuple[str, ...]


def allocate(gpus: Sequence[GpuPower], budgets: Sequence[NodesBudget]) -> Allocation:
    """Caps that keep every budget, in whole watts: in proportion to what each GPU needs, within its range.

    Budgets are taken one after the other and each only lowers what those before it allow, so that they may overlap. One
    that cannot be kept has every cap at its minimum.
    """
    high_w = {gpu.uuid: gpu.max_w for gpu in gpus if gpu.steerable}
    covered: set[str] = set()
    unreachable = []
    for budget in sorted(budgets, key=lambda b: b.scope):
        members = [gpu for gpu in gpus if gpu.node_id in budget.nodes]
        steered = [gpu for gpu in members if gpu.steerable]
        covered |= {gpu.uuid for gpu in steered}
        left_w = budget.watts - sum(gpu.ceiling_w for gpu in members if not gpu.steerable)
        if sum(gpu.min_w for gpu in steered) > left_w + TOLERANCE_W:
            unreachable.append(budget.scope)
        shared = share_out(
            left_w,
            [gpu.min_w for gpu in steered],
            [high_w[gpu.uuid] for gpu in steered],
            [gpu.need_w for gpu in steered],
        )
        for gpu, watts in zip(steered, shared, strict=True):
            high_w[gpu.uuid] = watts
    return Allocation({uuid: high_w[uuid] for uuid in sorted(covered)}, tuple(unreachable))


def share_out(
    total_w: float, lows_w: Sequence[float], highs_w: Sequence[float], needs_w: Sequence[float]
) -> list[float]:
    """`need · f`, each within its bounds, for the largest f with which the sum stays within `total_w`; whole watts,
    rounded down. The lower bounds where not even they fit."""

    kinds = Counter(zip(lows_w, highs_w, needs_w, strict=True))  # of a fleet's GPUs only few differ

    def at(factor: float) -> dict[tuple[float, float, float], float]:
        return {kind: max(kind[0], min(kind[1], kind[2] * factor)) for kind in kinds}

    def sum_at(factor: float) -> float:
        return sum(kinds[kind] * watts for kind, watts in at(factor).items())

    factor = max((high / need for _, high, need in kinds if need > 0), default=0.0)
    if sum_at(factor) > total_w:
        below, above = 0.0, factor
        for _ in range(60):
            middle = (below + above) / 2
            if sum_at(middle) <= total_w:
                below = middle
            else:
                above = middle
        factor = below
    found = {kind: max(kind[0], float(floor(watts + 1e-6))) for kind, watts in at(factor).items()}
    return [found[kind] for kind in zip(lows_w, highs_w, needs_w, strict=True)]


def next_caps(
    gpus: Sequence[GpuPower], budgets: Sequence[NodesBudget], wanted_w: Mapping[str, float]
) -> dict[str, float]:
    """The caps to ask for now. What surely goes down goes at once. What goes up, or may, goes only as far as every
    budget has room beside the ceilings of all others, node by node, the poorest first; where there is none, a cap that
    is not known for sure is asked for at its least."""
    asked: dict[str, float] = {}
    rising: dict[str, list[GpuPower]] = {}
    for gpu in gpus:
        wish_w = wanted_w.get(gpu.uuid)
        if wish_w is None or not gpu.steerable:
            continue
        if wish_w > gpu.least_w + TOLERANCE_W:
            rising.setdefault(gpu.node_id, []).append(gpu)
        elif gpu.held_w is None or abs(gpu.held_w - wish_w) > TOLERANCE_W or gpu.ceiling_w > wish_w + TOLERANCE_W:
            asked[gpu.uuid] = wish_w
    rooms = {
        budget.scope: budget.watts - sum(gpu.ceiling_w for gpu in gpus if gpu.node_id in budget.nodes)
        for budget in budgets
    }
    for node_id, mine in sorted(rising.items(), key=lambda item: (min(g.ceiling_w for g in item[1]), item[0])):
        more_w = sum(wanted_w[gpu.uuid] - gpu.ceiling_w for gpu in mine)
        over = [budget.scope for budget in budgets if node_id in budget.nodes]
        if all(more_w <= rooms[scope] + TOLERANCE_W for scope in over):
            asked.update((gpu.uuid, wanted_w[gpu.uuid]) for gpu in mine)
            for scope in over:
                rooms[scope] -= max(0.0, more_w)
        else:
            asked.update((g.uuid, g.least_w) for g in mine if g.ceiling_w > g.least_w + TOLERANCE_W)
    return asked


def room_w(gpus: Sequence[GpuPower], budgets: Sequence[NodesBudget]) -> float:
    """What plans may count on: the most that the caps of all GPUs together can be."""
    alike = [replace(gpu, need_w=1.0) for gpu in gpus]
    caps_w = allocate(alike, budgets).caps_w
    return sum(caps_w.get(gpu.uuid, gpu.max_w) for gpu in gpus if gpu.steerable)


def largest_share(needed_w: Sequence[tuple[float, float]], budget_w: float) -> float:
    """The largest share of a load that its watts allow. `needed_w` are points (share, watts) by rising share; between
    them lies a line. 0 where not even the first fits."""
    best = 0.0
    before: tuple[float, float] | None = None
    for share, watts in needed_w:
        if watts <= budget_w:
            best, before = share, (share, watts)
            continue
        if before is not None and watts < inf:
            best += (share - before[0]) * (budget_w - before[1]) / (watts - before[1])
        break
    return best
