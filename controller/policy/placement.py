"""Placement: from wanted counts by (pool, tp) to a layout, instance by instance and GPU by GPU.

Stands between the MILP and the transition. Keeps what can stay (same pool first; then an instance of the same tp
changes its pool without a restart), places the rest on aligned GPU groups, free GPUs first: spread over the nodes, or
gathered on few where empty ones are switched off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from controller.domain.layout import Layout, Node, PlannedInstance


@dataclass(frozen=True, slots=True)
class HeldInstance:
    """An instance that holds GPUs now. `keep` is True when it serves or is on its way to (starting, warming, ready);
    a draining, stopping or quarantined one cannot be kept and only blocks its GPUs until it is gone."""

    instance_id: str
    pool: str  # that it is routed as now
    node_id: str
    gpu_uuids: tuple[str, ...]
    keep: bool

    @property
    def tp(self) -> int:
        return len(self.gpu_uuids)


@dataclass(frozen=True, slots=True)
class Placed:
    """`missing` counts what did not fit, by (pool, tp); empty when everything did."""

    layout: Layout
    missing: Mapping[tuple[str, int], int]
    kept: tuple[str, ...]  # instance ids, pool changes included
    relabelled: tuple[str, ...]
    started: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.missing


def place(
    counts: Mapping[tuple[str, int], int],
    model: str,
    current: Layout,
    held: tuple[HeldInstance, ...],
    nodes: tuple[Node, ...],
    new_id: Callable[[], str],
    least_nodes: int | None = None,
) -> Placed:
    """Puts `counts` on `nodes`.

    A pool is spread over the nodes. With `least_nodes` instances gather instead, as far as that takes no restart: the
    emptiest node loses its instances first, the fullest one gets the new ones; only so many nodes does a pool lie on in
    any case, so that it outlives the loss of one.

    `current` is the layout wanted so far: of it, instances that hold no GPU yet keep their place where it still fits,
    so that repeating the call changes nothing. No GPU has two owners in the result; unusable GPUs have none.
    """
    groups = _Groups(nodes)
    wanted = {key: n for key, n in counts.items() if n > 0}
    staying = _candidates(current, held, groups)
    need = _by_tp(wanted)
    taken: set[str] = set()
    chosen: list[PlannedInstance] = []
    kept: list[str] = []
    relabelled: list[str] = []
    started: list[str] = []
    missing: dict[tuple[str, int], int] = {}
    rank = _emptiest_first(staying) if least_nodes is not None else {}
    # Widest first: a wide group is the hardest to find, narrow ones fit into what is left.
    for tp in sorted(need, reverse=True):
        mine = [c for c in staying if c.tp == tp and taken.isdisjoint(c.gpu_uuids)]
        slots = [pool for (pool, t), n in sorted(wanted.items()) if t == tp for _ in range(n)]
        assigned = _assign(mine, slots, rank)
        for i, candidate in assigned.items():
            chosen.append(
                PlannedInstance(candidate.instance_id, slots[i], model, candidate.node_id, candidate.gpu_uuids)
            )
            taken.update(candidate.gpu_uuids)
            if candidate.held:
                kept.append(candidate.instance_id)
                if candidate.pool != slots[i]:
                    relabelled.append(candidate.instance_id)
            else:
                started.append(candidate.instance_id)
        left = _interleaved([slots[i] for i in range(len(slots)) if i not in assigned])
        spots = None
        if left:
            later = [c for c in staying if c.tp < tp and taken.isdisjoint(c.gpu_uuids)]
            burdens = _Burdens(held, staying, need, taken, tp)
            spots = _Spots(groups, tp, taken, burdens, chosen, later, least_nodes)
        for pool in left:
            spot = spots.best(pool) if spots is not None else None
            if spot is None:
                missing[pool, tp] = missing.get((pool, tp), 0) + 1
                continue
            node_id, gpu_uuids = spot
            instance = PlannedInstance(new_id(), pool, model, node_id, gpu_uuids)
            chosen.append(instance)
            taken.update(gpu_uuids)
            started.append(instance.instance_id)
    layout = Layout(tuple(sorted(chosen, key=lambda i: i.instance_id)))
    return Placed(layout, missing, tuple(sorted(kept)), tuple(sorted(relabelled)), tuple(sorted(started)))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An instance that could stay where it is: held, or planned there and not started yet."""

    instance_id: str
    pool: str
    node_id: str
    gpu_uuids: tuple[str, ...]
    held: bool

    @property
    def tp(self) -> int:
        return len(self.gpu_uuids)


