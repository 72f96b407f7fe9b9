"""The engines' pace: found in batches and tokens, believed as far as it is sure, heard by all who read curves."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from controller.domain.classes import Bucket, RequestClass
from controller.domain.reasons import Level, Mode, Reason
from controller.fleet.port import ClassCounters, InstanceObservation, LoadObservation, LoadSeen, Tick
from controller.loop.core import Core
from controller.loop.journal import JournaledCore
from controller.loop.orders import NoteEngines, SetMode, SetPowerBudget
from controller.loop.pace import _implied_rps
from controller.loop.profile_in_use import curves_of, status_line
from controller.loop.snapshot import restore, take
from controller.loop.state import Instant
from controller.policy.idle import carried_share
from controller.profile.fit import fit
from controller.profile.pace import (
    UNKNOWN,
    Pace,
    PaceBook,
    PaceSettings,
    PaceWindow,
    drifted,
    fleet_of,
    implied_rps,
    next_factor,
    output_share,
    pace_of,
    slowed,
)
from controller.profile.table import Profile
from controller.replay.same import replay
from controller.store.records import InputSnapshot, Record
from controller.store.repositories import save_profile, write_records
from tests.store_suite import sqlite_url, upgraded_engine
from tests.synthetic_profile import CLOCKS_MHZ, MODEL, TPS, synthetic_profile
from tests.unit.test_loop_core import Bench, make, ready, settings, starts

PROFILE = synthetic_profile()
FITTED = fit(PROFILE)
MS = RequestClass.parse("MS")

# ----------------------------------------------------------------------------------------------------- estimation


def seen(ratio: float, scatter: float, windows: int, seed: int = 0) -> list[PaceWindow]:
    draw = random.Random(seed)
    loads = [draw.uniform(5.0, 15.0) for _ in range(windows)]
    return [PaceWindow(load * ratio * (1.0 + draw.gauss(0.0, scatter)), load) for load in loads]


def followed(ratio: float, scatter: float, windows: int, seed: int, factor: float = 1.0) -> list[float]:
    """The factors of one pool, window by window."""
    all_windows, factors = seen(ratio, scatter, windows, seed), []
    for number in range(1, windows + 1):
        pace = pace_of(all_windows[:number])
        factor = next_factor(fleet_of([pace]), pace, factor)
        factors.append(factor)
    return factors


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scatter", [0.0, 0.03, 0.06])
def test_engines_as_fast_as_the_profile_are_left_alone(scatter: float, seed: int) -> None:
    assert set(followed(1.0, scatter, 60, seed)) == {1.0}


@pytest.mark.parametrize("seed", range(10))
def test_a_tenth_slower_is_nearly_all_corrected_within_minutes_and_never_overdone(seed: int) -> None:
    factors = followed(1.10, 0.05, 60, seed)
    assert factors[9] >= 1.03
    assert all(1.04 <= factor <= 1.13 for factor in factors[20:]), factors


def test_no_more_than_the_bound_is_corrected_and_that_asks_for_another_calibration() -> None:
    assert followed(1.6, 0.02, 60, 1)[-1] == PaceSettings().bound
    assert drifted(pace_of(seen(1.6, 0.02, 20)))
    assert drifted(pace_of(seen(0.7, 0.02, 20)))
    assert not drifted(pace_of(seen(1.1, 0.02, 20)))
    assert not drifted(pace_of(seen(1.6, 0.02, 5))), "five minutes may be anything"


def test_faster_engines_are_not_counted_on() -> None:
    assert set(followed(0.85, 0.02, 40, 1)) == {1.0}


def test_it_comes_sooner_than_it_goes_and_goes_wholly() -> None:
    up = followed(1.15, 0.01, 12, 1)
    down = followed(1.0, 0.01, 60, 2, factor=up[-1])
    rises = [b - a for a, b in zip([1.0, *up], up, strict=False)]
    falls = [a - b for a, b in zip([up[-1], *down], down, strict=False)]
    settings = PaceSettings()
    assert 0.0 < max(falls) <= settings.fall + 1e-9 < max(rises) <= settings.rise + 1e-9
    assert down[-1] == 1.0
    assert down == sorted(down, reverse=True), "no swinging"


def test_what_is_not_known_changes_nothing() -> None:
    few = pace_of(seen(1.2, 0.0, 3))
    assert few.error == inf
    assert next_factor(fleet_of([few]), few, 1.07) == 1.07
    assert pace_of([]) == Pace(1.0, inf, 0)
    assert pace_of([PaceWindow(0.0, 0.0)] * 9).error == inf
    assert fleet_of([few, few]) is UNKNOWN


def test_pools_that_are_sure_decide_for_the_fleet_and_one_alone_only_when_it_is_very_sure() -> None:
    sure, unsure = Pace(1.0, 0.01, 20), Pace(1.3, 0.1, 20)
    assert fleet_of([sure, unsure]).ratio == pytest.approx(1.003, abs=1e-3)
    assert next_factor(fleet_of([sure, unsure]), unsure, 1.0) == 1.0
    slow = Pace(1.15, 0.01, 20)
    both = fleet_of([replace(sure, error=0.002), slow])
    assert next_factor(both, slow, 1.0) > 1.0
    assert next_factor(both, sure, 1.0) == 1.0


# --------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("factor", [1.05, 1.2])
def test_a_slower_engine_holds_the_same_batch_and_draws_the_same_at_a_lighter_load(factor: float) -> None:
    slower = slowed(FITTED, {"long": factor})
    for tp in TPS:
        assert slower.clocks("short", tp) == FITTED.clocks("short", tp)
        for was, now in zip(FITTED.clocks("long", tp), slower.clocks("long", tp), strict=True):
            rate = 0.7 * was.rates_rps[-1]
            assert now.running(rate / factor) == pytest.approx(was.running(rate))
            assert now.power_w(rate / factor) == pytest.approx(was.power_w(rate))
            late, before = now.ttft_p99(Bucket.L, rate / factor), was.ttft_p99(Bucket.L, rate)
            assert late is not None
            assert before is not None
            assert late == pytest.approx(before * factor)
            assert now.max_rate_rps <= was.max_rate_rps / factor + 1e-9
            assert slower.curve("long", tp, now.mhz) == now


def test_a_latency_that_the_slo_has_no_room_for_takes_the_clock_away() -> None:
    """The gap of 80 ms has a quarter left below its 100."""
    assert all(slowed(FITTED, {"all": 1.2}).max_rate_rps("all", tp) > 0 for tp in TPS)
    assert all(slowed(FITTED, {"all": 1.3}).max_rate_rps("all", tp) == 0 for tp in TPS)


def test_the_largest_load_is_where_the_slower_latency_meets_its_bound() -> None:
    """A gap that rises with the load: at 1.1 times as long it must have been 90.9 ms."""
    points = tuple(replace(p, gap_p99_ms=60.0 + 40.0 * p.rate_rps / p.tp) for p in PROFILE.points)
    curves = fit(replace(PROFILE, points=points))
    top = slowed(curves, {"all": 1.1}).curve("all", 8, 1980)
    assert top is not None
    assert top.max_rate_rps * 1.1 / 0.95 == pytest.approx(8 * (100.0 / 1.1 - 60.0) / 40.0, rel=0.01)


def test_more_slowness_never_carries_more_and_a_lower_clock_never_more_than_a_higher() -> None:
    tops = []
    for factor in (1.0, 1.03, 1.06, 1.1, 1.15, 1.2):
        curves = slowed(FITTED, {"all": factor})
        clocks = [curves.curve("all", 4, mhz) for mhz in CLOCKS_MHZ]
        rates = [curve.max_rate_rps for curve in clocks if curve is not None]
        assert rates == sorted(rates)
        tops.append(rates[-1])
    assert tops == sorted(tops, reverse=True)
    assert slowed(FITTED, {"all": 1.0}) is FITTED


# ------------------------------------------------------------------------------------------------------- in the core


class World:
    """One node, one instance of TP8, requests of one class, engines that take `factor` times as long; each request
    writes `writes` times the tokens it was calibrated with."""

    def __init__(
        self, factor: float, writes: float = 1.0, rate_rps: float = 4.0, core: JournaledCore | None = None
    ) -> None:
        self.bench: Bench = Bench(core) if core else make(nodes=1)
        self.factor, self.rate_rps, self.output = factor, rate_rps, 150.0 * writes
        self.arrived = 0.0
        self.bench.see("a")
        (self.start,) = starts(self.bench.send(Tick(Level.INSTANCE)))

    @property
    def core(self) -> Core:
        return self.bench.core

    def running(self) -> float:
        """What the profile has at `factor` times the load."""
        state = self.core.state
        chosen = state.clocks.get(self.start.instance_id)
        curve = FITTED.curve("all", 8, chosen.mhz if chosen and chosen.mhz else PROFILE.full_mhz)
        work = PROFILE.work.of(500.0, self.output) / PROFILE.mean_work_s("all")
        share = output_share(PROFILE, "all", 500.0, self.output)
        assert curve is not None
        running = curve.running(self.factor * self.rate_rps * work)
        assert running is not None
        return round(running * share, 3)

    def minutes(self, minutes: int, seen: InstanceObservation | None = None) -> None:
        for number in range(12 * minutes):
            self.bench.wait(5)
            self.arrived += 5 * self.rate_rps
            n = int(self.arrived)
            counts = {MS: ClassCounters(n, n, 0, n, 500 * n, int(self.output * n))}
            self.bench.send(LoadSeen(LoadObservation("g", "1", self.bench.now_s, MODEL, counts, {})))
            self.bench.see("a", seen or ready(self.start, running=self.running()))
            self.bench.send(Tick(Level.INSTANCE))
            if number % 6 == 5:
                self.bench.send(Tick(Level.POOL))

    def reasons(self) -> set[Reason]:
        return {reason for _, reason in self.bench.decisions}


def test_slower_engines_are_found_told_and_planned_for() -> None:
    world = World(1.1)
    state = world.core.state
    before = state.fit.max_rate_rps("all", 8)
    world.minutes(15)
    assert state.paces["all"] == pytest.approx(1.1, abs=0.02)
    assert state.paces.keys() == {group.name for group in PROFILE.groups}, "another cut is of the same engines"
    assert state.fit.max_rate_rps("all", 8) == pytest.approx(before / state.paces["all"], rel=0.01)
    assert next(c for c in state.columns if c.pool == "all" and c.tp == 8).rate_rps < before
    corrected = [d for step in world.bench.steps for d in step.decisions if d.reason is Reason.PROFILE_CORRECTED]
    assert corrected[-1].outcome["paces"] == dict(sorted(state.paces.items()))
    assert corrected[-1].inputs["fleet"]["ratio"] == pytest.approx(1.1, abs=0.01)
    assert "slower" in corrected[-1].sentence
    assert "slower than measured: every pool +" in status_line(state)
    again = Core(state.settings, state.profile, 3, 1)
    restore(again.state, json.loads(take(state, 1)()))
    assert again.state.fit.curves == state.fit.curves
    assert again.state.pace == state.pace
    world.factor = 1.0
    world.minutes(60)
    assert state.paces == {}
    assert state.fit.curves == curves_of(state.settings, state.profile).curves
    assert world.bench.core.state.sentences[Level.CLUSTER] == "Engines are as fast as the profile says again."


def test_a_replay_finds_it_again_from_what_was_recorded_also_from_the_middle_on(tmp_path: Path) -> None:
    profile = Profile.from_json(PROFILE.to_json())
    core = JournaledCore(settings(pool_s=5), profile, term=3, expected_nodes=1)
    records: list[Record] = []
    core.keep_journal(records.append)
    world = World(1.1, core=core)
    world.minutes(12)
    world.factor = 1.18  # so that there is more to correct after the second snapshot
    world.minutes(6)
    core.close_journal(Instant(world.bench.now_s, 1e9 + world.bench.now_s))
    decisions = [d for step in world.bench.steps for d in step.decisions]
    assert sum(d.reason is Reason.PROFILE_CORRECTED for d in decisions) > 1
    snapshots = [r for r in records if isinstance(r, InputSnapshot)]
    assert len(snapshots) == 2
    for dropped in ([], snapshots[:1]):
        (folder := tmp_path / str(len(dropped))).mkdir()
        for engine in upgraded_engine(sqlite_url(folder)):
            save_profile(engine, profile.checksum(), MODEL, profile.to_json(), 0.0)
            write_records(engine, [*decisions, *(r for r in records if r not in dropped)])
            report = replay(engine, 0.0, 2e9)
            assert report.differences == []
            assert report.identical + report.without_inputs == len(decisions)
            assert report.by_level["cluster"] > 0, "corrections"
            assert (report.without_inputs == 0) == (not dropped)


@pytest.mark.parametrize("writes", [0.6, 1.0, 1.6])
@pytest.mark.parametrize("factor", [0.9, 1.0])
def test_engines_that_are_not_slower_change_nothing_whatever_requests_are_like(factor: float, writes: float) -> None:
    world = World(factor, writes, rate_rps=3.0)
    world.minutes(12)
    assert world.core.state.paces == {}
    assert not {Reason.PROFILE_CORRECTED, Reason.PROFILE_DRIFTED} & world.reasons()


def test_engines_far_from_the_profile_ask_for_a_calibration() -> None:
    world = World(0.7)
    world.minutes(15)
    state = world.core.state
    assert (state.paces, state.pace_drifted) == ({}, {"all"})
    assert Reason.PROFILE_DRIFTED in world.reasons()
    assert "drifted for all" in status_line(state)


@pytest.mark.parametrize("what", ["unknown batch", "advisory", "budget", "another engine"])
def test_what_cannot_be_compared_is_not(what: str) -> None:
    world = World(1.2)
    world.minutes(1)
    told = {
        "advisory": SetMode("cluster", Mode.ADVISORY),
        "budget": SetPowerBudget("cluster", 50_000.0),
        "another engine": NoteEngines(("vllm 9.9",)),
    }
    if what in told:
        world.core.order(Instant(world.bench.now_s, 1e9 + world.bench.now_s), told[what])
    world.minutes(12, replace(ready(world.start), running=None) if what == "unknown batch" else None)
    assert world.core.state.paces == {}
    assert not world.core.state.pace.windows


def test_of_unequal_batches_each_counts_for_itself() -> None:
    """Little's law holds for each: a large batch beside an empty one is not the batches of two half loads."""
    curve = FITTED.curve("all", 8, 1980)
    assert curve is not None
    running = curve.running(6.0)
    assert running is not None
    book = PaceBook(ticks=12)
    book.held = {("all", 8, 1980, "a"): [running] * 12, ("all", 8, 1980, "b"): [0.0] * 12}
    state = make(nodes=1).core.state
    assert _implied_rps(state, book, PROFILE.group("all"), 1.0) == pytest.approx(6.0)


