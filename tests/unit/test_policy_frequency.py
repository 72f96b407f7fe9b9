"""The clock rule: least power in SLO, full clock in trouble, held back only on the way down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.reasons import Reason
from controller.policy.frequency import ClockSettings, InstanceLoad, choose_clock
from controller.profile.fit import fit
from controller.profile.table import OperatingPoint, Profile
from tests.synthetic_profile import CLOCKS_MHZ, synthetic_profile

FITTED = fit(synthetic_profile())
FULL = CLOCKS_MHZ[-1]


def load(
    rate: float | None, running: float | None = None, waiting: float | None = 0.0, kv: float | None = None
) -> InstanceLoad:
    return InstanceLoad(rate, running, waiting, kv)


def test_the_clock_of_least_power_among_those_in_slo() -> None:
    for share in (0.05, 0.3, 0.6, 0.9):
        rate = share * FITTED.max_rate_rps("short", 8)
        choice = choose_clock(FITTED, "short", 8, load(rate), None)
        powers = {c.mhz: c.power_w(rate) for c in FITTED.clocks("short", 8) if c.max_rate_rps >= rate}
        assert choice.mhz == min(powers, key=lambda mhz: powers[mhz] or 0.0)
        assert choice.reason is Reason.LEAST_POWER
        assert choice.predicted_power_w == pytest.approx(powers[choice.mhz])
        assert choice.margin == pytest.approx(
            1 - rate / next(c.max_rate_rps for c in FITTED.clocks("short", 8) if c.mhz == choice.mhz)
        )


def test_not_the_lowest_feasible_where_a_higher_one_draws_less() -> None:
    profile = synthetic_profile()
    bent = replace(
        profile,
        points=tuple(replace(p, power_w=p.power_w * 3) if p.mhz == 800 else p for p in profile.points),
    )
    choice = choose_clock(fit(bent), "all", 4, load(0.5), None)
    assert choice.mhz == 1400
    assert next(a for a in choice.alternatives if a.mhz == 800).rejected == "draws more"


def test_idle_takes_the_lowest_power_and_says_so() -> None:
    choice = choose_clock(FITTED, "all", 8, load(0.0, 0.0), FULL)
    assert (choice.mhz, choice.reason) == (800, Reason.IDLE)
    assert choice.predicted_power_w == pytest.approx(FITTED.idle_power_w(8, 800))


def test_idle_never_at_a_clock_that_fails_its_first_request() -> None:
    profile = synthetic_profile()
    slow = replace(
        profile,
        points=tuple(replace(p, attainment_worst=0.5) if p.mhz == 800 else p for p in profile.points),
    )
    choice = choose_clock(fit(slow), "all", 8, load(0.0, 0.0), FULL)
    assert choice.mhz == 1400


@pytest.mark.parametrize(
    ("given_load", "reason"),
    [
        (load(1.0, 5.0, waiting=3.0), Reason.QUEUE_BUILDING),
        (load(1.0, 5.0, kv=0.95), Reason.OVER_CAPACITY),
        (load(100.0), Reason.OVER_CAPACITY),
        (load(1.0, running=1e6), Reason.OVER_CAPACITY),
        (load(None, None), Reason.STALE_TELEMETRY),
        (load(float("nan"), None), Reason.STALE_TELEMETRY),
    ],
    ids=["waiting", "kv", "rate", "batch", "unknown", "nan"],
)
def test_full_clock_in_trouble(given_load: InstanceLoad, reason: Reason) -> None:
    choice = choose_clock(FITTED, "all", 8, given_load, 800)
    assert (choice.mhz, choice.reason) == (FULL, reason)
    assert all(a.rejected for a in choice.alternatives if a.mhz != FULL)


def test_over_capacity_has_a_negative_margin_and_a_finite_rate() -> None:
    choice = choose_clock(FITTED, "all", 8, load(9.9), 800)
    assert choice.margin is not None
    assert choice.margin < 0
    unbounded = choose_clock(FITTED, "all", 8, load(1.0, running=1e6), 800)
    assert unbounded.rate_rps is None
    assert unbounded.margin is None


def test_no_profile_means_full_clock() -> None:
    choice = choose_clock(FITTED, "all", 16, load(1.0), 800)
    assert (choice.mhz, choice.reason, choice.predicted_power_w) == (FULL, Reason.NO_PROFILE, None)


def test_a_batch_larger_than_the_estimate_explains_raises_the_load() -> None:
    curve = FITTED.curve("all", 8, 800)
    assert curve is not None
    running = curve.running(4.0)
    by_batch = choose_clock(FITTED, "all", 8, load(0.5, running), 800)
    assert by_batch.rate_rps == pytest.approx(4.0)
    by_rate = choose_clock(FITTED, "all", 8, load(5.0, running), 800)
    assert by_rate.rate_rps == pytest.approx(5.0)


def test_small_savings_do_not_lower_the_clock_but_nothing_holds_back_a_rise() -> None:
    rate = 1.0
    powers = {c.mhz: c.power_w(rate) or 0.0 for c in FITTED.clocks("all", 8)}
    greedy = ClockSettings(min_saving_ratio=0.0)
    reluctant = ClockSettings(min_saving_ratio=1.0 - powers[800] / powers[1400] + 0.01)
    assert choose_clock(FITTED, "all", 8, load(rate), 1400, greedy).mhz == 800
    held = choose_clock(FITTED, "all", 8, load(rate), 1400, reluctant)
    assert held.mhz == 1400
    assert "too little" in next(a for a in held.alternatives if a.mhz == 800).rejected
    needs_1400 = FITTED.clocks("all", 8)[0].max_rate_rps * 1.05
    assert choose_clock(FITTED, "all", 8, load(needs_1400), 800, reluctant).mhz > 800


def test_a_rise_that_saves_a_little_is_not_held_back_either() -> None:
    profile = synthetic_profile()
    flat = replace(
        profile,
        points=tuple(
            replace(p, rate_rps=q.rate_rps, power_w=q.power_w * 1.01) if p.mhz == 800 else p
            for p, q in zip(profile.points, _at(profile, 1400), strict=True)
        ),
        idle=tuple(replace(p, power_w=400.0) for p in profile.idle),
    )
    assert choose_clock(fit(flat), "all", 8, load(3.0), 800).mhz == 1400


def _at(profile: Profile, mhz: int) -> list[OperatingPoint]:
    """For each point the one that stands in its place at another clock."""
    other = {(p.group, p.tp, i): p for i, p in _ranked(profile) if p.mhz == mhz}
    return [other[p.group, p.tp, i] for i, p in _ranked(profile)]


def _ranked(profile: Profile) -> list[tuple[int, OperatingPoint]]:
    return [(i % 5, p) for i, p in enumerate(profile.points)]  # five loads each


MAYBE = st.one_of(st.none(), st.floats(0, 40), st.just(float("nan")), st.just(float("inf")))


@given(
    st.sampled_from(["all", "short", "long"]),
    st.sampled_from([2, 4, 8]),
    MAYBE,
    MAYBE,
    MAYBE,
    st.one_of(st.none(), st.sampled_from([*CLOCKS_MHZ, 1234])),
)
def test_whatever_comes_the_choice_carries_the_load_or_is_full_clock(
    group: str, tp: int, rate: float | None, running: float | None, waiting: float | None, current: int | None
) -> None:
    choice = choose_clock(FITTED, group, tp, load(rate, running, waiting), current)
    assert choice.mhz in CLOCKS_MHZ
    curve = FITTED.curve(group, tp, choice.mhz)
    assert curve is not None
    if choice.reason in (Reason.LEAST_POWER, Reason.IDLE):
        assert choice.rate_rps is not None
        assert choice.rate_rps <= curve.max_rate_rps
        if rate is not None and rate == rate:
            assert choice.rate_rps >= rate
    else:
        assert choice.mhz == FULL
    assert [a.mhz for a in choice.alternatives] == list(CLOCKS_MHZ)
    assert [a.mhz for a in choice.alternatives if not a.rejected] == [choice.mhz]


@given(st.lists(st.floats(0, 8), min_size=2, max_size=8))
def test_head_room_never_falls_short_as_the_load_rises(rates: list[float]) -> None:
    choices = [choose_clock(FITTED, "long", 8, load(rate), None) for rate in sorted(rates)]
    mhz = [c.mhz for c in choices]
    assert mhz == sorted(mhz)  # true for curves that do not cross, as these
