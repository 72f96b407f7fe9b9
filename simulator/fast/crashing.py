"""The end of an instance that dies, compiled: what becomes of the requests that it held (`simulator/incidents.py`)."""

from __future__ import annotations

from math import inf
from typing import Any

from simulator.fast.compiling import kernel, part
from simulator.fast.gateway import append
from simulator.fast.layout import AT_DRAINING, CLASSES, FAILED, SLOT_MASK, STOPPING

Record = Any
Array = Any


@kernel
def crash(
    row: int,
    power_w: float,
    fleet_record: Array,
    fronts: Array,
    instances: Array,
    slots: Array,
    results: Array,
) -> None:
    """An instance dies, all having been advanced to now: what no client has heard of yet waits again at the gateway,
    answers under way are lost. Its GPUs draw `power_w` from now on."""
    fleet = fleet_record[0]
    instance = instances[row]
    for place in range(instance.decoding):
        _drop(instance.heap[place] & SLOT_MASK, slots, results, fleet)
    for number in range(instance.prefilling):
        _drop(instance.prefill[number], slots, results, fleet)
    index = instance.head
    for _ in range(instance.waiting):
        following = slots[index].next
        _drop(index, slots, results, fleet)
        index = following
    instance.decoding = instance.prefilling = instance.waiting = instance.paused = 0
    instance.decode_kv = instance.prefill_kv = 0
    instance.by_class[:] = 0
    instance.state = STOPPING
    instance.account = AT_DRAINING
    instance.power_w = power_w
    front = fronts[row]
    front.end_s = front.score = inf
    front.held = front.pending = front.limit = 0


@part
def _drop(index: int, slots: Array, results: Array, fleet: Record) -> None:
    """One request of an instance that died."""
    slot = slots[index]
    fleet.in_flight[slot.pool] -= 1
    if slot.generated == 0:
        slot.target = slot.input
        slot.prefilled = 0
        slot.preemptions = 0
        late = CLASSES + slot.routing_class
        # Those that will be late stand apart, and whoever came before one of them will be late too.
        behind = fleet.queue[late] > 0 and slot.request < slots[fleet.queue_tail[late]].request
        append(index, late if behind else slot.routing_class, slots, fleet)
        fleet.queued += 1
        return
    fleet.counters[slot.request_class, FAILED] += 1
    fleet.live -= 1
    result = results[slot.request]
    result.first_s = slot.first_s
    result.queue_s = slot.queue_s
    result.instance = slot.instance
    result.pool = slot.pool
    slot.next = fleet.free_slot
    fleet.free_slot = index
