"""Inputs for the replay, operators' orders, and savings by day.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
TIME = sa.DateTime(timezone=True)

# Money and carbon stand beside the joules they follow from, so that a later price changes no past day.
SAVINGS_BY_DAY = """
CREATE VIEW v_savings_by_day AS
SELECT
    day,
    model,
    CASE WHEN pool = '' THEN 'cluster' ELSE pool END AS pool,
    against,
    covered_s / 3600.0 AS covered_hours,
    energy_j / 3.6e6 AS energy_kwh,
    against_j / 3.6e6 AS against_kwh,
    (against_j - energy_j) / 3.6e6 AS saved_kwh,
    (against_low_j - energy_j) / 3.6e6 AS saved_kwh_low,
    (against_high_j - energy_j) / 3.6e6 AS saved_kwh_high,
    (against_j - energy_j) / NULLIF(against_j, 0) AS saved_ratio,
    (against_j - energy_j) / 3.6e6 * usd_per_kwh AS saved_usd,
    (against_j - energy_j) / 3.6e9 * g_per_kwh AS saved_kg_co2
FROM saving_days
"""


def upgrade() -> None:
    op.create_table(
        "input_frames",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("began_at", TIME, nullable=False),
        sa.Column("ended_at", TIME, nullable=False),
        sa.Column("events", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_input_frames"),
        sa.UniqueConstraint("term", "number", name="uq_input_frames"),
    )
    op.create_index("ix_input_frames_began_at", "input_frames", ["began_at"])
    op.create_table(
        "input_snapshots",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("taken_at", TIME, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_input_snapshots"),
        sa.UniqueConstraint("term", "number", name="uq_input_snapshots"),
    )
    op.create_index("ix_input_snapshots_taken_at", "input_snapshots", ["taken_at"])
    op.create_table(
        "orders",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("ordered_at", TIME, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("scope", sa.String, nullable=False),
        sa.Column("value", sa.String, nullable=False),
        sa.Column("until", TIME),
        sa.Column("who", sa.String, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_orders"),
        sa.UniqueConstraint("term", "number", name="uq_orders"),
    )
    op.create_index("ix_orders_kind_scope_ordered_at", "orders", ["kind", "scope", "ordered_at"])
    op.create_table(
        "saving_days",
        sa.Column("day", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("pool", sa.String, nullable=False),
        sa.Column("against", sa.String, nullable=False),
        sa.Column("covered_s", sa.Double, nullable=False),
        sa.Column("energy_j", sa.Double, nullable=False),
        sa.Column("against_j", sa.Double, nullable=False),
        sa.Column("against_low_j", sa.Double, nullable=False),
        sa.Column("against_high_j", sa.Double, nullable=False),
        sa.Column("usd_per_kwh", sa.Double, nullable=False),
        sa.Column("g_per_kwh", sa.Double, nullable=False),
        sa.Column("computed_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("day", "model", "pool", "against", name="pk_saving_days"),
    )
    op.execute(SAVINGS_BY_DAY)


def downgrade() -> None:
    op.execute("DROP VIEW v_savings_by_day")
    for table in ("saving_days", "orders", "input_snapshots", "input_frames"):
        op.drop_table(table)
