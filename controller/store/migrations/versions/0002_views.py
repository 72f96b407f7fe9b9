"""The views for people. Their SQL is the same on both databases but for the rounding of times.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# {hour(x)}: the hour that a time lies in, as text "2026-03-01 14:00" (UTC) on both databases, so that the same
# query works on both. {age(x)}: seconds since then.
HOUR = {
    "sqlite": "strftime('%Y-%m-%d %H:00', {0})",
    "postgresql": "to_char({0} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:00')",
}
AGE_S = {
    "sqlite": "(julianday('now') - julianday({0})) * 86400.0",
    "postgresql": "CAST(extract(epoch FROM now() - {0}) AS double precision)",
}

# Energy of every GPU by what it was doing; a GPU of no pool stands under '-'. Time whose energy nobody measured is
# not counted as zero joules: it stands in unmeasured_gpu_hours.
ENERGY_BY_POOL_HOUR = """
CREATE VIEW v_energy_by_pool_hour AS
SELECT
    {hour_window_start} AS hour,
    CASE WHEN pool = '' THEN '-' ELSE pool END AS pool,
    SUM(seconds) / 3600.0 AS gpu_hours,
    COALESCE(SUM(energy_j), 0) / 3.6e6 AS energy_kwh,
    COALESCE(SUM(CASE WHEN state = 'serving' THEN energy_j END), 0) / 3.6e6 AS serving_kwh,
    COALESCE(SUM(CASE WHEN state = 'idle' THEN energy_j END), 0) / 3.6e6 AS idle_kwh,
    COALESCE(SUM(CASE WHEN state = 'loading' THEN energy_j END), 0) / 3.6e6 AS loading_kwh,
    COALESCE(SUM(CASE WHEN state = 'draining' THEN energy_j END), 0) / 3.6e6 AS draining_kwh,
    COALESCE(SUM(CASE WHEN state IN ('parked', 'asleep') THEN energy_j END), 0) / 3.6e6 AS parked_kwh,
    SUM(energy_j) / NULLIF(SUM(CASE WHEN energy_j IS NOT NULL THEN seconds END), 0) AS mean_gpu_power_w,
    COALESCE(SUM(CASE WHEN energy_j IS NULL THEN seconds END), 0) / 3600.0 AS unmeasured_gpu_hours
FROM telemetry_minute
GROUP BY {hour_window_start}, CASE WHEN pool = '' THEN '-' ELSE pool END
"""

DECISIONS = """
CREATE VIEW v_decisions AS
SELECT
    d.id,
    d.decided_at,
    {age_decided_at} AS age_s,
    d.level,
    d.scope,
    d.trigger,
    d.mode,
    d.reason,
    d.sentence,
    d.predicted_power_w,
    o.power_w AS realised_power_w,
    o.power_w - d.predicted_power_w AS power_error_w,
    d.predicted_slo_margin,
    o.slo_attainment,
    o.ttft_p99_ms,
    d.solver,
    d.solver_status,
    d.gap,
    d.solve_ms,
    d.term,
    d.number,
    d.parent
FROM decisions d
LEFT JOIN decision_outcomes o ON o.term = d.term AND o.number = d.number
"""

# A P99 of an hour cannot be made of the P99s of its minutes; the worst minute can be named.
SLO_BY_CLASS_HOUR = """
CREATE VIEW v_slo_by_class_hour AS
SELECT
    {hour_window_start} AS hour,
    model,
    request_class,
    CAST(SUM(requests) AS BIGINT) AS requests,
    CAST(SUM(in_slo) AS BIGINT) AS in_slo,
    CAST(SUM(in_slo) AS DOUBLE PRECISION) / NULLIF(SUM(requests), 0) AS attainment,
    MAX(ttft_p99_ms) AS worst_ttft_p99_ms,
    MAX(token_gap_p99_ms) AS worst_token_gap_p99_ms
FROM slo_minute
GROUP BY {hour_window_start}, model, request_class
"""

LOAD_BY_CLASS_HOUR = """
CREATE VIEW v_load_by_class_hour AS
SELECT
    {hour_window_start} AS hour,
    model,
    request_class,
    CAST(SUM(arrived) AS BIGINT) AS arrived,
    CAST(SUM(completed) AS BIGINT) AS completed,
    CAST(SUM(failed) AS BIGINT) AS failed,
    CAST(SUM(input_tokens) AS BIGINT) AS input_tokens,
    CAST(SUM(output_tokens) AS BIGINT) AS output_tokens
FROM load_minute
GROUP BY {hour_window_start}, model, request_class
"""

# What starting, draining and stopping instances took, by size. The joules are those of the instance's GPUs while
# loading (starts) or draining (drains), where telemetry measured them.
SWITCHING_COSTS = """
CREATE VIEW v_switching_costs AS
SELECT
    a.kind,
    a.gpus,
    COUNT(*) AS actions,
    SUM(CASE WHEN a.ok THEN 0 ELSE 1 END) AS failed,
    AVG(CASE WHEN a.ok THEN a.duration_s END) AS mean_s,
    MAX(CASE WHEN a.ok THEN a.duration_s END) AS worst_s,
    SUM(a.gpus * a.duration_s) AS gpu_seconds,
    AVG(e.energy_j) AS mean_energy_j
FROM actions a
LEFT JOIN (
    SELECT instance_id, state, SUM(energy_j) AS energy_j
    FROM telemetry_minute
    WHERE state IN ('loading', 'draining') AND instance_id <> ''
    GROUP BY instance_id, state
) e
    ON e.instance_id = a.instance_id
    AND e.state = CASE a.kind WHEN 'start_instance' THEN 'loading' WHEN 'drain_instance' THEN 'draining' END
WHERE a.kind IN ('start_instance', 'drain_instance', 'stop_instance')
GROUP BY a.kind, a.gpus
"""

VIEWS = {
    "v_energy_by_pool_hour": ENERGY_BY_POOL_HOUR,
    "v_decisions": DECISIONS,
    "v_load_by_class_hour": LOAD_BY_CLASS_HOUR,
    "v_slo_by_class_hour": SLO_BY_CLASS_HOUR,
    "v_switching_costs": SWITCHING_COSTS,
}


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    for sql in VIEWS.values():
        op.execute(
            sql.format(
                hour_window_start=HOUR[dialect].format("window_start"),
                age_decided_at=AGE_S[dialect].format("d.decided_at"),
            )
        )


def downgrade() -> None:
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
