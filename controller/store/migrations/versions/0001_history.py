"""The tables of history.

Revision ID: 0001
Revises:
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "decisions",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("decided_at", TIME, nullable=False),
        sa.Column("level", sa.String, nullable=False),
        sa.Column("scope", sa.String, nullable=False),
        sa.Column("trigger", sa.String, nullable=False),
        sa.Column("mode", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("sentence", sa.Text, nullable=False),
        sa.Column("inputs", sa.Text, nullable=False),
        sa.Column("alternatives", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("effects", sa.Text, nullable=False),
        sa.Column("predicted_power_w", sa.Double),
        sa.Column("predicted_slo_margin", sa.Double),
        sa.Column("solver", sa.String),
        sa.Column("solver_status", sa.String),
        sa.Column("objective_w", sa.Double),
        sa.Column("bound_w", sa.Double),
        sa.Column("gap", sa.Double),
        sa.Column("solve_ms", sa.Double),
        sa.Column("solver_columns", sa.Integer),
        sa.Column("parent", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_decisions"),
        sa.UniqueConstraint("term", "number", name="uq_decisions"),
    )
    op.create_index("ix_decisions_decided_at", "decisions", ["decided_at"])
    op.create_index("ix_decisions_level_scope_decided_at", "decisions", ["level", "scope", "decided_at"])

    op.create_table(
        "decision_outcomes",
        sa.Column("term", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("measured_at", TIME, nullable=False),
        sa.Column("window_s", sa.Double, nullable=False),
        sa.Column("power_w", sa.Double),
        sa.Column("energy_j", sa.Double),
        sa.Column("load_rps", sa.Double),
        sa.Column("slo_attainment", sa.Double),
        sa.Column("ttft_p99_ms", sa.Double),
        sa.Column("token_gap_p99_ms", sa.Double),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("term", "number", name="pk_decision_outcomes"),
        sa.ForeignKeyConstraint(
            ["term", "number"],
            ["decisions.term", "decisions.number"],
            name="fk_decision_outcomes_decisions",
            ondelete="CASCADE",
        ),
    )

    op.create_table(
        "actions",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("effect_id", sa.String, nullable=False),
        sa.Column("decision", sa.BigInteger),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("node_id", sa.String, nullable=False),
        sa.Column("instance_id", sa.String, nullable=False),
        sa.Column("gpus", sa.Integer, nullable=False),
        sa.Column("asked", sa.Text, nullable=False),
        sa.Column("ok", sa.Boolean, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("duration_s", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_actions"),
        sa.UniqueConstraint("term", "effect_id", name="uq_actions"),
    )
    op.create_index("ix_actions_started_at", "actions", ["started_at"])
    op.create_index("ix_actions_term_decision", "actions", ["term", "decision"])

    op.create_table(
        "telemetry_minute",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("window_start", TIME, nullable=False),
        sa.Column("window_s", sa.Double, nullable=False),
        sa.Column("node_id", sa.String, nullable=False),
        sa.Column("gpu_uuid", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("pool", sa.String, nullable=False),
        sa.Column("instance_id", sa.String, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("energy_j", sa.Double),
        sa.Column("energy_source", sa.String, nullable=False),
        sa.Column("mean_power_w", sa.Double),
        sa.Column("mean_sm_mhz", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_telemetry_minute"),
        sa.UniqueConstraint(
            "term",
            "window_start",
            "gpu_uuid",
            "state",
            "pool",
            "instance_id",
            name="uq_telemetry_minute",
        ),
    )
    op.create_index("ix_telemetry_minute_window_start", "telemetry_minute", ["window_start"])

    op.create_table(
        "load_minute",
        *_class_window_columns(),
        sa.Column("arrived", sa.BigInteger, nullable=False),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_load_minute"),
        sa.UniqueConstraint(
            "term",
            "window_start",
            "model",
            "request_class",
            name="uq_load_minute",
        ),
    )
    op.create_index("ix_load_minute_window_start", "load_minute", ["window_start"])

    op.create_table(
        "slo_minute",
        *_class_window_columns(),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("in_slo", sa.BigInteger, nullable=False),
        sa.Column("ttft_p50_ms", sa.Double),
        sa.Column("ttft_p99_ms", sa.Double),
        sa.Column("token_gap_p50_ms", sa.Double),
        sa.Column("token_gap_p99_ms", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_slo_minute"),
        sa.UniqueConstraint("term", "window_start", "model", "request_class", name="uq_slo_minute"),
    )
    op.create_index("ix_slo_minute_window_start", "slo_minute", ["window_start"])

    op.create_table(
        "transitions",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("transition_id", sa.String, nullable=False),
        sa.Column("decision", sa.BigInteger),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("pool", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("duration_s", sa.Double, nullable=False),
        sa.Column("completed", sa.Boolean, nullable=False),
        sa.Column("starts", sa.Integer, nullable=False),
        sa.Column("stops", sa.Integer, nullable=False),
        sa.Column("layout_before", sa.Text, nullable=False),
        sa.Column("layout_after", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_transitions"),
        sa.UniqueConstraint("term", "transition_id", name="uq_transitions"),
    )
    op.create_index("ix_transitions_started_at", "transitions", ["started_at"])

    op.create_table(
        "plans",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("planned_at", TIME, nullable=False),
        sa.Column("layout", sa.Text, nullable=False),
        sa.Column("pools", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_plans"),
        sa.UniqueConstraint("term", "number", name="uq_plans"),
    )

    op.create_table(
        "profiles",
        sa.Column("checksum", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("saved_at", TIME, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("checksum", name="pk_profiles"),
    )

    op.create_table(
        "nodes",
        sa.Column("node_id", sa.String, nullable=False),
        sa.Column("seen_at", TIME, nullable=False),
        sa.Column("gpus", sa.Integer, nullable=False),
        sa.Column("address", sa.String, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("node_id", name="pk_nodes"),
    )

    leadership = op.create_table(
        "leadership",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_leadership"),
    )
    # The one row is there from the start, so that taking the lead is always an update: compare and set.
    op.execute(leadership.insert().values(id=1, term=0, holder="", expires_at=sa.text("'1970-01-01 00:00:00.000000'")))


def downgrade() -> None:
    for table in (
        "leadership",
        "nodes",
        "profiles",
        "plans",
        "transitions",
        "slo_minute",
        "load_minute",
        "telemetry_minute",
        "actions",
        "decision_outcomes",
        "decisions",
    ):
        op.drop_table(table)


def _class_window_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("window_start", TIME, nullable=False),
        sa.Column("window_s", sa.Double, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("request_class", sa.String, nullable=False),
    ]
