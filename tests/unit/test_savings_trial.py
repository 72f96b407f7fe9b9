"""Trials with and without the controller, in virtual time: the plan is kept whatever dies, a known saving is found, one
that is not there is not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine
from typer.testing import CliRunner

from common.clock import VirtualClock
from common.errors import UserError
from controller.cli.main import app
from controller.domain.classes import RequestClass
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Mode
from controller.loop.core import Core
from controller.loop.load import ClassWindow, LoadWindow
from controller.loop.orders import CLUSTER_SCOPE, Order, SetMode
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant, State
from controller.savings import Served
from controller.store.records import LoadRow, OrderKind, OrderRecord, Record, TelemetryRow
from controller.store.repositories import save_profile, write_records
from controller.trial import WHO, Trial, plan
from controller.trial_result import Verdict, mode_orders, result, weigh
from controller.trials import Trials
from tests.store_suite import sqlite_url, upgraded_engine
from tests.synthetic_profile import MODEL, synthetic_profile

NOON_S = 1_772_366_400.0
MS = RequestClass.parse("MS")
PROFILE = synthetic_profile()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    for opened in upgraded_engine(url):
        save_profile(opened, PROFILE.checksum(), MODEL, PROFILE.to_json(), 0.0)
        yield opened


# --------------------------------------------------------------------------------------------- what it concludes


def kept_orders(trial: Trial) -> list[OrderRecord]:
    """As the controller gives them when nothing comes in between."""
    orders, mode = [], Mode.ACTIVE
    for number in range(trial.windows):
        wanted = Mode.ACTIVE if trial.is_on(number) else Mode.ADVISORY
        if wanted is not mode:
            at_s = trial.begins_s + number * trial.window_s + 1
            orders.append(OrderRecord(1, number, at_s, OrderKind.MODE, CLUSTER_SCOPE, wanted.value, WHO, ""))
        mode = wanted
    return orders


def day(trial: Trial, saving: float, seed: int) -> list[Served]:
    """Minutes of a day whose load swings threefold, wanders and is noisy; most of the energy does not follow it."""
    chance, wander, rows = random.Random(seed), 0.0, []
    for minute in range(int(trial.windows * trial.window_s / 60)):
        start_s = trial.begins_s + 60 * minute
        number = trial.window_at(start_s)
        assert number is not None
        wander = 0.97 * wander + chance.gauss(0, 0.04)
        rate = 4.0 * (1 + 0.5 * math.sin(2 * math.pi * start_s / 86_400)) * math.exp(wander)
        requests = max(1.0, chance.gauss(60 * rate, 3 * math.sqrt(60 * rate)))
        energy_j = 60 * (2000 + 500 * rate) * chance.gauss(1, 0.03) * (1 - saving * trial.is_on(number))
        rows.append(Served(start_s, 60.0, energy_j, requests, 60.0))
    return rows


def verdict(saving: float, seed: int, hours: float = 6) -> Verdict:
    trial = plan(NOON_S, hours * 3600, 900, 120, seed)
    return weigh(trial, kept_orders(trial), day(trial, saving, 7919 * seed + 1), trial.ends_s)


def test_where_there_is_no_saving_none_is_found() -> None:
    found = [verdict(0.0, seed) for seed in range(300)]
    assert sum(v.found for v in found) <= 15, "at most one trial in twenty"
    assert all("No saving found" in v.sentence for v in found if not v.found)


def test_a_known_saving_is_found_and_lies_in_the_interval() -> None:
    found = [verdict(0.2, seed) for seed in range(200)]
    assert sum(v.found for v in found) >= 190
    held = sum(v.low is not None and v.high is not None and v.low <= 0.2 <= v.high for v in found)
    assert 180 <= held <= 199, "a 95 % interval, neither boasting nor hiding"
    assert sum(v.saved_ratio or 0.0 for v in found) / len(found) == pytest.approx(0.2, abs=0.01)


def test_pairs_that_were_not_kept_or_not_measured_are_left_out() -> None:
    trial = plan(NOON_S, 6 * 3600, 900, 120, 1)
    rows, orders = day(trial, 0.2, 1), kept_orders(trial)
    whole = weigh(trial, orders, rows, trial.ends_s)
    assert (whole.pairs, whole.left_out) == (12, 0)
    until_s = trial.begins_s + 900
    gap = [row for row in rows if not trial.begins_s <= row.start_s < until_s - 300]
    assert weigh(trial, orders, gap, trial.ends_s).left_out == 1
    broken = OrderRecord(1, 99, trial.begins_s + 3000, OrderKind.MODE, CLUSTER_SCOPE, "paused", "ada", "")
    said = weigh(trial, sorted([*orders, broken], key=lambda o: o.ordered_at_s), rows, trial.ends_s)
    assert said.left_out >= 1
    assert weigh(trial, [], rows, trial.ends_s).pairs == 0, "nobody carried it out"
    assert "3 are the least" in weigh(trial, orders, rows, trial.begins_s + 2000).sentence


def test_each_pair_has_one_of_each_and_the_order_is_drawn() -> None:
    trial = plan(NOON_S, 24 * 3600, 900, 120, 3)
    firsts = [trial.is_on(2 * pair) for pair in range(trial.pairs)]
    assert all(trial.is_on(2 * pair) != trial.is_on(2 * pair + 1) for pair in range(trial.pairs))
    assert 12 <= sum(firsts) <= 36
    assert Trial.from_json(trial.to_json()) == trial
    for lasts, window in ((3600.0, 900.0), (6 * 3600.0, 200.0)):
        with pytest.raises(UserError):
            plan(NOON_S, lasts, window, 120, 1)


# ------------------------------------------------------------------------------------------------ how it is kept


class Fleet:
    """The real core under the trial's hand, a minute at a time; its history in a real database."""

    def __init__(self, engine: Engine, saving: float) -> None:
        self.engine, self.saving = engine, saving
        self.clock = VirtualClock(wall_at_zero_s=NOON_S)
        self.term, self.numbers = 0, 0
        self.restart()

    def restart(self, mode: Mode = Mode.ACTIVE) -> None:
        """Another leader: what it knows is what the history says."""
        self.term += 1
        self.core = Core(LoopSettings(model=MODEL), PROFILE, self.term, 1, mode)
        for found in mode_orders(self.engine)[-1:]:
            self.core.order(self.instant(), SetMode(CLUSTER_SCOPE, Mode(found.value)))
        self.trials = Trials(self, self.engine, self.clock)

    def instant(self) -> Instant:
        return Instant(self.clock.monotonic_s(), self.clock.wall_s())

    @property
    def state(self) -> State:
        return self.core.state

    def has(self, mode: Mode) -> bool:
        return self.core.state.mode is mode

    async def order(self, kind: OrderKind, order: Order, value: str, who: str, why: str) -> None:
        self.numbers += 1
        record = OrderRecord(self.term, self.numbers, self.clock.wall_s(), kind, CLUSTER_SCOPE, value, who, why)
        write_records(self.engine, [record])
        self.core.order(self.instant(), order)

    async def minute(self, chance: random.Random) -> None:
        """One look, a minute of service in the mode that holds, and its rows."""
        await self.trials.step()
        on = self.state.mode is Mode.ACTIVE
        at_s = self.clock.wall_s()
        arrived = round(60 * chance.uniform(3.5, 4.5))
        rows: list[Record] = [
            LoadRow(1, at_s, 60.0, MODEL, MS, arrived, arrived, 0, 500 * arrived, 150 * arrived),
            TelemetryRow(
                self.term, at_s, 60.0, "n", "g0", GpuState.SERVING, 60.0, "all", "i1",
                60 * 4000 * chance.gauss(1, 0.02) * (1 - self.saving * on), mean_sm_mhz=1000.0,
            ),
        ]  # fmt: skip
        write_records(self.engine, rows)
        self.clock.advance(60)

    def asks_for(self, trial: Trial | None) -> None:
        value = "" if trial is None else trial.to_json()
        number = round(self.clock.wall_s() * 1e3)
        write_records(
            self.engine,
            [OrderRecord(0, number, self.clock.wall_s(), OrderKind.TRIAL, CLUSTER_SCOPE, value, "ada", "")],
        )


