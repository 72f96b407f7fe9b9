"""Keeps the history small: old rows go, table by table; minutes become hours before they do.

A row that something newer still needs stays: the last plan, the last order of each scope, the snapshot that the oldest
kept frame is replayed from. Deletes in short transactions, so that a running controller never waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Table, and_, case, delete, func, insert, literal, select

from controller.store.engine import writing
from controller.store.models import (
    Base,
    InputFrameModel,
    InputSnapshotModel,
    LoadMinuteModel,
    OrderModel,
    PlanModel,
    SloMinuteModel,
    TelemetryMinuteModel,
)

BATCH_ROWS = 5_000
HOUR_S = 3600.0

# Table -> the column that says how old a row is. `decision_outcomes` go with their decisions.
AGE_COLUMN: Mapping[str, str] = {
    "decisions": "decided_at",
    "actions": "started_at",
    "telemetry_minute": "window_start",
    "load_minute": "window_start",
    "slo_minute": "window_start",
    "forecasts": "window_start",
    "transitions": "started_at",
    "plans": "planned_at",
    "input_frames": "ended_at",
    "input_snapshots": "taken_at",
    "orders": "ordered_at",
    "choices": "chosen_at",
}
ROLLED_UP = ("telemetry_minute", "load_minute", "slo_minute")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long rows are kept, in seconds, by table; a table that is not named is kept for ever. Windows older than
    `hourly_after_s` are summed into hours."""

    keep_s: Mapping[str, float]
    hourly_after_s: float


def prune(engine: Engine, limits: Limits, now_s: float) -> dict[str, int]:
    """Rolls up and deletes; returns the rows that went, by table. Raises StoreUnavailable."""
    gone = {table: roll_up(engine, table, now_s - limits.hourly_after_s) for table in ROLLED_UP}
    for table, keep_s in limits.keep_s.items():
        gone[table] = gone.get(table, 0) + _delete(engine, table, now_s - keep_s)
    return gone


def _delete(engine: Engine, name: str, before_s: float) -> int:
    table = Base.metadata.tables[name]
    old = and_(table.c[AGE_COLUMN[name]] < before_s, *_still_needed(name, before_s))
    total = 0
    while True:
        with writing(engine) as connection:
            ids = connection.scalars(select(table.c.id).where(old).order_by(table.c.id).limit(BATCH_ROWS)).all()
            if ids:
                total += connection.execute(
                    delete(table).where(table.c.id >= ids[0], table.c.id <= ids[-1], table.c.id.in_(ids))
                ).rowcount
        if len(ids) < BATCH_ROWS:
            return total


def _still_needed(name: str, before_s: float) -> list[ColumnElement[bool]]:
    """Conditions under which an old row may go all the same."""
    if name == PlanModel.__tablename__:
        plan = PlanModel.__table__
        return [plan.c.id < select(func.max(PlanModel.id)).scalar_subquery()]
    if name == OrderModel.__tablename__:
        order = OrderModel.__table__
        newest = select(func.max(OrderModel.id)).group_by(OrderModel.kind, OrderModel.scope)
        return [order.c.id.not_in(newest)]
    if name == InputSnapshotModel.__tablename__:
        # The one from which the first kept frame of its term is reached.
        snapshot = InputSnapshotModel.__table__
        kept, later = InputFrameModel, InputSnapshotModel.__table__.alias("later")
        first = (
            select(func.min(kept.number))
            .where(kept.term == snapshot.c.term, kept.ended_at >= before_s)
            .scalar_subquery()
        )
        return [
            case(
                (first.is_(None), literal(True)),
                else_=select(later.c.id)
                .where(later.c.term == snapshot.c.term, later.c.number > snapshot.c.number, later.c.number <= first)
                .exists(),
            )
        ]
    return []


# ------------------------------------------------------------------------------------------------------- roll-up

