"""The circuit breaker of an agent's calls: when it opens, how long it stays open, what closes it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.fleet.breaker import FAILED_CALLS, Breaker, Circuit

FIRST_S, MOST_S = 4.0, 32.0


def breaker(chance: float = 1.0) -> Breaker:
    """With a chance of 1 it stays open for the whole time."""
    return Breaker(FIRST_S, MOST_S, lambda: chance)


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


STEPS = st.lists(st.tuples(st.sampled_from(("ask", "fail", "answer")), st.floats(0, 20), st.floats(0, 1)), max_size=60)


@given(STEPS)
def test_whatever_happens_no_agent_is_left_alone_for_longer_than_the_bound(
    steps: list[tuple[str, float, float]],
) -> None:
    chances = [chance for _, _, chance in steps]
    made, now_s, in_a_row = Breaker(FIRST_S, MOST_S, lambda: chances.pop()), 0.0, 0
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
