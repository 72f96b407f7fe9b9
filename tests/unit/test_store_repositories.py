"""History in and out: every record comes back as it was, repeats are dropped, questions get honest answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from controller.domain.classes import RequestClass
from controller.domain.decision import SolverReport, canonical_json
from controller.domain.gpu_state import GpuState
from controller.domain.layout import Layout
from controller.domain.reasons import Level
from controller.savings import served_minutes
from controller.store.codec import from_line, to_line, to_row
from controller.store.engine import StoreUnavailable
from controller.store.records import (
    ActionKind,
    ActionRecord,
    ChoiceRecord,
    DecisionOutcome,
    EnergySource,
    LoadRow,
    NodeRecord,
    PlanRecord,
    SavingRow,
    SloRow,
    TelemetryRow,
)
from controller.store.repositories import (
    ActionCount,
    EnergySum,
    RowRefused,
    count_actions,
    count_decisions,
    energy_by_state,
    find_decision,
    get_choice,
    get_decision,
    get_profile,
    last_plan,
    list_choices,
    list_decisions,
    list_nodes,
    rows_s,
    save_profile,
    write_records,
)
from tests.store_suite import NOON_S, decision, one_of_each, rows_by_table, sqlite_url, upgraded_engine
from tests.synthetic_profile import MODEL, synthetic_profile


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from upgraded_engine(database_url)


def test_a_decision_comes_back_as_it_was_and_byte_for_byte(engine: Engine) -> None:
    whole = decision(decided_at_s=NOON_S + 0.123456)
    bare = decision(2, solver=None, parent=None, predicted_power_w=None, alternatives=(), effects=())
    write_records(engine, [whole, bare])
    newest, oldest = list_decisions(engine)
    assert (newest.decision, oldest.decision) == (bare, whole)
    with engine.connect() as connection:
        inputs = connection.execute(text("SELECT inputs FROM decisions WHERE number = 1")).scalar_one()
    assert (
        inputs == canonical_json(whole.inputs) == '{"names":["\\u00fc","n"],"rates":{"LL":1.25,"LS":0.5},"stale":false}'
    )


def test_times_are_utc_for_people(engine: Engine) -> None:
    write_records(engine, [decision(decided_at_s=NOON_S)])
    with engine.connect() as connection:
        shown = connection.execute(text("SELECT CAST(decided_at AS TEXT) FROM decisions")).scalar_one()
    assert shown.startswith("2026-03-01 12:00:00")


def test_a_solve_that_found_nothing_is_unknown_not_zero(engine: Engine) -> None:
    failed = SolverReport("HiGHS", "infeasible", math.nan, math.nan, math.inf, 3.5, 48)
    write_records(engine, [decision(solver=failed)])
    stored = get_decision(engine, 1)
    assert stored is not None
    assert stored.decision.solver is not None
    assert math.isnan(stored.decision.solver.objective_w)
    assert math.isnan(stored.decision.solver.gap)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT gap FROM decisions")).scalar_one() is None


def test_what_happened_joins_the_decision(engine: Engine) -> None:
    outcome = next(record for record in one_of_each() if isinstance(record, DecisionOutcome))
    write_records(engine, [outcome, decision()])  # in any order within one batch
    stored = find_decision(engine, term=1, number=1)
    assert stored is not None
    assert stored.outcome == outcome
    assert find_decision(engine, term=2, number=1) is None
    assert get_decision(engine, 99) is None


def test_an_outcome_without_its_decision_is_refused(engine: Engine) -> None:
    with pytest.raises(RowRefused, match=r"(?i)foreign key"):
        write_records(engine, [DecisionOutcome(1, 4711, NOON_S, 300.0)])


def test_writing_again_adds_nothing(engine: Engine) -> None:
    first = write_records(engine, one_of_each())
    before = rows_by_table(engine)
    changed = [replace(record, sentence="another") if record == decision() else record for record in one_of_each()]
    # The node and the day's saving are brought up to date, all else was there.
    assert write_records(engine, changed) == 2
    assert first == len(one_of_each())
    assert rows_by_table(engine) == before
    assert list_decisions(engine)[0].decision == decision()


def test_the_same_numbers_of_another_term_are_other_rows(engine: Engine) -> None:
    write_records(engine, one_of_each())
    termless = NodeRecord | SavingRow | ChoiceRecord
    later = [replace(record, term=2) for record in one_of_each() if not isinstance(record, termless)]
    assert write_records(engine, later) == len(later)


def test_one_refused_row_keeps_the_whole_batch_out(engine: Engine) -> None:
    broken = replace(decision(2), sentence=None)  # type: ignore[arg-type]
    with pytest.raises(RowRefused, match=r"(?i)not.null"):
        write_records(engine, [decision(1), broken])
    assert list_decisions(engine) == ()


def test_a_row_survives_its_line() -> None:
    for record in one_of_each():
        row = to_row(record)
        assert from_line(to_line(row)) == row
        assert to_line(row).count(b"\n") == 1


@pytest.mark.parametrize("line", [b"", b"{}\n", b'{"table":"nodes","values":{"gpus":[8]}}\n', b"\x00\x00\n", b"[1]\n"])
def test_a_line_that_is_no_row_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a spooled row"):
        from_line(line)


def test_pages_of_decisions_newest_first(engine: Engine) -> None:
    levels = [Level.CLUSTER, Level.POOL, Level.INSTANCE]
    write_records(engine, [decision(n, level=levels[n % 3], scope=f"scope-{n % 2}") for n in range(1, 13)])
    first = list_decisions(engine, limit=5)
    second = list_decisions(engine, limit=5, before=first[-1].id)
    assert [stored.decision.number for stored in (*first, *second)] == list(range(12, 2, -1))
    pools = list_decisions(engine, level=Level.POOL, scope="scope-0")
    assert [stored.decision.number for stored in pools] == [10, 4]


def test_decisions_by_level_in_a_time_span(engine: Engine) -> None:
    write_records(engine, [decision(n, level=Level.INSTANCE if n > 2 else Level.CLUSTER) for n in range(1, 7)])
    assert count_decisions(engine) == {Level.CLUSTER: 2, Level.POOL: 0, Level.INSTANCE: 4}
    within = count_decisions(engine, since_s=NOON_S + 2, until_s=NOON_S + 4)
    assert within == {Level.CLUSTER: 1, Level.POOL: 0, Level.INSTANCE: 1}


def test_actions_by_kind(engine: Engine) -> None:
    start, lock = ActionKind.START_INSTANCE, ActionKind.APPLY_CLOCKS
    write_records(
        engine,
        [
            ActionRecord(1, "e1", start, NOON_S, 30.0, True),
            ActionRecord(1, "e2", start, NOON_S + 1, 40.0, True),
            ActionRecord(1, "e3", start, NOON_S + 2, 5.0, False, "no memory"),
            ActionRecord(1, "e4", lock, NOON_S + 90, 0.5, False, "GPU is lost"),
        ],
    )
    assert count_actions(engine) == {start: ActionCount(2, 1, 35.0, 40.0), lock: ActionCount(0, 1, None, None)}
    assert count_actions(engine, since_s=NOON_S + 2) == {
        start: ActionCount(0, 1, None, None),
        lock: ActionCount(0, 1, None, None),
    }


def gpu_window(minute: int, state: GpuState, energy_j: float | None, mhz: float | None = None) -> TelemetryRow:
    source = EnergySource.NONE if energy_j is None else EnergySource.COUNTER
    start_s = NOON_S + 60 * minute
    return TelemetryRow(1, start_s, 60.0, "n", f"GPU-{state}", state, 30.0, "", "", energy_j, source, None, mhz)


def test_energy_by_state_keeps_the_unknown_apart(engine: Engine) -> None:
    write_records(
        engine,
        [
            gpu_window(0, GpuState.SERVING, 12_000.0, 1980.0),
            gpu_window(1, GpuState.SERVING, 6_000.0, 990.0),
            gpu_window(2, GpuState.SERVING, None, None),
            gpu_window(0, GpuState.PARKED, 2_100.0),
        ],
    )
    assert energy_by_state(engine) == {
        GpuState.SERVING: EnergySum(90.0, 18_000.0, 30.0, 1485.0),
        GpuState.PARKED: EnergySum(30.0, 2_100.0, 0.0, None),
    }
    assert set(energy_by_state(engine, since_s=NOON_S + 60)) == {GpuState.SERVING}


def test_the_last_plan_is_that_of_the_highest_term(engine: Engine) -> None:
    assert last_plan(engine) is None
    plan = next(record for record in one_of_each() if isinstance(record, PlanRecord))
    latest = replace(plan, term=2, number=3)
    empty = PlanRecord(2, 1, NOON_S, Layout())
    write_records(engine, [latest, empty, replace(plan, number=900)])
    assert last_plan(engine) == latest


def test_a_profile_is_kept_once(engine: Engine) -> None:
    save_profile(engine, "abc", MODEL_NAME, '{"points":[]}', NOON_S)
    save_profile(engine, "abc", MODEL_NAME, '{"points":["other"]}', NOON_S + 1)
    assert get_profile(engine, "abc") == '{"points":[]}'
    assert get_profile(engine, "abd") is None


MODEL_NAME = "llama-70b on H100"


def test_a_node_is_as_it_was_seen_last(engine: Engine) -> None:
    seen = NodeRecord("node-1", NOON_S, 8, "10.0.0.1:7443", {"driver": "580.1"})
    later = replace(seen, seen_at_s=NOON_S + 60, address="10.0.0.2:7443")
    write_records(engine, [later])
    write_records(engine, [seen])  # drained from a spool, after the later one
    assert list_nodes(engine) == (later,)


def test_a_database_without_tables_is_unavailable_not_a_refusal(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE actions RENAME TO elsewhere"))
    with pytest.raises(StoreUnavailable, match="actions"):
        write_records(engine, one_of_each())
    with pytest.raises(StoreUnavailable, match="actions"):
        count_actions(engine)


# ----------------------------------------------------------------------------------------------------- views


def rows(engine: Engine, sql: str) -> list[dict[str, object]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(sql)).mappings()]


def test_energy_by_pool_and_hour_counts_every_gpu(engine: Engine) -> None:
    serving = gpu_window(0, GpuState.SERVING, 3.6e6)
    write_records(
        engine,
        [
            replace(serving, pool="long"),
            replace(serving, pool="long", state=GpuState.IDLE, energy_j=1.8e6),
            replace(serving, pool="long", window_start_s=NOON_S + 3600, state=GpuState.LOADING),
            gpu_window(1, GpuState.PARKED, 0.36e6),
            gpu_window(2, GpuState.PARKED, None),
        ],
    )
    noon, parked, later = sorted(
        rows(engine, "SELECT * FROM v_energy_by_pool_hour"), key=lambda row: (row["hour"], row["pool"] == "-")
    )
    assert (noon["hour"], noon["pool"], later["hour"]) == ("2026-03-01 12:00", "long", "2026-03-01 13:00")
    assert (noon["energy_kwh"], noon["serving_kwh"], noon["idle_kwh"]) == (1.5, 1.0, 0.5)
    assert noon["gpu_hours"] == pytest.approx(1 / 60)
    assert (later["loading_kwh"], later["serving_kwh"]) == (1.0, 0.0)
    assert (parked["pool"], parked["parked_kwh"]) == ("-", pytest.approx(0.1))
    assert parked["mean_gpu_power_w"] == pytest.approx(0.36e6 / 30)
    assert parked["unmeasured_gpu_hours"] == pytest.approx(30 / 3600)


def test_decisions_beside_what_happened(engine: Engine) -> None:
    write_records(engine, one_of_each())
    write_records(engine, [decision(2)])
    known, unknown = rows(engine, "SELECT * FROM v_decisions ORDER BY id")
    assert known["power_error_w"] == 4250.5 - 4100.25
    assert unknown["realised_power_w"] is None
    age_s = known["age_s"]
    assert isinstance(age_s, float)
    with engine.connect() as connection:
        sql = {
            "sqlite": "SELECT strftime('%s', 'now') + 0.0",
            "postgresql": "SELECT extract(epoch FROM now())::float8",
        }[engine.dialect.name]
        now_s = connection.execute(text(sql)).scalar_one()
    assert age_s == pytest.approx(now_s - (NOON_S + 1), abs=60)


def test_slo_by_class_and_hour(engine: Engine) -> None:
    write_records(engine, one_of_each())
    slo = next(record for record in one_of_each() if isinstance(record, SloRow))
    write_records(
        engine,
        [
            replace(slo, window_start_s=NOON_S + 60, requests=81, in_slo=80, ttft_p99_ms=None),
            replace(slo, window_start_s=NOON_S + 120, requests=0, in_slo=0, model="silent"),
        ],
    )
    busy, silent = rows(engine, "SELECT * FROM v_slo_by_class_hour ORDER BY model")
    assert (busy["request_class"], busy["requests"], busy["in_slo"]) == ("LM", 200, 197)
    assert busy["attainment"] == pytest.approx(197 / 200)
    assert busy["worst_ttft_p99_ms"] == 1900.5
    assert silent["attainment"] is None  # nobody asked: neither good nor bad


def test_switching_costs_by_size(engine: Engine) -> None:
    start = ActionRecord(1, "e1", ActionKind.START_INSTANCE, NOON_S, 30.0, True, instance_id="i1", gpus=4)
    loading = replace(gpu_window(0, GpuState.LOADING, 9_000.0), instance_id="i1")
    write_records(
        engine,
        [
            start,
            replace(start, effect_id="e2", instance_id="i2", duration_s=50.0),
            replace(start, effect_id="e3", instance_id="i3", duration_s=7.0, ok=False),
            replace(start, effect_id="e4", kind=ActionKind.APPLY_CLOCKS),
            loading,
            replace(loading, gpu_uuid="GPU-2"),
            replace(loading, instance_id="i2", energy_j=20_000.0),
            replace(loading, instance_id="i2", state=GpuState.SERVING, energy_j=1e9),
        ],
    )
    (row,) = rows(engine, "SELECT * FROM v_switching_costs")
    assert (row["kind"], row["gpus"], row["actions"], row["failed"]) == ("start_instance", 4, 3, 1)
    assert (row["mean_s"], row["worst_s"], row["gpu_seconds"]) == (40.0, 50.0, 4 * 87.0)
    assert row["mean_energy_j"] == 19_000.0


def test_choices_come_back_newest_first_and_twice_told_counts_once(engine: Engine) -> None:
    first = next(record for record in one_of_each() if isinstance(record, ChoiceRecord))
    later = replace(first, number=2, chosen_at_s=first.chosen_at_s + 5, pool="long")
    assert write_records(engine, [first, later]) == 2
    assert write_records(engine, [later]) == 0  # a gateway tells again what it does not know to have arrived
    assert [each.record for each in list_choices(engine)] == [later, first]
    assert [each.record.pool for each in list_choices(engine, pool="long", since_s=first.chosen_at_s)] == ["long"]
    found = get_choice(engine, list_choices(engine)[1].id)
    assert found is not None
    assert found.record == first
    assert get_choice(engine, 99) is None


def test_what_was_served_is_summed_over_terms_and_gpus(engine: Engine) -> None:
    """As the proof of a saving weighs it: of a minute with a change of leaders only a part is covered."""
    profile = synthetic_profile()
    save_profile(engine, profile.checksum(), MODEL, profile.to_json(), 0.0)
    spent = TelemetryRow(1, NOON_S, 60.0, "n", "g0", GpuState.SERVING, 20.0, "all", "i1", 2000.0)
    came = LoadRow(1, NOON_S, 60.0, MODEL, RequestClass.parse("MS"), 10, 10, 0, 5000, 1500)
    write_records(
        engine,
        [
            spent,
            replace(spent, term=2, seconds=30.0, energy_j=3000.0),
            replace(
                spent, gpu_uuid="g1", state=GpuState.PARKED, pool="", instance_id="", seconds=45.0, energy_j=3600.0
            ),
            came,
            replace(came, term=2, arrived=20, completed=20, input_tokens=10_000, output_tokens=3000),
            replace(spent, window_start_s=NOON_S + 60, seconds=60.0, energy_j=None),
        ],
    )
    (minute,) = served_minutes(engine, NOON_S, NOON_S + 120)
    assert (minute.start_s, minute.seconds, minute.energy_j, minute.covered_s) == (NOON_S, 60.0, 8600.0, 50.0)
    weight = profile.request_weight(profile.groups[0].name, came.request_class, (500.0, 150.0))
    assert minute.requests == pytest.approx(30 * weight)
    assert rows_s(engine) == 60.0
