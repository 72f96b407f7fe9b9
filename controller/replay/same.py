"""`dynamollm replay`: makes the recorded decisions again and compares them byte for byte.

The solver solves again too. Where it gives another answer than it did (another version, or a limit of time that was
hit) that is reported, and the stored answer is taken, so that what follows is judged on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from sqlalchemy import Engine, select

from controller.domain.decision import Decision, canonical_json
from controller.domain.reasons import Level
from controller.fleet.port import EffectDone
from controller.loop.core import Core
from controller.loop.orders import Order
from controller.policy.milp.plan import plan_for
from controller.policy.milp.problem import PartitionResult, PlanSolution
from controller.replay.inputs import Reader, Stretch, Told, core_of, solution_of, stretches
from controller.store.codec import to_decision, to_row
from controller.store.engine import reading
from controller.store.models import DecisionModel


@dataclass(frozen=True, slots=True)
class Difference:
    """A decision that came out otherwise, or only on one side. The fields that differ, as (recorded, replayed)."""

    term: int
    number: int
    fields: dict[str, tuple[str, str]]


@dataclass(slots=True)
class Report:
    """What became of a replay."""

    identical: int = 0
    bytes: int = 0
    by_level: dict[str, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    without_inputs: int = 0  # recorded decisions of the span whose inputs are not there
    solved_again: int = 0
    solver_differs: int = 0
    stretches: int = 0

    @property
    def ok(self) -> bool:
        return not self.differences and not self.solver_differs


def replay(engine: Engine, since_s: float, until_s: float) -> Report:
    """Raises UserError where inputs cannot be read, StoreUnavailable when the database fails."""
    report = Report()
    recorded = _recorded(engine, since_s, until_s)
    for stretch in stretches(engine, since_s, until_s):
        report.stretches += 1
        for decision in decisions_of(engine, stretch, report):
            if not since_s <= decision.decided_at_s < until_s:
                continue
            _compare(report, decision, recorded.pop((decision.term, decision.number), None))
    report.without_inputs = len(recorded)
    return report


def decisions_of(engine: Engine, stretch: Stretch, report: Report) -> Iterator[Decision]:
    """The decisions that follow from a stretch's events."""
    core = core_of(engine, stretch)
    reader = Reader(core)
    for frame in stretch.frames:
        for told in reader.events(frame):
            event = told.event
            if isinstance(event, Order):
                yield from core.order(told.now, event).decisions
                continue
            if isinstance(event, EffectDone) and told.solution is not None:
                event = replace(event, solution=_solved_again(core, event, told, report))
            yield from core.handle(told.now, event).decisions


def _solved_again(core: Core, event: EffectDone, told: Told, report: Report) -> PlanSolution | None:
    pending = core.state.solving.get(event.effect_id)
    if pending is None:  # the replay asked for no such solve: the decisions will show it
        return None
    stored = solution_of(told, pending.problem)
    assert stored is not None
    report.solved_again += 1
    again = plan_for(pending.problem, stored.solver or None)
    if _untimed(again) != _untimed(stored):
        report.solver_differs += 1
    return stored


def _untimed(solution: PlanSolution) -> PlanSolution:
    """How long it took is measured, not decided."""

    def strip(result: PartitionResult) -> PartitionResult:
        return replace(result, solve_ms=0.0)

    return replace(
        solution,
        chosen=None if solution.chosen is None else strip(solution.chosen),
        rejected=tuple(strip(result) for result in solution.rejected),
    )


def _recorded(engine: Engine, since_s: float, until_s: float) -> dict[tuple[int, int], Decision]:
    row = DecisionModel
    query = select(row).where(row.decided_at >= since_s, row.decided_at < until_s)
    with reading(engine) as session:
        return {(found.term, found.number): to_decision(found) for found in session.scalars(query)}


def _compare(report: Report, again: Decision, recorded: Decision | None) -> None:
    new = _row(again)
    if recorded is None:
        report.differences.append(Difference(again.term, again.number, {"decision": ("not recorded", again.sentence)}))
        return
    old = _row(recorded)
    if old == new:
        report.identical += 1
        report.bytes += len(canonical_json(new))
        level = again.level.value
        report.by_level[level] = report.by_level.get(level, 0) + 1
        return
    fields = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    report.differences.append(Difference(again.term, again.number, fields))


def _row(decision: Decision) -> dict[str, str]:
    """The bytes of each column. Databases keep times to the microsecond."""
    at = datetime.fromtimestamp(decision.decided_at_s, tz=UTC)
    values = to_row(replace(decision, decided_at_s=at.timestamp())).values
    return {name: canonical_json(value) for name, value in values.items()}


def levels(report: Report) -> str:
    """For people: "3 cluster, 12 pool, 240 instance"."""
    return ", ".join(f"{report.by_level[level]} {level}" for level in map(str, Level) if report.by_level.get(level))
