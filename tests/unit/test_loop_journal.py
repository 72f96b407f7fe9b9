"""The journal of inputs: what a replay makes of it is what was decided, to the byte."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, select, update

from common.errors import UserError
from common.typed_json import decode, encode
from controller.domain.classes import ALL_CLASSES, RequestClass
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode
from controller.fleet.port import (
    ClassCounters,
    Event,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadObservation,
    NodeObservation,
    NodeSeen,
    QueueObservation,
    Tick,
)
from controller.loop.core import Core, Step
from controller.loop.journal import (
    JournaledCore,
    load_from_line,
    load_line,
    node_from_json,
    node_json,
    recover_open_frame,
    same_structure,
)
from controller.loop.orders import Order, PlanNow, SetMode
from controller.loop.runtime import coarse
from controller.loop.settings import LoopSettings
from controller.loop.snapshot import DERIVED, restore, settings_of, take
from controller.loop.state import Instant, State
from controller.profile.table import Profile
from controller.replay.other import compare, read_policy
from controller.replay.same import replay
from controller.store.codec import unpack
from controller.store.frames import frame_lines
from controller.store.models import DecisionModel, InputFrameModel, InputSnapshotModel
from controller.store.records import InputFrame, InputSnapshot, Record
from controller.store.repositories import save_profile, write_records
from simulator.fleet import WALL_AT_ZERO_S, FleetTimes, VirtualFleet
from simulator.physics import Physics
from simulator.traces import generate
from tests.first_format import pack_first
from tests.store_suite import sqlite_url, upgraded_engine
from tests.synthetic_profile import MODEL, synthetic_profile

# From its text, as a controller reads it: the order of its parts is part of what is added up.
PROFILE = Profile.from_json(synthetic_profile().to_json())
SETTINGS = LoopSettings(
    model=MODEL,
    cluster_s=20,
    pool_s=5,
    instance_s=1,
    lease_ttl_s=4,
    rpc_deadline_s=0.5,
    load_window_s=5,
    min_dwell_s=5,
    start_s=3,
    initial_rps={RequestClass.parse("MS"): 2.0, RequestClass.parse("LM"): 2.0},
)
ENDS_S = WALL_AT_ZERO_S + 1e6


class Ordered(JournaledCore):
    """A core that is given orders at their times, between two events; it hears numbers as fine as the runtime's."""

    def give(self, orders: list[tuple[float, Order]]) -> None:
        self._orders = deque(orders)

    def handle(self, now: Instant, event: Event) -> Step:
        decisions: tuple[Decision, ...] = ()
        step = super().handle(Instant(round(now.monotonic_s, 6), round(now.wall_s, 6)), coarse(event))
        while self._orders and self._orders[0][0] <= now.monotonic_s:
            ordered = self.order(now, self._orders.popleft()[1])
            decisions += ordered.decisions
            step = replace(step, decisions=step.decisions + decisions, effects=step.effects + ordered.effects)
        return step


def run(
    term: int,
    *,
    orders: list[tuple[float, Order]] | None = None,
    open_frame: Path | None = None,
    seconds: float = 60.0,
    killed: bool = False,
    bursts_s: float = 0.0,
) -> tuple[list[Decision], list[Record]]:
    """What a virtual fleet's controller decided and kept."""
    core = Ordered(SETTINGS, PROFILE, term=term, expected_nodes=2)
    core.give(orders or [])
    records: list[Record] = []
    core.keep_journal(records.append, open_frame)
    fleet = VirtualFleet(core, Physics.load(), 2, FleetTimes(start_s=3.5))
    trace = generate("conv", seconds, 5.0, term)
    if bursts_s:  # what arrives in so many seconds comes in the first tenth of them
        begun_s = trace.arrival_s // bursts_s * bursts_s
        trace = replace(trace, arrival_s=begun_s + (trace.arrival_s - begun_s) / 10)
    result = fleet.run(trace, start_s=8.0, tail_s=30.0)
    if not killed:
        end_s = result.observations[-1].observed_at_s
        core.close_journal(Instant(end_s, WALL_AT_ZERO_S + end_s))
    return result.decisions, records


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    for opened in upgraded_engine(sqlite_url(tmp_path)):
        save_profile(opened, PROFILE.checksum(), MODEL, PROFILE.to_json(), 0.0)
        yield opened


