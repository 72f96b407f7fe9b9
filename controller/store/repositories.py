"""Writing and reading history with domain values: the only place that turns questions into SQL.

Writes are idempotent: every row has a key of its own making (term and number, effect, window …), and a row that is
there already is left alone, so that what was spooled can be written again after a crash. Reads raise
StoreUnavailable when the database fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Table, case, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute

from controller.domain.decision import Decision
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level
from controller.store.codec import (
    Row,
    to_choice,
    to_decision,
    to_decision_outcome,
    to_node,
    to_order,
    to_plan,
    to_row,
    unpack,
)
from controller.store.engine import StoreUnavailable, first_line, is_unavailable, reading, writing
from controller.store.models import (
    ActionModel,
    Base,
    ChoiceModel,
    DecisionModel,
    DecisionOutcomeModel,
    InputSnapshotModel,
    NodeModel,
    OrderModel,
    PlanModel,
    ProfileModel,
    SavingDayModel,
    TelemetryMinuteModel,
)
from controller.store.records import (
    ActionKind,
    ChoiceRecord,
    DecisionOutcome,
    NodeRecord,
    OrderKind,
    OrderRecord,
    PlanRecord,
    Record,
)

# ---------------------------------------------------------------------------------------------------- writing


class RowRefused(Exception):
    """The database works, but will never take one of these rows."""


def write_records(engine: Engine, records: Iterable[Record]) -> int:
    """Writes values in one transaction, for callers that can wait; the running controller uses `Recorder`.

    Returns how many rows were new. Raises StoreUnavailable, RowRefused.
    """
    return write_rows(engine, [to_row(record) for record in records])


def write_rows(engine: Engine, rows: Sequence[Row]) -> int:
    """All of the rows or none, in one transaction. Returns how many were new. Raises StoreUnavailable, RowRefused."""
    if not rows:
        return 0
    try:
        connection = engine.execution_options(sqlite_begin="BEGIN IMMEDIATE").connect()
    except Exception as error:  # whatever goes wrong here is the database's fault, not a row's
        raise StoreUnavailable(first_line(error)) from error
    try:
        with connection, connection.begin():
            return sum(_insert(connection, table, values) for table, values in _by_table(rows))
    except Exception as error:
        if is_unavailable(error):
            raise StoreUnavailable(first_line(error)) from error
        raise RowRefused(first_line(error)) from error


def save_profile(engine: Engine, checksum: str, name: str, body: str, saved_at_s: float) -> None:
    """Keeps a profile's text under its checksum, once. Raises StoreUnavailable."""
    values = {"checksum": checksum, "name": name, "body": body, "saved_at": saved_at_s}
    with writing(engine) as connection:
        _insert(connection, ProfileModel.__tablename__, [values])


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """`id` is what people name it by: unique over all terms, rising with time."""

    id: int
    decision: Decision
    outcome: DecisionOutcome | None


@dataclass(frozen=True, slots=True)
class StoredChoice:
    """`id` is what people name it by."""

    id: int
    record: ChoiceRecord


@dataclass(frozen=True, slots=True)
class EnergySum:
    """Over all GPUs in one state. Means are weighted by time and None where nothing was measured."""

    gpu_seconds: float
    energy_j: float
    unmeasured_gpu_seconds: float  # time whose energy is unknown, so not part of energy_j
    mean_sm_mhz: float | None


@dataclass(frozen=True, slots=True)
class ActionCount:
    done: int
    failed: int
    mean_s: float | None  # of those done
    worst_s: float | None


def list_decisions(
    engine: Engine,
    *,
    level: Level | None = None,
    scope: str | None = None,
    limit: int = 50,
    before: int | None = None,
) -> tuple[StoredDecision, ...]:
    """Newest first; `before` is the id of the last one already seen, for the next page."""
    query = _decisions().order_by(DecisionModel.id.desc()).limit(limit)
    if level is not None:
        query = query.where(DecisionModel.level == level.value)
    if scope is not None:
        query = query.where(DecisionModel.scope == scope)
    if before is not None:
        query = query.where(DecisionModel.id < before)
    with reading(engine) as session:
        return tuple(_stored(decision, outcome) for decision, outcome in session.execute(query))


def get_decision(engine: Engine, decision_id: int) -> StoredDecision | None:
    return _one_decision(engine, DecisionModel.id == decision_id)


