"""One instance of continuous batching, compiled: the scheduler of `simulator/engine.py` over records.

Same order, chunks, admission, preemption, merged decode runs and cuts as the reference, which stays the definition;
the agreement tests hold the two together. `advance` brings an instance to an instant, `admit` gives it a request.
"""

from __future__ import annotations

from math import ceil, inf, sqrt
from typing import Any

from simulator.fast.compiling import part
from simulator.fast.layout import (
    ASLEEP,
    AT_ASLEEP,
    AT_DRAINING,
    BASE_J,
    BASE_S,
    CLASSES,
    COMPLETED,
    FINE_GAPS,
    GAP_BINS,
    IDLE,
    IN_SLO,
    NONE,
    OUTPUT_TOKENS,
    READY,
    SERVING,
    SLOT_BITS,
    SLOT_MASK,
    TENSOR_W,
)

Record = Any
Array = Any


@part
def advance(
    until_s: float,
    row: int,
    fronts: Array,
    instances: Array,
    slots: Array,
    cost: Array,
    rates: Array,
    gaps: Array,
    results: Array,
    fleet: Record,
) -> int:
    """Runs every iteration that ends before `until_s`; the number of requests that finished."""
    front = fronts[row]
    instance = instances[row]
    finished = 0
    while front.end_s < until_s:
        now_s = front.end_s
        finished += finish(instance, front, slots, gaps, results, fleet)
        begin(now_s, instance, front, slots, cost, rates, fleet)
    return finished


@part
def admit(
    now_s: float,
    index: int,
    row: int,
    fronts: Array,
    instances: Array,
    slots: Array,
    cost: Array,
    rates: Array,
    fleet: Record,
) -> None:
    """Queues a request at an instance that was advanced to now."""
    front = fronts[row]
    instance = instances[row]
    slots[index].next = NONE
    if instance.waiting == 0:
        instance.head = index
    else:
        slots[instance.tail].next = index
    instance.tail = index
    instance.waiting += 1
    hold(front, 1, slots[index].input, fleet)
    if front.end_s == inf:
        begin(now_s, instance, front, slots, cost, rates, fleet)
    else:
        cut(now_s, instance, front)


@part
def hold(front: Record, more: int, prompt_tokens: int, fleet: Record) -> None:
    """Counts requests in or out and prompts to be read, and with them how the instance stands for the next request."""
    front.held += more
    front.pending += prompt_tokens
    load = front.held + 1 + front.pending / fleet.prompt_tokens
    room = front.held < front.limit and front.pending < front.most_pending
    front.score = (load + front.besides) / front.weight if room else inf


@part
def book(now_s: float, instance: Record) -> None:
    """Books the energy drawn up to now."""
    instance.energy_j[instance.account] += instance.power_w * (now_s - instance.at_s)
    instance.at_s = now_s


@part
def rest(now_s: float, instance: Record, rates: Array) -> None:
    """Nothing to run: idle from now on, at the present clock."""
    book(now_s, instance)
    instance.power_w = rates[instance.cost_row].idle_w
    if instance.state == READY:
        instance.account = IDLE
    else:
        instance.account = AT_ASLEEP if instance.state == ASLEEP else AT_DRAINING


@part
def cut(now_s: float, instance: Record, front: Record) -> None:
    """Ends the merged run in flight with the step that is under way now."""
    if instance.steps == 1:
        return
    elapsed_s = now_s - instance.start_s
    step_s, growth_s = instance.step_s, instance.step_growth_s
    if elapsed_s <= step_s:
        steps = 1
    elif growth_s == 0:
        steps = ceil(elapsed_s / step_s)
    else:
        half = step_s - growth_s / 2
        steps = max(1, ceil((sqrt(half * half + 2 * growth_s * elapsed_s) - half) / growth_s))
    if steps >= instance.steps:
        return
    # The run so far had the longer run's mean watts; what is left makes up the shorter one's energy.
    book(now_s, instance)
    drawn_j = instance.power_w * elapsed_s
    pairs = steps * (steps - 1) / 2
    seconds = steps * step_s + pairs * growth_s
    joules = steps * instance.step_j + pairs * instance.step_growth_j
    front.end_s = instance.start_s + seconds
    left_s = front.end_s - now_s
    instance.power_w = (joules - drawn_j) / left_s if left_s > 0 else joules / seconds
    instance.steps = steps