def stored_kinds(engine: Engine) -> set[str]:
    """Kinds of line in the text of the stored frames; what went into columns has left a stub (store/frames.py)."""
    with engine.connect() as connection:
        bodies = connection.execute(select(InputFrameModel.body)).scalars().all()
    texts = [zlib.decompressobj().decompress(base64.b85decode(body[2:])[4:]).decode() for body in bodies]
    return {line[2] for text in texts for line in text.split("\n")[1:]}


def replayed_elsewhere(engine: Engine, seed: str) -> dict[str, object]:
    """By another process, in which sets have another order."""
    arguments = ["replay", "--from", "2023-11-01", "--to", "2024-01-01", "--json", "--database-url", str(engine.url)]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("dynamollm")), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    assert done.stdout, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_a_virtual_fleets_decisions_are_made_again_to_the_byte_in_another_process(engine: Engine) -> None:
    decisions, records = run(1)
    write_records(engine, [*decisions, *records])
    assert {d.level for d in decisions} == set(Level)
    assert stored_kinds(engine) >= {"B", "L", "t"}, "what is replayed went through the columns"
    for seed in ("1", "2"):
        report = replayed_elsewhere(engine, seed)
        assert report["identical"] == len(decisions)
        assert (report["differences"], report["without_inputs"], report["solver_differs"]) == ([], 0, 0)


def test_an_early_tick_is_made_again_from_what_was_known_at_it(engine: Engine) -> None:
    decisions, records = run(1, seconds=220.0, bursts_s=20.0)
    write_records(engine, [*decisions, *records])
    lines = [json.loads(line) for record in records if isinstance(record, InputFrame) for line in record.lines]
    early = [line for line in lines if line[0] == "t" and len(line) > 4]
    assert early, "load that comes in bursts makes some"
    assert {line[3] for line in early} == {"instance"}
    report = replay(engine, 0.0, ENDS_S)
    assert (report.identical, report.differences, report.without_inputs) == (len(decisions), [], 0)


def test_orders_restarts_and_a_kill_inside(engine: Engine, tmp_path: Path) -> None:
    orders = [
        (20.0, SetMode("pool:short", Mode.ADVISORY)),
        (25.0, PlanNow("test")),
        (30.0, SetMode("cluster", Mode.PAUSED)),
        (36.0, SetMode("cluster", Mode.ACTIVE)),
        (40.0, SetMode("node:node-1", Mode.PAUSED)),
        (50.0, SetMode("pool:short", Mode.ACTIVE)),
    ]
    first, kept = run(1, orders=orders)
    file = tmp_path / "open.jsonl"
    second, kept_second = run(2, open_frame=file, killed=True)
    with file.open("a") as torn:
        torn.write('["t",1.0,')  # the process died while it wrote
    left = recover_open_frame(file)
    assert left is not None
    assert left.number == max(r.number for r in kept_second if isinstance(r, InputFrame)) + 1
    write_records(engine, [*first, *kept, *second, *kept_second, left])
    report = replay(engine, 0.0, ENDS_S)
    assert report.ok, report.differences[:1]
    assert report.identical == len(first) + len(second)
    assert report.stretches == 2


def test_a_changed_decision_is_found(engine: Engine) -> None:
    decisions, records = run(1, seconds=20.0)
    forged = [replace(d, sentence="It was not me.") if d.number == 5 else d for d in decisions]
    write_records(engine, [*forged, *records])
    report = replay(engine, 0.0, ENDS_S)
    assert [(d.number, sorted(d.fields)) for d in report.differences] == [(5, ["sentence"])]
    assert report.identical == len(decisions) - 1


def test_a_missing_frame_ends_a_stretch_and_says_what_cannot_be_replayed(engine: Engine) -> None:
    decisions, records = run(1)
    gone = next(r for r in records if isinstance(r, InputFrame) and r.number == 4)
    write_records(engine, [*decisions, *(r for r in records if r is not gone)])
    report = replay(engine, 0.0, ENDS_S)
    assert report.differences == []
    after = sum(d.decided_at_s >= gone.began_at_s for d in decisions)
    assert report.without_inputs == pytest.approx(after, abs=2)
    assert report.identical + report.without_inputs == len(decisions)