class _Groups:
    """The usable aligned GPU groups of the nodes, by width."""

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self.node_of: dict[str, str] = {}
        self._slots: list[tuple[str, dict[int, str]]] = []
        for node in sorted(nodes, key=lambda n: n.node_id):
            slots = {gpu.slot: gpu.uuid for gpu in node.gpus if gpu.usable}
            self._slots.append((node.node_id, slots))
            self.node_of.update(dict.fromkeys(slots.values(), node.node_id))
        self._by_tp: dict[int, list[tuple[str, tuple[str, ...]]]] = {}

    def of(self, tp: int) -> list[tuple[str, tuple[str, ...]]]:
        """(node, GPUs) of every group of `tp` that starts at a multiple of `tp`."""
        if tp not in self._by_tp:
            found = []
            for node_id, slots in self._slots:
                for first in range(0, max(slots, default=-1) + 1, tp):
                    group = [slots.get(first + i) for i in range(tp)]
                    if None not in group:
                        found.append((node_id, tuple(uuid for uuid in group if uuid is not None)))
            self._by_tp[tp] = found
        return self._by_tp[tp]


def _candidates(current: Layout, held: tuple[HeldInstance, ...], groups: _Groups) -> list[_Candidate]:
    """Whatever could stay. A GPU that became unusable or left takes its instance with it. A planned instance may lie
    over held ones of another tp, which leave for it: the wider kind, looked at first, decides."""
    holders = {h.instance_id for h in held}
    keepable = [_Candidate(h.instance_id, h.pool, h.node_id, h.gpu_uuids, held=True) for h in held if h.keep]
    planned = [
        _Candidate(p.instance_id, p.pool, p.node_id, p.gpu_uuids, held=False)
        for p in current.instances
        if p.instance_id not in holders
    ]
    found: list[_Candidate] = []
    # Of two that claim one GPU within a kind only the first counts: two owners are a fault not to be carried on.
    claimed: set[tuple[int, str]] = set()
    owned: set[str] = set()
    for candidate in (*sorted(keepable, key=_by_id), *sorted(planned, key=_by_id)):
        uuids = candidate.gpu_uuids
        mine = {(candidate.tp, uuid) for uuid in uuids}
        on_node = all(groups.node_of.get(uuid) == candidate.node_id for uuid in uuids)
        if uuids and on_node and claimed.isdisjoint(mine) and not (candidate.held and not owned.isdisjoint(uuids)):
            found.append(candidate)
            claimed |= mine
            owned.update(uuids if candidate.held else ())
    return found


def _by_id(candidate: _Candidate) -> str:
    return candidate.instance_id


def _by_tp(counts: Mapping[tuple[str, int], int]) -> Counter[int]:
    total: Counter[int] = Counter()
    for (_, tp), n in counts.items():
        total[tp] += n
    return total


# Costs of giving a candidate a wanted place. A new pool label is cheap, but not free: it moves load. A place that is
# only planned yields to an instance that exists. A tie-break tells which node loses an instance first.
_RELABEL = 1.0
_NOT_STARTED = 10.0
_TIE = 0.001


def _emptiest_first(staying: list[_Candidate]) -> dict[str, int]:
    """Nodes numbered by the held GPUs that could stay in use there, fewest first. No two are alike, so that of two
    nodes one becomes empty and not a half of each. What is only planned follows from this order, not the other way."""
    used: Counter[str] = Counter()
    for candidate in staying:
        used[candidate.node_id] += candidate.tp if candidate.held else 0
    return {node_id: number for number, node_id in enumerate(sorted(used, key=lambda name: (used[name], name)))}


def _assign(candidates: list[_Candidate], slots: list[str], rank: Mapping[str, int]) -> dict[int, _Candidate]:
    """Which candidate takes which wanted place (index into `slots`, a pool each): the assignment of least cost. `rank`
    has the nodes in the order in which they are to become empty; without it a crowded one loses an instance first."""
    if not candidates or not slots:
        return {}
    numbers = {pool: number for number, pool in enumerate(dict.fromkeys(slots))}
    pools = np.array([numbers[pool] for pool in slots])
    cost = np.empty((len(candidates), len(slots)))
    seen: Counter[tuple[str, str]] = Counter()
    for row, candidate in enumerate(candidates):
        crowd = seen[candidate.pool, candidate.node_id]
        seen[candidate.pool, candidate.node_id] += 1
        cost[row] = np.where(pools == numbers.get(candidate.pool, -1), 0.0, _RELABEL)
        tie = 1.0 - rank[candidate.node_id] / len(rank) if rank else crowd
        cost[row] += (0.0 if candidate.held else _NOT_STARTED) + _TIE * tie
    rows, columns = linear_sum_assignment(cost)
    return {int(column): candidates[int(row)] for row, column in zip(rows, columns, strict=True)}


def _interleaved(pools: list[str]) -> list[str]:
    """Pools take turns, so that where not all fits none is left out."""
    seen: Counter[str] = Counter()
    ranked = []
    for pool in pools:
        ranked.append((seen[pool], pool))
        seen[pool] += 1
    return [pool for _, pool in sorted(ranked)]


# What one GPU of a spot costs a new instance: 0 free, _FREED held by an instance that leaves (a drain to wait for),
# _DISPLACED held by one that would else stay (a restart for nothing).
_FREED = 1
_DISPLACED = 10


