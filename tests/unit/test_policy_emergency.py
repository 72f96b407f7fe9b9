"""The emergency ladder's state table: one stage at a time, up on fresh trouble alone, down after a calm alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.reasons import Stage
from controller.policy.emergency import (
    NEXT,
    Ladder,
    LadderSettings,
    QueueSeen,
    Signal,
    at_risk,
    can_make_it,
    expected_first_token_s,
    most_prompt_tokens,
    rejected,
    signal_of,
    step,
)
from controller.profile.fit import fit
from tests.synthetic_profile import synthetic_profile

SETTINGS = LadderSettings(at_risk_high=2, calm_s=15.0)
TROUBLE, STRAINED, CALM = QueueSeen(9, 5, 0, 0.4, 0.5), QueueSeen(3, 1, 0, 0.2, 0.5), QueueSeen(0, 0, 0, 0.0, 0.5)
TICK_S = 5.0


def climb(looks: list[QueueSeen | None], ladder: Ladder | None = None, tick_s: float = TICK_S) -> list[Ladder]:
    """The ladder before the first look and after each."""
    ladders = [ladder or Ladder()]
    for number, seen in enumerate(looks, start=1):
        ladders.append(step(ladders[-1], seen, number * tick_s, SETTINGS))
    return ladders


def test_every_signal_at_every_stage_is_in_the_table_and_leads_to_a_neighbour() -> None:
    assert set(NEXT) == {(stage, signal) for stage in Stage for signal in Signal}
    for (stage, signal), after in NEXT.items():
        assert abs(after.rank - stage.rank) <= 1
        assert after.rank <= stage.rank or signal is Signal.TROUBLE


def test_trouble_that_lasts_climbs_stage_by_stage_and_stays_at_the_last() -> None:
    stages = [ladder.stage for ladder in climb([TROUBLE] * 6)]
    assert stages == [*Stage, Stage.REFUSE, Stage.REFUSE]


def test_each_stage_down_takes_a_calm_of_its_own() -> None:
    top = climb([TROUBLE] * 4)[-1]
    stages = [ladder.stage for ladder in climb([CALM] * 20, Ladder(top.stage, 0.0))[1:]]
    assert (
        stages
        == [Stage.REFUSE] * 3 + [Stage.MOVE] * 3 + [Stage.FULL_CLOCK] * 3 + [Stage.REORDER] * 3 + [Stage.NONE] * 8
    )


def test_one_request_at_risk_ends_the_calm() -> None:
    looks = [CALM, CALM, CALM, STRAINED, CALM, CALM, CALM]
    assert climb(looks, Ladder(Stage.MOVE, 0.0))[-1].stage is Stage.MOVE
    assert climb([*looks, CALM], Ladder(Stage.MOVE, 0.0))[-1].stage is Stage.FULL_CLOCK


def test_silence_holds_every_stage_but_nobody_is_refused_on_old_news() -> None:
    for stage in Stage:
        after = climb([None] * 10, Ladder(stage, 0.0))[-1].stage
        assert after is (Stage.MOVE if stage is Stage.REFUSE else stage)


def test_a_report_from_before_the_last_step_leads_no_further() -> None:
    old = QueueSeen(9, 5, 0, 0.4, age_s=7.0)
    assert [ladder.stage for ladder in climb([TROUBLE, old, TROUBLE])][1:] == [
        Stage.REORDER,
        Stage.REORDER,
        Stage.FULL_CLOCK,
    ]


@pytest.mark.parametrize(
    ("seen", "signal"),
    [
        (None, Signal.UNKNOWN),
        (CALM, Signal.CALM),
        (QueueSeen(500, 0, 0, 0.1, 0.5), Signal.CALM),  # a queue alone is none
        (STRAINED, Signal.STRAINED),
        (TROUBLE, Signal.TROUBLE),
        (QueueSeen(0, 0, 1, 0.0, 0.5), Signal.TROUBLE),  # who was refused is not hidden by an empty queue
    ],
)
def test_what_a_queue_says(seen: QueueSeen | None, signal: Signal) -> None:
    assert signal_of(seen, SETTINGS) is signal


LOOKS = st.lists(
    st.one_of(
        st.none(),
        st.builds(
            QueueSeen,
            st.integers(0, 50),
            st.integers(0, 5),
            st.integers(0, 3),
            st.floats(0, 5),
            st.sampled_from([0.0, 0.5, 2.0, 8.0]),
        ),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(LOOKS, st.sampled_from([1.0, 5.0, 7.0]))
def test_whatever_is_seen_no_stage_is_skipped_and_each_change_has_its_reason(
    looks: list[QueueSeen | None], tick_s: float
) -> None:
    ladders = climb(looks, tick_s=tick_s)
    for number, (before, after) in enumerate(pairwise(ladders), start=1):
        now_s, seen = number * tick_s, looks[number - 1]
        if after.stage is before.stage:
            assert after.since_s == before.since_s
            continue
        assert abs(after.stage.rank - before.stage.rank) == 1
        assert after.since_s == now_s
        if after.stage.rank > before.stage.rank:
            assert seen is not None
            assert seen.at_risk >= SETTINGS.at_risk_high or seen.refused
            assert now_s - seen.age_s > before.since_s
        elif seen is not None:
            quiet = [looks[i] for i in range(number) if (i + 1) * tick_s > now_s - SETTINGS.calm_s]
            assert all(one is not None and one.at_risk == one.refused == 0 for one in quiet)
            assert now_s - before.since_s >= SETTINGS.calm_s
        else:
            assert before.stage is Stage.REFUSE


@given(st.floats(0, 1e6), st.floats(0.01, 10), st.floats(0, 20))
def test_who_can_make_it_is_never_late_and_who_is_late_was_at_risk(
    arrived_s: float, slack_s: float, waited_s: float
) -> None:
    deadline_s, now_s = arrived_s + slack_s, arrived_s + waited_s
    if now_s < deadline_s:
        assert can_make_it(deadline_s, now_s)
    else:
        assert not can_make_it(deadline_s, now_s)
        assert at_risk(arrived_s, deadline_s, now_s)


def test_the_record_says_why_each_other_stage_was_not_taken() -> None:
    up = rejected(Stage.REORDER, Stage.FULL_CLOCK)
    assert list(up) == [Stage.REORDER, Stage.MOVE, Stage.REFUSE]
    assert "not enough" in up[Stage.REORDER]
    down = rejected(Stage.MOVE, Stage.FULL_CLOCK)
    assert list(down) == [Stage.NONE, Stage.REORDER, Stage.MOVE]
    assert down[Stage.MOVE] == "no longer needed"


def test_of_very_many_in_flight_some_are_always_at_risk() -> None:
    assert signal_of(QueueSeen(0, 20, 0, 0.0, 0.5, in_flight=10_000), SETTINGS) is Signal.STRAINED
    assert signal_of(QueueSeen(0, 31, 0, 0.0, 0.5, in_flight=10_000), SETTINGS) is Signal.TROUBLE


def test_an_instance_gets_as_many_prompts_as_it_reads_in_half_the_time_of_the_tightest_bound() -> None:
    curves = fit(synthetic_profile())
    profile = curves.profile
    for name, bound_s in (("short", 0.25), ("long", 2.0)):
        for tp in (4, 8):
            tokens = most_prompt_tokens(curves, profile.group(name), tp)
            assert tokens * profile.work.input_s * 8 / tp == pytest.approx(0.5 * bound_s, rel=0.01)


def test_the_first_token_to_expect_comes_from_the_profile() -> None:
    curves = fit(synthetic_profile())
    assert expected_first_token_s(curves, "all") == (0.1, 0.1, 0.1)
    assert expected_first_token_s(curves, "short")[2] == 0.0  # it holds no long prompts
    assert expected_first_token_s(curves, "unknown") == (0.0, 0.0, 0.0)
