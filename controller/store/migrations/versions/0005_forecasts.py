"""Forecasts of pools' load beside what came.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# The day that a time lies in, as text "2026-03-01" (UTC) on both databases, so that the same query works on both.
DAY = {
    "sqlite": "strftime('%Y-%m-%d', window_start)",
    "postgresql": "to_char(window_start AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
}

# Errors over the mean load, so that a quiet night does not count as much as a busy noon; NULL where nothing came.
FORECAST_BY_POOL_DAY = """
CREATE VIEW v_forecast_by_pool_day AS
SELECT
    {day} AS day,
    model,
    pool,
    COUNT(*) AS forecasts,
    AVG(arrived_rps) AS mean_arrived_rps,
    AVG(ABS(forecast_rps - arrived_rps)) / NULLIF(AVG(arrived_rps), 0) AS error_ratio,
    AVG(ABS(plain_forecast_rps - arrived_rps)) / NULLIF(AVG(arrived_rps), 0) AS plain_error_ratio,
    AVG(forecast_rps - arrived_rps) / NULLIF(AVG(arrived_rps), 0) AS bias_ratio,
    AVG(CAST(CASE WHEN arrived_rps > quantile_rps THEN 1 ELSE 0 END AS DOUBLE PRECISION)) AS exceeded_ratio,
    AVG(CAST(CASE WHEN arrived_rps > plain_quantile_rps THEN 1 ELSE 0 END AS DOUBLE PRECISION)) AS plain_exceeded_ratio,
    CAST(SUM(CASE WHEN forecast_rps > plain_forecast_rps THEN 1 ELSE 0 END) AS BIGINT) AS raised_by_week
FROM forecasts
GROUP BY {day}, model, pool
"""


def upgrade() -> None:
    op.create_table(
        "forecasts",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("window_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("window_s", sa.Double, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("pool", sa.String, nullable=False),
        sa.Column("forecast_rps", sa.Double, nullable=False),
        sa.Column("quantile_rps", sa.Double, nullable=False),
        sa.Column("plain_forecast_rps", sa.Double, nullable=False),
        sa.Column("plain_quantile_rps", sa.Double, nullable=False),
        sa.Column("arrived_rps", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_forecasts"),
        sa.UniqueConstraint("term", "window_start", "model", "pool", name="uq_forecasts"),
    )
    op.create_index("ix_forecasts_window_start", "forecasts", ["window_start"])
    op.execute(FORECAST_BY_POOL_DAY.format(day=DAY[op.get_bind().dialect.name]))


def downgrade() -> None:
    op.execute("DROP VIEW v_forecast_by_pool_day")
    op.drop_table("forecasts")
