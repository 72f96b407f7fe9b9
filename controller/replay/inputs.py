"""Reads the inputs of a span of history: snapshots and frames, and the events in them.

A term's events begin at a snapshot and go on frame by frame; where a frame is missing (a database that was down for
longer than the spool holds) the stretch ends and the next one begins at the next snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Engine, select

from common.errors import UserError
from common.typed_json import decode
from controller.domain.reasons import Level
from controller.fleet.port import EffectDone, Event, LoadObservation, LoadSeen, NodeObservation, NodeSeen, Tick
from controller.loop.core import Core
from controller.loop.journal import (
    load_from_line,
    node_from_json,
    observed_at,
    solution_from_json,
    with_live,
)
from controller.loop.orders import ORDERS, Order
from controller.loop.settings import LoopSettings
from controller.loop.snapshot import restore, settings_of
from controller.loop.state import Instant
from controller.policy.milp.problem import PlanProblem, PlanSolution
from controller.profile.table import Profile
from controller.store.codec import unpack
from controller.store.engine import reading
from controller.store.frames import frame_lines
from controller.store.models import InputFrameModel, InputSnapshotModel
from controller.store.repositories import get_profile


@dataclass(frozen=True, slots=True)
class Frame:
    number: int
    began_at_s: float
    ended_at_s: float
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Frames without a gap, from a snapshot on."""

    term: int
    taken_at_s: float
    snapshot: Mapping[str, Any]
    frames: tuple[Frame, ...]

    @property
    def ended_at_s(self) -> float:
        return self.frames[-1].ended_at_s if self.frames else self.taken_at_s


def stretches(engine: Engine, since_s: float, until_s: float) -> list[Stretch]:
    """Every stretch that reaches into [since, until), each from the last snapshot before it. Raises UserError."""
    frame, snapshot = InputFrameModel, InputSnapshotModel
    found: list[Stretch] = []
    with reading(engine) as session:
        terms = session.scalars(
            select(frame.term)
            .where(frame.ended_at >= since_s, frame.began_at < until_s)
            .group_by(frame.term)
            .order_by(frame.term)
        ).all()
        for term in terms:
            starts = session.execute(
                select(snapshot.number, snapshot.taken_at).where(snapshot.term == term).order_by(snapshot.number)
            ).all()
            earlier = [number for number, taken_s in starts if taken_s <= since_s]
            first = earlier[-1] if earlier else (starts[0][0] if starts else None)
            if first is None:
                continue
            begins = {number for number, _ in starts if number >= first}
            run: list[Frame] = []
            start = first
            for row in session.scalars(
                select(frame)
                .where(frame.term == term, frame.number >= first, frame.began_at < until_s)
                .order_by(frame.number)
            ):
                expected = run[-1].number + 1 if run else start
                if row.number != expected:
                    if run:
                        found.append(_stretch(session, term, start, run))
                    run = []
                    if row.number not in begins:
                        start = -1
                        continue
                    start = row.number
                run.append(Frame(row.number, row.began_at, row.ended_at, _lines(row)))
            if run:
                found.append(_stretch(session, term, start, run))
    return [stretch for stretch in found if stretch.ended_at_s >= since_s]


def _lines(row: InputFrameModel) -> tuple[str, ...]:
    try:
        return frame_lines(row.body)
    except ValueError as error:
        raise UserError(
            f"frame {row.number} of term {row.term} cannot be read: {error}.",
            "Replay with the version that wrote it, or name a time without it with --from and --to.",
        ) from None


def _stretch(session: Any, term: int, number: int, frames: list[Frame]) -> Stretch:
    row = session.scalars(
        select(InputSnapshotModel).where(InputSnapshotModel.term == term, InputSnapshotModel.number == number)
    ).one()
    return Stretch(term, row.taken_at, json.loads(unpack(row.body)), tuple(frames))


def core_of(engine: Engine, stretch: Stretch, settings: LoopSettings | None = None) -> Core:
    """A core as it stood at the stretch's snapshot; `settings` are another policy's. Raises UserError."""
    checksum = stretch.snapshot["profile"]
    text = get_profile(engine, checksum)
    if text is None:
        raise UserError(f"the profile {checksum[:12]} that was planned with is not in the history.")
    try:
        wanted = settings or settings_of(dict(stretch.snapshot))
        core = Core(wanted, Profile.from_json(text), stretch.term, stretch.snapshot["expected_nodes"])
        restore(core.state, dict(stretch.snapshot))
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"the inputs of term {stretch.term} cannot be read: {error}.",
            "Another version of the program wrote them: replay with that version.",
        ) from None
    return core


@dataclass(frozen=True, slots=True)
class Told:
    """One event as it was told. `solution` is the stored answer of the solver, to be read against its problem."""

    now: Instant
    event: Event | Order
    solution: Any = None


class Reader:
    """Turns a stretch's lines back into events; it remembers what lines only differ from."""

    def __init__(self, core: Core) -> None:
        self._nodes: dict[str, NodeObservation] = dict(core.state.nodes)
        self._reports: dict[str, LoadObservation] = dict(core.state.load.last_reports)

    def events(self, frame: Frame) -> Iterator[Told]:
        """Raises UserError for a line that cannot be read."""
        for line in frame.lines:
            if not line:
                continue
            try:
                yield from self._of(json.loads(line))
            except (ValueError, TypeError, LookupError) as error:
                raise UserError(
                    f"frame {frame.number}: a line cannot be read: {error!r}.",
                    "Another version of the program wrote it: replay with that version.",
                ) from None

    def _of(self, line: list[Any]) -> Iterator[Told]:
        kind = line[0]
        if kind == "b":
            yield from self._batch(*line[1:])
            return
        now = Instant(line[1], line[2])
        match kind:
            case "t":
                yield Told(now, Tick(Level(line[3]), early=len(line) > 4))
            case "l":
                report = load_from_line(line[3], self._reports.get(line[3][0]))
                self._reports[report.gateway_id] = report
                yield Told(now, LoadSeen(report))
            case "n":
                seen = node_from_json(line[3])
                self._nodes[seen.node_id] = seen
                yield Told(now, NodeSeen(seen))
            case "d":
                yield Told(now, EffectDone(line[3], line[4], line[5]), line[6])
            case "o":
                yield Told(now, decode(ORDERS[line[3]], line[4]))
            case _:
                raise ValueError(f"unknown kind of line {kind!r}")

    def _batch(self, base_s: float, ages: list[Any], live: dict[str, list[list[float | None]]]) -> Iterator[Told]:
        for index, (node_id, age) in enumerate(zip(list(self._nodes), ages, strict=True)):
            if age is None:
                continue
            seen = replace(self._nodes[node_id], observed_at_s=observed_at(base_s, age))
            if str(index) in live:
                seen = with_live(seen, live[str(index)])
            self._nodes[node_id] = seen
            # Nothing is decided on it, so no wall time was kept.
            yield Told(Instant(seen.observed_at_s, 0.0), NodeSeen(seen))


def solution_of(told: Told, problem: PlanProblem) -> PlanSolution | None:
    return None if told.solution is None else solution_from_json(told.solution, problem)
