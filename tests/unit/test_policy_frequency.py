"""The clock rule: least power in SLO, full clock in trouble, held back only on the way down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.reasons import Reason
from controller.policy.frequency import (
    FEW,
    ClockAlternative,
    ClockAsk,
    ClockChoice,
    ClockSettings,
    InstanceLoad,
    choose_clock,
    choose_clocks,
    explain_clock,
)
from controller.profile.fit import ProfileFit, fit
from controller.profile.table import SERVING, Actuator, ActuatorRow, OperatingPoint, Profile
from tests.synthetic_profile import CLOCKS_MHZ, synthetic_profile

FITTED = fit(synthetic_profile())
FULL = CLOCKS_MHZ[-1]


def explained(
    fitted: ProfileFit,
    given_load: InstanceLoad,
    current: int | None,
    choice: ClockChoice,
    settings: ClockSettings | None = None,
    kind: tuple[str, int] = ("all", 8),
) -> tuple[ClockAlternative, ...]:
    return explain_clock(fitted, ClockAsk(*kind, given_load, current), choice, settings or ClockSettings())


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
    others = explained(fit(bent), load(0.5), None, choice, kind=("all", 4))
    assert next(a for a in others if a.mhz == 800).rejected == "draws more"


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
    assert all(a.rejected for a in explained(FITTED, given_load, 800, choice) if a.mhz != FULL)


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
    others = explained(FITTED, load(rate), 1400, held, reluctant)
    assert "too little" in next(a for a in others if a.mhz == 800).rejected
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
    others = explained(FITTED, load(rate, running, waiting), current, choice, kind=(group, tp))
    assert [a.mhz for a in others] == list(CLOCKS_MHZ)
    assert [a.mhz for a in others if not a.rejected] == [choice.mhz]


@given(st.lists(st.floats(0, 8), min_size=2, max_size=8))
def test_head_room_never_falls_short_as_the_load_rises(rates: list[float]) -> None:
    choices = [choose_clock(FITTED, "long", 8, load(rate), None) for rate in sorted(rates)]
    mhz = [c.mhz for c in choices]
    assert mhz == sorted(mhz)  # true for curves that do not cross, as these


ASKS = st.builds(
    ClockAsk,
    st.sampled_from(["all", "short", "long", "nowhere"]),
    st.sampled_from([2, 4, 8, 16]),
    st.builds(InstanceLoad, MAYBE, MAYBE, MAYBE, st.one_of(st.none(), st.floats(0, 1), st.just(float("nan")))),
    st.one_of(st.none(), st.sampled_from([*CLOCKS_MHZ, 1234])),
)


@given(st.lists(ASKS, min_size=FEW, max_size=2 * FEW), st.sampled_from([0.5, 0.8, 1.0]), st.booleans())
def test_a_fleet_at_once_gets_to_the_bit_what_each_gets_alone(asks: list[ClockAsk], fill: float, bent: bool) -> None:
    fitted = UNEVEN if bent else FITTED
    settings = ClockSettings(fill=fill)
    assert choose_clocks(fitted, asks, settings) == [choose_clock(fitted, *ask, settings) for ask in asks]


def _uneven() -> ProfileFit:
    """Curves of unequal length, some without idle, with flat stretches, one clock that misses the SLO at any load."""
    profile = synthetic_profile()
    points = tuple(
        replace(p, attainment_worst=0.5, running_mean=p.running_mean) if p.mhz == 800 and p.tp == 4 else p
        for i, p in enumerate(profile.points)
        if i % 7 or p.mhz == 1400
    )
    flat = tuple(replace(p, running_mean=7.0, power_w=1500.0) if p.group == "long" else p for p in points)
    return fit(replace(profile, points=flat, idle=tuple(p for p in profile.idle if p.tp != 2)))


UNEVEN = _uneven()


@pytest.mark.parametrize("rate", [0.0, 3.0, float("inf")])
def test_knees_and_ends_of_curves_are_the_same_for_a_fleet(rate: float) -> None:
    edges = [c.max_rate_rps for c in UNEVEN.curves.values()] + [c.rates_rps[-1] for c in UNEVEN.curves.values()]
    asks = [
        ClockAsk(g, tp, load(edge), mhz)
        for edge in [*edges, rate]
        for g, tp in UNEVEN.by_instance
        for mhz in (800, 1980)
    ]
    assert choose_clocks(UNEVEN, asks) == [choose_clock(UNEVEN, *ask) for ask in asks]


def test_a_kind_that_was_measured_at_one_clock_alone_stays_there() -> None:
    alone = FITTED.at_clock(FULL)
    asks = [ClockAsk("all", 8, load(rate / 10), FULL) for rate in range(FEW)]
    assert {choice.mhz for choice in choose_clocks(alone, asks)} == {FULL}


def test_a_cap_that_was_measured_to_draw_less_takes_the_place_of_the_lock_and_only_there() -> None:
    row = ActuatorRow(SERVING, "all", 8, 2.0, 800, 1000.0, 350.0, 800.0, 0.0, Actuator.CAP)
    beyond = replace(row, load=5.0, better=Actuator.CLOCK)
    capped = fit(replace(synthetic_profile(), actuators=(row, beyond)))
    locked = choose_clock(FITTED, "all", 8, load(1.5), None)
    choice = choose_clock(capped, "all", 8, load(1.5), None)
    assert (choice.mhz, choice.cap_w, choice.reason) == (FULL, 350.0, Reason.LEAST_POWER)
    assert locked.predicted_power_w is not None
    assert choice.predicted_power_w == pytest.approx(0.8 * locked.predicted_power_w)
    for other in (load(3.0), load(6.0), load(0.0, 0.0), load(1.5, waiting=5.0), load(1.5, kv=0.95)):
        assert choose_clock(capped, "all", 8, other, None) == choose_clock(FITTED, "all", 8, other, None)
    assert choose_clock(capped, "all", 4, load(1.5), None).cap_w is None
    asks = [ClockAsk("all", tp, load(i / 10), None) for i in range(FEW) for tp in (4, 8)]
    assert choose_clocks(capped, asks) == [choose_clock(capped, *ask) for ask in asks]
