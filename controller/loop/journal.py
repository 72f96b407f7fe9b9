"""The journal: everything the core was told, written so that the same decisions can be made of it again.

`JournaledCore` is the core with a pen: it writes each event before the core answers it. Lines are gathered into one
frame per pool tick; at times a snapshot of the whole state goes before a frame, where a replay may begin
(controller/replay/). An open frame also goes to a file, so that a SIGKILL loses none of the inputs of a decision
that was recorded.

Only changes are written. Of an observation that changes no instance's state, only the last one before something is
decided counts, and only in what differs; GPU readings (power, energy, clocks) are history of their own
(telemetry_minute) and no input of any decision. The end of an effect that nobody waits for changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from common.logs import get_logger
from common.typed_json import decode, encode
from controller.domain.classes import RequestClass
from controller.domain.reasons import Level
from controller.fleet.port import (
    ClassCounters,
    EffectDone,
    Event,
    GpuObservation,
    InstanceObservation,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    QueueObservation,
    Tick,
)
from controller.loop.core import Core, Step
from controller.loop.orders import Order
from controller.loop.snapshot import take
from controller.loop.state import Instant
from controller.policy.milp.problem import Column, PartitionResult, PlanProblem, PlanSolution
from controller.store.records import InputFrame, InputSnapshot, Record

_log = get_logger(__name__)

SNAPSHOT_EVERY = 24  # frames: two hours of five minutes
_Live = tuple[tuple[float | None, float | None, float | None], ...]


class JournaledCore(Core):
    """A core whose inputs are kept. `record` takes finished frames and snapshots; it must neither block nor raise.

    `open_frame` is the file of the frame that is being written; None keeps it in memory only.
    """

    def keep_journal(self, record: Callable[[Record], None], open_frame: Path | None = None) -> None:
        """Begins the journal; to be called once, before the first event."""
        self._journal = Journal(self, record, open_frame)

    def handle(self, now: Instant, event: Event) -> Step:
        self._journal.before(now, event)
        step = super().handle(now, event)
        if isinstance(event, Tick) and event.level is Level.POOL:
            self._journal.close_frame(now)
        return step

    def order(self, now: Instant, order: Order) -> Step:
        self._journal.before(now, order)
        return super().order(now, order)

    def close_journal(self, now: Instant) -> None:
        """Ends the frame that is open: at an orderly end."""
        self._journal.close_frame(now, last=True)


class Journal:
    """Writes what the core is about to be told."""

    def __init__(self, core: Core, record: Callable[[Record], None], open_frame: Path | None) -> None:
        self._core = core
        self._record = record
        self._path = open_frame
        self._file: IO[str] | None = None
        self._number = 0
        self._lines: list[str] = []
        self._began_s: float | None = None
        self._events = 0
        self._told: dict[str, NodeObservation] = {}  # as a replay knows each node
        self._waiting: dict[str, NodeObservation] = {}  # seen since, and not yet of any consequence
        self._reports: dict[str, LoadObservation] = {}

    def before(self, now: Instant, event: Event | Order) -> None:
        if self._began_s is None:
            self._open(now)
        self._events += 1
        match event:
            case NodeSeen(seen):
                self._node(now, seen)
            case LoadSeen(report):
                self._write(["l", now.monotonic_s, now.wall_s, load_line(report, self._reports.get(report.gateway_id))])
                self._reports[report.gateway_id] = report
            case EffectDone():
                state = self._core.state
                pending = state.solving.get(event.effect_id)
                awaited = pending or event.effect_id in state.acting or event.effect_id in state.capping
                if not awaited and all(node.effect_id != event.effect_id for node in state.powered.values()):
                    return  # nobody waits for it
                solution = solution_json(event.solution, pending.problem) if pending and event.solution else None
                self._catch_up()
                done = [event.effect_id, event.ok, event.detail, solution]
                self._write(["d", now.monotonic_s, now.wall_s, *done])
            case Tick():
                self._catch_up(now)
                early = [1] if event.early else []
                self._write(["t", now.monotonic_s, now.wall_s, event.level.value, *early])
            case _:
                self._catch_up()
                self._write(["o", now.monotonic_s, now.wall_s, type(event).__name__, encode(type(event), event)])
        if not isinstance(event, LoadSeen):
            self._flush()

    def close_frame(self, now: Instant, last: bool = False) -> None:
        if self._began_s is None:
            return
        self._catch_up()
        self._record(
            InputFrame(self._core.state.term, self._number, self._began_s, now.wall_s, self._events, tuple(self._lines))
        )
        if self._file is not None:
            self._file.close()
            self._file = None
        self._began_s = None
        if last and self._path is not None:
            self._path.unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------- one frame

    def _open(self, now: Instant) -> None:
        self._number += 1
        self._began_s, self._events, self._lines = now.wall_s, 0, []
        state = self._core.state
        if self._number % SNAPSHOT_EVERY == 1:
            self._record(InputSnapshot(state.term, self._number, now.wall_s, take(state, state.expected_nodes)))
        if self._path is not None:
            with suppress(OSError):  # without the file a SIGKILL loses the frame; control goes on
                self._file = self._path.open("w", encoding="utf-8")
                self._file.write(json.dumps([state.term, self._number, now.wall_s]) + "\n")

    def _write(self, line: list[Any]) -> None:
        text = json.dumps(line, separators=(",", ":"), ensure_ascii=True)
        self._lines.append(text)
        if self._file is not None:
            with suppress(OSError):
                self._file.write(text + "\n")

    def _flush(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.flush()

    # ---------------------------------------------------------------------------------------------- observations

    def _node(self, now: Instant, seen: NodeObservation) -> None:
        before = self._waiting.get(seen.node_id) or self._told.get(seen.node_id)
        if before is not None and same_structure(before, seen):
            self._waiting[seen.node_id] = seen
            return
        self._catch_up()
        self._told[seen.node_id] = seen
        self._write(["n", now.monotonic_s, now.wall_s, node_json(seen)])

    def _catch_up(self, now: Instant | None = None) -> None:
        """Writes what nodes have shown since the last line, in one line."""
        if not self._waiting:
            return
        base_s = now.monotonic_s if now else max(seen.observed_at_s for seen in self._waiting.values())
        order = {node_id: index for index, node_id in enumerate(self._told)}
        ages: list[int | list[float] | None] = [None] * len(order)
        live: dict[str, list[list[float | None]]] = {}
        for node_id, seen in self._waiting.items():
            index = order[node_id]
            ages[index] = _age(base_s, seen.observed_at_s)
            values = live_values(seen)
            if values != live_values(self._told[node_id]):
                live[str(index)] = [list(item) for item in values]
            self._told[node_id] = seen
        self._waiting.clear()
        self._write(["b", base_s, ages, live])


def recover_open_frame(path: Path) -> InputFrame | None:
    """The frame that a killed controller left behind, up to its last whole line; None when there is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was cut off
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    try:
        term, number, began_s = json.loads(lines[0])
        ended_s = max((_wall_s(line) or began_s for line in lines[1:]), default=began_s)
        return InputFrame(int(term), int(number), began_s, ended_s, len(lines) - 1, tuple(lines[1:]))
    except (IndexError, ValueError, TypeError) as error:
        _log.warning("open_frame_unreadable", file=str(path), detail=str(error))
        return None