def find_decision(engine: Engine, term: int, number: int) -> StoredDecision | None:
    """By its number within a term, as `Decision.parent` and `ActionRecord.decision` name it."""
    return _one_decision(engine, (DecisionModel.term == term) & (DecisionModel.number == number))


def count_decisions(engine: Engine, *, since_s: float | None = None, until_s: float | None = None) -> dict[Level, int]:
    """Decisions by level within [since, until), UTC epoch seconds; every level is there."""
    query = (
        select(DecisionModel.level, func.count())
        .where(*_between(DecisionModel.decided_at, since_s, until_s))
        .group_by(DecisionModel.level)
    )
    with reading(engine) as session:
        found = {Level(level): count for level, count in session.execute(query)}
    return {level: found.get(level, 0) for level in Level}


def count_actions(
    engine: Engine, *, since_s: float | None = None, until_s: float | None = None
) -> dict[ActionKind, ActionCount]:
    """Actions by kind that began within [since, until); kinds that never occurred are left out."""
    ok_duration = case((ActionModel.ok, ActionModel.duration_s))
    query = (
        select(
            ActionModel.kind,
            func.count(ok_duration),
            func.count(),
            func.avg(ok_duration),
            func.max(ok_duration),
        )
        .where(*_between(ActionModel.started_at, since_s, until_s))
        .group_by(ActionModel.kind)
    )
    with reading(engine) as session:
        return {
            ActionKind(kind): ActionCount(done=done, failed=total - done, mean_s=mean_s, worst_s=worst_s)
            for kind, done, total, mean_s, worst_s in session.execute(query)
        }


def energy_by_state(
    engine: Engine, *, since_s: float | None = None, until_s: float | None = None
) -> dict[GpuState, EnergySum]:
    """Energy of the windows that began within [since, until); states that never occurred are left out."""
    row = TelemetryMinuteModel
    clock_s = func.sum(case((row.mean_sm_mhz.is_not(None), row.seconds)))
    query = (
        select(
            row.state,
            func.sum(row.seconds),
            func.coalesce(func.sum(row.energy_j), 0.0),
            func.coalesce(func.sum(case((row.energy_j.is_(None), row.seconds))), 0.0),
            func.sum(row.mean_sm_mhz * row.seconds) / func.nullif(clock_s, 0.0),
        )
        .where(*_between(row.window_start, since_s, until_s))
        .group_by(row.state)
    )
    with reading(engine) as session:
        return {
            GpuState(state): EnergySum(seconds, energy_j, unmeasured_s, mhz)
            for state, seconds, energy_j, unmeasured_s, mhz in session.execute(query)
        }


def rows_s(engine: Engine) -> float:
    """How long the newest rows of energy, load and SLO are; a minute where there are none."""
    row = TelemetryMinuteModel
    query = select(row.window_s).order_by(row.window_start.desc()).limit(1)
    with reading(engine) as session:
        return session.scalar(query) or 60.0


def last_plan(engine: Engine) -> PlanRecord | None:
    """The layout wanted last, under whatever term: what a restarted controller carries on from."""
    query = select(PlanModel).order_by(PlanModel.term.desc(), PlanModel.number.desc()).limit(1)
    with reading(engine) as session:
        row = session.scalars(query).first()
        return None if row is None else to_plan(row)


def last_snapshot(engine: Engine) -> str | None:
    """The newest snapshot of a core's state (controller/loop/snapshot.py); None without one that can be read."""
    snapshot = InputSnapshotModel
    query = select(snapshot.body).order_by(snapshot.term.desc(), snapshot.number.desc()).limit(1)
    with reading(engine) as session:
        body = session.scalars(query).first()
    try:
        return None if body is None else unpack(body)
    except ValueError:
        return None


def last_orders(engine: Engine, kind: OrderKind) -> tuple[OrderRecord, ...]:
    """The newest order of this kind in each scope, by scope."""
    row = OrderModel
    query = select(row).where(row.kind == kind.value).order_by(row.term, row.number)
    with reading(engine) as session:
        newest = {found.scope: to_order(found) for found in session.scalars(query)}
    return tuple(newest[scope] for scope in sorted(newest))


def list_orders(engine: Engine, limit: int = 50) -> tuple[OrderRecord, ...]:
    """Newest first."""
    with reading(engine) as session:
        return tuple(map(to_order, session.scalars(select(OrderModel).order_by(OrderModel.id.desc()).limit(limit))))


