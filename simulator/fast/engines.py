"""A fleet of engines behind one gateway, at speed: what a controller's side starts, steers and reads.

`advance` runs everything up to an instant inside the kernels; in between, instances are started, drained, stopped,
locked and routed to, and arrays show what they hold. Deterministic: the same calls give the same bytes. Whoever owns
a controller drives it (`simulator/fast/fleet.py`), a static fleet is a loop of one `advance`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from controller.domain.classes import ALL_CLASSES, Bucket, ClassScheme, RequestClass
from controller.domain.reasons import Stage
from controller.domain.slo import Slo
from controller.fleet.port import QueueObservation, RoutedInstance, RoutedPool
from controller.gateway.classify import PRIOR_REQUESTS, REMEMBERED_REQUESTS
from controller.policy.routing import PROMPT_TOKENS_PER_REQUEST, load_of, pools_for
from simulator.engine import DEFAULT_MAX_RUNNING, token_budget
from simulator.fast import layout
from simulator.fast.crashing import crash
from simulator.fast.gateway import QUEUE_FULL, TOO_LATE, count_at_risk, count_late, serve, set_clocks
from simulator.fast.layout import (
    ABSENT,
    ASLEEP,
    AT_ASLEEP,
    AT_DRAINING,
    AT_LOADING,
    CLASSES,
    COPYING,
    DRAINING,
    FLEET,
    FRONT,
    IDLE,
    INSTANCE,
    LOADING,
    MEMBER,
    MOST_POOLS,
    MOST_RUNNING,
    NONE,
    READY,
    RESULT,
    SLOT,
    SLOT_MASK,
    STOPPING,
)
from simulator.fast.tables import CostTables
from simulator.physics import Physics
from simulator.traces import Trace

MAX_WAITING = 10_000
QUANTILE = 0.8
_FIRST_SLOTS = 4096
_FIRST_ROWS = 16
NO_LIMIT = 1 << 62
_NO_FRONT = (inf, inf, 1.0, 0.0, 0, 0, 0, NO_LIMIT)


class ClassRow(NamedTuple):
    """Cumulative counters of one class, in the order of the kernels' columns."""

    arrived: int
    completed: int
    failed: int
    in_slo: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Shown:
    """All instances at one instant, by row; rows without an instance hold zeros."""

    running: list[int]
    waiting: list[int]
    kv_usage_ratio: list[float]
    power_w: list[float]  # per GPU
    energy_j: list[float]  # per GPU, since the instance's start


