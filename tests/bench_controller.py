"""The controller's benchmark: ticks at 10, 100 and 1,000 nodes, the journal's size, writing to both databases."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from controller.domain.classes import RequestClass
from controller.domain.layout import Layout, PlannedInstance
from controller.domain.reasons import Level
from controller.fleet.port import (
    ClassCounters,
    EffectDone,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    Solve,
    Tick,
)
from controller.loop.journal import JournaledCore
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.policy.milp.model import solve
from controller.profile.table import Profile
from controller.store import migrate
from controller.store.codec import to_row
from controller.store.engine import open_engine
from controller.store.records import InputFrame, PlanRecord, Record
from controller.store.repositories import write_records
from simulator.bench.metric import Metric
from tests.pg import Postgres, missing
from tests.store_suite import decision
from tests.synthetic_profile import MODEL, synthetic_profile

NODES = (10, 100, 1000)
PER_NODE, TICKS = 4, 30
ROWS = 2000
MONTH_S = 30 * 86_400.0


def measure(say: Callable[[str], None]) -> list[Metric]:
    metrics: list[Metric] = []
    for nodes in NODES:
        say(f"ticks at {nodes} nodes")
        metrics += _ticks(nodes)
    with tempfile.TemporaryDirectory() as folder:
        say("writing decisions to SQLite")
        metrics.append(_writing("SQLite", f"sqlite:///{Path(folder) / 'history.db'}"))
    if not missing():
        say("writing decisions to Postgres")
        with Postgres() as server:
            metrics.append(_writing("Postgres", server.new_database()))
    return metrics


class _Fleet:
    """A fleet of `nodes` hosts with four TP2 instances each, all serving; the load changes a little every second."""

    def __init__(self, nodes: int) -> None:
        self.records: list[Record] = []
        settings = LoopSettings(model=MODEL, cluster_s=1800, pool_s=300, initial_rps={RequestClass.parse("MS"): 1.0})
        profile = Profile.from_json(synthetic_profile().to_json())
        wanted = tuple(
            PlannedInstance(
                f"i-{n}-{slot}", _pool(slot), MODEL, f"n{n}", (f"GPU-{n}-{2 * slot}", f"GPU-{n}-{2 * slot + 1}")
            )
            for n in range(nodes)
            for slot in range(PER_NODE)
        )
        pools = {
            name: {"granted_gpus": 2 * k * nodes, "counts": {"2": k * nodes}, "demand_rps": float(nodes)}
            for name, k in (("short", 3), ("long", 1))
        }
        plan = PlanRecord(1, 1, 0.0, Layout(wanted), pools)
        self.core = JournaledCore(settings, profile, term=2, expected_nodes=nodes, plan=plan)
        self.core.keep_journal(self.records.append)
        self.nodes = nodes
        self.now_s = 0.0
        self.gpus = {
            n: tuple(GpuObservation(f"GPU-{n}-{i}", i, True, 300.0, 0.0, 1200, None) for i in range(8))
            for n in range(nodes)
        }

    def instant(self) -> Instant:
        return Instant(self.now_s, 1.8e9 + self.now_s)

    def second(self) -> None:
        """One second of telemetry of every node and a load report."""
        for number in range(self.nodes):
            instances = tuple(
                InstanceObservation(
                    f"i-{number}-{slot}", MODEL, _pool(slot),
                    tuple(f"GPU-{number}-{2 * slot + k}" for k in (0, 1)), InstanceState.READY,
                    f"http://{number}-{slot}", float((number + slot + int(self.now_s)) % 9), 0.0,
                    round(((number * 7 + slot + int(self.now_s)) % 23) / 100, 2),
                )
                for slot in range(PER_NODE)
            )  # fmt: skip
            seen_s = int(self.now_s * 10) / 10
            self.core.handle(
                self.instant(), NodeSeen(NodeObservation(f"n{number}", seen_s, self.gpus[number], instances))
            )
        arrived = int(self.now_s * self.nodes)
        counts = ClassCounters(arrived, arrived, 0, arrived, 500 * arrived, 150 * arrived)
        classes = {RequestClass.parse(name): counts for name in ("SS", "MS", "LM")}
        self.core.handle(self.instant(), LoadSeen(LoadObservation("g", "1", self.now_s, MODEL, classes, {})))
        self.now_s += 1.0

    def tick(self, level: Level) -> float:
        """Seconds that the answer took, without any solving."""
        began_s = time.perf_counter()
        step = self.core.handle(self.instant(), Tick(level))
        took_s = time.perf_counter() - began_s
        for effect in step.effects:
            if isinstance(effect, Solve):
                solution = solve(effect.problem)
                self.core.handle(
                    self.instant(), EffectDone(effect.effect_id, solution.chosen is not None, solution=solution)
                )
        return took_s


def _pool(slot: int) -> str:
    return "short" if slot < 3 else "long"


def _ticks(nodes: int) -> list[Metric]:
    fleet = _Fleet(nodes)
    for _ in range(20):
        fleet.second()
    fleet.tick(Level.INSTANCE)
    took: list[float] = []
    began_s, ingest_s = fleet.now_s, 0.0
    for _ in range(TICKS):
        started_s = time.perf_counter()
        for _ in range(5):
            fleet.second()
        ingest_s += time.perf_counter() - started_s
        took.append(fleet.tick(Level.INSTANCE))
    fleet.core.close_journal(fleet.instant())
    frame = [record for record in fleet.records if isinstance(record, InputFrame)][-1]
    stored = len(str(to_row(frame).values["body"]))
    seconds = fleet.now_s - began_s
    took.sort()
    return [
        Metric(
            f"instance tick, {nodes} nodes x {PER_NODE}, p99", took[-1], "s", statistics.pstdev(took),
            1.0 if nodes == max(NODES) else None,
        ),
        Metric(f"telemetry ingest, {nodes} nodes at 1 s", ingest_s / seconds, "cores", 0.0, 1.0),
        Metric(f"inputs kept, {nodes} nodes, busy", stored / seconds * MONTH_S / 1e9, "GB/month", 0.0),
    ]  # fmt: skip


def _writing(name: str, url: str) -> Metric:
    engine: Engine = open_engine(url, create=True)
    migrate.upgrade(engine)
    rates = []
    for batch in range(4):
        rows = [decision(batch * ROWS + n) for n in range(1, ROWS + 1)]
        began_s = time.perf_counter()
        for first in range(0, ROWS, 500):  # as the recorder does
            write_records(engine, rows[first : first + 500])
        rates.append(ROWS / (time.perf_counter() - began_s))
    engine.dispose()
    return Metric(f"decisions written, {name}", statistics.median(rates), "1/s", statistics.pstdev(rates))
