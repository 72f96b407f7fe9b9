"""The tables of history as SQLAlchemy models: the target that the migrations must reach.

Times are stored as UTC timestamps for people and are epoch seconds in Python (`UtcSeconds`). Structured values are
canonical JSON text, byte for byte what a replay compares. Rows are only ever added; `nodes`, `leadership` and
`saving_days`, which tell how things stand, are the exceptions.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcSeconds(TypeDecorator[float]):
    """Epoch seconds in Python; `timestamptz` on Postgres, ISO text with microseconds (UTC) on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment = datetime.fromtimestamp(value, tz=UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        if not isinstance(value, datetime):
            return None
        return (value.replace(tzinfo=UTC) if value.tzinfo is None else value).timestamp()


# SQLite numbers rows by itself only in a column of exactly the type INTEGER.
RowId = BigInteger().with_variant(Integer, "sqlite")
Name = String()  # no length: node and instance names come from elsewhere


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {float: Double()}
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class DecisionModel(Base):
    """One choice of one manager, with everything that explains it."""

    __tablename__ = "decisions"
    __table_args__ = (
        UniqueConstraint("term", "number"),
        Index(None, "decided_at"),
        Index(None, "level", "scope", "decided_at"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int] = mapped_column(BigInteger)
    decided_at: Mapped[float] = mapped_column(UtcSeconds)
    level: Mapped[str] = mapped_column(Name)
    scope: Mapped[str] = mapped_column(Name)
    trigger: Mapped[str] = mapped_column(Name)
    mode: Mapped[str] = mapped_column(Name)
    reason: Mapped[str] = mapped_column(Name)
    sentence: Mapped[str] = mapped_column(Text)
    inputs: Mapped[str] = mapped_column(Text)
    alternatives: Mapped[str] = mapped_column(Text)
    outcome: Mapped[str] = mapped_column(Text)
    effects: Mapped[str] = mapped_column(Text)
    predicted_power_w: Mapped[float | None]
    predicted_slo_margin: Mapped[float | None]
    solver: Mapped[str | None] = mapped_column(Name)
    solver_status: Mapped[str | None] = mapped_column(Name)
    objective_w: Mapped[float | None]
    bound_w: Mapped[float | None]
    gap: Mapped[float | None]
    solve_ms: Mapped[float | None]
    solver_columns: Mapped[int | None]
    parent: Mapped[int | None] = mapped_column(BigInteger)


class DecisionOutcomeModel(Base):
    """What happened in the epoch after a decision."""

    __tablename__ = "decision_outcomes"
    __table_args__ = (
        ForeignKeyConstraint(["term", "number"], ["decisions.term", "decisions.number"], ondelete="CASCADE"),
    )

    term: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    measured_at: Mapped[float] = mapped_column(UtcSeconds)
    window_s: Mapped[float]
    power_w: Mapped[float | None]
    energy_j: Mapped[float | None]
    load_rps: Mapped[float | None]
    slo_attainment: Mapped[float | None]
    ttft_p99_ms: Mapped[float | None]
    token_gap_p99_ms: Mapped[float | None]
    detail: Mapped[str] = mapped_column(Text)


class ActionModel(Base):
    """What was sent to whom, and its result."""

    __tablename__ = "actions"
    __table_args__ = (UniqueConstraint("term", "effect_id"), Index(None, "started_at"), Index(None, "term", "decision"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    effect_id: Mapped[str] = mapped_column(Name)
    decision: Mapped[int | None] = mapped_column(BigInteger)
    kind: Mapped[str] = mapped_column(Name)
    node_id: Mapped[str] = mapped_column(Name)
    instance_id: Mapped[str] = mapped_column(Name)
    gpus: Mapped[int]
    asked: Mapped[str] = mapped_column(Text)
    ok: Mapped[bool]
    detail: Mapped[str] = mapped_column(Text)
    started_at: Mapped[float] = mapped_column(UtcSeconds)
    duration_s: Mapped[float]


class TelemetryMinuteModel(Base):
    """Energy, power and clock of one GPU in one state during one window (a minute unless configured)."""

    __tablename__ = "telemetry_minute"
    __table_args__ = (
        UniqueConstraint("term", "window_start", "gpu_uuid", "state", "pool", "instance_id"),
        Index(None, "window_start"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    window_start: Mapped[float] = mapped_column(UtcSeconds)
    window_s: Mapped[float]
    node_id: Mapped[str] = mapped_column(Name)
    gpu_uuid: Mapped[str] = mapped_column(Name)
    state: Mapped[str] = mapped_column(Name)
    pool: Mapped[str] = mapped_column(Name)
    instance_id: Mapped[str] = mapped_column(Name)
    seconds: Mapped[float]
    energy_j: Mapped[float | None]
    energy_source: Mapped[str] = mapped_column(Name)
    mean_power_w: Mapped[float | None]
    mean_sm_mhz: Mapped[float | None]


class LoadMinuteModel(Base):
    """Arrivals by request class and window."""

    __tablename__ = "load_minute"
    __table_args__ = (UniqueConstraint("term", "window_start", "model", "request_class"), Index(None, "window_start"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    window_start: Mapped[float] = mapped_column(UtcSeconds)
    window_s: Mapped[float]
    model: Mapped[str] = mapped_column(Name)
    request_class: Mapped[str] = mapped_column(Name)
    arrived: Mapped[int] = mapped_column(BigInteger)
    completed: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)


class SloMinuteModel(Base):
    """Service by request class and window."""

    __tablename__ = "slo_minute"
    __table_args__ = (UniqueConstraint("term", "window_start", "model", "request_class"), Index(None, "window_start"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    window_start: Mapped[float] = mapped_column(UtcSeconds)
    window_s: Mapped[float]
    model: Mapped[str] = mapped_column(Name)
    request_class: Mapped[str] = mapped_column(Name)
    requests: Mapped[int] = mapped_column(BigInteger)
    in_slo: Mapped[int] = mapped_column(BigInteger)
    ttft_p50_ms: Mapped[float | None]
    ttft_p99_ms: Mapped[float | None]
    token_gap_p50_ms: Mapped[float | None]
    token_gap_p99_ms: Mapped[float | None]


class ForecastModel(Base):
    """What was forecast of a pool's load for a span, and what came in it; written when it has ended."""

    __tablename__ = "forecasts"
    __table_args__ = (UniqueConstraint("term", "window_start", "model", "pool"), Index(None, "window_start"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    window_start: Mapped[float] = mapped_column(UtcSeconds)
    window_s: Mapped[float]
    model: Mapped[str] = mapped_column(Name)
    pool: Mapped[str] = mapped_column(Name)
    forecast_rps: Mapped[float]
    quantile_rps: Mapped[float]
    plain_forecast_rps: Mapped[float]
    plain_quantile_rps: Mapped[float]
    arrived_rps: Mapped[float]


class TransitionModel(Base):
    """Ways from one layout to another that have ended."""

    __tablename__ = "transitions"
    __table_args__ = (UniqueConstraint("term", "transition_id"), Index(None, "started_at"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    transition_id: Mapped[str] = mapped_column(Name)
    decision: Mapped[int | None] = mapped_column(BigInteger)
    model: Mapped[str] = mapped_column(Name)
    pool: Mapped[str] = mapped_column(Name)
    reason: Mapped[str] = mapped_column(Name)
    started_at: Mapped[float] = mapped_column(UtcSeconds)
    duration_s: Mapped[float]
    completed: Mapped[bool]
    starts: Mapped[int]
    stops: Mapped[int]
    layout_before: Mapped[str] = mapped_column(Text)
    layout_after: Mapped[str] = mapped_column(Text)


class PlanModel(Base):
    """Wanted layouts; the last one is what a restarted controller carries on from."""

    __tablename__ = "plans"
    __table_args__ = (UniqueConstraint("term", "number"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int] = mapped_column(BigInteger)
    planned_at: Mapped[float] = mapped_column(UtcSeconds)
    layout: Mapped[str] = mapped_column(Text)
    pools: Mapped[str] = mapped_column(Text)


class InputFrameModel(Base):
    """What the controller was told, pool tick by pool tick, packed (store/frames.py)."""

    __tablename__ = "input_frames"
    __table_args__ = (UniqueConstraint("term", "number"), Index(None, "began_at"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int] = mapped_column(BigInteger)
    began_at: Mapped[float] = mapped_column(UtcSeconds)
    ended_at: Mapped[float] = mapped_column(UtcSeconds)
    events: Mapped[int]
    body: Mapped[str] = mapped_column(Text)


class InputSnapshotModel(Base):
    """The core's whole state before the frame of the same number: zlib over JSON, in base64."""

    __tablename__ = "input_snapshots"
    __table_args__ = (UniqueConstraint("term", "number"), Index(None, "taken_at"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int] = mapped_column(BigInteger)
    taken_at: Mapped[float] = mapped_column(UtcSeconds)
    body: Mapped[str] = mapped_column(Text)


class OrderModel(Base):
    """What operators asked for, and who."""

    __tablename__ = "orders"
    __table_args__ = (UniqueConstraint("term", "number"), Index(None, "kind", "scope", "ordered_at"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    term: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int] = mapped_column(BigInteger)
    ordered_at: Mapped[float] = mapped_column(UtcSeconds)
    kind: Mapped[str] = mapped_column(Name)
    scope: Mapped[str] = mapped_column(Name)
    value: Mapped[str] = mapped_column(Name)
    until: Mapped[float | None] = mapped_column(UtcSeconds)
    who: Mapped[str] = mapped_column(Name)
    why: Mapped[str] = mapped_column(Text)


class ChoiceModel(Base):
    """A sample of the gateways' choices, each with the alternatives and why they lost."""

    __tablename__ = "choices"
    __table_args__ = (UniqueConstraint("gateway_id", "epoch", "number"), Index(None, "chosen_at"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    gateway_id: Mapped[str] = mapped_column(Name)
    epoch: Mapped[str] = mapped_column(Name)
    number: Mapped[int] = mapped_column(BigInteger)
    chosen_at: Mapped[float] = mapped_column(UtcSeconds)
    model: Mapped[str] = mapped_column(Name)
    request_class: Mapped[str] = mapped_column(Name)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    pool: Mapped[str] = mapped_column(Name)
    instance_id: Mapped[str] = mapped_column(Name)
    decided_by: Mapped[str] = mapped_column(Name)
    queue_ms: Mapped[float]
    speaks_for: Mapped[int] = mapped_column(BigInteger)
    alternatives: Mapped[str] = mapped_column(Text)


class SavingDayModel(Base):
    """What each day saved, as computed last: one row per day, pool and counterfactual."""

    __tablename__ = "saving_days"

    day: Mapped[str] = mapped_column(Name, primary_key=True)
    model: Mapped[str] = mapped_column(Name, primary_key=True)
    pool: Mapped[str] = mapped_column(Name, primary_key=True)
    against: Mapped[str] = mapped_column(Name, primary_key=True)
    covered_s: Mapped[float]
    energy_j: Mapped[float]
    against_j: Mapped[float]
    against_low_j: Mapped[float]
    against_high_j: Mapped[float]
    usd_per_kwh: Mapped[float]
    g_per_kwh: Mapped[float]
    computed_at: Mapped[float] = mapped_column(UtcSeconds)


class ProfileModel(Base):
    """Every profile that was ever planned with, by the checksum of its bytes."""

    __tablename__ = "profiles"

    checksum: Mapped[str] = mapped_column(Name, primary_key=True)
    name: Mapped[str] = mapped_column(Name)
    saved_at: Mapped[float] = mapped_column(UtcSeconds)
    body: Mapped[str] = mapped_column(Text)


class NodeModel(Base):
    """Nodes as last seen."""

    __tablename__ = "nodes"

    node_id: Mapped[str] = mapped_column(Name, primary_key=True)
    seen_at: Mapped[float] = mapped_column(UtcSeconds)
    gpus: Mapped[int]
    address: Mapped[str] = mapped_column(Name)
    detail: Mapped[str] = mapped_column(Text)


class LeadershipModel(Base):
    """The one row that says who leads. `term` only ever rises; an empty holder means that nobody does."""

    __tablename__ = "leadership"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    term: Mapped[int] = mapped_column(BigInteger)
    holder: Mapped[str] = mapped_column(Name)
    expires_at: Mapped[float] = mapped_column(UtcSeconds)
