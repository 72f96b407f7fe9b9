"""The gateway in front of the instances, compiled: classes, the queue, and which instance serves a request.

The twin of `controller/gateway/{classify,dispatcher}.py` and `controller/policy/routing/` in arrays; those stay the
definition, and the agreement tests hold the two together. While nobody queues, instances are advanced only when a
request may go to them; while somebody does, every iteration end of the fleet is taken in order of time.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

from simulator.fast.compiling import kernel, part
from simulator.fast.engine import admit, advance, book, cut, rest
from simulator.fast.layout import (
    ARRIVED,
    ASLEEP,
    CLASSES,
    DRAINING,
    FAILED,
    INPUT_TOKENS,
    NONE,
    READY,
)

Record = Any
Array = Any
# Columns of FLEET.refused_by.
QUEUE_FULL, TOO_LATE = range(2)


@kernel
def serve(
    until_s: float,
    fleet_record: Array,
    fronts: Array,
    instances: Array,
    slots: Array,
    cost: Array,
    rates: Array,
    gaps: Array,
    results: Array,
    members: Array,
    arrival_s: Array,
    input_tokens: Array,
    output_tokens: Array,
) -> bool:
    """Serves arrivals up to `until_s` and brings every instance there. False when it ran out of slots before."""
    fleet = fleet_record[0]
    if fleet.queued > 0 and fleet.rerouted:
        _dispatch(fleet.now_s, fronts, instances, slots, cost, rates, members, fleet)
    fleet.rerouted = 0
    while fleet.cursor < len(arrival_s):
        request = fleet.cursor
        now_s = fleet.start_s + arrival_s[request]
        if now_s > until_s:
            break
        if fleet.free_slot == NONE:
            return False
        if fleet.queued > 0:
            _serve_in_order(now_s, fronts, instances, slots, cost, rates, gaps, results, members, fleet)
        if fleet.choices == 0:
            for row in range(fleet.rows):
                if fronts[row].end_s < now_s:
                    advance(now_s, row, fronts, instances, slots, cost, rates, gaps, results, fleet)
        fleet.cursor += 1
        _arrive(
            now_s,
            request,
            input_tokens[request],
            output_tokens[request],
            fronts,
            instances,
            slots,
            cost,
            rates,
            gaps,
            results,
            members,
            fleet,
        )
    if fleet.queued > 0:
        _serve_in_order(until_s, fronts, instances, slots, cost, rates, gaps, results, members, fleet)
    for row in range(fleet.rows):
        if fronts[row].end_s < until_s:
            advance(until_s, row, fronts, instances, slots, cost, rates, gaps, results, fleet)
    fleet.now_s = until_s if until_s < inf else max(fleet.now_s, fleet.last_end_s)
    for row in range(fleet.rows):
        book(fleet.now_s, instances[row])
    return True


@kernel
def set_clocks(now_s: float, rows: Array, cost_rows: Array, fronts: Array, instances: Array, rates: Array) -> None:
    """Gives instances that were advanced to now another clock: runs end with the step under way."""
    for number in range(len(rows)):
        row = rows[number]
        instance = instances[row]
        instance.cost_row = cost_rows[number]
        if instance.state == READY or instance.state == DRAINING or instance.state == ASLEEP:
            if fronts[row].end_s < inf:
                cut(now_s, instance, fronts[row])
            else:
                rest(now_s, instance, rates)


# ------------------------------------------------------------------------------------------------- arrivals


@part
def _arrive(
    now_s: float,
    request: int,
    tokens_in: int,
    tokens_out: int,
    fronts: Array,
    instances: Array,
    slots: Array,
    cost: Array,
    rates: Array,
    gaps: Array,
    results: Array,
    members: Array,
    fleet: Record,
) -> None:
    bucket = _bucket(tokens_in, fleet.input_cuts)
    true_class = 3 * bucket + _bucket(tokens_out, fleet.output_cuts)
    if fleet.accuracy < 0:
        routing_class = _classify(bucket, tokens_in, fleet)
    else:
        routing_class = 3 * bucket + _predict(request, true_class % 3, fleet)
        fleet.counters[routing_class, ARRIVED] += 1
        fleet.counters[routing_class, INPUT_TOKENS] += tokens_in
    fleet.mispredicted += routing_class != true_class
    fleet.outgrown += routing_class < true_class
    if fleet.queued >= fleet.max_waiting:
        _refuse(true_class, fleet)
        if fleet.preferred[routing_class] > 0:
            fleet.refused_by[fleet.preference[routing_class, 0], QUEUE_FULL] += 1
        return
    index = fleet.free_slot
    slot = slots[index]
    fleet.free_slot = slot.next
    fleet.live += 1
    slot.request = request
    slot.arrival_s = now_s
    slot.input = tokens_in
    slot.output = tokens_out
    slot.target = tokens_in
    slot.request_class = true_class
    slot.routing_class = routing_class
    slot.generated = 0
    slot.prefilled = 0
    slot.preemptions = 0
    if fleet.queued == 0 and not fleet.ordered:
        for number in range(fleet.preferred[routing_class]):
            pool = fleet.preference[routing_class, number]
            row = _pick(now_s, pool, fronts, instances, slots, cost, rates, gaps, results, members, fleet)
            if row != NONE:
                fleet.spilled += number > 0
                _give(now_s, index, pool, row, fronts, instances, slots, cost, rates, fleet)
                return
    if fleet.queued == 0:
        # From here on somebody waits, and any instance's finish may make room: they must all be here.
        for row in range(fleet.rows):
            if fronts[row].end_s < now_s:
                advance(now_s, row, fronts, instances, slots, cost, rates, gaps, results, fleet)
    append(index, routing_class, slots, fleet)
    fleet.queued += 1
    _dispatch(now_s, fronts, instances, slots, cost, rates, members, fleet)


@part
def _refuse(true_class: int, fleet: Record) -> None:
    fleet.refused += 1
    fleet.counters[true_class, FAILED] += 1


@part
def _bucket(tokens: int, cuts: Array) -> int:
    bucket: int = (tokens >= cuts[0]) + (tokens >= cuts[1])
    return bucket


@part
def _classify(bucket: int, tokens_in: int, fleet: Record) -> int:
    """The class to route by; the class that load reports count the arrival under is counted here."""
    seen, owed = fleet.seen[bucket], fleet.owed[bucket]
    total = seen[0] + seen[1] + seen[2]
    routing = 2
    below = 0.0
    for out in range(3):
        below += seen[out]
        if below >= fleet.quantile * total:
            routing = out
            break
    most = 0
    for out in range(3):
        owed[out] += seen[out] / total
        if owed[out] > owed[most]:
            most = out
    owed[most] -= 1.0
    fleet.counters[3 * bucket + most, ARRIVED] += 1
    fleet.counters[3 * bucket + most, INPUT_TOKENS] += tokens_in
    return 3 * bucket + routing


@part
def _predict(request: int, true_bucket: int, fleet: Record) -> int:
    """A predictor's output bucket for a request: the true one as often as its accuracy says, else one of the others.
    Drawn from the request alone, so that every system hears the same (splitmix64)."""
    state = np.uint64(request + 1) * np.uint64(0x9E3779B97F4A7C15) + fleet.predictor
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    drawn = np.int64(state >> np.uint64(11)) / 9007199254740992.0
    if drawn < fleet.accuracy:
        return true_bucket
    return (true_bucket + (1 if drawn < (1.0 + fleet.accuracy) / 2 else 2)) % 3


# ----------------------------------------------------------------------------------------- which instance


@part
def _pick(
    now_s: float,
    pool: int,
    fronts: Array,
    instances: Array,
    slots: Array,
    cost: Array,
    rates: Array,
    gaps: Array,
    results: Array,
    members: Array,
    fleet: Record,
) -> int:
    """The instance of a pool for one request; NONE when none has room. Brings those it looks at to now."""
    count = fleet.members[pool]
    if 0 < fleet.choices < count:
        best = NONE
        best_score = inf
        for _ in range(fleet.choices):
            row = members[pool, _draw(pool, count, members, fleet)].instance
            if fronts[row].end_s < now_s:
                advance(now_s, row, fronts, instances, slots, cost, rates, gaps, results, fleet)
            if fronts[row].score < best_score:
                best, best_score = row, fronts[row].score
        if best != NONE:
            return best
    for number in range(count):
        row = members[pool, number].instance
        if fronts[row].end_s < now_s:
            advance(now_s, row, fronts, instances, slots, cost, rates, gaps, results, fleet)
    return _shortest(pool, fronts, members, fleet)


@part
def _shortest(pool: int, fronts: Array, members: Array, fleet: Record) -> int:
    """The member with room that is least loaded per weight, the first of equals; NONE without one."""
    best = NONE
    best_score = inf
    for number in range(fleet.members[pool]):
        row = members[pool, number].instance
        if fronts[row].score < best_score:
            best, best_score = row, fronts[row].score
    return best


@part
def _draw(pool: int, count: int, members: Array, fleet: Record) -> int:
    """A member at random, by weight: xorshift64* and an alias table."""
    state = fleet.random
    state ^= state >> np.uint64(12)
    state ^= state << np.uint64(25)
    state ^= state >> np.uint64(27)
    fleet.random = state
    drawn = state * np.uint64(0x2545F4914F6CDD1D)
    # Signed again: mixed with a signed number, numba would make a fraction of it.
    number = np.int64(((drawn >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32))
    fraction = np.int64(drawn & np.uint64(0xFFFFFFFF)) / 4294967296.0
    member = members[pool, number]
    return int(number) if fraction < member.share else int(member.other)


@part
def _give(
    now_s: float,
    index: int,
    pool: int,
    row: int,
    fronts: Array,
    instances: Array,
    slots: Array,
    cost: Array,
    rates: Array,
    fleet: Record,
) -> None:
    slot = slots[index]
    if slot.input + slot.output > instances[row].capacity:
        # An engine answers a request that its KV cache can never hold with an error.
        _refuse(slot.request_class, fleet)
        fleet.live -= 1
        slot.next = fleet.free_slot
        fleet.free_slot = index
        return
    slot.pool = pool
    slot.instance = row
    slot.queue_s = now_s - slot.arrival_s
    fleet.in_flight[pool] += 1
    admit(now_s, index, row, fronts, instances, slots, cost, rates, fleet)


# ------------------------------------------------------------------------------------------------ the queue


@part
def _serve_in_order(
    until_s: float,
    fronts: Array,
    instances: Array,
    slots: Array,
    cost: Array,
    rates: Array,
    gaps: Array,
    results: Array,
    members: Array,
    fleet: Record,
) -> None:
    """Takes the fleet's iteration ends one after another until `until_s`, or until nobody queues any more."""
    while fleet.queued > 0:
        first = NONE
        end_s = until_s
        for row in range(fleet.rows):
            if fronts[row].end_s < end_s:
                first, end_s = row, fronts[row].end_s
        if first == NONE:
            return
        # Just beyond its end, so that this one run is ended and the next begun.
        after_s = np.nextafter(end_s, inf)
        unread = fronts[first].pending
        finished = advance(after_s, first, fronts, instances, slots, cost, rates, gaps, results, fleet)
        if finished > 0 or (fleet.ordered and fronts[first].pending < unread):
            _dispatch(end_s, fronts, instances, slots, cost, rates, members, fleet)