class FastEngines:
    """Every instance of one model, the gateway before them and the requests of one trace.

    Arrivals count from `start_s`; the fleet's clock begins at 0. An instance is known by its row, which is free again
    once it was removed. Without `choices` a request goes to the least loaded of all instances, exactly; with it to the
    least loaded of so many, drawn at random. With `accuracy` a predictor tells routing the output bucket of a request,
    right that often. Everything else is what the reference has by default.
    """

    def __init__(
        self,
        physics: Physics,
        trace: Trace,
        *,
        start_s: float = 0.0,
        choices: int | None = None,
        accuracy: float | None = None,
        seed: int = 0,
        slo: Slo | None = None,
        scheme: ClassScheme | None = None,
        chunk_tokens: int | None = None,
        max_running: int = DEFAULT_MAX_RUNNING,
    ) -> None:
        chunk_tokens = chunk_tokens or token_budget(physics)
        if not max_running <= min(chunk_tokens, MOST_RUNNING):
            raise ValueError(f"max_running ({max_running}) must be at most chunk_tokens and {MOST_RUNNING}")
        if len(trace) and min(trace.input_tokens.min(), trace.output_tokens.min()) < 1:
            raise ValueError("every request needs at least one token in and one out")
        slo, scheme = slo or Slo(), scheme or ClassScheme()
        self.trace = trace
        self.physics = physics
        self.results: NDArray[np.void] = np.empty(len(trace), RESULT)
        self.results["first_s"] = self.results["finished_s"] = np.nan
        self.results["queue_s"] = self.results["preempted"] = 0
        self.results["instance"] = self.results["pool"] = NONE
        self.gaps: NDArray[np.int64] = np.zeros((layout.GAP_BINS, CLASSES), np.int64)
        # Joules of instances that are gone, by account.
        self._gone_j: NDArray[np.float64] = np.zeros(layout.ACCOUNTS)
        self._tables = CostTables(physics, chunk_tokens)
        self._pools: dict[str, int] = {}
        self._listed: tuple[str, ...] = ()
        self._columns = (
            np.ascontiguousarray(trace.arrival_s, np.float64),
            np.ascontiguousarray(trace.input_tokens, np.int64),
            np.ascontiguousarray(trace.output_tokens, np.int64),
        )
        self._fleet = np.zeros(1, FLEET)
        self._now_s = 0.0
        self._fronts = np.zeros(0, FRONT)
        self._instances = np.zeros(0, INSTANCE)
        self._members = np.zeros((MOST_POOLS, 0), MEMBER)
        self._slots = np.zeros(0, SLOT)
        fleet = self._fleet
        fleet["start_s"] = start_s
        fleet["free_slot"] = NONE
        fleet["chunk_tokens"], fleet["max_running"] = chunk_tokens, max_running
        fleet["prefill_first"] = physics.prefill_first
        fleet["choices"] = choices or 0
        fleet["max_waiting"] = MAX_WAITING
        fleet["prompt_tokens"] = PROMPT_TOKENS_PER_REQUEST
        fleet["quantile"], fleet["remembered"] = QUANTILE, REMEMBERED_REQUESTS
        fleet["accuracy"] = -1.0 if accuracy is None else accuracy
        fleet["predictor"] = np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0]
        fleet["input_cuts"], fleet["output_cuts"] = scheme.input_cuts_tokens, scheme.output_cuts_tokens
        fleet["ttft_ms"] = [slo.ttft_ms(bucket) for bucket in Bucket]
        fleet["ttft_s"] = [slo.ttft_ms(bucket) / 1e3 for bucket in Bucket]
        fleet["tbt_ms"] = slo.tbt_ms
        fleet["seen"] = PRIOR_REQUESTS / layout.BUCKETS
        # Any seed will do but zero, from which the generator would not move.
        fleet["random"] = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] | np.uint64(1)
        self._more_rows(_FIRST_ROWS)
        self._more_slots(_FIRST_SLOTS)

    # ----------------------------------------------------------------------------------------------- time

    @property
    def now_s(self) -> float:
        return self._now_s

    @property
    def open(self) -> int:
        """Requests that arrived and have not ended."""
        return int(self._fleet["live"][0])

    @property
    def arrived(self) -> int:
        return int(self._fleet["cursor"][0])

    def advance(self, until_s: float) -> None:
        """Serves every arrival up to `until_s` and brings all instances there."""
        if until_s < self.now_s:
            raise ValueError(f"the fleet is at {self.now_s} s already, it cannot go back to {until_s} s")
        while not self._serve(until_s):
            self._more_slots(2 * len(self._slots))

    def finish(self) -> float:
        """Serves everything to its end and returns that instant."""
        self.advance(inf)
        return self.now_s

    def _serve(self, until_s: float) -> bool:
        done = serve(
            until_s,
            self._fleet,
            self._fronts,
            self._instances,
            self._slots,
            self._tables.cost,
            self._tables.rates,
            self.gaps,
            self.results,
            self._members,
            *self._columns,
        )
        self._now_s = float(self._fleet["now_s"][0])  # asked for far more often than it changes
        return bool(done)

    # ------------------------------------------------------------------------------------------ instances

    def start(self, tp: int, mhz: int) -> int:
        """Begins to load an instance; returns its row. It draws the loading power until `ready`."""
        cost_row = self._tables.row(tp, mhz)
        free = np.flatnonzero(self._instances["state"] == ABSENT)
        if not len(free):
            self._more_rows(2 * len(self._fronts))
            free = np.flatnonzero(self._instances["state"] == ABSENT)
        row = int(free[0])
        instance = np.zeros((), INSTANCE)
        instance["state"], instance["account"] = LOADING, AT_LOADING
        instance["cost_row"], instance["tp"] = cost_row, tp
        instance["capacity"] = self.physics.kv_capacity_tokens(tp)
        instance["at_s"], instance["power_w"] = self.now_s, self.physics.loading_w
        self._instances[row] = instance
        self._fronts[row] = _NO_FRONT
        self._fleet["rows"] = max(self._fleet["rows"][0], row + 1)
        return row

    def ready(self, row: int) -> None:
        """It is loaded, and idles until it is routed to."""
        instance = self._instances[row]
        instance["state"], instance["account"] = READY, IDLE
        instance["power_w"] = self._tables.rates["idle_w"][instance["cost_row"]]

    def drain(self, row: int) -> None:
        """What it draws from now on counts as draining; taking it out of the routing is the caller's step."""
        self._instances[row]["state"], self._instances[row]["account"] = DRAINING, AT_DRAINING

    def is_empty(self, row: int) -> bool:
        return int(self._fronts[row]["held"]) == 0

    def stop(self, row: int) -> None:
        """Begins to stop an empty instance."""
        if not self.is_empty(row):
            raise ValueError(f"instance {row} still has work")
        self._instances[row]["state"], self._instances[row]["account"] = STOPPING, AT_DRAINING

    def crash(self, row: int) -> None:
        """It dies: what it held waits again or is lost. Its GPUs are parked, but not proven free yet."""
        crash(
            row,
            self.physics.idle_w(self.physics.clocks_mhz[-1], context=False),
            self._fleet,
            self._fronts,
            self._instances,
            self._slots,
            self.results,
        )

    def copy(self, row: int) -> None:
        """An empty instance moves its weights to host memory; it gets nothing more."""
        if not self.is_empty(row):
            raise ValueError(f"instance {row} still has work")
        self._instances[row]["state"] = COPYING
        self._instances[row]["power_w"] = self.physics.loading_w
        self._fronts[row]["limit"], self._fronts[row]["score"] = 0, inf

    def sleep(self, row: int) -> None:
        """Its weights are away; it holds its GPUs with their contexts."""
        instance = self._instances[row]
        instance["state"], instance["account"] = ASLEEP, AT_ASLEEP
        instance["power_w"] = self._tables.rates["idle_w"][instance["cost_row"]]

    def wake(self, row: int) -> None:
        """It moves its weights back, until `ready`."""
        instance = self._instances[row]
        instance["state"], instance["account"] = LOADING, AT_LOADING
        instance["power_w"] = self.physics.loading_w

    def remove(self, row: int) -> float:
        """It is gone: its row is free. Returns the joules that each of its GPUs drew."""
        instance = self._instances[row]
        drawn_j = np.array(instance["energy_j"])
        self._gone_j += drawn_j * instance["tp"]
        self._instances[row] = np.zeros((), INSTANCE)
        self._fronts[row] = _NO_FRONT
        return float(drawn_j.sum())

    def lock(self, rows: Sequence[int], clocks_mhz: Sequence[int]) -> None:
        """Sets the clock that each of the instances runs at from the end of the step under way."""
        if not rows:
            return
        tps = self._instances["tp"]
        wanted = [self._tables.row(int(tps[row]), mhz) for row, mhz in zip(rows, clocks_mhz, strict=True)]
        set_clocks(
            self.now_s,
            np.array(rows, np.int64),
            np.array(wanted, np.int64),
            self._fronts,
            self._instances,
            self._tables.rates,
        )

    # -------------------------------------------------------------------------------------------- routing

    def route(self, pools: Sequence[RoutedPool], rows: dict[str, int]) -> None:
        """Takes a routing table; `rows` finds instances by id. Whoever waits is dispatched at once."""
        fleet = self._fleet[0]
        for pool in pools:
            if pool.name not in self._pools:
                if len(self._pools) == MOST_POOLS:
                    raise ValueError(f"more than {MOST_POOLS} pools in one run")
                self._pools[pool.name] = len(self._pools)
        self._listed = tuple(pool.name for pool in pools)
        self._fleet["members"] = 0
        for pool in pools:
            number = self._pools[pool.name]
            taking = [i for i in pool.instances if i.accepts_new and self._answers(rows.get(i.instance_id))]
            fleet["members"][number] = len(taking)
            self._members[number, : len(taking)] = _alias_table(taking, [rows[i.instance_id] for i in taking])
            limits = pool.order.limits if pool.order is not None else {}
            most_pending = pool.order.prompt_tokens if pool.order is not None else {}
            for instance in taking:
                front = self._fronts[rows[instance.instance_id]]
                limit = limits.get(instance.instance_id, instance.max_in_flight)
                front["weight"], front["limit"] = instance.weight, min(limit, instance.max_in_flight)
                front["most_pending"] = most_pending.get(instance.instance_id, NO_LIMIT)
                front["besides"] = besides = instance.standby_load + instance.rank_load
                room = front["held"] < front["limit"] and front["pending"] < front["most_pending"]
                load = load_of(int(front["held"]), int(front["pending"])) + besides
                front["score"] = load / front["weight"] if room else inf
        for number, request_class in enumerate(ALL_CLASSES):
            preference = [self._pools[pool.name] for pool in pools_for(pools, request_class)]
            fleet["preferred"][number] = len(preference)
            fleet["preference"][number, : len(preference)] = preference
        self._obey(pools)
        fleet["rerouted"] = 1
        self.advance(self.now_s)

    def _answers(self, row: int | None) -> bool:
        """False for an instance whose port is closed: a gateway hears that at its first try."""
        return row is not None and self._instances[row]["state"] in (READY, DRAINING)

    def _obey(self, pools: Sequence[RoutedPool]) -> None:
        """Takes the orders that the table carries. In virtual time they are always renewed, so none expires."""
        fleet = self._fleet[0]
        for name in ("ordered", "reorders", "refuses", "first_token_s", "open_to"):
            fleet[name] = 0
        for number, request_class in enumerate(ALL_CLASSES):
            preferred = pools_for(pools, request_class)
            order = preferred[0].order if preferred else None
            if order is None:
                continue
            fleet["ordered"] = fleet["reorders"][number] = 1
            fleet["refuses"][number] = order.stage is Stage.REFUSE
            fleet["first_token_s"][number] = order.first_token_s[request_class.input.rank]
            if order.stage.rank >= Stage.MOVE.rank:
                fleet["open_to"][number] = sum(
                    1 << self._pools[pool.name]
                    for pool in preferred[1:]
                    if pool.order is None or pool.order.stage.rank < Stage.MOVE.rank
                )

    def pool_names(self) -> tuple[str, ...]:
        """By the numbers that results carry."""
        return tuple(self._pools)

    # ---------------------------------------------------------------------------------------- observations

    def shown(self) -> Shown:
        """What every instance holds now."""
        rows = self._instances
        capacity = np.maximum(rows["capacity"], 1)
        return Shown(
            running=(rows["decoding"] + rows["prefilling"]).tolist(),
            waiting=rows["waiting"].tolist(),
            kv_usage_ratio=((rows["decode_kv"] + rows["prefill_kv"]) / capacity).tolist(),
            power_w=rows["power_w"].tolist(),
            energy_j=rows["energy_j"].sum(axis=1).tolist(),
        )

    def energy_j(self) -> NDArray[np.float64]:
        """Joules of all GPUs of all instances so far, by account (serving, idle, loading, draining, asleep)."""
        drawn_j: NDArray[np.float64] = self._instances["energy_j"] * self._instances["tp"][:, np.newaxis]
        total_j: NDArray[np.float64] = self._gone_j + drawn_j.sum(axis=0)
        return total_j

    def running_s(self) -> NDArray[np.float64]:
        """Instance-seconds of the iterations that have ended, by requests in the batch."""
        return np.array(self._fleet["running_s"][0])

    def counters(self) -> dict[RequestClass, ClassRow]:
        """What a gateway would have counted since its start."""
        rows = self._fleet["counters"][0].tolist()
        return {request_class: ClassRow(*row) for request_class, row in zip(ALL_CLASSES, rows, strict=True)}

    def queues(self) -> dict[str, QueueObservation]:
        """Per pool of the table: who waits for it as its own, and what is in flight on it."""
        fleet = self._fleet[0]
        waiting = dict.fromkeys(self._pools.values(), 0)
        oldest_s = dict.fromkeys(self._pools.values(), 0.0)
        late = np.zeros(MOST_POOLS, np.int64)
        count_late(self.now_s, self._instances, self._slots, self._fleet, late)
        at_risk = {pool: int(late[pool]) for pool in self._pools.values()}
        if fleet["queued"]:
            counts = np.zeros(2 * CLASSES, np.int64)
            count_at_risk(self.now_s, self._slots, self._fleet, counts)
            for number in range(2 * CLASSES):
                if fleet["queue"][number] and fleet["preferred"][number % CLASSES]:
                    own = int(fleet["preference"][number % CLASSES, 0])
                    head = self._slots[fleet["queue_head"][number]]
                    waiting[own] += int(fleet["queue"][number])
                    oldest_s[own] = max(oldest_s[own], self.now_s - float(head["arrival_s"]))
                    at_risk[own] += int(counts[number])
        return {
            name: QueueObservation(
                waiting[pool], int(fleet["in_flight"][pool]), oldest_s[pool], at_risk[pool], self._refused_by(pool)
            )
            for name in self._listed
            for pool in (self._pools[name],)
        }

    def _refused_by(self, pool: int) -> dict[str, int]:
        counts = self._fleet["refused_by"][0, pool]
        named = {"queue_full": int(counts[QUEUE_FULL]), "too_late": int(counts[TOO_LATE])}
        return {reason: count for reason, count in named.items() if count}

    @property
    def spilled(self) -> int:
        """Requests that another pool than their own served."""
        return int(self._fleet["spilled"][0])

    @property
    def mispredicted(self) -> int:
        """Requests that were routed for another output bucket than the true one."""
        return int(self._fleet["mispredicted"][0])

    @property
    def outgrown(self) -> int:
        """Of the mispredicted ones those whose answers grew longer than they were routed for."""
        return int(self._fleet["outgrown"][0])

    @property
    def refused(self) -> int:
        """Requests that found the queue full, or that no KV cache could hold."""
        return int(self._fleet["refused"][0])

    # --------------------------------------------------------------------------------------------- memory

    def _more_rows(self, rows: int) -> None:
        fronts = np.zeros(rows, FRONT)
        fronts[:] = _NO_FRONT
        instances = np.zeros(rows, INSTANCE)
        members = np.zeros((MOST_POOLS, rows), MEMBER)
        have = len(self._fronts)
        fronts[:have], instances[:have], members[:, :have] = self._fronts, self._instances, self._members
        self._fronts, self._instances, self._members = fronts, instances, members

    def _more_slots(self, count: int) -> None:
        have = len(self._slots)
        if count > SLOT_MASK:
            raise MemoryError(f"more than {have:,} requests are in the fleet at once")
        slots = np.zeros(count, SLOT)
        slots[:have] = self._slots
        slots["next"][have:] = np.arange(have + 1, count + 1)
        slots["next"][-1] = self._fleet["free_slot"][0]
        self._fleet["free_slot"] = have
        self._slots = slots


def _alias_table(instances: Collection[RoutedInstance], rows: Iterable[int]) -> NDArray[np.void]:
    """Members of a pool, with what it takes to draw one by weight in constant time (Vose's method)."""
    table = np.zeros(len(instances), MEMBER)
    table["instance"] = list(rows)
    table["other"] = np.arange(len(instances))
    weights = np.array([instance.weight for instance in instances])
    share = (weights * (len(weights) / weights.sum())).tolist() if len(weights) else []
    small = [number for number, part in enumerate(share) if part < 1]
    large = [number for number, part in enumerate(share) if part >= 1]
    while small and large:
        poor, rich = small.pop(), large[-1]
        table["other"][poor] = rich
        share[rich] -= 1 - share[poor]
        if share[rich] < 1:
            small.append(large.pop())
    for number in small + large:
        share[number] = 1.0  # what rounding left over
    # Those that gave their remainder away keep the share they had.
    table["share"] = share
    return table
