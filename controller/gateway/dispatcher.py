"""The waiting queue and who serves next: a synchronous state machine without I/O, time passed in.

The gateway's server and the virtual fleet drive the same dispatcher. It bounds the work in flight per instance, so
that waiting happens here, where a request can still go anywhere, and not inside an engine. A request is

    waiting --dispatch--> in flight --complete--> gone        (cancel ends it from either state)
       ^-------------------fail_over-----'

Its own pool serves it earliest deadline first; when that is full and a dominating pool has room and nobody of its own
waiting, it spills there. It never goes to a pool that does not dominate its class.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from controller.domain.classes import RequestClass
from controller.fleet.port import QueueObservation, RoutedInstance, RoutedPool, RoutingTable
from controller.policy.routing import pick, pools_for

# How long an instance gets nothing new after it failed a request: long enough to outlast a routing update.
SUSPECT_S = 2.0

ModelClass = tuple[str, RequestClass]
PoolKey = tuple[str, str]  # model, pool name


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """What the dispatcher knows of a request. `deadline_s`: when its first token is due, on the caller's clock."""

    request_id: str
    model: str
    request_class: RequestClass
    deadline_s: float
    prompt_tokens: int = 0  # weigh on the instance that reads them, until its first token


@dataclass(slots=True)
class _Entry:
    request: QueuedRequest
    arrived_s: float
    order: int  # of arrival: breaks ties between deadlines
    instance_id: str | None = None  # None while it waits
    pool: PoolKey | None = None  # that serves it
    reading: bool = False  # given to an instance, no token yet


