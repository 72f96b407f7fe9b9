"""The waiting queue and who serves next: a synchronous state machine without I/O, time passed in.

The gateway's server and the virtual fleet drive the same dispatcher. It bounds the work in flight per instance, so
that waiting happens here, where a request can still go anywhere, and not inside an engine. A request is

    waiting --dispatch--> in flight --complete--> gone        (cancel ends it from either state)
       ^-------------------fail_over-----'

Its own pool serves it earliest deadline first; when that is full and a dominating pool has room and nobody of its own
waiting, it spills there. It never goes to a pool that does not dominate its class.

An order of the emergency ladder (`obey`) changes that while it stands: what can still meet its deadline comes before
what cannot, the pool's requests compete for room in dominating pools, and what waits past its deadline is given up.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf

from controller.domain.classes import RequestClass
from controller.domain.reasons import Stage
from controller.fleet.port import PoolOrder, QueueObservation, RoutedInstance, RoutedPool, RoutingTable
from controller.policy.emergency import at_risk, can_make_it
from controller.policy.routing import Decided, Seen, Weights, choose, pools_for, runners_up

# How long an instance gets nothing new after it failed a request: long enough to outlast a routing update.
SUSPECT_S = 2.0

ModelClass = tuple[str, RequestClass]
PoolKey = tuple[str, str]  # model, pool name
Queue = list[tuple[float, int, str]]  # a heap of deadline, order of arrival, id


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """What the dispatcher knows of a request. `deadline_s`: when its first token is due, on the caller's clock."""

    request_id: str
    model: str
    request_class: RequestClass
    deadline_s: float
    prompt_tokens: int = 0  # weigh on the instance that reads them, until its first token
    prefix: str = ""  # names the prompt's beginning; empty: not known
    tells_first: bool = True  # its first token will be heard of (`first_token`), not only its end


@dataclass(slots=True)
class _Entry:
    request: QueuedRequest
    arrived_s: float
    order: int  # of arrival: breaks ties between deadlines
    instance_id: str | None = None  # None while it waits
    pool: PoolKey | None = None  # that serves it
    reading: bool = False  # given to an instance, no token yet
    read_by_s: float = 0.0  # when the prompt is taken for read, of a request whose first token nobody hears of


