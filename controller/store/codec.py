"""Between values and rows: `to_row` on the way in, `to_decision` and the others on the way out.

A row is a table's name and its columns as JSON scalars (times as epoch seconds), so that the same form can be
inserted, spooled to disk as one line, and inserted later.
"""

from __future__ import annotations

import base64
import bz2
import json
import math
import zlib
from dataclasses import asdict, dataclass
from typing import Any

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision, Json, SolverReport, canonical_json
from controller.domain.layout import Layout, PlannedInstance
from controller.domain.reasons import Level, Mode, Reason
from controller.store.frames import pack_frame
from controller.store.models import ChoiceModel, DecisionModel, DecisionOutcomeModel, NodeModel, OrderModel, PlanModel
from controller.store.records import (
    ActionRecord,
    ChoiceRecord,
    DecisionOutcome,
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

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Row:
    """One row for one table."""

    table: str
    values: dict[str, Scalar]


def to_row(record: Record) -> Row:
    """A number that is not finite (the gap of a solve that found nothing) becomes NULL: unknown, not zero.

    Raises ValueError or TypeError where a structured value has no JSON form.
    """
    row = _to_row(record)
    for name, value in row.values.items():
        if isinstance(value, float) and not math.isfinite(value):
            row.values[name] = None
    return row


def _to_row(record: Record) -> Row:
    match record:
        case Decision():
            return Row("decisions", _decision(record))
        case DecisionOutcome():
            return Row(
                "decision_outcomes",
                {
                    "term": record.term,
                    "number": record.number,
                    "measured_at": record.measured_at_s,
                    "window_s": record.window_s,
                    "power_w": record.power_w,
                    "energy_j": record.energy_j,
                    "load_rps": record.load_rps,
                    "slo_attainment": record.slo_attainment,
                    "ttft_p99_ms": record.ttft_p99_ms,
                    "token_gap_p99_ms": record.token_gap_p99_ms,
                    "detail": canonical_json(record.detail),
                },
            )
        case ActionRecord():
            return Row(
                "actions",
                {
                    "term": record.term,
                    "effect_id": record.effect_id,
                    "decision": record.decision,
                    "kind": record.kind.value,
                    "node_id": record.node_id,
                    "instance_id": record.instance_id,
                    "gpus": record.gpus,
                    "asked": canonical_json(record.asked),
                    "ok": record.ok,
                    "detail": record.detail,
                    "started_at": record.started_at_s,
                    "duration_s": record.duration_s,
                },
            )
        case TelemetryRow():
            return Row(
                "telemetry_minute",
                {
                    "term": record.term,
                    "window_start": record.window_start_s,
                    "window_s": record.window_s,
                    "node_id": record.node_id,
                    "gpu_uuid": record.gpu_uuid,
                    "state": record.state.value,
                    "pool": record.pool,
                    "instance_id": record.instance_id,
                    "seconds": record.seconds,
                    "energy_j": record.energy_j,
                    "energy_source": record.energy_source.value,
                    "mean_power_w": record.mean_power_w,
                    "mean_sm_mhz": record.mean_sm_mhz,
                },
            )
        case LoadRow():
            return Row(
                "load_minute",
                {
                    **_class_window(record),
                    "arrived": record.arrived,
                    "completed": record.completed,
                    "failed": record.failed,
                    "input_tokens": record.input_tokens,
                    "output_tokens": record.output_tokens,
                },
            )
        case SloRow():
            return Row(
                "slo_minute",
                {
                    **_class_window(record),
                    "requests": record.requests,
                    "in_slo": record.in_slo,
                    "ttft_p50_ms": record.ttft_p50_ms,
                    "ttft_p99_ms": record.ttft_p99_ms,
                    "token_gap_p50_ms": record.token_gap_p50_ms,
                    "token_gap_p99_ms": record.token_gap_p99_ms,
                },
            )
        case ForecastRow():
            values = asdict(record)
            return Row("forecasts", {**values, "window_start": values.pop("window_start_s")})
        case TransitionRow():
            return Row(
                "transitions",
                {
                    "term": record.term,
                    "transition_id": record.transition_id,
                    "decision": record.decision,
                    "model": record.model,
                    "pool": record.pool,
                    "reason": record.reason,
                    "started_at": record.started_at_s,
                    "duration_s": record.duration_s,
                    "completed": record.completed,
                    "starts": record.starts,
                    "stops": record.stops,
                    "layout_before": canonical_json(record.before),
                    "layout_after": canonical_json(record.after),
                },
            )
        case PlanRecord():
            return Row(
                "plans",
                {
                    "term": record.term,
                    "number": record.number,
                    "planned_at": record.planned_at_s,
                    "layout": canonical_json(_layout_json(record.layout)),
                    "pools": canonical_json(record.pools),
                },
            )
        case NodeRecord():
            return Row(
                "nodes",
                {
                    "node_id": record.node_id,
                    "seen_at": record.seen_at_s,
                    "gpus": record.gpus,
                    "address": record.address,
                    "detail": canonical_json(dict(record.detail)),
                },
            )
        case InputFrame():
            return Row(
                "input_frames",
                {
                    "term": record.term,
                    "number": record.number,
                    "began_at": record.began_at_s,
                    "ended_at": record.ended_at_s,
                    "events": record.events,
                    "body": pack_frame(record.lines),
                },
            )
        case InputSnapshot():
            return Row(
                "input_snapshots",
                {
                    "term": record.term,
                    "number": record.number,
                    "taken_at": record.taken_at_s,
                    "body": pack(record.text()),
                },
            )
        case OrderRecord():
            return Row(
                "orders",
                {
                    "term": record.term,
                    "number": record.number,
                    "ordered_at": record.ordered_at_s,
                    "kind": record.kind.value,
                    "scope": record.scope,
                    "value": record.value,
                    "until": record.until_s,
                    "who": record.who,
                    "why": record.why,
                },
            )
        case ChoiceRecord():
            return Row(
                "choices",
                {
                    "gateway_id": record.gateway_id,
                    "epoch": record.epoch,
                    "number": record.number,
                    "chosen_at": record.chosen_at_s,
                    "model": record.model,
                    "request_class": str(record.request_class),
                    "input_tokens": record.input_tokens,
                    "pool": record.pool,
                    "instance_id": record.instance_id,
                    "decided_by": record.decided_by,
                    "queue_ms": record.queue_ms,
                    "speaks_for": record.speaks_for,
                    "alternatives": canonical_json(list(record.alternatives)),
                },
            )
        case SavingRow():
            values = asdict(record)
            return Row("saving_days", {**values, "computed_at": values.pop("computed_at_s")})


_FORMAT = "2:"  # a colon is in no base64: without it a text is of the first format


def pack(text: str) -> str:
    """Text for a column that nobody reads by eye, in characters that every database and spool line takes. Numbers take
    bzip2 a third less than zlib, in the same time; frames have columns instead (controller/store/frames.py)."""
    return _FORMAT + base64.b85encode(bz2.compress(text.encode())).decode()


def unpack(body: str) -> str:
    """Of any format. Raises ValueError for what was never packed."""
    try:
        if not body.startswith(_FORMAT):
            return zlib.decompress(base64.b64decode(body, validate=True)).decode()
        return bz2.decompress(base64.b85decode(body.removeprefix(_FORMAT))).decode()
    except (ValueError, OSError, zlib.error) as error:
        raise ValueError(f"a packed column is damaged: {error}") from None


def to_line(row: Row) -> bytes:
    """The row as one line of a spool file."""
    return canonical_json({"table": row.table, "values": row.values}).encode() + b"\n"


def from_line(line: bytes) -> Row:
    """Raises ValueError for anything that `to_line` did not write."""
    try:
        value = json.loads(line)
        row = Row(value["table"], dict(value["values"]))
        if all(item is None or isinstance(item, Scalar) for item in (row.table, *row.values.values())):
            return row
        raise TypeError("only plain values have a place in a row")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a spooled row: {line[:80]!r}") from error


def to_decision(row: DecisionModel) -> Decision:
    solver = None
    if row.solver is not None:
        solver = SolverReport(
            solver=row.solver,
            status=row.solver_status or "",
            objective_w=_known(row.objective_w),
            bound_w=_known(row.bound_w),
            gap=_known(row.gap),
            solve_ms=_known(row.solve_ms),
            columns=row.solver_columns or 0,
        )
    return Decision(
        term=row.term,
        number=row.number,
        decided_at_s=row.decided_at,
        level=Level(row.level),
        scope=row.scope,
        trigger=row.trigger,
        mode=Mode(row.mode),
        reason=Reason(row.reason),
        sentence=row.sentence,
        inputs=_object(row.inputs),
        outcome=_object(row.outcome),
        alternatives=tuple(json.loads(row.alternatives)),
        predicted_power_w=row.predicted_power_w,
        predicted_slo_margin=row.predicted_slo_margin,
        solver=solver,
        parent=row.parent,
        effects=tuple(json.loads(row.effects)),
    )


def to_decision_outcome(row: DecisionOutcomeModel) -> DecisionOutcome:
    return DecisionOutcome(
        term=row.term,
        number=row.number,
        measured_at_s=row.measured_at,
        window_s=row.window_s,
        power_w=row.power_w,
        energy_j=row.energy_j,
        load_rps=row.load_rps,
        slo_attainment=row.slo_attainment,
        ttft_p99_ms=row.ttft_p99_ms,
        token_gap_p99_ms=row.token_gap_p99_ms,
        detail=_object(row.detail),
    )


def to_plan(row: PlanModel) -> PlanRecord:
    return PlanRecord(
        term=row.term,
        number=row.number,
        planned_at_s=row.planned_at,
        layout=Layout(
            tuple(
                PlannedInstance(
                    instance_id=item["instance_id"],
                    pool=item["pool"],
                    model=item["model"],
                    node_id=item["node_id"],
                    gpu_uuids=tuple(item["gpu_uuids"]),
                )
                for item in json.loads(row.layout)
            )
        ),
        pools=_object(row.pools),
    )


def to_choice(row: ChoiceModel) -> ChoiceRecord:
    return ChoiceRecord(
        gateway_id=row.gateway_id,
        epoch=row.epoch,
        number=row.number,
        chosen_at_s=row.chosen_at,
        model=row.model,
        request_class=RequestClass.parse(row.request_class),
        input_tokens=row.input_tokens,
        pool=row.pool,
        instance_id=row.instance_id,
        decided_by=row.decided_by,
        queue_ms=row.queue_ms,
        speaks_for=row.speaks_for,
        alternatives=tuple(json.loads(row.alternatives)),
    )


def to_order(row: OrderModel) -> OrderRecord:
    return OrderRecord(
        row.term, row.number, row.ordered_at, OrderKind(row.kind), row.scope, row.value, row.who, row.why, row.until
    )


def to_node(row: NodeModel) -> NodeRecord:
    return NodeRecord(
        node_id=row.node_id, seen_at_s=row.seen_at, gpus=row.gpus, address=row.address, detail=_object(row.detail)
    )


def _decision(decision: Decision) -> dict[str, Scalar]:
    solver = decision.solver
    return {
        "term": decision.term,
        "number": decision.number,
        "decided_at": decision.decided_at_s,
        "level": decision.level.value,
        "scope": decision.scope,
        "trigger": decision.trigger,
        "mode": decision.mode.value,
        "reason": decision.reason.value,
        "sentence": decision.sentence,
        "inputs": canonical_json(decision.inputs),
        "alternatives": canonical_json(decision.alternatives),
        "outcome": canonical_json(decision.outcome),
        "effects": canonical_json(decision.effects),
        "predicted_power_w": decision.predicted_power_w,
        "predicted_slo_margin": decision.predicted_slo_margin,
        "solver": solver.solver if solver else None,
        "solver_status": solver.status if solver else None,
        "objective_w": solver.objective_w if solver else None,
        "bound_w": solver.bound_w if solver else None,
        "gap": solver.gap if solver else None,
        "solve_ms": solver.solve_ms if solver else None,
        "solver_columns": solver.columns if solver else None,
        "parent": decision.parent,
    }


def _class_window(record: LoadRow | SloRow) -> dict[str, Scalar]:
    return {
        "term": record.term,
        "window_start": record.window_start_s,
        "window_s": record.window_s,
        "model": record.model,
        "request_class": str(record.request_class),
    }


def _layout_json(layout: Layout) -> list[dict[str, Any]]:
    return [
        {
            "instance_id": instance.instance_id,
            "pool": instance.pool,
            "model": instance.model,
            "node_id": instance.node_id,
            "gpu_uuids": list(instance.gpu_uuids),
        }
        for instance in layout.instances
    ]


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _object(text: str) -> Json:
    value: Json = json.loads(text)
    return value
