"""How the engine schedules: order, chunks, admission, preemption, aborts, clocks."""

from __future__ import annotations

import pytest

from simulator.engine import Engine
from simulator.iteration import Phase, TokenEvent
from simulator.physics import Physics

PHYSICS = Physics.load()
FULL = 1980


def step(engine: Engine, now_s: float, mhz: int = FULL) -> tuple[float, list[TokenEvent]]:
    """One iteration; the instant of its end and its tokens."""
    iteration = engine.begin_iteration(now_s, mhz)
    assert iteration is not None
    return iteration.end_s, engine.finish_iteration(iteration)


def told(events: list[TokenEvent]) -> list[tuple[str, int, bool]]:
    return [(event.request_id, event.last_index, event.finished) for event in events]


def test_an_engine_without_requests_has_nothing_to_do():
    engine = Engine(PHYSICS, 4)
    assert engine.idle
    assert engine.begin_iteration(0.0, FULL) is None


def test_one_request_from_prompt_to_last_token():
    engine = Engine(PHYSICS, 4)
    request = engine.add("a", 500, 3, now_s=10.0)
    prefill_s, _ = PHYSICS.iteration(4, FULL, 0, 0, [(500, 0)])
    end, events = step(engine, 10.0)
    assert end == pytest.approx(10.0 + prefill_s)
    assert told(events) == [("a", 0, False)]
    assert events[0].first
    decode_s, _ = PHYSICS.iteration(4, FULL, 1, 501)
    end, events = step(engine, end)
    assert end == pytest.approx(10.0 + prefill_s + decode_s)
    assert told(events) == [("a", 1, False)]
    assert events[0].gap_s == pytest.approx(decode_s)
    end, events = step(engine, end)
    assert told(events) == [("a", 2, True)]
    assert engine.idle
    assert engine.kv_used_tokens == 0
    assert (request.scheduled_s, request.finished_s) == (10.0, end)


def test_decodes_ride_first_and_prompts_fill_the_rest_of_the_budget():
    engine = Engine(PHYSICS, 8, chunk_tokens=1024)
    engine.add("decoding", 100, 50, 0.0)
    now, _ = step(engine, 0.0)
    engine.add("long", 2000, 5, now)
    engine.add("short", 30, 5, now)
    first = engine.begin_iteration(now, FULL)
    assert [(r.request_id, tokens) for r, tokens in first.chunks] == [("long", 1023)]
    assert first.batch == 1
    assert told(engine.finish_iteration(first)) == [("decoding", 1, False)]
    second = engine.begin_iteration(first.end_s, FULL)
    assert [(r.request_id, tokens) for r, tokens in second.chunks] == [("long", 977), ("short", 30)]
    assert told(engine.finish_iteration(second)) == [("decoding", 2, False), ("long", 0, False), ("short", 0, False)]


def test_a_later_chunk_pays_for_attention_to_the_earlier_ones():
    engine = Engine(PHYSICS, 4)
    engine.add("a", 2048, 1, 0.0)
    first = engine.begin_iteration(0.0, FULL)
    engine.finish_iteration(first)
    second = engine.begin_iteration(first.end_s, FULL)
    assert second.seconds > first.seconds
    assert second.seconds == pytest.approx(PHYSICS.iteration(4, FULL, 0, 0, [(1024, 1024)])[0])


def test_no_more_than_max_running_at_a_time():
    engine = Engine(PHYSICS, 8, max_running=4)
    for number in range(6):
        engine.add(str(number), 10, 5, 0.0)
    now, _ = step(engine, 0.0)
    assert (engine.running, engine.waiting) == (4, 2)
    now, _ = step(engine, now)
    assert (engine.running, engine.waiting) == (4, 2)


def test_a_prompt_waits_until_it_fits_into_the_kv_cache_and_holds_up_those_behind_it():
    engine = Engine(PHYSICS, 2)
    engine.add("big", 20_000, 4, 0.0)
    engine.add("too big for now", 15_000, 4, 0.0)
    engine.add("small", 10, 4, 0.0)
    now = 0.0
    finished = []
    while not finished:
        now, events = step(engine, now)
        assert engine.running == (0 if any(event.finished for event in events) else 1)
        finished = [event.request_id for event in events if event.finished]
    assert finished == ["big"]
    iteration = engine.begin_iteration(now, FULL)
    assert [r.request_id for r, _ in iteration.chunks] == ["too big for now"]


def test_full_kv_cache_preempts_the_last_admitted_which_recomputes_and_goes_on():
    engine = Engine(PHYSICS, 2)  # room for 29,000 tokens
    first = engine.add("first", 14_400, 400, 0.0)
    last = engine.add("last", 14_400, 400, 0.0)
    now, tokens, gaps = 0.0, {"first": [], "last": []}, {"first": [], "last": []}
    while not engine.idle:
        now, events = step(engine, now)
        assert engine.kv_used_tokens <= engine.kv_capacity_tokens
        for event in events:
            tokens[event.request_id].append(event.last_index)
            gaps[event.request_id].append(event.gap_s)
    assert (first.preemptions, last.preemptions) == (0, 1)
    assert engine.counters.preemptions == 1
    assert tokens == {"first": list(range(400)), "last": list(range(400))}
    # Its stream stood still while the other finished and its prompt and answer so far were computed again.
    assert max(gap for gap in gaps["last"] if gap is not None) > 2.0
    assert sum(gap for gap in gaps["last"] if gap is not None) == pytest.approx(last.finished_s - last.first_token_s)


