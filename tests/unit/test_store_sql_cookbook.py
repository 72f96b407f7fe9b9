"""docs/sql.md: every query on the page runs, finds something, and finds what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, inspect

from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level, Reason
from controller.store.records import (
    ActionKind,
    ActionRecord,
    ChoiceRecord,
    DecisionOutcome,
    ForecastRow,
    LoadRow,
    OrderKind,
    OrderRecord,
    SloRow,
    TelemetryRow,
)
from controller.store.repositories import write_records
from tests.store_suite import NOON_S, decision, one_of_each, sqlite_url, upgraded_engine

PAGE = (Path(__file__).parents[2] / "docs" / "sql.md").read_text(encoding="utf-8")
QUERIES = {
    title: query.strip().rstrip(";")
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    for query in re.findall(r"```sql\n(.*?)```", body, re.DOTALL)
}


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from upgraded_engine(database_url)


@pytest.fixture
def history(engine: Engine) -> Engine:
    """Two hours of a small fleet: a second, quieter hour with a parked GPU, a failure and a missed SLO."""
    _, outcome, start, telemetry, load, slo, *_ = one_of_each()
    choice = next(each for each in one_of_each() if isinstance(each, ChoiceRecord))
    forecast = next(each for each in one_of_each() if isinstance(each, ForecastRow))
    assert isinstance(outcome, DecisionOutcome)
    assert isinstance(start, ActionRecord)
    assert isinstance(telemetry, TelemetryRow)
    assert isinstance(load, LoadRow)
    assert isinstance(slo, SloRow)
    later_s = NOON_S + 3600
    write_records(
        engine,
        [
            *one_of_each(),
            decision(2, level=Level.INSTANCE, predicted_power_w=1000.0, solver=None),
            replace(outcome, number=2, power_w=1100.0),
            decision(3, reason=Reason.POWER_BUDGET, predicted_power_w=None, solver=None),
            replace(start, effect_id="e2", ok=False, detail="GPU-b is held by process 77", started_at_s=later_s),
            replace(start, effect_id="e3", kind=ActionKind.APPLY_CLOCKS, ok=False, detail="GPU is lost"),
            replace(telemetry, gpu_uuid="GPU-b", state=GpuState.IDLE, energy_j=6_000.0, mean_sm_mhz=990.0),
            replace(telemetry, window_start_s=later_s, state=GpuState.PARKED, pool="", energy_j=4_320.0),
            replace(telemetry, window_start_s=later_s, gpu_uuid="GPU-b", energy_j=None),
            replace(load, window_start_s=later_s, completed=27, output_tokens=2_700),
            replace(slo, window_start_s=later_s, requests=27, in_slo=20),
            OrderRecord(
                1, 90, NOON_S - 60, OrderKind.MODE, "cluster", "advisory", "savings --ab", "window 1 of 6 is off"
            ),
            OrderRecord(
                1, 91, NOON_S + 1800, OrderKind.MODE, "cluster", "active", "savings --ab", "window 2 of 6 is on"
            ),
            replace(choice, number=2, pool="long", decided_by="spilled", queue_ms=80.4, speaks_for=3000),
            replace(forecast, window_start_s=later_s, plain_forecast_rps=2.5, plain_quantile_rps=3.5, arrived_rps=4.0),
            replace(forecast, window_start_s=later_s, pool="short", arrived_rps=0.0),
            replace(forecast, window_start_s=NOON_S + 86_400),
        ],
    )
    return engine


def ask(engine: Engine, title: str) -> list[dict[str, object]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.exec_driver_sql(QUERIES[title]).mappings()]


def test_the_page_has_its_questions() -> None:
    assert len(QUERIES) >= 20
    assert len(QUERIES) == PAGE.count("```sql") == PAGE.count("\n## ")


@pytest.mark.parametrize("title", QUERIES)
def test_every_query_runs_and_answers(history: Engine, title: str) -> None:
    assert ask(history, title)


def test_the_page_names_every_table_and_view(engine: Engine) -> None:
    names = {*inspect(engine).get_table_names(), *inspect(engine).get_view_names()} - {"alembic_version"}
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE] == []


def test_fleet_watts(history: Engine) -> None:
    noon, later = ask(history, "How many watts did the whole fleet draw, window by window?")
    assert (noon["fleet_w"], noon["gpus"], noon["unmeasured_gpu_s"]) == (500.0, 2, 0.0)
    assert (later["fleet_w"], later["gpus"], later["unmeasured_gpu_s"]) == (72.0, 2, 60.0)


def test_power_and_clock_by_state(history: Engine) -> None:
    found = {row["state"]: row for row in ask(history, "What does a GPU draw in each state, and at which clock?")}
    assert {state: row["mean_power_w"] for state, row in found.items()} == {
        "serving": 400.0,
        "idle": 100.0,
        "parked": 72.0,
    }
    assert found["idle"]["mean_sm_mhz"] == 990.0


def test_cost_of_a_request(history: Engine) -> None:
    noon, later = ask(history, "What does a request cost, hour by hour?")
    assert (noon["hour"], later["hour"]) == ("2026-03-01 12:00", "2026-03-01 13:00")
    assert noon["j_per_request"] == pytest.approx(30_000 / 118)
    assert later["j_per_output_token"] == pytest.approx(4_320 / 2_700)


def test_missed_slos_worst_first(history: Engine) -> None:
    found = ask(history, "Which classes missed their SLO, and when?")
    assert [(row["hour"], row["in_slo"]) for row in found] == [("2026-03-01 13:00", 20), ("2026-03-01 12:00", 117)]


def test_prediction_error_by_level(history: Engine) -> None:
    found = {row["level"]: row["mean_relative_error"] for row in ask(history, "How good are the predictions?")}
    assert found == {"instance": pytest.approx(0.1), "pool": pytest.approx(150.25 / 4100.25)}


def test_forecasts_by_pool_and_day_with_and_without_the_week(history: Engine) -> None:
    found = ask(history, "How far off was the forecast of each pool, day by day?")
    assert [(row["day"], row["pool"], row["forecasts"]) for row in found] == [
        ("2026-03-01", "long", 2),
        ("2026-03-01", "short", 1),
        ("2026-03-02", "long", 1),
    ]
    first, quiet, _ = found
    assert (first["error_ratio"], first["plain_error_ratio"]) == (pytest.approx(1.0 / 3.0), pytest.approx(0.75 / 3.0))
    assert first["bias_ratio"] == pytest.approx(-0.5 / 3.0)
    assert (first["exceeded_ratio"], first["plain_exceeded_ratio"], first["raised_by_week"]) == (0.5, 0.5, 1)
    assert (quiet["error_ratio"], quiet["exceeded_ratio"]) == (None, 0.0), "nothing came: there is no share of it"


def test_loads_beyond_what_was_planned_for(history: Engine) -> None:
    (found,) = ask(history, "When was the load higher than was planned for?")
    assert (found["pool"], found["over_quantile"]) == ("long", pytest.approx(4.0 / 3.5))


def test_failures_newest_first(history: Engine) -> None:
    found = ask(history, "What went wrong, and on which node?")
    assert [row["detail"] for row in found] == ["GPU-b is held by process 77", "GPU is lost"]


def test_savings_by_day(history: Engine) -> None:
    (found,) = ask(history, "What was saved, day by day?")
    assert (found["day"], found["pool"], found["saved_kwh"], found["saved_ratio"]) == (
        "2026-03-01",
        "cluster",
        100.0,
        0.5,
    )
    assert (found["saved_usd"], found["saved_kg_co2"]) == (pytest.approx(12.0), pytest.approx(45.0))
    assert found["saved_kwh_low"] == pytest.approx(3.2e8 / 3.6e6)


def test_worst_prediction_first(history: Engine) -> None:
    found = ask(history, "Which predictions were furthest off?")
    assert [row["power_error_w"] for row in found] == [150.25, 100.0]


def test_empty_nodes(history: Engine) -> None:
    (found,) = ask(history, "Which nodes stand empty, and what do they draw meanwhile?")
    assert found["parked_ratio"] == pytest.approx(0.25)


def test_replayable_span(history: Engine) -> None:
    (found,) = ask(history, "From when on can decisions be replayed?")
    assert (found["term"], found["frames"], found["frames_expected"]) == (1, 1, 1)


def test_shares_of_choices_are_of_all_requests_not_of_the_sample(history: Engine) -> None:
    most, least = ask(history, "What decides where requests go, by pool?")
    assert (most["pool"], most["decided_by"], most["choices"], most["share"]) == ("long", "spilled", 3000, 0.75)
    assert (least["decided_by"], least["share"], least["mean_queue_ms"]) == ("load", 0.25, pytest.approx(0.4))


def test_choices_out_of_their_pool(history: Engine) -> None:
    (found,) = ask(history, "Which requests left their own pool, or waited for room?")
    assert (found["pool"], found["queue_ms"]) == ("long", 80.4)
    assert '"lost_by":"load"' in str(found["alternatives"])


def test_what_a_trial_drew_between_its_orders(history: Engine) -> None:
    off, on = ask(history, "What did a trial's windows draw?")
    assert (off["mode"], off["requests"], off["energy_kwh"]) == ("advisory", 118, pytest.approx(30_000 / 3.6e6))
    assert off["j_per_request"] == pytest.approx(30_000 / 118)
    assert (on["mode"], on["until_at"], on["energy_kwh"]) == ("active", None, None), "it has not ended"