def _wall_s(line: str) -> float | None:
    value = json.loads(line)
    return None if value[0] == "b" else float(value[2])


# ------------------------------------------------------------------------------------------------------ one line


def same_structure(before: NodeObservation, seen: NodeObservation) -> bool:
    """True when nothing but readings and counts differ: then the core remembers the newer one and does nothing."""
    return _structure(before) == _structure(seen)


def _structure(seen: NodeObservation) -> tuple[Any, ...]:
    gpus = tuple((gpu.uuid, gpu.index, gpu.healthy, gpu.limit_w, gpu.limits_w) for gpu in seen.gpus)
    instances = tuple(
        (i.instance_id, i.model, i.pool, i.gpu_uuids, i.state, i.endpoint, i.detail, i.step_seconds)
        for i in seen.instances
    )
    held = tuple((i.instance_id, i.gpu_uuids, i.state, i.held_by) for i in seen.held)
    return gpus, instances, held


def live_values(seen: NodeObservation) -> _Live:
    return tuple((i.running, i.waiting, i.kv_usage_ratio) for i in seen.instances)


def with_live(seen: NodeObservation, values: list[list[float | None]]) -> NodeObservation:
    instances = tuple(
        replace(instance, running=running, waiting=waiting, kv_usage_ratio=kv)
        for instance, (running, waiting, kv) in zip(seen.instances, values, strict=True)
    )
    return replace(seen, instances=instances)


def node_json(seen: NodeObservation) -> Any:
    """The whole observation but for the GPUs' readings; their power limits belong to it."""
    data = encode(NodeObservation, replace(seen, gpus=()))
    if not seen.held:  # as nearly always
        del data[4]
    data[2] = [
        [g.uuid, g.index, int(g.healthy)]
        + ([] if g.limit_w is None and g.limits_w is None else [g.limit_w, list(g.limits_w) if g.limits_w else None])
        for g in seen.gpus
    ]
    return data