class _Burdens:
    """Cost of every GPU that is not simply free, for new instances of `tp`; it follows what they take."""

    def __init__(
        self, held: tuple[HeldInstance, ...], staying: list[_Candidate], need: Counter[int], taken: set[str], tp: int
    ) -> None:
        self._freed = {uuid: _FREED for instance in held for uuid in instance.gpu_uuids}
        self._need = need
        self._there = {
            narrower: {c.gpu_uuids: c for c in staying if c.tp == narrower and taken.isdisjoint(c.gpu_uuids)}
            for narrower in sorted(need)
            if narrower < tp
        }
        self._owners: dict[str, list[_Candidate]] = {}
        for candidates in self._there.values():
            for candidate in candidates.values():
                for uuid in candidate.gpu_uuids:
                    self._owners.setdefault(uuid, []).append(candidate)

    def of(self, uuid: str) -> int:
        displaced = any(self._stays(candidate) for candidate in self._owners.get(uuid, ()))
        return _DISPLACED if displaced else self._freed.get(uuid, 0)

    def take(self, uuids: tuple[str, ...]) -> list[str]:
        """Notes that the GPUs are taken; the GPUs whose cost may differ now."""
        changed: list[str] = []
        for gone in {c.gpu_uuids: c for uuid in uuids for c in self._owners.get(uuid, ())}.values():
            there = self._there[gone.tp]
            if there.pop(gone.gpu_uuids, None) is None:
                continue
            changed += gone.gpu_uuids
            if len(there) == self._need[gone.tp]:  # from here on none of these is one too many
                changed += [uuid for candidate in there.values() for uuid in candidate.gpu_uuids]
        return changed

    def _stays(self, candidate: _Candidate) -> bool:
        """None of its kind is to leave, and nobody has taken its GPUs."""
        there = self._there[candidate.tp]
        return candidate.gpu_uuids in there and len(there) <= self._need[candidate.tp]


class _Spots:
    """Where new instances of `tp` may go. Best is the least burden, then the node with fewest instances of the pool,
    then the fullest node. With `least_nodes` the fullest comes first, once the pool lies on so many nodes. Kept as one
    array per measure, since a large fleet has thousands of spots and of starts."""

    def __init__(
        self,
        groups: _Groups,
        tp: int,
        taken: set[str],
        burdens: _Burdens,
        chosen: list[PlannedInstance],
        later: list[_Candidate],
        least_nodes: int | None,
    ) -> None:
        """`later`: narrower ones that could stay. Most of them will, so their nodes are in use."""
        self._spots = groups.of(tp)
        self._burdens = burdens
        numbers = {node_id: i for i, node_id in enumerate(dict.fromkeys(node_id for node_id, _ in self._spots))}
        self._node = np.array([numbers[node_id] for node_id, _ in self._spots], dtype=np.int64)
        self._spot_of = {uuid: i for i, (_, uuids) in enumerate(self._spots) for uuid in uuids}
        self._free = np.array([taken.isdisjoint(uuids) for _, uuids in self._spots], dtype=bool)
        self._burden = np.array([self._sum(uuids) for _, uuids in self._spots], dtype=np.int64)
        self._load = np.zeros(len(numbers), dtype=np.int64)
        self._of_pool: dict[str, NDArray[np.int64]] = {}
        for instance in chosen:
            if instance.node_id in numbers:
                self._load[numbers[instance.node_id]] += instance.tp
                self._count(instance.pool)[numbers[instance.node_id]] += 1
        self._least_nodes = least_nodes
        for candidate in later if least_nodes is not None else ():
            if candidate.node_id in numbers:
                self._load[numbers[candidate.node_id]] += candidate.tp

    def best(self, pool: str) -> tuple[str, tuple[str, ...]] | None:
        """Takes the best spot for one instance of the pool; None when there is none."""
        best = np.flatnonzero(self._free)
        if not best.size:
            return None
        of_pool = self._count(pool)
        best = _least(best, self._burden[best])
        if self._least_nodes is None:
            best = _least(best, of_pool[self._node[best]])
        elif np.count_nonzero(of_pool) < self._least_nodes:
            best = _least(best, (of_pool[self._node[best]] > 0).astype(np.int64))
        best = _least(best, -self._load[self._node[best]])
        node_id, uuids = self._spots[best[0]]
        node = self._node[best[0]]
        of_pool[node] += 1
        self._load[node] += len(uuids)
        self._free[best[0]] = False
        for spot in {self._spot_of[u] for u in self._burdens.take(uuids) if u in self._spot_of}:
            self._burden[spot] = self._sum(self._spots[spot][1])
        return node_id, uuids

    def _sum(self, uuids: tuple[str, ...]) -> int:
        return sum(self._burdens.of(uuid) for uuid in uuids)

    def _count(self, pool: str) -> NDArray[np.int64]:
        """Instances of the pool by node."""
        return self._of_pool.setdefault(pool, np.zeros_like(self._load))


def _least(spots: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    least: NDArray[np.int64] = spots[values == values.min()]
    return least
