"""The shape of a week: learnt slot by slot, with gaps; what it adds to a forecast; how it survives a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import pi, sin
from pathlib import Path

import pytest
from sqlalchemy import Engine

from controller.domain.classes import RequestClass
from controller.domain.decision import canonical_json
from controller.domain.reasons import Level
from controller.fleet.port import (
    ClassCounters,
    EffectDone,
    GpuObservation,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    Solve,
    Tick,
)
from controller.loop.core import Core
from controller.loop.demand import Demand, ahead_s, expected_demand
from controller.loop.load import ClassWindow, LoadWindow
from controller.loop.settings import LoopSettings
from controller.loop.snapshot import restore, take, week_of
from controller.loop.state import Instant, State
from controller.loop.week import Foreseen, Judged, WeekBook, came_rps, judged
from controller.policy.forecast import RateForecast
from controller.policy.milp.plan import plan_for
from controller.policy.template import SLOT_S, SLOTS, SlotMean, expected_ratio, known_rates, learn, raised, slot_of
from controller.store.records import InputSnapshot
from controller.store.repositories import last_snapshot, write_records
from tests.store_suite import sqlite_url, upgraded_engine
from tests.synthetic_profile import MODEL, synthetic_profile

MS, SS = RequestClass.parse("MS"), RequestClass.parse("SS")
WEEK_S = SLOTS * SLOT_S
DAY_S = 86400.0
PROFILE = synthetic_profile()


def day_rps(wall_s: float) -> float:
    """A day of load: least at midnight, most at noon."""
    return 5.0 - 4.0 * sin(2 * pi * (wall_s % DAY_S) / DAY_S + pi / 2)


def taught(rate: object = day_rps, weeks: int = 1) -> dict[int, SlotMean]:
    assert callable(rate)
    return {slot: SlotMean(weeks, {MS: rate((slot + 0.5) * SLOT_S)}) for slot in range(SLOTS)}


def window(end_s: float, seconds: float, arrived: int, gateway: str = "g") -> LoadWindow:
    return LoadWindow(gateway, end_s, seconds, {MS: ClassWindow(arrived, arrived, 0, arrived, 0, 0)} if arrived else {})


def fill(book: WeekBook, from_s: float, until_s: float, rate: float, gateway: str = "g") -> None:
    """A minute at a time; wall and monotonic time are the same here."""
    at_s = from_s
    while at_s < until_s:
        at_s += 60.0
        book.add(Instant(at_s, at_s), window(at_s, 60.0, round(rate * 60), gateway))


def test_a_template_gives_the_shape_ahead_and_nothing_where_it_is_unknown() -> None:
    slots = taught()
    assert expected_ratio(slots, MS, 6 * 3600.0, 1800.0) == pytest.approx(1.065, abs=0.01)
    assert expected_ratio(slots, MS, 18 * 3600.0, 1800.0) == pytest.approx(0.92, abs=0.01)
    # The same half hour of another week; the numbers go round at its end.
    assert expected_ratio(slots, MS, WEEK_S * 7 + 6 * 3600.0, 1800.0) == expected_ratio(slots, MS, 6 * 3600.0, 1800.0)
    assert expected_ratio(slots, MS, WEEK_S - 600.0, 1800.0) is not None
    del slots[13]
    assert expected_ratio(slots, MS, 6 * 3600.0, 1800.0) is None
    assert expected_ratio(slots, MS, 9 * 3600.0, 1800.0) is not None
    assert expected_ratio({}, MS, 0.0, 60.0) is None
    assert expected_ratio(slots, SS, 9 * 3600.0, 1800.0) is None  # no load of it now: nothing to multiply


def test_a_ratio_is_bounded_and_no_rise_is_seen_in_noise() -> None:
    step = {slot: SlotMean(3, {MS: 0.1 if slot < 20 else 50.0}) for slot in range(SLOTS)}
    assert expected_ratio(step, MS, 19.4 * SLOT_S, 4 * SLOT_S) == 3.0
    few = {slot: SlotMean(1, {MS: 0.01 if slot % 2 else 0.0115}) for slot in range(SLOTS)}
    ratios = [expected_ratio(few, MS, slot * SLOT_S, 600.0) for slot in range(40)]
    assert all(ratio is not None and ratio <= 1.0 for ratio in ratios)


def test_newer_weeks_weigh_more_and_the_first_ones_evenly() -> None:
    mean = learn(None, {MS: 4.0})
    assert mean == SlotMean(1, {MS: 4.0})
    mean = learn(mean, {MS: 2.0, SS: 1.0})
    assert mean == SlotMean(2, {MS: 3.0, SS: 0.5})
    for _ in range(20):
        mean = learn(mean, {MS: 10.0})
    assert mean.weeks == 22
    assert mean.rates_rps[MS] == pytest.approx(10.0, abs=0.1)


def test_rates_of_gateways_add_and_one_with_a_gap_makes_the_span_unknown() -> None:
    assert known_rates([(100.0, {MS: 100}), (50.0, {MS: 100, SS: 50})], 100.0) == {MS: 3.0, SS: 1.0}
    assert known_rates([(100.0, {MS: 100}), (49.0, {MS: 100})], 100.0) is None
    assert known_rates([(100.0, {})], 100.0) == {}  # silence is known
    assert known_rates([], 100.0) is None


def test_a_slot_counts_when_half_of_it_was_reported_and_a_gap_leaves_it_untouched() -> None:
    book = WeekBook()
    fill(book, 0.0, SLOT_S, 2.0)
    fill(book, SLOT_S, SLOT_S * 1.6, 4.0)  # more than half
    fill(book, SLOT_S * 2, SLOT_S * 2.3, 6.0)  # less
    fill(book, SLOT_S * 3, SLOT_S * 4, 0.0)  # nothing came, and that is known
    fill(book, SLOT_S * 4, SLOT_S * 4 + 60, 1.0)
    assert book.slots == {0: SlotMean(1, {MS: 2.0}), 1: SlotMean(1, {MS: 4.0}), 3: SlotMean(1, {})}
    # A week later slot 0 is a gap: what is known of it stays. One long report says how much came, and not when.
    book.add(Instant(WEEK_S + SLOT_S, WEEK_S + SLOT_S), window(WEEK_S + SLOT_S, SLOT_S, 9000))
    fill(book, WEEK_S + SLOT_S, WEEK_S + SLOT_S * 2, 8.0)
    fill(book, WEEK_S + SLOT_S * 2, WEEK_S + SLOT_S * 2 + 60, 1.0)
    assert book.slots[0] == SlotMean(1, {MS: 2.0})
    assert book.slots[1] == SlotMean(2, {MS: 6.0})


def test_two_gateways_in_one_slot_and_one_that_ends_late() -> None:
    book = WeekBook()
    fill(book, 0.0, SLOT_S, 2.0, "a")
    late = Instant(SLOT_S + 61, SLOT_S + 61)
    fill(book, 60.0, SLOT_S - 120, 1.0, "b")
    book.add(late, window(SLOT_S + 60, 60.0, 60, "a"))
    book.add(late, window(SLOT_S - 60, 60.0, 60, "b"))  # of the slot that is closed: it opens nothing anew
    assert book.open_slot == 1
    assert set(book.counted) == {"a"}
    assert book.slots[0].rates_rps[MS] == pytest.approx(3.0)


def test_the_shape_raises_a_forecast_and_never_lowers_it() -> None:
    part = RateForecast(4.4, 0.4, 4.0, 0.0, 1.0, 900.0)
    assert raised(part, None) == part
    assert raised(part, 0.5) == part
    assert raised(part, 1.05) == part  # the trend of the last minutes sees more
    more = raised(part, 1.5)
    assert more.mean_rps == 6.0
    assert more.level_rps == 4.0
    assert part.std_rps < more.std_rps < 0.5


# ----------------------------------------------------------------------------------------------- in the core


def settings() -> LoopSettings:
    return LoopSettings(model=MODEL, cluster_s=1800, pool_s=300, instance_s=5)


def core(week: WeekBook | None = None) -> Core:
    return Core(settings(), PROFILE, term=1, expected_nodes=1, week=week)


def drive(made: Core, from_s: float, until_s: float, every_s: float = 60.0, began_s: float | None = None) -> None:
    """Reports of exact day loads; monotonic time is wall time."""
    steps = int((until_s - from_s) / every_s)
    total = 0.0
    for step in range(steps + 1):
        at_s = from_s + step * every_s
        total += day_rps(at_s) * every_s if step else 0.0
        counters = ClassCounters(round(total), round(total), 0, round(total), 500 * round(total), 50 * round(total))
        report = LoadObservation("g", str(began_s), at_s, MODEL, {MS: counters}, {})
        made.handle(Instant(at_s, at_s), LoadSeen(report))


def demand(state: State, at_s: float, horizon_s: float) -> Demand:
    found = expected_demand(state, Instant(at_s, at_s), horizon_s)
    assert found is not None
    return found


def test_after_a_week_of_load_the_rise_is_expected_before_it_is_seen() -> None:
    learnt, fresh = core(), core()
    drive(learnt, 0.0, WEEK_S + 3600.0)
    assert len(learnt.state.week.slots) == SLOTS
    rise_s = WEEK_S + DAY_S + 3 * 3600.0
    for made in (learnt, fresh):
        drive(made, rise_s - 900.0, rise_s, every_s=5.0, began_s=rise_s)
    with_week, without = demand(learnt.state, rise_s, 3600.0), demand(fresh.state, rise_s, 3600.0)
    horizon_s = ahead_s(fresh.state, 3600.0)
    comes_rps = day_rps(rise_s + 0.75 * horizon_s)
    assert without.week_ratios == {}
    told = without.json()
    assert isinstance(told, dict)
    assert "week_ratios" not in told
    assert with_week.mean_rps()[MS] > 1.2 * without.mean_rps()[MS]
    assert with_week.mean_rps()[MS] == pytest.approx(comes_rps, rel=0.05)
    assert with_week.week_ratios[MS] > 1.2
    assert with_week.plain == without.plain == without.parts
    # What serves now is not raised: capacity comes early, clocks and standby follow the load.
    assert with_week.parts[MS][0].level_rps == without.parts[MS][0].level_rps


def test_at_the_fall_and_in_the_first_week_it_is_as_without() -> None:
    learnt = core(WeekBook(taught()))
    fresh = core()
    for made in (learnt, fresh):
        drive(made, 18 * 3600.0 - 900.0, 18 * 3600.0, every_s=5.0)
    assert demand(learnt.state, 18 * 3600.0, 1800.0).parts == demand(fresh.state, 18 * 3600.0, 1800.0).parts
    young = core()
    drive(young, 0.0, 3 * DAY_S)
    for back_s in (0.0, 400.0, 1000.0, 1700.0):
        assert demand(young.state, 3 * DAY_S - back_s, 1800.0).week_ratios == {}


def test_a_restart_takes_up_the_week_of_the_last_snapshot() -> None:
    before = core()
    drive(before, 0.0, 4 * SLOT_S + 600.0)
    text = take(before.state, 1)()
    week = week_of(text)
    assert week is not None
    assert week.slots == before.state.week.slots
    assert sorted(week.slots) == [0, 1, 2, 3]
    assert week.counted == {}
    assert core(week).state.week.slots == before.state.week.slots
    # A replay begins with all of it, the half hour under way too.
    again = core()
    restore(again.state, json.loads(text))
    assert again.state.week == before.state.week
    assert take(again.state, 1)() == text
    # One of another version has none, or another.
    assert week_of(None) is None
    assert week_of("{}") is None
    assert week_of("no JSON") is None
    assert week_of(canonical_json({"state": {"week": [1, 2]}})) is None


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    yield from upgraded_engine(sqlite_url(tmp_path))


def test_the_week_comes_back_from_the_history(engine: Engine) -> None:
    assert last_snapshot(engine) is None
    young, old = core(), core()
    drive(young, 0.0, 2 * SLOT_S + 60.0)
    drive(old, 0.0, 5 * SLOT_S + 60.0)
    # The newest is that of the last term, whatever its number.
    snapshots = [InputSnapshot(1, 49, 9e9, take(young.state, 1)), InputSnapshot(2, 1, 9e9, take(old.state, 1))]
    write_records(engine, snapshots[::-1])
    week = week_of(last_snapshot(engine))
    assert week is not None
    assert week.slots == old.state.week.slots
    assert len(week.slots) == 5


def test_the_week_stays_small_in_a_snapshot() -> None:
    full = core(WeekBook({slot: SlotMean(9, {MS: 1.234567, SS: 0.000123}) for slot in range(SLOTS)}))
    assert len(take(full.state, 1)()) - len(take(core().state, 1)()) < 60 * SLOTS


# ------------------------------------------------------------------------------------------- how far it was off


@pytest.mark.parametrize(
    "week", [None, WeekBook({slot: SlotMean(3, {MS: 2.0 ** (slot % 8)}) for slot in range(SLOTS)})]
)
def test_a_forecast_is_held_against_what_came(week: WeekBook | None) -> None:
    made = core(week)
    gpus = tuple(GpuObservation(f"g{i}", i, True, 100.0, 0.0, 800, None) for i in range(8))

    def tick(at_s: float) -> None:
        now = Instant(at_s, at_s)
        made.handle(now, NodeSeen(NodeObservation("n", at_s, gpus, ())))
        for level in (Level.INSTANCE, Level.POOL):
            for effect in made.handle(now, Tick(level)).effects:
                if isinstance(effect, Solve):
                    made.handle(now, EffectDone(effect.effect_id, True, solution=plan_for(effect.problem)))

    drive(made, 0.0, 900.0, every_s=5.0, began_s=0.0)
    tick(900.0)
    pool, foreseen = next(item for item in made.state.foreseen.items() if item[1].mean_rps > 0)
    assert foreseen.quantile_rps > foreseen.mean_rps > 0
    assert (foreseen.plain_mean_rps < foreseen.mean_rps) == (week is not None)
    assert (foreseen.plain_quantile_rps < foreseen.quantile_rps) == (week is not None)
    drive(made, 900.0, foreseen.until_s + 5.0, every_s=5.0, began_s=900.0)
    tick(foreseen.until_s + 5.0)
    error = made.state.forecast_errors[pool]
    assert error.count == 1
    came = day_rps((foreseen.from_s + foreseen.until_s) / 2)
    assert error.came_rps == pytest.approx(came, rel=0.05)
    assert error.ratio == pytest.approx(abs(came - foreseen.mean_rps) / came, abs=0.05)
    assert error.last is not None
    assert error.last.foreseen == foreseen
    assert error.last.came_rps == error.came_rps
    copied = core()
    restore(copied.state, json.loads(take(made.state, 1)()))
    assert copied.state.forecast_errors == {pool: error}
    again = made.state.foreseen[pool]
    assert again.from_s > foreseen.from_s
    # Nobody reports any more: what came is unknown, and judges nothing.
    tick(again.until_s + 5.0)
    assert made.state.forecast_errors[pool] == error


def test_errors_are_means_and_the_share_above_the_quantile() -> None:
    foreseen = Foreseen(10.0, 12.0, 9.0, 11.0, 0.0, 60.0)
    error = judged(None, foreseen, 8.0)
    assert (error.count, error.ratio, error.above) == (1, 0.25, 0.0)
    error = judged(error, foreseen, 16.0)
    assert (error.count, error.above) == (2, 0.5)
    assert error.ratio == pytest.approx(8.0 / 24.0)
    assert error.last == Judged(foreseen, 16.0)
    assert judged(None, foreseen, 0.0).ratio is None
    for _ in range(2000):
        error = judged(error, foreseen, 10.0)
    assert error.ratio == pytest.approx(0.0, abs=0.01)


def test_what_came_is_counted_over_the_span_alone() -> None:
    made = core()
    for end_s, arrived in ((40.0, 600), (100.0, 120), (160.0, 180), (220.0, 6000)):
        made.state.load.windows.append(window(end_s, 60.0, arrived))
    foreseen = Foreseen(0.0, 0.0, 0.0, 0.0, 40.0, 160.0)
    assert came_rps(made.state, frozenset({MS}), 220.0, foreseen) == pytest.approx(2.5)
    assert came_rps(made.state, frozenset({SS}), 220.0, foreseen) == 0.0
    assert came_rps(made.state, frozenset({MS}), 220.0, replace(foreseen, from_s=160.0, until_s=400.0)) is None


def test_slots_are_of_the_week_in_utc() -> None:
    assert slot_of(0.0) == 0
    assert slot_of(SLOT_S - 0.001) == 0
    assert slot_of(WEEK_S) == SLOTS
