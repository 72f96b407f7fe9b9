"""What the tests of the history store share: databases, one sample of every record, and questions to ask afterwards.

The suite itself runs twice: on SQLite (tests/unit/test_store_*.py) and, function for function, on a real Postgres
(tests/integration/test_store_postgres.py), which only puts another `database_url` under it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, func, select, text

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision, SolverReport
from controller.domain.gpu_state import GpuState
from controller.domain.layout import Layout, PlannedInstance
from controller.domain.reasons import Level, Mode, Reason
from controller.store import migrate
from controller.store.engine import open_engine
from controller.store.models import Base
from controller.store.recorder import Recorder
from controller.store.records import (
    ActionKind,
    ActionRecord,
    ChoiceRecord,
    DecisionOutcome,
    EnergySource,
    ForecastRow,
    InputFrame,
    InputSnapshot,
    LoadRow,
    NodeRecord,
    OrderKind,
    OrderRecord,
    PlanRecord,
    Record,
    SavingRow,
    SloRow,
    TelemetryRow,
    TransitionRow,
)

NOON_S = 1_772_366_400.0  # 2026-03-01 12:00:00 UTC
MODEL = "llama-70b"


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'history.db'}"


def upgraded_engine(url: str) -> Iterator[Engine]:
    """An engine on a database with all tables: the body of the `engine` fixtures."""
    engine = open_engine(url, create=True)
    migrate.upgrade(engine)
    yield engine
    engine.dispose()


def quick_recorder(url: str, folder: Path, **options: Any) -> Recorder:
    """A recorder that waits a tenth of a second for a lock and tries again after a twentieth."""
    return Recorder(open_engine(url, patience_s=0.1), folder, retry_s=0.05, **options)


def decision(number: int = 1, *, term: int = 1, **changes: Any) -> Decision:
    whole = Decision(
        term=term,
        number=number,
        decided_at_s=NOON_S + number,
        level=Level.POOL,
        scope="long",
        trigger="tick",
        mode=Mode.ACTIVE,
        reason=Reason.FORECAST_CHANGED,
        sentence=f"Pool long goes from 2 to 3 × TP4 (decision {number}).",
        inputs={"rates": {"LL": 1.25, "LS": 0.5}, "stale": False, "names": ["ü", "n"]},
        outcome={"counts": {"4": 3}},
        alternatives=({"counts": {"8": 2}, "power_w": 5200.5, "why": "draws more"},),
        predicted_power_w=4100.25,
        predicted_slo_margin=0.125,
        solver=SolverReport("HiGHS", "optimal", 4100.25, 4099.5, 0.0002, 12.5, 48),
        parent=7,
        effects=("e1", "e2"),
    )
    return replace(whole, **changes)


def action(number: int, *, term: int = 1) -> ActionRecord:
    return ActionRecord(term, f"e{number}", ActionKind.APPLY_CLOCKS, NOON_S + number, 0.25, True)


def one_of_each() -> list[Record]:
    """One record per table that the recorder writes."""
    return [
        decision(),
        DecisionOutcome(1, 1, NOON_S + 301, 300.0, 4250.5, 1.2e6, 6.5, 0.995, 1800.0, 62.5, {"instances": 3}),
        ActionRecord(
            term=1,
            effect_id="e1",
            kind=ActionKind.START_INSTANCE,
            started_at_s=NOON_S + 2,
            duration_s=31.5,
            ok=True,
            decision=1,
            node_id="node-1",
            instance_id="t1-i1",
            gpus=4,
            asked={"gpu_uuids": ["GPU-a", "GPU-b"]},
        ),
        TelemetryRow(
            term=1,
            window_start_s=NOON_S,
            window_s=60.0,
            node_id="node-1",
            gpu_uuid="GPU-a",
            state=GpuState.SERVING,
            seconds=60.0,
            pool="long",
            instance_id="t1-i1",
            energy_j=24_000.0,
            energy_source=EnergySource.COUNTER,
            mean_power_w=400.0,
            mean_sm_mhz=1410.0,
        ),
        LoadRow(1, NOON_S, 60.0, MODEL, RequestClass.parse("LM"), 120, 118, 1, 240_000, 30_000),
        SloRow(1, NOON_S, 60.0, MODEL, RequestClass.parse("LM"), 119, 117, 600.0, 1900.5, 30.0, 80.0),
        ForecastRow(1, NOON_S, 120.0, MODEL, "long", 2.5, 3.5, 2.0, 3.0, 2.0),
        TransitionRow(1, "tr1", MODEL, "long", "forecast_changed", NOON_S + 2, 45.0, True, 1, 0, 1, {"4": 2}, {"4": 3}),
        PlanRecord(
            1,
            1,
            NOON_S + 1,
            Layout((PlannedInstance("t1-i1", "long", MODEL, "node-1", ("GPU-a", "GPU-b", "GPU-c", "GPU-d")),)),
            {"long": {"granted_gpus": 8}},
        ),
        NodeRecord("node-1", NOON_S, 8, "10.0.0.1:7443", {"driver": "580.1"}),
        InputFrame(1, 1, NOON_S, NOON_S + 300, 1200, ('["t",1.0,2.0,"instance"]',)),
        InputSnapshot(1, 1, NOON_S, lambda: "{}"),
        OrderRecord(1, 1, NOON_S, OrderKind.MODE, "pool:long", "advisory", "ada@desk", "trying it out"),
        ChoiceRecord(
            "gw",
            "e1",
            1,
            NOON_S + 3,
            MODEL,
            RequestClass.parse("SM"),
            120,
            "short",
            "i1",
            "load",
            0.4,
            1000,
            (
                {
                    "instance": "i2",
                    "pool": "short",
                    "lost_by": "load",
                    "in_flight": 3,
                    "pending_tokens": 0,
                    "score": 1.0,
                },
            ),
        ),
        SavingRow("2026-03-01", MODEL, "", "single_pool", 86_400.0, 3.6e8, 7.2e8, 6.8e8, 7.6e8, 0.12, 450.0, NOON_S),
    ]


def rows_by_table(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {
            name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for name, table in Base.metadata.tables.items()
        }


def effect_numbers(engine: Engine) -> list[int]:
    """Of the actions in the database, in the order in which they were written."""
    with engine.connect() as connection:
        ids = connection.execute(text("SELECT effect_id FROM actions ORDER BY id")).scalars()
        return [int(effect_id[1:]) for effect_id in ids]


@contextmanager
def hold_sqlite(path: Path) -> Iterator[None]:
    """As another process that holds the database: nobody else may write."""
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        holder.close()


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Waits for a condition that another thread or process brings about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True