class Dispatcher:
    """Not thread-safe: one event loop, or one simulation, owns it.

    `max_waiting` bounds the queue; `offer` answers False beyond it.
    """

    def __init__(self, max_waiting: int = 10_000, suspect_s: float = SUSPECT_S) -> None:
        self.spilled = 0  # dispatches to another pool than the request's own, since the start
        self.failed_over = 0
        self._max_waiting = max_waiting
        self._suspect_s = suspect_s
        self._table: RoutingTable | None = None
        self._entries: dict[str, _Entry] = {}
        self._waiting = 0
        self._arrivals = 0
        # One heap of (deadline, order, id) per model and class; entries that no longer wait are dropped at the head.
        self._queues: dict[ModelClass, list[tuple[float, int, str]]] = {}
        self._pools: dict[PoolKey, RoutedPool] = {}  # as published, less suspect instances
        self._preferences: dict[ModelClass, tuple[PoolKey, ...]] = {}
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        self._pending_tokens: defaultdict[str, int] = defaultdict(int)  # prompts without a token yet, by instance
        self._pool_in_flight: defaultdict[PoolKey, int] = defaultdict(int)
        self._suspect_until_s: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------ inputs

    def update_routing(self, table: RoutingTable) -> None:
        """Takes a new table. Work in flight on instances that left it is still accounted for until it ends."""
        self._table = table
        listed = {instance.instance_id for pool in table.pools for instance in pool.instances}
        self._suspect_until_s = {name: until for name, until in self._suspect_until_s.items() if name in listed}
        self._rebuild()

    def offer(self, request: QueuedRequest, now_s: float) -> bool:
        """Queues a request; False when the queue is full. Ids must be unique (ValueError)."""
        if request.request_id in self._entries:
            raise ValueError(f"request {request.request_id} is already known")
        if self._waiting >= self._max_waiting:
            return False
        self._arrivals += 1
        entry = _Entry(request, now_s, self._arrivals)
        self._entries[request.request_id] = entry
        self._enqueue(entry)
        return True

    def dispatch(self, now_s: float) -> list[tuple[QueuedRequest, RoutedInstance]]:
        """All requests that can go to an instance now, in the order they were given one."""
        if not self._waiting:
            return []
        if self._suspect_until_s and min(self._suspect_until_s.values()) <= now_s:
            self._suspect_until_s = {name: until for name, until in self._suspect_until_s.items() if until > now_s}
            self._rebuild()
        given: list[tuple[QueuedRequest, RoutedInstance]] = []
        full: set[PoolKey] = set()
        while (chosen := self._next(full)) is not None:
            queue, pool, instance = chosen
            _, _, request_id = heapq.heappop(queue)
            entry = self._entries[request_id]
            entry.instance_id, entry.pool, entry.reading = instance.instance_id, pool, True
            self._waiting -= 1
            self._pending_tokens[instance.instance_id] += entry.request.prompt_tokens
            self._in_flight[instance.instance_id] += 1
            self._pool_in_flight[pool] += 1
            given.append((entry.request, instance))
        return given

    def first_token(self, request_id: str) -> None:
        """The prompt is read: it weighs on its instance no longer. No error when the request is not in flight."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._read(entry)

    def complete(self, request_id: str) -> None:
        """The answer is finished, or failed for good. KeyError for a request that is not in flight."""
        entry = self._entries[request_id]
        if entry.instance_id is None:
            raise KeyError(f"request {request_id} is not in flight")
        self._release(entry)
        del self._entries[request_id]

    def cancel(self, request_id: str) -> None:
        """The client has gone, or waited too long; no error when the request is unknown or already finished."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        if entry.instance_id is None:
            self._waiting -= 1  # its heap entry is dropped when it reaches the head
            if not self._waiting:
                self._queues.clear()
        else:
            self._release(entry)

    def fail_over(self, request_id: str, now_s: float) -> None:
        """The instance failed before it answered: the request waits again with its old deadline, and the instance
        gets nothing new for a while. KeyError for a request that is not in flight."""
        entry = self._entries[request_id]
        if entry.instance_id is None:
            raise KeyError(f"request {request_id} is not in flight")
        self.failed_over += 1
        self.suspect(entry.instance_id, now_s)
        self._release(entry)
        self._enqueue(entry)

    def suspect(self, instance_id: str, now_s: float) -> None:
        """The instance failed: it gets nothing new for a while."""
        self._suspect_until_s[instance_id] = now_s + self._suspect_s
        self._rebuild()

    # --------------------------------------------------------------------------------------------- questions

    @property
    def table(self) -> RoutingTable | None:
        return self._table

    @property
    def waiting(self) -> int:
        return self._waiting

    def in_flight(self) -> Mapping[str, int]:
        """Requests in flight per instance, those without any left out."""
        return {name: count for name, count in self._in_flight.items() if count}

    def pool_of(self, request_id: str) -> str | None:
        """Name of the pool that serves a request; None while it waits."""
        entry = self._entries[request_id]
        return None if entry.pool is None else entry.pool[1]

    def queues(self, now_s: float) -> dict[str, QueueObservation]:
        """Per pool of the table: what waits for it as its own, and what is in flight on it. Pools of the same name
        (of several models) are summed, as reports carry names only."""
        waiting: defaultdict[PoolKey, int] = defaultdict(int)
        oldest_s: defaultdict[PoolKey, float] = defaultdict(float)
        for entry in self._entries.values():
            if entry.instance_id is None:
                preferred = self._preferences_of((entry.request.model, entry.request.request_class))
                if preferred:
                    waiting[preferred[0]] += 1
                    oldest_s[preferred[0]] = max(oldest_s[preferred[0]], now_s - entry.arrived_s)
        summed: dict[str, QueueObservation] = {}
        for key in self._pools:
            have = summed.get(key[1], QueueObservation(0, 0, 0.0))
            summed[key[1]] = QueueObservation(
                have.waiting + waiting[key],
                have.in_flight + self._pool_in_flight[key],
                max(have.oldest_wait_s, oldest_s[key]),
            )
        return summed

    # ---------------------------------------------------------------------------------------------- internals

    def _enqueue(self, entry: _Entry) -> None:
        request = entry.request
        queue = self._queues.setdefault((request.model, request.request_class), [])
        heapq.heappush(queue, (request.deadline_s, entry.order, request.request_id))
        self._waiting += 1

    def _release(self, entry: _Entry) -> None:
        if entry.instance_id is None or entry.pool is None:
            return
        self._read(entry)
        self._in_flight[entry.instance_id] -= 1
        if not self._in_flight[entry.instance_id]:
            del self._in_flight[entry.instance_id]
        self._pool_in_flight[entry.pool] -= 1
        entry.instance_id = entry.pool = None

    def _read(self, entry: _Entry) -> None:
        if entry.reading and entry.instance_id is not None:
            entry.reading = False
            self._pending_tokens[entry.instance_id] -= entry.request.prompt_tokens
            if not self._pending_tokens[entry.instance_id]:
                del self._pending_tokens[entry.instance_id]

    def _next(self, full: set[PoolKey]) -> tuple[list[tuple[float, int, str]], PoolKey, RoutedInstance] | None:
        """The waiting request of the earliest deadline that some pool can take. `full` remembers pools without room
        over one dispatch, in which room only shrinks."""
        heads = [
            (queue[0], key, queue, preferred)
            for key, queue in self._queues.items()
            if self._drop_stale(queue) and (preferred := self._preferences_of(key))
        ]
        if not heads:
            return None
        heads.sort(key=lambda head: head[0])
        for _, _, queue, preferred in heads:
            if (instance := self._room(preferred[0], full)) is not None:
                return queue, preferred[0], instance
        # Whatever still waits has a full pool of its own, so no pool with room has anybody of its own waiting.
        for _, _, queue, preferred in heads:
            for pool in preferred[1:]:
                if (instance := self._room(pool, full)) is not None:
                    self.spilled += 1
                    return queue, pool, instance
        return None

    def _room(self, pool: PoolKey, full: set[PoolKey]) -> RoutedInstance | None:
        if pool in full:
            return None
        instance = pick(self._pools[pool], self._in_flight, self._pending_tokens)
        if instance is None:
            full.add(pool)
        return instance

    def _drop_stale(self, queue: list[tuple[float, int, str]]) -> bool:
        """Removes heads that no longer wait; True when a waiting one is left."""
        while queue:
            _, order, request_id = queue[0]
            entry = self._entries.get(request_id)
            if entry is not None and entry.instance_id is None and entry.order == order:
                return True
            heapq.heappop(queue)
        return False

    def _preferences_of(self, key: ModelClass) -> tuple[PoolKey, ...]:
        preferred = self._preferences.get(key)
        if preferred is None:
            model, request_class = key
            pools: Iterable[RoutedPool] = (pool for pool in self._pools.values() if pool.model == model)
            preferred = tuple((pool.model, pool.name) for pool in pools_for(pools, request_class))
            self._preferences[key] = preferred
        return preferred

    def _rebuild(self) -> None:
        """Pools without suspect instances. A suspect is left out, not shown as drained: `pick` need not know it."""
        if self._table is None:
            return
        self._pools = {
            (pool.model, pool.name): replace(
                pool,
                instances=tuple(i for i in pool.instances if i.instance_id not in self._suspect_until_s),
            )
            for pool in self._table.pools
        }
        self._preferences = {}