@part
def begin(
    now_s: float, instance: Record, front: Record, slots: Array, cost: Array, rates: Array, fleet: Record
) -> None:
    """Schedules the next run; goes idle when there is none."""
    preempted = False
    while instance.decoding > 0 and _free_tokens(instance) < instance.decoding:
        _preempt(now_s, instance, slots)
        preempted = True
    decoding = instance.decoding
    tokens = 0  # of prompts
    units = 0.0
    if instance.prefilling > 0 or instance.waiting > 0:
        budget = fleet.chunk_tokens - (0 if fleet.prefill_first else decoding)
        if instance.prefilling > 0:
            # All but the last prompt of a run are completed by it, so at most one is left over.
            slot = slots[instance.prefill[0]]
            chunk = min(slot.target - slot.prefilled, budget)
            instance.last_chunk = chunk
            units += chunk * (slot.prefilled + chunk / 2)
            budget -= chunk
            tokens += chunk
        free = _free_tokens(instance) - decoding
        while (
            instance.waiting > 0 and not preempted and budget > 0 and instance.prefilling + decoding < fleet.max_running
        ):
            index = instance.head
            slot = slots[index]
            if slot.target > free:
                break
            instance.head = slot.next
            instance.waiting -= 1
            instance.prefill[instance.prefilling] = index
            instance.prefilling += 1
            instance.prefill_kv += slot.target
            free -= slot.target
            chunk = min(slot.target, budget)
            instance.last_chunk = chunk
            units += chunk * (chunk / 2)
            budget -= chunk
            tokens += chunk
    batch = decoding
    if tokens > 0 and decoding > 0 and fleet.prefill_first:
        _pause(now_s, instance, slots)
        batch = 0
    tokens += batch
    if tokens == 0:
        front.end_s = inf
        rest(now_s, instance, rates)
        return
    instance.batch = batch
    rate = rates[instance.cost_row]
    if tokens > batch:
        base = cost[2 * instance.cost_row, tokens]
        attention_s = units * rate.attention_s
        memory_s = (instance.decode_kv + batch) * rate.kv_s + batch * rate.sequence_s if batch > 0 else 0.0
        seconds = base[BASE_S] + attention_s + memory_s
        joules = base[BASE_J] + attention_s * base[TENSOR_W] + memory_s * rate.kv_w
        if batch > 0 and seconds < rate.floor_s:
            joules += (rate.floor_s - seconds) * rate.idle_w
            seconds = rate.floor_s
        instance.steps = 1
    else:
        base = cost[2 * instance.cost_row + 1, tokens]
        seconds, joules = _plan_decode(instance, rate, base[BASE_S], base[BASE_J])
    book(now_s, instance)
    instance.account = SERVING if instance.state == READY else AT_DRAINING
    instance.power_w = joules / seconds
    instance.start_s = now_s
    front.end_s = now_s + seconds