def test_of_bursts_the_mean_batch_is_not_believed_alone() -> None:
    """A batch grows faster than its load: a mean of unequal ones is that of a larger load than theirs."""
    curve = FITTED.curve("all", 8, 1980)
    assert curve is not None
    state, book, group = make(nodes=1).core.state, PaceBook(ticks=2), PROFILE.group("all")
    largest, largest_rps = curve.runnings[-1], curve.rates_rps[-1]
    book.held = {("all", 8, 1980, "a"): [0.0, 2 * largest]}  # of which more than half is no more load
    assert _implied_rps(state, book, group, 1.0) == pytest.approx(largest_rps)
    state.bursty = frozenset({"all"})
    assert _implied_rps(state, book, group, 1.0) == pytest.approx(0.9 * largest_rps + 0.1 * largest_rps / 2)
    book.held = {("all", 8, 1980, "a"): [largest, largest]}
    assert _implied_rps(state, book, group, 1.0) == pytest.approx(largest_rps), "of equal batches both say the same"


def test_many_that_share_a_load_may_each_hold_more() -> None:
    """What the planners count on of many instances is no slowness, and no speed."""
    curve = FITTED.curve("all", 8, 1980)
    assert curve is not None
    carried = carried_share(8)
    running = curve.running(4.0)
    assert running is not None
    assert carried * implied_rps(curve, running * carried / carried) == pytest.approx(4.0 * carried)
    assert implied_rps(curve, 1e9) == curve.rates_rps[-1]
    assert implied_rps(curve, 0.0) == 0.0
