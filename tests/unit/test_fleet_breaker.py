"""The circuit breaker of an agent's calls: when it opens, how long it stays open, what closes it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from controller.fleet.breaker import FAILED_CALLS, Breaker, Circuit, breaker_of
from controller.fleet.port import ApplyCaps, ApplyClocks, CapTarget, ClockTarget, StopInstance

FIRST_S, MOST_S, SILENT_S = 4.0, 32.0, 3.0


def breaker(chance: float = 1.0) -> Breaker:
    """With a chance of 1 it stays open for the whole time."""
    return Breaker(FIRST_S, MOST_S, SILENT_S, lambda: chance)


def opened(chance: float = 1.0) -> Breaker:
    """At 0 s."""
    made = breaker(chance)
    assert [made.failed(0.0) for _ in range(FAILED_CALLS)] == [False] * (FAILED_CALLS - 1) + [True]
    return made


def open_for_s(made: Breaker, now_s: float) -> float:
    """Until it lets a trial out, to a tenth of a second."""
    return next(tenths / 10 for tenths in range(10_000) if made.admits(now_s + tenths / 10))


def test_calls_go_out_until_a_few_in_a_row_have_failed() -> None:
    made = breaker()
    for _ in range(FAILED_CALLS - 1):
        assert not made.failed(0.0)
    assert made.admits(0.0)
    assert not made.answered()  # counting begins anew; nothing was open
    for _ in range(FAILED_CALLS - 1):
        assert not made.failed(0.0)
    assert made.admits(0.0)
    assert not made.is_open
    assert made.failed(0.0)
    assert made.is_open
    assert not made.admits(0.0)


def test_when_its_time_is_over_one_call_is_let_out_and_the_others_wait_for_what_comes_of_it() -> None:
    made = opened()
    assert not made.admits(FIRST_S - 0.1)
    assert made.admits(FIRST_S)
    assert made.circuit is Circuit.TRYING
    assert [made.admits(FIRST_S + after_s) for after_s in (0.0, 0.1, FIRST_S)] == [False] * 3
    assert made.answered()
    assert all(made.admits(FIRST_S + 0.2) for _ in range(10))


def test_each_trial_that_fails_doubles_the_time_up_to_a_bound_and_an_answer_begins_anew() -> None:
    made, now_s, stayed_s = opened(), 0.0, []
    for _ in range(6):
        stayed_s.append(open_for_s(made, now_s))
        now_s += stayed_s[-1]
        assert not made.failed(now_s)  # it was open all the time: nothing new to tell
    assert stayed_s == [4.0, 8.0, 16.0, 32.0, 32.0, 32.0]
    assert made.answered()
    for _ in range(FAILED_CALLS):
        made.failed(now_s)
    assert open_for_s(made, now_s) == FIRST_S


def test_chance_spreads_trials_over_half_of_the_time() -> None:
    assert [open_for_s(opened(chance), 0.0) for chance in (0.0, 0.5, 1.0)] == [2.0, 3.0, 4.0]


def test_calls_that_were_under_way_when_it_opened_change_nothing_when_they_fail() -> None:
    made = opened()
    for _ in range(20):
        assert not made.failed(1.0)
    assert made.admits(FIRST_S)


def test_one_of_them_that_is_answered_closes_it() -> None:
    made = opened()
    assert made.answered()
    assert made.admits(0.0)


def test_a_trial_whose_end_is_never_told_does_not_keep_the_agent_out() -> None:
    made = opened()
    assert made.admits(FIRST_S)
    assert open_for_s(made, FIRST_S) == MOST_S


CLOCKS = ApplyClocks("e", "n", (ClockTarget(("g",), 1200),), 20.0, "a test")
CAPS = ApplyCaps("e", "n", (CapTarget(("g",), 400.0),), 20.0, "a test")
STOP = StopInstance("e", "n", "i", "a test")


def let_out(made: Breaker, now_s: float) -> list[bool]:
    """Of a clock, a cap that guards a budget, one that only saves, and a stop."""
    return [made.lets_out(effect, now_s) for effect in (CLOCKS, CAPS, replace(CAPS, protects=False), STOP)]


def test_what_guards_a_budget_is_always_tried_and_clocks_while_the_node_reports() -> None:
    made = opened()
    assert let_out(made, 1.0) == [False, True, False, False], "it was never heard"
    made.heard(1.0)
    assert let_out(breaker(), 1.0) == [True] * 4
    for _ in range(FAILED_CALLS):
        made.failed(1.0)
    assert let_out(made, 1.0 + SILENT_S) == [True, True, False, False]
    assert let_out(made, 1.1 + SILENT_S) == [False, True, False, False]


def test_samples_close_it_after_a_silence_alone() -> None:
    made = breaker()
    assert not made.heard(0.0), "nothing was open"
    for _ in range(FAILED_CALLS):
        made.failed(0.0)
    assert [made.heard(at_s) for at_s in (1.0, 2.0, 2.0 + SILENT_S)] == [False] * 3
    assert made.is_open
    assert made.heard(2.1 + 2 * SILENT_S)
    assert not made.is_open
    for _ in range(FAILED_CALLS):
        made.failed(10.0)
    made.stream_lost()
    assert made.heard(10.1), "one that comes back is heard again, however soon"


def test_an_agents_breaker_waits_for_its_deadlines_and_its_samples() -> None:
    made = breaker_of(deadline_s=4.0, interval_s=1.0, chance=lambda: 1.0)
    assert (made.first_s, made.most_s, made.silent_s) == (FIRST_S, MOST_S, SILENT_S)


STEPS = st.lists(st.tuples(st.sampled_from(("ask", "fail", "answer")), st.floats(0, 20), st.floats(0, 1)), max_size=60)


@given(STEPS)
def test_whatever_happens_no_agent_is_left_alone_for_longer_than_the_bound(
    steps: list[tuple[str, float, float]],
) -> None:
    chances = [chance for _, _, chance in steps]
    made, now_s, in_a_row = Breaker(FIRST_S, MOST_S, SILENT_S, lambda: chances.pop()), 0.0, 0
    for what, after_s, _ in steps:
        now_s += after_s
        if what == "ask":
            made.admits(now_s)
        elif what == "fail":
            made.failed(now_s)
            in_a_row += 1
        else:
            made.answered()
            in_a_row = 0
        assert made.is_open == (in_a_row >= FAILED_CALLS)
        assert made.failed_calls == in_a_row
    assert made.admits(now_s + MOST_S)