class Dispatcher:
    """Not thread-safe: one event loop, or one simulation, owns it.

    `max_waiting` bounds the queue; `offer` answers False beyond it.
    """

    def __init__(self, max_waiting: int = 10_000, suspect_s: float = SUSPECT_S, weights: Weights | None = None) -> None:
        self.spilled = 0  # dispatches to another pool than the request's own, since the start
        self.chosen: Counter[Decided] = Counter()  # dispatches by what decided them
        # What is known besides the counts: KV use by instance, and which instance last read a prompt's beginning.
        self.kv_use: Mapping[str, float] = {}
        self.prefix_at: Mapping[str, str] = {}
        # Told of each choice, with the instances as they were just before it.
        self.on_choice: Callable[[QueuedRequest, PoolKey, RoutedInstance, Decided, Seen], None] | None = None
        self._weights = weights or Weights()
        self.moved = 0  # of the spilled: took a place of a dominating pool by order, before some of its own
        self.failed_over = 0
        self._max_waiting = max_waiting
        self._suspect_s = suspect_s
        self._table: RoutingTable | None = None
        self._entries: dict[str, _Entry] = {}
        # Of these, what waits or has an unread prompt: few beside what is being answered, and all that reports look at.
        self._open: dict[str, _Entry] = {}
        self._waiting = 0
        self._arrivals = 0
        # One heap per model and class; entries that no longer wait are dropped at the head.
        self._queues: dict[ModelClass, Queue] = {}
        # The same of those that will not meet their deadline, while an order puts them behind all others.
        self._late: dict[ModelClass, Queue] = {}
        self._orders: dict[PoolKey, tuple[PoolOrder, float]] = {}  # and until when they stand
        self._refused: Counter[tuple[PoolKey, str]] = Counter()
        self._pools: dict[PoolKey, RoutedPool] = {}  # as published, less suspect instances
        self._preferences: dict[ModelClass, tuple[PoolKey, ...]] = {}
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        self._pending_tokens: defaultdict[str, int] = defaultdict(int)  # prompts without a token yet, by instance
        self._pool_in_flight: defaultdict[PoolKey, int] = defaultdict(int)
        self._suspect_until_s: dict[str, float] = {}
        self._silent: list[tuple[float, int, str]] = []  # heap of `read_by_s`, order of arrival, id

    # ------------------------------------------------------------------------------------------------ inputs

    def update_routing(self, table: RoutingTable) -> None:
        """Takes a new table. Work in flight on instances that left it is still accounted for until it ends."""
        self._table = table
        listed = {instance.instance_id for pool in table.pools for instance in pool.instances}
        self._suspect_until_s = {name: until for name, until in self._suspect_until_s.items() if name in listed}
        self._rebuild()

    def obey(self, pools: Iterable[RoutedPool], now_s: float) -> None:
        """Takes the orders that a table carries; they stand until they expire or are given anew."""
        self._orders = {
            (pool.model, pool.name): (pool.order, now_s + pool.order.ttl_s) for pool in pools if pool.order is not None
        }
        self._rebuild()

    def refuse_late(self, now_s: float) -> list[tuple[QueuedRequest, PoolOrder]]:
        """Gives up what waits past its deadline for a pool that is ordered to refuse; each is gone, with the order."""
        given_up: list[tuple[QueuedRequest, PoolOrder]] = []
        self._end_orders(now_s)
        for key in [*self._queues] if self._orders else ():
            order = self._order_of(key)
            if order is None or order.stage is not Stage.REFUSE:
                continue
            for queue in (self._late.get(key, []), self._queues[key]):
                while self._drop_stale(queue) and not can_make_it(queue[0][0], now_s):
                    _, _, request_id = heapq.heappop(queue)
                    given_up.append((self._entries.pop(request_id).request, order))
                    del self._open[request_id]
                    self._waiting -= 1
        return given_up

    def count_refused(self, request: QueuedRequest, reason: str) -> None:
        """A request was refused, for whatever reason: reports say so, under its own pool."""
        if preferred := self._preferences_of((request.model, request.request_class)):
            self._refused[preferred[0], reason] += 1

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
        if self._orders or self._late:
            self._end_orders(now_s)
            self._part_late(now_s)
        if self._silent:
            self._take_for_read(now_s)
        given: list[tuple[QueuedRequest, RoutedInstance]] = []
        full: set[PoolKey] = set()
        while (chosen := self._next(full)) is not None:
            queue, pool, instance, decided = chosen
            _, _, request_id = heapq.heappop(queue)
            entry = self._entries[request_id]
            self.chosen[decided] += 1
            if self.on_choice is not None:
                self.on_choice(entry.request, pool, instance, decided, self._seen(entry.request))
            entry.instance_id, entry.pool, entry.reading = instance.instance_id, pool, True
            self._waiting -= 1
            self._pending_tokens[instance.instance_id] += entry.request.prompt_tokens
            self._in_flight[instance.instance_id] += 1
            self._pool_in_flight[pool] += 1
            if not entry.request.tells_first:
                self._expect(entry, pool, now_s)
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
            del self._open[request_id]
            self._waiting -= 1  # its heap entry is dropped when it reaches the head
            if not self._waiting:
                self._queues.clear()
                self._late.clear()
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
    def ordered(self) -> bool:
        """True while an order may stand: then room comes with a first token, too, not only with an end."""
        return bool(self._orders)

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

    def waited_s(self, request_id: str, now_s: float) -> float:
        """Since a request came. KeyError for one that is not known."""
        return now_s - self._entries[request_id].arrived_s

    def stages(self, now_s: float) -> dict[str, Stage]:
        """The stage ordered for each pool of the table; of pools of the same name the highest."""
        self._end_orders(now_s)
        found: dict[str, Stage] = {}
        for key in self._pools:
            found[key[1]] = max(found.get(key[1], Stage.NONE), self._stage(key), key=lambda stage: stage.rank)
        return found

    def order_for(self, request: QueuedRequest, now_s: float) -> PoolOrder | None:
        """The order that stands for a request's own pool."""
        self._end_orders(now_s)
        return self._order_of((request.model, request.request_class))

    def unread_at_risk(self, now_s: float) -> Counter[str]:
        """Requests at an instance that have had no token and are about to miss their deadline, by their own pool."""
        return Counter(
            preferred[0][1]
            for entry in self._open.values()
            if entry.reading
            and at_risk(entry.arrived_s, entry.request.deadline_s, now_s)
            and (preferred := self._preferences_of((entry.request.model, entry.request.request_class)))
        )

    def queues(self, now_s: float) -> dict[str, QueueObservation]:
        """Per pool of the table: what waits for it as its own, and what is in flight on it. Pools of the same name
        (of several models) are summed, as reports carry names only."""
        waiting: defaultdict[PoolKey, int] = defaultdict(int)
        risky: defaultdict[PoolKey, int] = defaultdict(int)
        oldest_s: defaultdict[PoolKey, float] = defaultdict(float)
        for entry in self._open.values():
            if entry.instance_id is None:
                preferred = self._preferences_of((entry.request.model, entry.request.request_class))
                if preferred:
                    waiting[preferred[0]] += 1
                    risky[preferred[0]] += at_risk(entry.arrived_s, entry.request.deadline_s, now_s)
                    oldest_s[preferred[0]] = max(oldest_s[preferred[0]], now_s - entry.arrived_s)
            elif entry.pool is not None and entry.request.tells_first:
                risky[entry.pool] += not can_make_it(entry.request.deadline_s, now_s)
        summed: dict[str, QueueObservation] = {}
        for key in self._pools:
            have = summed.get(key[1], QueueObservation(0, 0, 0.0))
            summed[key[1]] = QueueObservation(
                have.waiting + waiting[key],
                have.in_flight + self._pool_in_flight[key],
                max(have.oldest_wait_s, oldest_s[key]),
                have.at_risk + risky[key],
                have.refused,
            )
        for (key, reason), count in self._refused.items():
            if key[1] in summed:
                have = summed[key[1]]
                refused = {**have.refused, reason: have.refused.get(reason, 0) + count}
                summed[key[1]] = replace(have, refused=refused)
        return summed

    # ---------------------------------------------------------------------------------------------- internals

    def _enqueue(self, entry: _Entry) -> None:
        request = entry.request
        queue = self._queues.setdefault((request.model, request.request_class), [])
        heapq.heappush(queue, (request.deadline_s, entry.order, request.request_id))
        self._open[request.request_id] = entry
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
            del self._open[entry.request.request_id]
            self._pending_tokens[entry.instance_id] -= entry.request.prompt_tokens
            if not self._pending_tokens[entry.instance_id]:
                del self._pending_tokens[entry.instance_id]

    def _expect(self, entry: _Entry, pool: PoolKey, now_s: float) -> None:
        """Of a request whose first token nobody hears of: its prompt counts as read when it should be."""
        order = self._orders.get(pool)
        request = entry.request
        slack_s = request.deadline_s - entry.arrived_s
        entry.read_by_s = now_s + (
            slack_s if order is None else order[0].first_token_s[request.request_class.input.rank]
        )
        heapq.heappush(self._silent, (entry.read_by_s, entry.order, request.request_id))

    def _take_for_read(self, now_s: float) -> None:
        while self._silent and self._silent[0][0] <= now_s:
            read_by_s, order, request_id = heapq.heappop(self._silent)
            entry = self._entries.get(request_id)
            if entry is not None and (entry.order, entry.read_by_s) == (order, read_by_s):
                self._read(entry)

    def _end_orders(self, now_s: float) -> None:
        if self._orders and min(until_s for _, until_s in self._orders.values()) <= now_s:
            self._orders = {key: order for key, order in self._orders.items() if order[1] > now_s}
            self._rebuild()

    def _order_of(self, key: ModelClass) -> PoolOrder | None:
        """Of the class's own pool."""
        preferred = self._preferences_of(key)
        found = self._orders.get(preferred[0]) if preferred else None
        return None if found is None else found[0]

    def _part_late(self, now_s: float) -> None:
        """Parts what will not meet its deadline from what can, where an order says so; else brings them together."""
        for key in [*self._queues]:
            order = self._order_of(key)
            if order is None:
                for item in self._late.pop(key, ()):
                    heapq.heappush(self._queues[key], item)
                continue
            queue, first_token_s = self._queues[key], order.first_token_s[key[1].input.rank]
            while self._drop_stale(queue) and not can_make_it(queue[0][0], now_s + first_token_s):
                heapq.heappush(self._late.setdefault(key, []), heapq.heappop(queue))

    def _own_places(self, preferred: tuple[PoolKey, ...]) -> tuple[PoolKey, ...]:
        """Pools that a request waits for as one of their own: those that dominate it, too, where it is ordered to move
        and they are not in the same trouble."""
        if self._stage(preferred[0]).rank < Stage.MOVE.rank:
            return preferred[:1]
        others = (pool for pool in preferred[1:] if self._stage(pool).rank < Stage.MOVE.rank)
        return (preferred[0], *others)

    def _stage(self, pool: PoolKey) -> Stage:
        found = self._orders.get(pool)
        return Stage.NONE if found is None else found[0].stage

    def _next(self, full: set[PoolKey]) -> tuple[Queue, PoolKey, RoutedInstance, Decided] | None:
        """The waiting request of the earliest deadline that some pool can take. `full` remembers pools without room
        over one dispatch, in which room only shrinks."""
        heads = [
            (late, queue[0], queue, preferred)
            for late, queues in enumerate((self._queues, self._late))
            for key, queue in queues.items()
            if self._drop_stale(queue) and (preferred := self._preferences_of(key))
        ]
        if not heads:
            return None
        heads.sort(key=lambda head: head[:2])
        for _, (_, _, name), queue, preferred in heads:
            for pool in self._own_places(preferred) if self._orders else preferred[:1]:
                if (found := self._room(pool, full, name)) is not None:
                    if pool == preferred[0]:
                        return queue, pool, *found
                    self.spilled += 1
                    self.moved += 1
                    return queue, pool, found[0], Decided.SPILLED
        # Whatever still waits has a full pool of its own, so no pool with room has anybody of its own waiting.
        for _, (_, _, name), queue, preferred in heads:
            for pool in preferred[1:]:
                if (found := self._room(pool, full, name)) is not None:
                    self.spilled += 1
                    return queue, pool, found[0], Decided.SPILLED
        return None

    def _room(self, pool: PoolKey, full: set[PoolKey], request_id: str) -> tuple[RoutedInstance, Decided] | None:
        if pool in full:
            return None
        members = self._pools[pool]
        if self._orders and (order := self._orders.get(pool)) is not None:
            members = self._with_time(members, order[0].prompt_tokens)
        found = choose(members, self._seen(self._entries[request_id].request), self._weights)
        if found is None:
            full.add(pool)
        return found

    def _with_time(self, pool: RoutedPool, most_tokens: Mapping[str, int]) -> RoutedPool:
        """The pool without the instances that have as many prompts to read as they can in time."""
        pending = self._pending_tokens
        ready = tuple(
            each for each in pool.instances if pending.get(each.instance_id, 0) < most_tokens.get(each.instance_id, inf)
        )
        return pool if len(ready) == len(pool.instances) else replace(pool, instances=ready)

    def _seen(self, request: QueuedRequest) -> Seen:
        prefix_at = self.prefix_at.get(request.prefix, "") if request.prefix else ""
        return Seen(self._in_flight, self._pending_tokens, self.kv_use, prefix_at)

    def next_best(self, request: QueuedRequest, without: str, most: int) -> list[RoutedInstance]:
        """Instances that could take a request over from `without`, the best first."""
        found: list[RoutedInstance] = []
        seen = self._seen(request)
        for key in self._preferences_of((request.model, request.request_class)):
            if len(found) < most:
                found += runners_up(self._pools[key], seen, most - len(found), without)
        return found

    @property
    def suspects(self) -> frozenset[str]:
        """Instances that get nothing new just now because they failed."""
        return frozenset(self._suspect_until_s)

    def _drop_stale(self, queue: Queue) -> bool:
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
        """Pools without suspect instances, with the limits that orders set. A suspect is left out, not shown as
        drained: `choose` need not know it."""
        if self._table is None:
            return
        self._pools = {
            (pool.model, pool.name): replace(pool, instances=tuple(self._usable(pool))) for pool in self._table.pools
        }
        self._preferences = {}

    def _usable(self, pool: RoutedPool) -> Iterable[RoutedInstance]:
        found = self._orders.get((pool.model, pool.name))
        limits = {} if found is None else found[0].limits
        for each in pool.instances:
            if each.instance_id not in self._suspect_until_s:
                limit = limits.get(each.instance_id, each.max_in_flight)
                yield each if limit >= each.max_in_flight else replace(each, max_in_flight=limit)
