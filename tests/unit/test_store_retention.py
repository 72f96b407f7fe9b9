"""Retention: what is old goes, what is still needed stays, and hours hold what their minutes held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from controller.config import RetentionConfig
from controller.domain.gpu_state import GpuState
from controller.store.models import Base, TelemetryMinuteModel
from controller.store.records import (
    DecisionOutcome,
    InputFrame,
    InputSnapshot,
    LoadRow,
    OrderKind,
    OrderRecord,
    PlanRecord,
    Record,
    SloRow,
    TelemetryRow,
)
from controller.store.repositories import last_orders, last_plan, write_records
from controller.store.retention import AGE_COLUMN, Limits, prune, roll_up
from tests.store_suite import NOON_S, decision, one_of_each, rows_by_table, sqlite_url, upgraded_engine

DAY_S = 86_400.0


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from upgraded_engine(database_url)


def numbers(engine: Engine, table: str) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(select(Base.metadata.tables[table].c.number).order_by("number")))


def test_old_rows_go_with_what_hangs_on_them(engine: Engine) -> None:
    outcome = next(r for r in one_of_each() if isinstance(r, DecisionOutcome))
    write_records(engine, [*one_of_each(), decision(400_000), replace(outcome, number=400_000)])
    gone = prune(engine, Limits({"decisions": DAY_S, "actions": DAY_S}, 100 * DAY_S), NOON_S + 2 * DAY_S)
    assert (gone["decisions"], gone["actions"]) == (1, 1)
    left = rows_by_table(engine)
    assert (left["decisions"], left["decision_outcomes"], left["actions"]) == (1, 1, 0)
    assert left["telemetry_minute"] == 1, "a table without a limit is kept"


def test_the_last_plan_and_the_last_order_of_a_scope_stay(engine: Engine) -> None:
    plan = next(r for r in one_of_each() if isinstance(r, PlanRecord))
    order = next(r for r in one_of_each() if isinstance(r, OrderRecord))
    write_records(
        engine,
        [
            *(replace(plan, number=n) for n in (1, 2, 3)),
            *(replace(order, number=n, value=v) for n, v in ((1, "paused"), (2, "advisory"))),
            replace(order, number=3, scope="cluster", value="paused"),
        ],
    )
    gone = prune(engine, Limits({"plans": DAY_S, "orders": DAY_S}, DAY_S), NOON_S + 900 * DAY_S)
    assert (gone["plans"], gone["orders"]) == (2, 1)
    kept = last_plan(engine)
    assert kept is not None
    assert kept.number == 3
    assert [(o.scope, o.value) for o in last_orders(engine, OrderKind.MODE)] == [
        ("cluster", "paused"),
        ("pool:long", "advisory"),
    ]


def test_a_snapshot_stays_as_long_as_a_kept_frame_is_reached_from_it(engine: Engine) -> None:
    hour_s = 3600.0
    frames = [InputFrame(1, n, NOON_S + n * hour_s, NOON_S + (n + 1) * hour_s, 1, ("[]",)) for n in range(1, 49)]
    snapshots = [InputSnapshot(1, n, NOON_S + n * hour_s, lambda: "{}") for n in (1, 13, 25, 37)]
    write_records(engine, [*frames, *snapshots])
    limits = Limits({"input_snapshots": 18 * hour_s, "input_frames": 18 * hour_s}, DAY_S)
    prune(engine, limits, NOON_S + 49 * hour_s)  # frames that ended in the 31st hour or later stay
    assert numbers(engine, "input_frames")[0] == 30
    assert numbers(engine, "input_snapshots") == [25, 37]


def test_hours_hold_what_their_minutes_held(engine: Engine) -> None:
    telemetry = next(r for r in one_of_each() if isinstance(r, TelemetryRow))
    load = next(r for r in one_of_each() if isinstance(r, LoadRow))
    slo = next(r for r in one_of_each() if isinstance(r, SloRow))
    rows: list[Record] = []
    for minute in range(120):
        at_s = NOON_S + 60 * minute
        rows += [
            replace(telemetry, window_start_s=at_s, energy_j=100.0 + minute, mean_sm_mhz=1000.0 + minute),
            replace(telemetry, window_start_s=at_s, gpu_uuid="GPU-b", state=GpuState.PARKED, energy_j=None),
            replace(load, window_start_s=at_s, arrived=minute),
            replace(slo, window_start_s=at_s, ttft_p99_ms=float(minute)),
        ]
    rows += [  # one GPU of which half of an hour was not measured
        replace(telemetry, window_start_s=NOON_S + 60 * m, gpu_uuid="GPU-c", energy_j=5.0 if m < 30 else None)
        for m in range(60)
    ]
    write_records(engine, rows)
    row = TelemetryMinuteModel

    def sums() -> list[tuple[object, ...]]:
        query = (
            select(row.gpu_uuid, func.sum(row.seconds), func.sum(row.energy_j), func.max(row.window_s))
            .group_by(row.gpu_uuid)
            .order_by(row.gpu_uuid)
        )
        with engine.connect() as connection:
            return [tuple(found) for found in connection.execute(query)]

    before = sums()
    assert roll_up(engine, "telemetry_minute", NOON_S + 3600 + 1800) == 60 * 3 - 4, "only whole hours"
    after = sums()
    assert [found[:3] for found in after] == [pytest.approx(found[:3]) for found in before]
    assert roll_up(engine, "telemetry_minute", NOON_S + 7200) == 60 * 2 - 2
    assert roll_up(engine, "telemetry_minute", NOON_S + 7200) == 0, "once is enough"
    roll_up(engine, "load_minute", NOON_S + 7200)
    roll_up(engine, "slo_minute", NOON_S + 7200)
    with engine.connect() as connection:
        tables = Base.metadata.tables
        hours = connection.execute(
            select(tables["load_minute"].c.arrived, tables["load_minute"].c.window_s).order_by("window_start")
        ).all()
        worst = connection.scalars(select(tables["slo_minute"].c.ttft_p99_ms).order_by("window_start")).all()
        mhz = connection.scalar(select(row.mean_sm_mhz).where(row.gpu_uuid == "GPU-a").order_by(row.window_start))
    assert [tuple(hour) for hour in hours] == [(sum(range(60)), 3600.0), (sum(range(60, 120)), 3600.0)]
    assert list(worst) == [59.0, 119.0]
    assert mhz == pytest.approx(1029.5)


def test_the_configuration_names_every_table_that_grows() -> None:
    named = set(RetentionConfig().limits().keep_s)
    assert named == set(AGE_COLUMN)
    assert set(RetentionConfig(inputs=0).limits().keep_s) == named - {"input_frames", "input_snapshots"}
    growing = {name for name, table in Base.metadata.tables.items() if "id" in table.c} - {"leadership"}
    assert growing == set(AGE_COLUMN), "a new table needs its retention"