_KEYS: Mapping[str, tuple[str, ...]] = {
    "telemetry_minute": ("term", "node_id", "gpu_uuid", "state", "pool", "instance_id", "energy_source"),
    "load_minute": ("term", "model", "request_class"),
    "slo_minute": ("term", "model", "request_class"),
}
_SUMS: Mapping[str, tuple[str, ...]] = {
    "telemetry_minute": ("seconds", "energy_j"),
    "load_minute": ("arrived", "completed", "failed", "input_tokens", "output_tokens"),
    "slo_minute": ("requests", "in_slo"),
}
# A percentile of an hour cannot be made of those of its minutes; the worst one can be named. Medians are weighed.
_WORST: Mapping[str, tuple[str, ...]] = {"slo_minute": ("ttft_p99_ms", "token_gap_p99_ms")}
_WEIGHED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "telemetry_minute": (("mean_power_w", "seconds"), ("mean_sm_mhz", "seconds")),
    "slo_minute": (("ttft_p50_ms", "requests"), ("token_gap_p50_ms", "requests")),
}
_MODELS = {"telemetry_minute": TelemetryMinuteModel, "load_minute": LoadMinuteModel, "slo_minute": SloMinuteModel}


def roll_up(engine: Engine, name: str, before_s: float) -> int:
    """Sums the windows of whole hours that ended before `before_s`, hour by hour. Returns how many rows became fewer.

    Nothing is lost that sums can keep: joules, seconds, requests. Time whose energy is unknown stays apart from the
    rest, as a row without joules.
    """
    table = Base.metadata.tables[name]
    before_s -= before_s % HOUR_S
    fewer = 0
    after_s = 0.0
    while True:
        with writing(engine) as connection:
            first_s = connection.scalar(
                select(func.min(table.c.window_start)).where(
                    table.c.window_s < HOUR_S, table.c.window_start < before_s, table.c.window_start >= after_s
                )
            )
            if first_s is None:
                return fewer
            hour_s = first_s - first_s % HOUR_S
            fewer += _one_hour(connection, table, hour_s)
            after_s = hour_s + HOUR_S


def _one_hour(connection: Connection, table: Table, hour_s: float) -> int:
    name = table.name
    in_hour = and_(table.c.window_start >= hour_s, table.c.window_start < hour_s + HOUR_S, table.c.window_s < HOUR_S)
    columns = [table.c[key] for key in _KEYS[name]]
    groups: list[Any] = list(columns)
    if name == "telemetry_minute":
        groups.append(table.c.energy_j.is_(None))
    values: list[Any] = [
        *columns,
        *(func.sum(table.c[key]).label(key) for key in _SUMS[name]),
        *(func.max(table.c[key]).label(key) for key in _WORST.get(name, ())),
        *(
            (
                func.sum(table.c[key] * table.c[weight])
                / func.nullif(func.sum(case((table.c[key].is_not(None), table.c[weight]))), 0)
            ).label(key)
            for key, weight in _WEIGHED.get(name, ())
        ),
    ]
    rows = [dict(row) for row in connection.execute(select(*values).where(in_hour).group_by(*groups)).mappings()]
    before = connection.execute(delete(table).where(in_hour)).rowcount
    for row in rows:
        row["window_start"], row["window_s"] = hour_s, HOUR_S
    merged = _unique(name, rows)
    if merged:
        connection.execute(insert(table), merged)
    return before - len(merged)


def _unique(name: str, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows' key does not tell measured from unmeasured time: what has no joules begins a moment later."""
    if name != "telemetry_minute":
        return rows
    seen: set[tuple[object, ...]] = set()
    for row in sorted(rows, key=lambda row: row["energy_j"] is None):
        key = tuple(row[part] for part in _KEYS[name] if part != "energy_source")
        while (*key, row["window_start"]) in seen:
            row["window_start"] = float(str(row["window_start"])) + 1.0
        seen.add((*key, row["window_start"]))
    return rows


def sizes(engine: Engine) -> dict[str, tuple[int, str | None]]:
    """Rows, and the oldest one's time (UTC), by table."""
    found: dict[str, tuple[int, str | None]] = {}
    with engine.connect() as connection:
        for name, column in AGE_COLUMN.items():
            table = Base.metadata.tables[name]
            rows, oldest = connection.execute(select(func.count(), func.min(table.c[column])).select_from(table)).one()
            at = datetime.fromtimestamp(oldest, tz=UTC).isoformat(sep=" ", timespec="seconds") if oldest else None
            found[name] = (rows, at)
    return found