def test_a_replay_may_begin_in_the_middle(engine: Engine) -> None:
    decisions, records = run(1, seconds=200.0)
    assert sum(isinstance(r, InputSnapshot) for r in records) >= 2
    write_records(engine, [*decisions, *records])
    with engine.begin() as connection:  # as retention leaves it
        connection.execute(delete(InputFrameModel).where(InputFrameModel.number < 25))
        connection.execute(delete(DecisionModel).where(DecisionModel.decided_at < WALL_AT_ZERO_S + 140))
    later = [d for d in decisions if d.decided_at_s >= WALL_AT_ZERO_S + 140]
    report = replay(engine, WALL_AT_ZERO_S + 140, ENDS_S)
    assert report.ok, report.differences[:1]
    assert report.identical == len(later) > 10


def test_inputs_of_the_first_format_are_still_replayed(engine: Engine) -> None:
    decisions, records = run(1, seconds=20.0)
    write_records(engine, [*decisions, *records])
    with engine.begin() as connection:
        for row in connection.execute(select(InputFrameModel.id, InputFrameModel.body)).all():
            text = pack_first("\n".join(frame_lines(row.body)))
            connection.execute(update(InputFrameModel).where(InputFrameModel.id == row.id).values(body=text))
        for row in connection.execute(select(InputSnapshotModel.id, InputSnapshotModel.body)).all():
            text = pack_first(unpack(row.body))
            connection.execute(update(InputSnapshotModel).where(InputSnapshotModel.id == row.id).values(body=text))
    report = replay(engine, 0.0, ENDS_S)
    assert report.ok
    assert report.identical == len(decisions)
    with engine.begin() as connection:
        connection.execute(update(InputFrameModel).where(InputFrameModel.number == 2).values(body="3:what comes later"))
    with pytest.raises(UserError, match="frame 2 of term 1 cannot be read"):
        replay(engine, 0.0, ENDS_S)


def test_another_policy_is_predicted_on_the_same_load(engine: Engine, tmp_path: Path) -> None:
    decisions, records = run(1, seconds=90.0)
    write_records(engine, [*decisions, *records])
    policy = tmp_path / "full.toml"
    policy.write_text("[knobs]\nclocks = false\n[planning]\nfill = 0.6\n")
    as_set, other = compare(engine, 0.0, ENDS_S, read_policy(policy))
    assert as_set.seconds == pytest.approx(other.seconds, rel=0.05)
    assert other.energy_kwh > as_set.energy_kwh > 0
    assert other.mean_mhz == PROFILE.full_mhz
    # The same policy comes to the same, however it is spelled.
    policy.write_text("[planning]\nfill = 0.85\n")
    same, again = compare(engine, 0.0, ENDS_S, read_policy(policy))
    assert replace(again, name="") == replace(same, name="")


def test_the_journal_holds_only_what_matters() -> None:
    """An hour of a quiet fleet: a line per tick, none per renewed lease or unchanged observation."""
    core = JournaledCore(replace(SETTINGS, pool_s=300, instance_s=5, cluster_s=1800, lease_ttl_s=20), PROFILE, 1, 4)
    records: list[Record] = []
    core.keep_journal(records.append)
    gpus = tuple(GpuObservation(f"g{i}", i, True, 100.0 + i, 5.0, 1000, None) for i in range(8))
    for second in range(3600):
        now = Instant(float(second), 1e9 + second)
        for node in range(4):
            seen = tuple(replace(gpu, uuid=f"{node}-{gpu.uuid}", energy_j=float(second)) for gpu in gpus)
            core.handle(now, NodeSeen(NodeObservation(f"n{node}", now.monotonic_s, seen, ())))
        if second % 5 == 0:
            core.handle(now, Tick(Level.INSTANCE))
        if second % 300 == 299:
            core.handle(now, Tick(Level.POOL))
    frames = [record for record in records if isinstance(record, InputFrame)]
    lines = [line for frame in frames for line in frame.lines]
    assert sum(frame.events for frame in frames) == 3600 * 4 + 720 + 12
    assert len(lines) < 2 * (720 + 12) + 40


# -------------------------------------------------------------------------------------------------- parts


counters = st.builds(ClassCounters, *[st.integers(0, 10**9)] * 6)