async def test_it_is_carried_out_over_a_restart_and_the_cluster_left_as_it_was(engine: Engine) -> None:
    chance, fleet = random.Random(1), Fleet(engine, saving=0.15)
    trial = plan(NOON_S, 3 * 3600, 900, 120, 5)
    fleet.asks_for(trial)
    seen = set()
    for minute in range(3 * 60 + 3):
        if minute == 70:  # the leader dies in the middle of a window
            fleet.restart()
        await fleet.minute(chance)
        seen.add(fleet.state.mode)
    assert seen == {Mode.ACTIVE, Mode.ADVISORY}
    assert fleet.has(Mode.ACTIVE)
    found = result(engine, trial, fleet.clock.wall_s())
    assert (found.pairs, found.left_out) == (6, 0)
    assert found.found
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.15 < found.high
    whys = [o.why for o in mode_orders(engine)]
    assert whys[-1] in ("the trial is over", "window 12 of 12 is on")


@pytest.mark.parametrize("restart", [False, True])
async def test_stopped_or_over_while_nobody_led_it_is_put_back(engine: Engine, restart: bool) -> None:
    chance, fleet = random.Random(1), Fleet(engine, 0.1)
    trial = plan(NOON_S, 3 * 3600, 900, 120, 5)
    fleet.asks_for(trial)
    while fleet.has(Mode.ACTIVE):
        await fleet.minute(chance)
    if restart:
        fleet.clock.advance(5 * 3600)
        fleet.restart()
        assert fleet.has(Mode.ADVISORY), "the order of the trial holds over the restart"
    else:
        fleet.asks_for(None)
    await fleet.minute(chance)
    assert fleet.has(Mode.ACTIVE)


