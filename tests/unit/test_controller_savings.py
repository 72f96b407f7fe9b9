"""Savings: the arithmetic against made-up days whose answer is known, and the interval's honesty."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from common.errors import UserError
from controller.domain.classes import RequestClass
from controller.domain.gpu_state import GpuState
from controller.profile.fit import fit
from controller.savings import Course, read_course, savings
from controller.store.records import LoadRow, Record, SavingRow, TelemetryRow
from controller.store.repositories import save_profile, write_records
from controller.store.retention import Limits, prune
from tests.store_suite import sqlite_url, upgraded_engine
from tests.synthetic_profile import MODEL, synthetic_profile

DAY_S = 1_772_323_200.0  # 2026-03-01 00:00:00 UTC
MS = RequestClass.parse("MS")
PROFILE = synthetic_profile()
CURVES = fit(PROFILE)
FLAT = Course((0.0,), (0.1,)), Course((0.0,), (400.0,))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    for opened in upgraded_engine(sqlite_url(tmp_path)):
        save_profile(opened, PROFILE.checksum(), MODEL, PROFILE.to_json(), 0.0)
        yield opened


def hours(count: int, *, tp: int, mhz: int, rate_rps: float, error: float = 1.0, noise: float = 0.0) -> list[Record]:
    """One node: one instance of the pool `all` at a clock, drawing `error` times what the profile says; the other
    GPUs parked."""
    chance, rows = random.Random(1), list[Record]()
    mix = PROFILE.mixes["all"][MS]
    weight = PROFILE.request_weight("all", MS, (mix.input_tokens, mix.output_tokens))
    curve = CURVES.curve("all", tp, mhz)
    assert curve is not None
    watts = curve.power_w(rate_rps * weight)
    assert watts is not None
    for minute in range(60 * count):
        at_s = DAY_S + 60 * minute
        drawn_w = watts * error * (1 + noise * chance.uniform(-1, 1))
        for index in range(8):
            used = index < tp
            energy_j = 60 * (drawn_w / tp if used else 72.0)
            rows.append(
                TelemetryRow(
                    1, at_s, 60.0, "n", f"g{index}", GpuState.SERVING if used else GpuState.PARKED, 60.0,
                    "all" if used else "", "i1" if used else "", energy_j, mean_sm_mhz=float(mhz),
                )
            )  # fmt: skip
        arrived = round(60 * rate_rps)
        rows.append(
            LoadRow(
                1, at_s, 60.0, MODEL, MS, arrived, arrived, 0,
                round(arrived * mix.input_tokens), round(arrived * mix.output_tokens),
            )
        )  # fmt: skip
    return rows


def cluster(rows: list[SavingRow]) -> dict[str, SavingRow]:
    return {row.against: row for row in rows if row.pool == ""}


def test_single_pool_at_full_clock_saves_nothing_against_itself(engine: Engine) -> None:
    write_records(engine, hours(2, tp=8, mhz=1980, rate_rps=1.0))
    found = cluster(savings(engine, DAY_S, DAY_S + 7200, *FLAT, 0.0))
    assert found["single_pool"].against_j == pytest.approx(found["single_pool"].energy_j, rel=1e-6)
    assert found["full_clock"].against_j == pytest.approx(found["full_clock"].energy_j, rel=1e-6)
    assert found["best_clock"].against_j < found["best_clock"].energy_j, "one with its best clock would do better"
    assert found["single_pool"].covered_s == 7200


def test_a_profile_that_errs_alike_everywhere_does_not_bias_the_saving(engine: Engine) -> None:
    """Hardware that draws 20 % more than the profile says draws it in the counterfactual, too."""
    write_records(engine, hours(2, tp=2, mhz=800, rate_rps=0.5, error=1.2))
    found = cluster(savings(engine, DAY_S, DAY_S + 7200, *FLAT, 0.0))["single_pool"]
    weight_rate = found.against_j / 7200
    full = CURVES.curve("all", 8, 1980)
    assert full is not None
    mix = PROFILE.mixes["all"][MS]
    rate = 0.5 * PROFILE.request_weight("all", MS, (mix.input_tokens, mix.output_tokens))
    expected_w = full.power_w(rate)
    assert expected_w is not None
    assert weight_rate == pytest.approx(1.2 * expected_w, rel=1e-3)


def test_noise_widens_the_interval_and_the_truth_lies_in_it(engine: Engine) -> None:
    write_records(engine, hours(6, tp=2, mhz=800, rate_rps=0.5, error=1.1, noise=0.5))
    found = cluster(savings(engine, DAY_S, DAY_S + 6 * 3600, *FLAT, 0.0))["single_pool"]
    assert found.against_low_j < found.against_j < found.against_high_j
    assert 0.005 < (found.against_high_j - found.against_low_j) / found.against_j < 0.3


def test_the_clocks_own_share_is_told_by_pool(engine: Engine) -> None:
    write_records(engine, hours(1, tp=4, mhz=800, rate_rps=0.5))
    rows = savings(engine, DAY_S, DAY_S + 3600, *FLAT, 0.0)
    (pool,) = [row for row in rows if row.pool == "all"]
    whole = cluster(rows)["full_clock"]
    assert pool.against == "full_clock"
    assert pool.against_j - pool.energy_j == pytest.approx(whole.against_j - whole.energy_j)
    assert pool.against_j > pool.energy_j


def test_days_are_told_apart_and_prices_follow_their_course(engine: Engine, tmp_path: Path) -> None:
    write_records(engine, hours(25, tp=8, mhz=800, rate_rps=0.5))
    prices = tmp_path / "prices.csv"
    prices.write_text("time,usd\n2026-03-01T00:00,0.10\n2026-03-01T12:00,0.30\n")
    rows = savings(engine, DAY_S, DAY_S + 25 * 3600, read_course(str(prices), "--price"), FLAT[1], 5.0)
    by_day = {row.day: row for row in rows if (row.pool, row.against) == ("", "single_pool")}
    assert by_day["2026-03-01"].usd_per_kwh == pytest.approx(0.2, rel=1e-6)
    assert by_day["2026-03-02"].usd_per_kwh == pytest.approx(0.3)
    assert write_records(engine, rows) == len(rows)
    assert write_records(engine, rows) == len(rows), "computed again, they are renewed"


def test_hours_made_of_minutes_give_the_same_saving(engine: Engine) -> None:
    write_records(engine, hours(3, tp=2, mhz=800, rate_rps=0.5))
    before = cluster(savings(engine, DAY_S, DAY_S + 3 * 3600, *FLAT, 0.0))
    gone = prune(engine, Limits({}, 0.0), DAY_S + 3 * 3600)
    assert gone["telemetry_minute"] == 3 * 60 * 8 - 3 * 8
    after = cluster(savings(engine, DAY_S, DAY_S + 3 * 3600, *FLAT, 0.0))
    for against, row in before.items():
        assert after[against].energy_j == pytest.approx(row.energy_j)
        assert after[against].against_j == pytest.approx(row.against_j, rel=0.01)


def test_nothing_to_count_is_said(engine: Engine) -> None:
    with pytest.raises(UserError, match="no energy of that time"):
        savings(engine, DAY_S, DAY_S + 60, *FLAT, 0.0)
    with pytest.raises(UserError, match="neither a number nor a CSV"):
        read_course("cheap", "--price-per-kwh")