def test_abort_frees_waiting_prefilling_and_decoding_requests():
    engine = Engine(PHYSICS, 4)
    decoding = engine.add("decoding", 10, 100, 0.0)
    now, _ = step(engine, 0.0)
    prefilling = engine.add("prefilling", 3000, 10, now)
    now, _ = step(engine, now)
    engine.add("waiting", 10, 10, now)
    assert (decoding.phase, prefilling.phase) == (Phase.DECODE, Phase.PREFILL)
    for name in ("waiting", "prefilling", "decoding"):
        assert engine.abort(name)
        assert not engine.abort(name)
    assert engine.idle
    assert (engine.kv_used_tokens, engine.waiting, engine.running) == (0, 0, 0)
    assert engine.counters.aborted == 3
    assert engine.begin_iteration(now, FULL) is None


def test_abort_in_the_middle_of_an_iteration_takes_only_that_request_out():
    engine = Engine(PHYSICS, 4)
    for name in ("a", "b"):
        engine.add(name, 10, 3, 0.0)
    now, _ = step(engine, 0.0)
    engine.add("c", 10, 3, now)
    iteration = engine.begin_iteration(now, FULL)
    engine.abort("a")
    engine.abort("c")
    assert told(engine.finish_iteration(iteration)) == [("b", 1, False)]
    _, events = step(engine, iteration.end_s)
    assert told(events) == [("b", 2, True)]
    assert engine.kv_used_tokens == 0


def test_a_clock_change_acts_from_the_next_iteration_on():
    engine = Engine(PHYSICS, 4)
    engine.add("a", 2000, 10, 0.0)
    fast = engine.begin_iteration(0.0, FULL)
    engine.finish_iteration(fast)
    slow = engine.begin_iteration(fast.end_s, 800)
    assert (fast.mhz, slow.mhz) == (FULL, 800)
    assert slow.seconds > 1.4 * fast.seconds * 976 / 1024
    assert slow.watts_per_gpu < fast.watts_per_gpu - 100


def test_a_power_limit_slows_the_engine_and_is_kept():
    engine = Engine(PHYSICS, 4)
    engine.add("a", 2000, 10, 0.0)
    free = engine.begin_iteration(0.0, FULL)
    engine.finish_iteration(free)
    limited = engine.begin_iteration(free.end_s, FULL, power_limit_w=350.0)
    assert limited.mhz < FULL
    assert limited.watts_per_gpu <= 350.0
    assert limited.seconds > free.seconds


@pytest.mark.parametrize(
    ("tokens_in", "tokens_out", "message"),
    [(0, 5, "at least one token"), (5, 0, "at least one token"), (28_000, 1_001, "exceed the KV cache of 29000")],
)
def test_impossible_requests_are_refused(tokens_in, tokens_out, message):
    engine = Engine(PHYSICS, 2)
    with pytest.raises(ValueError, match=message):
        engine.add("a", tokens_in, tokens_out, 0.0)
    assert engine.idle


def test_misuse_is_an_error():
    engine = Engine(PHYSICS, 4)
    engine.add("a", 10, 5, 0.0)
    with pytest.raises(ValueError, match="already here"):
        engine.add("a", 10, 5, 0.0)
    iteration = engine.begin_iteration(0.0, FULL)
    with pytest.raises(RuntimeError, match="in flight"):
        engine.begin_iteration(0.0, FULL)
    engine.finish_iteration(iteration)
    with pytest.raises(RuntimeError, match="not the one in flight"):
        engine.finish_iteration(iteration)
    with pytest.raises(ValueError, match="at least max_running"):
        Engine(PHYSICS, 4, chunk_tokens=128)


# ---------------------------------------------------------------------------------------------------- priorities


def test_by_priority_the_least_number_goes_first_and_ties_as_they_came():
    def order_of(by_priority: bool) -> list[str]:
        engine = Engine(PHYSICS, 8, chunk_tokens=300, max_running=1, by_priority=by_priority)
        for number, (name, priority) in enumerate((("a", 0), ("late", 900), ("b", 5), ("c", 5), ("d", -1))):
            engine.add(name, 300, 1, now_s=0.1 * number, priority=priority)
        now_s, told_of = 1.0, []
        while not engine.idle:
            now_s, events = step(engine, now_s)
            told_of += [event.request_id for event in events]
        return told_of

    assert order_of(by_priority=False) == ["a", "late", "b", "c", "d"]
    assert order_of(by_priority=True) == ["d", "a", "b", "c", "late"]


def test_by_priority_the_highest_number_is_preempted_and_waits_by_its_number():
    engine = Engine(PHYSICS, 2, by_priority=True)
    half = engine.kv_capacity_tokens // 2 - 2
    engine.chunk_tokens = 2 * half  # both are read at once
    late = engine.add("late", half, 100, now_s=0.0, priority=9)
    soon = engine.add("soon", half, 100, now_s=0.1, priority=1)
    now_s = 1.0
    while not engine.counters.preemptions:
        now_s, _ = step(engine, now_s)
    assert (late.phase, soon.phase) == (Phase.WAITING, Phase.DECODE)
    engine.add("between", 10, 1, now_s=now_s, priority=5)
    assert [request.request_id for request in engine._waiting] == ["between", "late"]
