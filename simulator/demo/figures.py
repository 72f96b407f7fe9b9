"""What one phase of the demonstration came to, as values: requests, latencies, energy, decisions. Pure but for reads.

Every figure is computed from what was measured in that phase: the client's result file, the watch's energy entries,
the controller's database. SLO and window follow the rules that docs/physics.md and the report state.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlalchemy import select

from common.latency import BucketBound, LatencySummary, quantile, summarise
from common.loadgen import Status
from controller.domain.classes import Bucket, ClassScheme
from controller.domain.reasons import Level
from controller.domain.slo import Slo
from controller.store.codec import to_plan
from controller.store.engine import open_engine, reading
from controller.store.models import ActionModel, PlanModel
from controller.store.records import ActionKind
from controller.store.repositories import count_decisions
from simulator.demo.client import Answered
from simulator.demo.load import Load
from simulator.demo.watch import EnergyFigures

# A bucket of fewer requests cannot be told from another at 99 %: it is judged together with the rest.
LEAST_JUDGED = 100


@dataclass(frozen=True)
class LoadFigures:
    """How the requests fared. Counts are of all that were sent; latencies and SLO of those in the window."""

    sent: int
    by_status: Mapping[str, int]
    in_window: int
    buckets: Sequence[LatencySummary]  # by the engine's stamps: per input bucket, then "all"
    client_buckets: Sequence[LatencySummary]  # the same by the client's clock
    overhead_p50_ms: float | None  # received minus stamped, per token
    overhead_p99_ms: float | None
    sent_late_p99_ms: float | None  # the client itself was behind
    problems: Sequence[str]  # the first few requests that were not served, in words

    @property
    def served(self) -> int:
        return self.by_status.get(Status.SERVED.value, 0)

    @property
    def lost(self) -> int:
        """Every request without its complete answer, for whatever reason."""
        return self.sent - self.served

    @property
    def attainment(self) -> float:
        """Share of the window's requests that were in SLO."""
        return self.buckets[-1].in_slo or 0.0


def load_figures(answers: Sequence[Answered], load: Load, slo: Slo) -> LoadFigures:
    window = [answer for answer in answers if load.in_window(answer.arrival_s)]
    bounds = _bounds(ClassScheme(), slo)
    lags = sorted(lag for answer in window for lag in answer.lags_s)
    late = sorted(answer.sent_late_s for answer in answers)
    return LoadFigures(
        sent=len(answers),
        by_status=dict(Counter(answer.status.value for answer in answers)),
        in_window=len(window),
        buckets=summarise((answer.latency() for answer in window), bounds, slo.tbt_ms),
        client_buckets=summarise((answer.latency(by_stamps=False) for answer in window), bounds, slo.tbt_ms),
        overhead_p50_ms=_ms(quantile(lags, 0.5)),
        overhead_p99_ms=_ms(quantile(lags, 0.99)),
        sent_late_p99_ms=_ms(quantile(late, 0.99)),
        problems=[
            f"{answer.status.value}: {answer.detail[:160]}" for answer in answers if answer.status is not Status.SERVED
        ][:3],
    )


def missed(figures: LoadFigures, slo: Slo) -> list[str]:
    """What of the SLO was missed, in words; empty when all of it was met.

    Each input bucket of at least `LEAST_JUDGED` requests is judged by itself, and all requests together.
    """
    found = []
    for bucket in figures.buckets:
        if bucket.name != "all" and bucket.requests < LEAST_JUDGED:
            continue
        if bucket.in_slo is not None and bucket.in_slo < slo.attainment:
            found.append(f"{bucket.name}: {bucket.in_slo:.1%} of requests in SLO")
        if bucket.gap_p99_ms is not None and bucket.gap_p99_ms > slo.token_gap_p99_ms:
            found.append(f"{bucket.name}: P99 of token gaps {bucket.gap_p99_ms:.0f} ms")
    return found


def _bounds(scheme: ClassScheme, slo: Slo) -> list[BucketBound]:
    starts = {Bucket.S: 0, Bucket.M: scheme.input_cuts_tokens[0], Bucket.L: scheme.input_cuts_tokens[1]}
    return [BucketBound(bucket.value, start, slo.ttft_ms(bucket)) for bucket, start in starts.items()]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


@dataclass(frozen=True)
class ControlFigures:
    """What the controller did, as its database tells."""

    decisions: Mapping[str, int]  # by level
    clock_locks_applied: int  # a GPU given another locked clock; renewals do not count
    switches: int  # changes of the wanted layout after the first one
    starts: int  # instances
    stops: int


def control_figures(database: Path) -> ControlFigures:
    engine = open_engine(f"sqlite:///{database}")
    try:
        decisions = count_decisions(engine)
        with reading(engine) as session:
            actions = session.execute(
                select(ActionModel.kind, ActionModel.asked)
                .where(ActionModel.ok)
                .order_by(ActionModel.started_at, ActionModel.id)
            ).all()
            plans = [
                to_plan(row) for row in session.scalars(select(PlanModel).order_by(PlanModel.term, PlanModel.number))
            ]
    finally:
        engine.dispose()
    kinds = Counter(kind for kind, _ in actions)
    layouts = [plan.layout.counts() for plan in plans]
    return ControlFigures(
        decisions={level.value: decisions[level] for level in Level},
        clock_locks_applied=_locks(actions),
        switches=sum(now != before for before, now in pairwise(layouts)),
        starts=kinds[ActionKind.START_INSTANCE.value],
        stops=kinds[ActionKind.STOP_INSTANCE.value],
    )


def _locks(actions: Sequence[Any]) -> int:
    """How often a GPU got a locked clock other than the one before."""
    locked: dict[str, int] = {}
    count = 0
    for kind, asked_json in actions:
        asked = json.loads(asked_json)
        if kind == ActionKind.APPLY_CLOCKS.value:
            for target in asked["targets"]:
                for uuid in target["gpu_uuids"]:
                    count += locked.get(uuid) != target["mhz"]
                    locked[uuid] = target["mhz"]
        elif kind == ActionKind.RELEASE_CLOCKS.value:
            for uuid in asked["gpu_uuids"]:
                locked.pop(uuid, None)
    return count


@dataclass(frozen=True)
class PhaseFigures:
    """One fleet under the load."""

    name: str
    load: LoadFigures
    energy: EnergyFigures
    control: ControlFigures
    timeline: Sequence[Mapping[int, int]]  # ready instances by TP, evenly over the window
    restarts: Mapping[str, int]
    slo_missed: Sequence[str]
    database: Path