@part
def _dispatch(
    now_s: float,
    fronts: Array,
    instances: Array,
    slots: Array,
    cost: Array,
    rates: Array,
    members: Array,
    fleet: Record,
) -> None:
    """Gives waiting requests to instances that have room, while there are both. All instances must be here."""
    _carry_out_orders(now_s, slots, fleet)
    full = 0  # pools without room, as bits: room only shrinks within one dispatch
    while fleet.queued > 0:
        queue = first = NONE
        due_s = inf
        for number in range(2 * CLASSES):
            if number == CLASSES and queue != NONE:
                break  # those that will be late come after all others
            request_class = number % CLASSES
            if fleet.queue[number] > 0 and fleet.preferred[request_class] > 0:
                if _own_places(request_class, fleet) & ~full == 0:
                    continue
                head = slots[fleet.queue_head[number]]
                head_due_s = _due_s(head, fleet)
                if head_due_s < due_s or (head_due_s == due_s and head.request < first):
                    queue, due_s, first = number, head_due_s, head.request
        if queue == NONE:
            break
        request_class = queue % CLASSES
        own = _own_places(request_class, fleet)
        for place in range(fleet.preferred[request_class]):
            pool = fleet.preference[request_class, place]
            if own >> pool & 1 == 0 or full >> pool & 1:
                continue
            row = _shortest(pool, fronts, members, fleet)
            if row == NONE:
                full |= 1 << pool
                continue
            fleet.spilled += place > 0
            index = _take(queue, slots, fleet)
            _give(now_s, index, pool, row, fronts, instances, slots, cost, rates, fleet)
            break
    # Whatever waits now has a full pool of its own, so no pool with room has anybody of its own waiting.
    while fleet.queued > 0:
        queue = first = NONE
        due_s = inf
        to_pool = to_row = NONE
        for number in range(2 * CLASSES):
            if number == CLASSES and queue != NONE:
                break
            if fleet.queue[number] == 0:
                continue
            head = slots[fleet.queue_head[number]]
            head_due_s = _due_s(head, fleet)
            if head_due_s > due_s or (head_due_s == due_s and head.request > first):
                continue
            for place in range(1, fleet.preferred[number % CLASSES]):
                pool = fleet.preference[number % CLASSES, place]
                if full >> pool & 1:
                    continue
                row = _shortest(pool, fronts, members, fleet)
                if row == NONE:
                    full |= 1 << pool
                else:
                    queue, due_s, first = number, head_due_s, head.request
                    to_pool, to_row = pool, row
                    break
        if queue == NONE:
            return
        fleet.spilled += 1
        index = _take(queue, slots, fleet)
        _give(now_s, index, to_pool, to_row, fronts, instances, slots, cost, rates, fleet)