def node_from_json(data: Any) -> NodeObservation:
    node_id, observed_at_s, gpus, instances, *held = data
    return NodeObservation(
        node_id,
        observed_at_s,
        tuple(_gpu(*item) for item in gpus),
        tuple(_instance(item) for item in instances),
        tuple(_instance(item) for items in held for item in items),
    )


def _gpu(
    uuid: str, index: int, healthy: int, limit_w: float | None = None, limits_w: list[float] | None = None
) -> GpuObservation:
    span_w = (limits_w[0], limits_w[1]) if limits_w else None
    return GpuObservation(uuid, index, bool(healthy), None, None, None, None, limit_w, span_w)


def _instance(data: Any) -> InstanceObservation:
    instance = decode(InstanceObservation, data)
    assert isinstance(instance, InstanceObservation)
    return instance


def _age(base_s: float, observed_at_s: float) -> int | list[float]:
    """Milliseconds before `base_s` where these give the very number back, else the time itself, in a list."""
    age_ms = round((base_s - observed_at_s) * 1000)
    return age_ms if age_ms >= 0 and observed_at(base_s, age_ms) == observed_at_s else [observed_at_s]


def observed_at(base_s: float, age: int | list[float]) -> float:
    return age[0] if isinstance(age, list) else round(base_s - age / 1000, 3)


_FIELDS = ("arrived", "completed", "failed", "in_slo", "input_tokens", "output_tokens")


def load_line(report: LoadObservation, before: LoadObservation | None) -> Any:
    """A gateway's counters as differences from its last report; whole after a new epoch or another order."""
    head = [report.gateway_id, report.epoch, report.observed_at_s, report.model]
    whole = before is None or before.epoch != report.epoch or before.model != report.model
    if not whole and before is not None:
        past = list(before.classes)
        whole = list(report.classes)[: len(past)] != past
    base: Mapping[RequestClass, ClassCounters] = {} if whole or before is None else before.classes
    counts = {}
    for request_class, counters in report.classes.items():
        was = base.get(request_class)
        if was == counters:
            continue
        counts[str(request_class)] = [getattr(counters, f) - (getattr(was, f) if was else 0) for f in _FIELDS]
    queues = (
        None
        if not whole and before is not None and before.queues == report.queues
        else [_queue_line(pool, queue) for pool, queue in report.queues.items()]
    )
    return [*head, int(whole), counts, queues]


def _queue_line(pool: str, queue: QueueObservation) -> list[Any]:
    """Without trouble, without what tells of it."""
    line = [pool, queue.waiting, queue.in_flight, queue.oldest_wait_s]
    return [*line, queue.at_risk, dict(queue.refused)] if queue.at_risk or queue.refused else line


def load_from_line(data: Any, before: LoadObservation | None) -> LoadObservation:
    gateway_id, epoch, observed_at_s, model, whole, counts, queues = data
    classes: dict[RequestClass, ClassCounters] = {} if whole or before is None else dict(before.classes)
    for name, deltas in counts.items():
        request_class = RequestClass.parse(name)
        was = classes.get(request_class)
        classes[request_class] = ClassCounters(
            *(delta + (getattr(was, f) if was else 0) for f, delta in zip(_FIELDS, deltas, strict=True))
        )
    kept = before.queues if queues is None and before is not None else {}
    asked = kept if queues is None else {pool: QueueObservation(*rest) for pool, *rest in queues}
    return LoadObservation(gateway_id, epoch, observed_at_s, model, classes, asked)


def solution_json(solution: PlanSolution, problem: PlanProblem) -> Any:
    """The solver's answer; its columns as positions in the problem."""
    positions: dict[Column, int] = {column: index for index, column in enumerate(problem.columns)}
    data = encode(PlanSolution, replace(solution, chosen=None, rejected=()))
    results = [solution.chosen, *solution.rejected]
    written: list[Any] = []
    for result in results:
        if result is None:
            written.append(None)
            continue
        item = encode(type(result), replace(result, used=()))
        written.append([item, [[positions[column], n] for column, n in result.used]])
    return [data, written]


def solution_from_json(data: Any, problem: PlanProblem) -> PlanSolution:
    head, written = data
    solution = decode(PlanSolution, head)
    assert isinstance(solution, PlanSolution)
    results: list[PartitionResult | None] = []
    for entry in written:
        if entry is None:
            results.append(None)
            continue
        result: PartitionResult = decode(PartitionResult, entry[0])
        results.append(replace(result, used=tuple((problem.columns[i], n) for i, n in entry[1])))
    return replace(solution, chosen=results[0], rejected=tuple(result for result in results[1:] if result is not None))