def list_choices(
    engine: Engine, *, since_s: float | None = None, pool: str = "", limit: int = 50
) -> tuple[StoredChoice, ...]:
    """The gateways' sampled choices, newest first."""
    query = select(ChoiceModel).where(*_between(ChoiceModel.chosen_at, since_s, None))
    if pool:
        query = query.where(ChoiceModel.pool == pool)
    query = query.order_by(ChoiceModel.chosen_at.desc(), ChoiceModel.id.desc()).limit(limit)
    with reading(engine) as session:
        return tuple(StoredChoice(row.id, to_choice(row)) for row in session.scalars(query))


def get_choice(engine: Engine, choice_id: int) -> StoredChoice | None:
    with reading(engine) as session:
        row = session.get(ChoiceModel, choice_id)
        return None if row is None else StoredChoice(row.id, to_choice(row))


@dataclass(frozen=True, slots=True)
class SavedProfile:
    checksum: str
    saved_at_s: float
    body: str


def find_profiles(engine: Engine, checksum: str) -> list[SavedProfile]:
    """Profiles whose checksum begins so, the newest first; all for "". Raises StoreUnavailable."""
    row = ProfileModel
    query = select(row).where(row.checksum.startswith(checksum, autoescape=True)).order_by(row.saved_at.desc())
    with reading(engine) as session:
        return [SavedProfile(found.checksum, found.saved_at, found.body) for found in session.scalars(query)]


def get_profile(engine: Engine, checksum: str) -> str | None:
    """A profile's text as it was saved."""
    with reading(engine) as session:
        return session.scalar(select(ProfileModel.body).where(ProfileModel.checksum == checksum))


def list_nodes(engine: Engine) -> tuple[NodeRecord, ...]:
    with reading(engine) as session:
        return tuple(to_node(row) for row in session.scalars(select(NodeModel).order_by(NodeModel.node_id)))


# ------------------------------------------------------------------------------------------------------ parts


def _decisions() -> Any:
    outcome = DecisionOutcomeModel
    joined = (outcome.term == DecisionModel.term) & (outcome.number == DecisionModel.number)
    return select(DecisionModel, outcome).outerjoin(outcome, joined)


def _one_decision(engine: Engine, condition: ColumnElement[bool]) -> StoredDecision | None:
    with reading(engine) as session:
        row = session.execute(_decisions().where(condition)).first()
        return None if row is None else _stored(row[0], row[1])


def _stored(decision: DecisionModel, outcome: DecisionOutcomeModel | None) -> StoredDecision:
    return StoredDecision(decision.id, to_decision(decision), None if outcome is None else to_decision_outcome(outcome))


def _between(
    column: InstrumentedAttribute[float], since_s: float | None, until_s: float | None
) -> tuple[ColumnElement[bool], ...]:
    conditions: list[ColumnElement[bool]] = []
    if since_s is not None:
        conditions.append(column >= since_s)
    if until_s is not None:
        conditions.append(column < until_s)
    return tuple(conditions)


def _by_table(rows: Sequence[Row]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of one table and one set of columns together, each group in its order; decisions before what names them."""
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row.table, tuple(sorted(row.values))), []).append(row.values)
    ordered = sorted(groups.items(), key=lambda group: group[0][0] != DecisionModel.__tablename__)
    return [(table, values) for (table, _), values in ordered]


def _insert(connection: Connection, table_name: str, values: list[dict[str, Any]]) -> int:
    table: Table = Base.metadata.tables[table_name]
    on_sqlite = connection.dialect.name == "sqlite"
    insert = sqlite.insert(table) if on_sqlite else postgresql.insert(table)
    if table_name == SavingDayModel.__tablename__:
        keys = [column.name for column in table.primary_key]
        renewed = {column.name: insert.excluded[column.name] for column in table.columns if not column.primary_key}
        statement = insert.on_conflict_do_update(
            index_elements=keys, set_=renewed, where=insert.excluded.computed_at >= table.c.computed_at
        )
    elif table_name == NodeModel.__tablename__:
        new = {column.name: insert.excluded[column.name] for column in table.columns if not column.primary_key}
        statement = insert.on_conflict_do_update(
            index_elements=["node_id"], set_=new, where=insert.excluded.seen_at >= table.c.seen_at
        )
    else:
        statement = insert.on_conflict_do_nothing()
    return connection.execute(statement, values, execution_options={"preserve_rowcount": True}).rowcount