@part
def _own_places(request_class: int, fleet: Record) -> int:
    """Pools that a class's requests wait for as their own, as bits."""
    places: int = 1 << fleet.preference[request_class, 0] | fleet.open_to[request_class]
    return places


@part
def _carry_out_orders(now_s: float, slots: Array, fleet: Record) -> None:
    """Refuses what waits past its deadline, and parts what will be late from what can be in time, where that is
    ordered; brings them together where it no longer is."""
    for request_class in range(CLASSES):
        late = CLASSES + request_class
        if not fleet.reorders[request_class]:
            if fleet.queue[late] > 0:
                _put_back(request_class, slots, fleet)
            continue
        if fleet.refuses[request_class]:
            for queue in (late, request_class):
                while fleet.queue[queue] > 0 and _due_s(slots[fleet.queue_head[queue]], fleet) <= now_s:
                    _give_up(_take(queue, slots, fleet), request_class, slots, fleet)
        by_s = now_s + fleet.first_token_s[request_class]
        while fleet.queue[request_class] > 0 and _due_s(slots[fleet.queue_head[request_class]], fleet) <= by_s:
            append(_take(request_class, slots, fleet), late, slots, fleet)
            fleet.queued += 1


@part
def _put_back(request_class: int, slots: Array, fleet: Record) -> None:
    """The late ones arrived before all others of their class: the two queues become one again."""
    late = CLASSES + request_class
    if fleet.queue[request_class] == 0:
        fleet.queue_tail[request_class] = fleet.queue_tail[late]
    else:
        slots[fleet.queue_tail[late]].next = fleet.queue_head[request_class]
    fleet.queue_head[request_class] = fleet.queue_head[late]
    fleet.queue[request_class] += fleet.queue[late]
    fleet.queue[late] = 0