@st.composite
def reports(draw: st.DrawFn) -> list[LoadObservation]:
    made = []
    for number in range(draw(st.integers(1, 6))):
        classes = draw(st.lists(st.sampled_from(ALL_CLASSES), unique=True, max_size=5))
        pools = draw(st.lists(st.sampled_from(["a", "b"]), unique=True))
        made.append(
            LoadObservation(
                "g",
                draw(st.sampled_from(["1", "1", "2"])),
                float(number),
                "m",
                {c: draw(counters) for c in classes},
                {
                    pool: QueueObservation(
                        draw(st.integers(0, 9)),
                        0,
                        draw(st.floats(0, 9)),
                        draw(st.integers(0, 3)),
                        draw(st.dictionaries(st.sampled_from(["queue_full", "too_late"]), st.integers(1, 9))),
                    )
                    for pool in pools
                },
            )
        )
    return made


@given(reports())
def test_load_reports_survive_their_lines(made: list[LoadObservation]) -> None:
    written = read = None
    for report in made:
        line = json.loads(json.dumps(load_line(report, written)))
        read = load_from_line(line, read)
        written = report
        assert read == report
        assert list(read.classes) == list(report.classes)


def test_every_field_of_the_state_is_in_a_snapshot(tmp_path: Path) -> None:
    core = Ordered(SETTINGS, PROFILE, term=1, expected_nodes=2)
    core.give([(15.0, SetMode("node:node-1", Mode.ADVISORY))])
    core.keep_journal(lambda _: None)
    VirtualFleet(core, Physics.load(), 2, FleetTimes(start_s=3.5)).run(generate("conv", 30.0, 5.0, 1), start_s=8.0)
    data = json.loads(take(core.state, 2)())
    fresh = Core(settings_of(data), PROFILE, 1, 2)
    assert settings_of(data) == SETTINGS
    restore(fresh.state, data)
    for item in fields(State):
        assert getattr(fresh.state, item.name) == getattr(core.state, item.name), item.name
    assert set(data["state"]) == {item.name for item in fields(State)} - DERIVED
    del data["state"]["modes"]
    with pytest.raises(ValueError, match="another version"):
        restore(fresh.state, data)


def test_a_snapshot_shows_the_moment_it_was_taken() -> None:
    core = Core(SETTINGS, PROFILE, term=1, expected_nodes=1)
    text = take(core.state, 1)
    before = text()
    core.state.failures["later"] = 1
    core.state.load.windows.append(core.state.load.windows[0]) if core.state.load.windows else None
    assert text() == before


@dataclass(frozen=True)
class Left:
    value: int


@dataclass(frozen=True)
class Right:
    name: str | None


@dataclass
class Whole:
    numbers: Mapping[int, float]
    classes: frozenset[RequestClass]
    states: list[InstanceState]
    either: Left | Right | None
    pair: tuple[int, str]
    hidden: int = field(default=3, init=False)


def test_values_of_annotated_types_survive() -> None:
    whole = Whole({2: float("-inf"), 1: 0.1}, frozenset(ALL_CLASSES[:3]), [InstanceState.READY], Right(None), (1, "x"))
    whole.hidden = 7
    back = decode(Whole, json.loads(json.dumps(encode(Whole, whole))))
    assert back == whole
    assert list(back.numbers) == [2, 1], "the order is kept"
    with pytest.raises(ValueError, match="has 6 fields"):
        decode(Whole, [1])
    with pytest.raises(TypeError, match="no JSON form"):
        encode(complex, 1j)


def test_an_observation_keeps_what_decisions_read() -> None:
    instance = InstanceObservation("i", "m", "p", ("g",), InstanceState.READY, "http://x", 1.0, 0.0, 0.25)
    assert decode(InstanceObservation, json.loads(json.dumps(encode(InstanceObservation, instance)))) == instance


@pytest.mark.parametrize("count", [0, 2])
def test_what_an_operator_holds_is_in_the_journal(count: int) -> None:
    held = tuple(
        InstanceObservation(f"h{i}", "m", "", (f"g{i}",), InstanceState.READY, "http://x", held_by="ada")
        for i in range(count)
    )
    seen = NodeObservation("n", 1.0, (), (), held)
    assert node_from_json(json.loads(json.dumps(node_json(seen)))) == seen
    assert same_structure(seen, seen)
    assert same_structure(seen, replace(seen, held=())) == (count == 0)