async def test_an_operators_order_ends_it(engine: Engine) -> None:
    chance, fleet = random.Random(1), Fleet(engine, 0.1)
    fleet.asks_for(plan(NOON_S, 3 * 3600, 900, 120, 5))
    while fleet.has(Mode.ACTIVE):
        await fleet.minute(chance)
    await fleet.order(OrderKind.MODE, SetMode(CLUSTER_SCOPE, Mode.PAUSED), "paused", "ada", "hands off")
    for _ in range(3 * 60):
        await fleet.minute(chance)
        assert fleet.has(Mode.PAUSED)


async def test_it_waits_for_an_active_cluster(engine: Engine) -> None:
    chance, fleet = random.Random(1), Fleet(engine, 0.1)
    fleet.restart(Mode.ADVISORY)
    trial = plan(NOON_S, 2 * 3600, 900, 120, 5)
    fleet.asks_for(trial)
    for _ in range(2 * 60 + 3):
        await fleet.minute(chance)
        assert fleet.has(Mode.ADVISORY)
    assert result(engine, trial, fleet.clock.wall_s()).pairs == 0


async def test_an_off_window_in_which_requests_are_late_is_given_up(engine: Engine) -> None:
    chance, fleet = random.Random(1), Fleet(engine, 0.1)
    trial = plan(NOON_S, 3 * 3600, 900, 120, 5)
    fleet.asks_for(trial)
    while fleet.has(Mode.ACTIVE):
        await fleet.minute(chance)
    late = LoadWindow("g", fleet.clock.monotonic_s(), 60.0, {MS: ClassWindow(240, 240, 0, 200, 1, 1)})
    fleet.state.load.windows.append(late)
    await fleet.minute(chance)
    assert fleet.has(Mode.ACTIVE)
    assert "only 83.3% of the requests were in SLO" in mode_orders(engine)[-1].why
    number = trial.window_at(fleet.clock.wall_s())
    while trial.window_at(fleet.clock.wall_s()) == number:
        await fleet.minute(chance)
        assert fleet.has(Mode.ACTIVE), "not again in this window"
    while fleet.clock.wall_s() < trial.ends_s:
        await fleet.minute(chance)
    assert result(engine, trial, fleet.clock.wall_s()).left_out == 1


# ------------------------------------------------------------------------------------------------ at the terminal


def test_the_command_plans_shows_and_stops(engine: Engine, url: str) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["savings", "--ab", "--database-url", url, *arguments])
        assert done.exit_code == code or done.exception is not None, done.output
        return done.output + str(done.exception or "")

    assert "there is no trial" in run()
    assert "12 pairs of windows of 15 minutes" in run("--for", "6h")
    assert "a trial is running" in run("--for", "6h")
    assert "Pairs of windows that count so far: 0" in run()
    assert '"over": true' in run("--stop", "--json")
    assert "there is no trial" in run()
    assert "hold 2 pairs" in run("--for", "1h")


def test_a_window_is_found_by_its_time() -> None:
    trial = replace(plan(NOON_S, 3600 * 3, 900, 120, 1), begins_s=NOON_S)
    assert trial.window_at(NOON_S - 1) is None
    assert trial.window_at(NOON_S) == 0
    assert trial.window_at(NOON_S + 899) == 0
    assert trial.window_at(trial.ends_s) is None
    assert trial.span(1) == (NOON_S + 1020, NOON_S + 1800)