@part
def _give_up(index: int, request_class: int, slots: Array, fleet: Record) -> None:
    """Refuses a request that waited for too long."""
    _refuse(slots[index].request_class, fleet)
    fleet.refused_by[fleet.preference[request_class, 0], TOO_LATE] += 1
    fleet.live -= 1
    slots[index].next = fleet.free_slot
    fleet.free_slot = index


@part
def append(index: int, queue: int, slots: Array, fleet: Record) -> None:
    """Queues a request behind all that came before it: at the end, unless it waits for the second time."""
    mine = slots[index]
    if fleet.queue[queue] == 0:
        mine.next = NONE
        fleet.queue_head[queue] = fleet.queue_tail[queue] = index
    elif slots[fleet.queue_tail[queue]].request < mine.request:
        mine.next = NONE
        slots[fleet.queue_tail[queue]].next = index
        fleet.queue_tail[queue] = index
    elif mine.request < slots[fleet.queue_head[queue]].request:
        mine.next = fleet.queue_head[queue]
        fleet.queue_head[queue] = index
    else:
        before = fleet.queue_head[queue]
        while slots[slots[before].next].request < mine.request:
            before = slots[before].next
        mine.next = slots[before].next
        slots[before].next = index
    fleet.queue[queue] += 1


@kernel
def count_late(now_s: float, instances: Array, slots: Array, fleet_record: Array, counts: Array) -> None:
    """Requests at instances that are past their deadline and have had no token, by the pool that serves them."""
    fleet = fleet_record[0]
    for row in range(fleet.rows):
        instance = instances[row]
        for number in range(instance.prefilling):
            _count_late(now_s, slots[instance.prefill[number]], fleet, counts)
        index = instance.head
        for _ in range(instance.waiting):
            _count_late(now_s, slots[index], fleet, counts)
            index = slots[index].next


@part
def _count_late(now_s: float, slot: Record, fleet: Record, counts: Array) -> None:
    if slot.generated == 0 and _due_s(slot, fleet) <= now_s:
        counts[slot.pool] += 1


@kernel
def count_at_risk(now_s: float, slots: Array, fleet_record: Array, counts: Array) -> None:
    """Waiting requests of which half the time to their deadline is gone, by queue."""
    fleet = fleet_record[0]
    for queue in range(2 * CLASSES):
        index = fleet.queue_head[queue]
        for _ in range(fleet.queue[queue]):
            slot = slots[index]
            if now_s - slot.arrival_s < (_due_s(slot, fleet) - slot.arrival_s) / 2:
                break
            counts[queue] += 1
            index = slot.next


@part
def _due_s(slot: Record, fleet: Record) -> float:
    due_s: float = slot.arrival_s + fleet.ttft_s[slot.request_class // 3]
    return due_s


@part
def _take(queue: int, slots: Array, fleet: Record) -> int:
    """Takes the head of a queue."""
    index: int = fleet.queue_head[queue]
    fleet.queue_head[queue] = slots[index].next
    fleet.queue[queue] -= 1
    fleet.queued -= 1
    return index