@part
def _plan_decode(instance: Record, rate: Record, base_s: float, base_j: float) -> tuple[float, float]:
    """Merges decode steps up to the next finish; seconds and joules of the run."""
    decoding = instance.decoding
    context = instance.decode_kv + decoding
    slope_s, slope_j = rate.kv_s, rate.kv_s * rate.kv_w
    steps = (instance.heap[0] >> SLOT_BITS) - instance.step
    free = _free_tokens(instance)
    if free < steps * decoding:
        steps = free // decoding
    if base_s < rate.floor_s:
        on_floor = (rate.floor_s - base_s) / slope_s  # tokens of context up to which the floor holds
        if context <= on_floor:
            base_j += (rate.floor_s - base_s) * rate.idle_w
            base_s = rate.floor_s
            slope_j -= slope_s * rate.idle_w
            slope_s = 0.0
            steps = min(steps, int((on_floor - context) // decoding) + 1)
    if instance.paused:
        steps = 1  # its gaps are longer than itself, so they are counted apart
    step_s, growth_s = base_s + slope_s * context, slope_s * decoding
    step_j, growth_j = base_j + slope_j * context, slope_j * decoding
    instance.steps = steps
    instance.step_s, instance.step_growth_s = step_s, growth_s
    instance.step_j, instance.step_growth_j = step_j, growth_j
    pairs = steps * (steps - 1) / 2
    return steps * step_s + pairs * growth_s, steps * step_j + pairs * growth_j


@part
def finish(instance: Record, front: Record, slots: Array, gaps: Array, results: Array, fleet: Record) -> int:
    """Ends the run in flight; the number of requests that finished with it."""
    end_s = front.end_s
    book(end_s, instance)
    decoding = instance.batch
    fleet.running_s[instance.decoding + instance.prefilling] += end_s - instance.start_s
    finished = 0
    if decoding > 0:
        instance.step += instance.steps
        instance.decode_kv += instance.steps * decoding
        if instance.paused:
            instance.paused = 0
            for place in range(decoding):
                slot = slots[instance.heap[place] & SLOT_MASK]
                gaps[gap_bin(end_s - slot.last_token_s), slot.request_class] += 1
        else:
            counts = gaps[gap_bin((end_s - instance.start_s) / instance.steps)]
            for number in range(CLASSES):
                counts[number] += instance.steps * instance.by_class[number]
        while instance.decoding > 0 and instance.heap[0] >> SLOT_BITS <= instance.step:
            index = instance.heap[0] & SLOT_MASK
            _remove(instance.heap, instance.decoding, 0)
            instance.decoding -= 1
            slot = slots[index]
            instance.by_class[slot.request_class] -= 1
            instance.decode_kv -= slot.target + instance.step - slot.joined_step
            slot.generated = slot.output
            _complete(end_s, index, slot, front, results, fleet)
            finished += 1
    prompts = instance.prefilling
    if prompts > 0:
        instance.prefilling = 0
        for number in range(prompts):
            index = instance.prefill[number]
            slot = slots[index]
            if number == prompts - 1 and slot.prefilled + instance.last_chunk < slot.target:
                slot.prefilled += instance.last_chunk
                instance.prefill[0] = index
                instance.prefilling = 1
                break
            instance.prefill_kv -= slot.target
            if slot.generated > 0:
                # The pause of a preempted request is a gap that no run's own length shows.
                gaps[gap_bin(end_s - slot.last_token_s), slot.request_class] += 1
            else:
                slot.first_s = end_s
                hold(front, 0, -slot.input, fleet)
            slot.generated += 1
            if slot.generated == slot.output:
                _complete(end_s, index, slot, front, results, fleet)
                finished += 1
                continue
            slot.last_token_s = end_s
            slot.joined_step = instance.step
            instance.joins += 1
            slot.join = instance.joins
            instance.decode_kv += slot.target
            instance.by_class[slot.request_class] += 1
            key = (instance.step + slot.output - slot.generated) << SLOT_BITS | index
            _raise(instance.heap, instance.decoding, key)
            instance.decoding += 1
    return finished


@part
def gap_bin(gap_s: float) -> int:
    fine = int(gap_s * 1e4 + 0.5)
    if fine < FINE_GAPS:
        return fine
    return min(FINE_GAPS + int((gap_s - FINE_GAPS / 1e4) * 100), GAP_BINS - 1)


@part
def _free_tokens(instance: Record) -> int:
    free: int = instance.capacity - instance.decode_kv - instance.prefill_kv
    return free


@part
def _pause(now_s: float, instance: Record, slots: Array) -> None:
    """Prefills go first now; those that joined meanwhile know their last token already."""
    if not instance.paused:
        for place in range(instance.decoding):
            slots[instance.heap[place] & SLOT_MASK].last_token_s = now_s
    instance.paused = 1


@part
def _preempt(now_s: float, instance: Record, slots: Array) -> None:
    """Puts the last admitted back to the head of the queue; its KV is to be computed anew."""
    if instance.prefilling > 0:
        instance.prefilling -= 1
        index = int(instance.prefill[instance.prefilling])
        slot = slots[index]
        instance.prefill_kv -= slot.target
    else:
        last = 0
        for place in range(1, instance.decoding):
            if slots[instance.heap[place] & SLOT_MASK].join > slots[instance.heap[last] & SLOT_MASK].join:
                last = place
        index = instance.heap[last] & SLOT_MASK
        slot = slots[index]
        _remove(instance.heap, instance.decoding, last)
        instance.decoding -= 1
        instance.by_class[slot.request_class] -= 1
        made = instance.step - slot.joined_step
        slot.generated += made
        instance.decode_kv -= slot.target + made
        if not instance.paused:
            slot.last_token_s = now_s
    slot.target = slot.input + slot.generated
    slot.prefilled = 0
    slot.preemptions += 1
    instance.preemptions += 1
    if instance.waiting == 0:
        instance.tail = index
        slot.next = NONE
    else:
        slot.next = instance.head
    instance.head = index
    instance.waiting += 1


@part
def _complete(now_s: float, index: int, slot: Record, front: Record, results: Array, fleet: Record) -> None:
    """Writes down what became of a request, feeds the gateway's meter and classifier, and frees the slot."""
    result = results[slot.request]
    result.first_s = slot.first_s
    result.finished_s = now_s
    result.queue_s = slot.queue_s
    result.instance = slot.instance
    result.pool = slot.pool
    result.preempted = min(slot.preemptions, 255)
    hold(front, -1, 0, fleet)
    fleet.in_flight[slot.pool] -= 1
    fleet.live -= 1
    fleet.last_end_s = max(fleet.last_end_s, now_s)
    request_class = slot.request_class
    fleet.counters[request_class, COMPLETED] += 1
    fleet.counters[request_class, OUTPUT_TOKENS] += slot.output
    bucket, out = request_class // 3, request_class % 3
    ttft_ms = (slot.first_s - slot.arrival_s) * 1e3
    tbt_ms = (now_s - slot.first_s) / (slot.output - 1) * 1e3 if slot.output > 1 else 0.0
    if ttft_ms <= fleet.ttft_ms[bucket] and tbt_ms <= fleet.tbt_ms:
        fleet.counters[request_class, IN_SLO] += 1
    seen = fleet.seen[bucket]
    seen[out] += 1
    if seen[0] + seen[1] + seen[2] > fleet.remembered:
        for number in range(3):
            seen[number] /= 2
    slot.next = fleet.free_slot
    fleet.free_slot = index


# --------------------------------------------------------------------------------- a heap of finishing steps


@part
def _raise(heap: Array, place: int, key: int) -> None:
    """Puts `key` in at `place`, a leaf, and lets it rise."""
    while place > 0:
        parent = (place - 1) >> 1
        if heap[parent] <= key:
            break
        heap[place] = heap[parent]
        place = parent
    heap[place] = key


@part
def _remove(heap: Array, size: int, place: int) -> None:
    """Takes the entry at `place` out of a heap of `size`."""
    last = size - 1
    key = heap[last]
    # The hole sinks to a leaf along the smaller children; the last entry rises from there.
    while True:
        child = 2 * place + 1
        if child >= last:
            break
        if child + 1 < last and heap[child + 1] < heap[child]:
            child += 1
        heap[place] = heap[child]
        place = child
    if place < last:
        _raise(heap, place, key)
