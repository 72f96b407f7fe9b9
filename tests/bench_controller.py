"""The controller's benchmark: ticks at 10, 100 and 1,000 nodes, a thousand agents' streams over real gRPC, the
journal's size, writing to both databases, takeover times, memory over days of virtual time.

Seconds are those of the processor, except where a name says "wall"."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import structlog
from sqlalchemy import Engine

from common.clock import SystemClock
from controller.api.routing_hub import RoutingHub
from controller.domain.classes import RequestClass
from controller.domain.layout import Layout, PlannedInstance
from controller.domain.reasons import Level
from controller.fleet.grpc import AgentClient
from controller.fleet.port import (
    ClassCounters,
    EffectDone,
    Event,
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
from controller.loop.accounting import EnergyBook
from controller.loop.history import OutcomeBook, WindowBook
from controller.loop.journal import JournaledCore
from controller.loop.runtime import Runtime, coarse
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from controller.policy.placement import HeldInstance, place
from controller.policy.transition import ActualInstance, CapacityModel, next_steps
from controller.profile.table import Profile
from controller.store import migrate
from controller.store.codec import to_row
from controller.store.engine import open_engine
from controller.store.records import InputFrame, PlanRecord, Record
from controller.store.repositories import write_records
from simulator.bench.metric import Metric
from tests.controllerrig import Controller, ControllerRig
from tests.many_agents import PER_NODE, pool_of
from tests.pg import Postgres, missing
from tests.store_suite import decision
from tests.synthetic_profile import MODEL, synthetic_profile

NODES = (10, 100, 1000)
TICKS = 30
STREAMED_S = 20.0
DAYS = 7.0
TAKEOVERS = 3
ROWS = 2000
MONTH_S = 30 * 86_400.0
STAY_S = 10.0  # of a request


def measure(say: Callable[[str], None]) -> list[Metric]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    metrics: list[Metric] = []
    for nodes in NODES:
        say(f"ticks at {nodes} nodes")
        metrics += _ticks(nodes)
    say(f"planning at {NODES[-1]} nodes")
    metrics += _layout(NODES[-1])
    say(f"streams of {NODES[-1]} agents over gRPC")
    metrics += asyncio.run(_streams(NODES[-1]))
    say(f"memory over {DAYS:g} days of virtual time")
    metrics += _memory()
    with tempfile.TemporaryDirectory() as folder:
        say("writing decisions to SQLite")
        metrics.append(_writing("SQLite", f"sqlite:///{Path(folder) / 'history.db'}"))
    if not missing():
        say("writing decisions to Postgres")
        with Postgres() as server:
            metrics.append(_writing("Postgres", server.new_database()))
            say("takeovers")
            metrics += _takeovers(server)
    return metrics


class _Fleet:
    """A fleet of `nodes` hosts with four TP2 instances each, all serving. Requests come to each by chance, at a rate of
    its own, and stay for about ten seconds: what the journal keeps is as hard to pack as it is in earnest."""

    def __init__(self, nodes: int) -> None:
        self.records: list[Record] = []
        settings = LoopSettings(model=MODEL, cluster_s=1800, pool_s=300, initial_rps={RequestClass.parse("MS"): 1.0})
        profile = Profile.from_json(synthetic_profile().to_json())
        wanted = tuple(
            PlannedInstance(
                f"i-{n}-{slot}", pool_of(slot), MODEL, f"n{n}", (f"GPU-{n}-{2 * slot}", f"GPU-{n}-{2 * slot + 1}")
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
        self._chance = np.random.default_rng(nodes)
        self._rate_rps = self._chance.uniform(0.3, 3.0, (nodes, PER_NODE))
        self._running = self._chance.poisson(STAY_S * self._rate_rps)
        self._tokens = 1000.0 * self._running
        self._late_s = self._chance.uniform(0.0, 0.9, nodes)  # of each node's sample, behind the second
        self._counts = {name: ClassCounters() for name in ("SS", "MS", "LM")}

    def instant(self) -> Instant:
        return Instant(self.now_s, 1.8e9 + self.now_s)

    def second(self) -> None:
        """One second of telemetry of every node and a load report, as fine as the runtime lets them in."""
        came = self._chance.poisson(self._rate_rps)
        left = self._chance.binomial(self._running, 1 / STAY_S)
        self._tokens *= 1.0 - left / np.maximum(self._running, 1)
        self._tokens += self._chance.gamma(1.5, 700.0, came.shape) * came
        self._running += came - left
        for number in range(self.nodes):
            held, tokens = self._running[number].tolist(), self._tokens[number].tolist()
            instances = tuple(
                InstanceObservation(
                    f"i-{number}-{slot}", MODEL, pool_of(slot),
                    tuple(f"GPU-{number}-{2 * slot + k}" for k in (0, 1)), InstanceState.READY,
                    f"http://{number}-{slot}", float(held[slot]), 0.0, min(1.0, tokens[slot] / 120_000),
                )
                for slot in range(PER_NODE)
            )  # fmt: skip
            seen = NodeObservation(
                f"n{number}", max(0.0, self.now_s - self._late_s[number].item()), self.gpus[number], instances
            )
            self.core.handle(self.instant(), coarse(NodeSeen(seen)))
        self._counts = {name: self._more(counts, int(came.sum()) // 3) for name, counts in self._counts.items()}
        classes = {RequestClass.parse(name): counts for name, counts in self._counts.items()}
        self.core.handle(self.instant(), coarse(LoadSeen(LoadObservation("g", "1", self.now_s, MODEL, classes, {}))))
        self.now_s += 1.0

    def _more(self, was: ClassCounters, mean: int) -> ClassCounters:
        """A class's counters a second later."""
        arrived, ended = self._chance.poisson(mean, 2).tolist()
        tokens_in, tokens_out = (self._chance.gamma(np.maximum(1, [arrived, ended])) * [500, 150]).astype(int).tolist()
        return ClassCounters(
            was.arrived + arrived, was.completed + ended, 0, was.in_slo + ended,
            was.input_tokens + tokens_in, was.output_tokens + tokens_out,
        )  # fmt: skip

    def tick(self, level: Level) -> float:
        """Seconds that the answer took, without any solving."""
        began_s = time.thread_time()
        step = self.core.handle(self.instant(), Tick(level))
        took_s = time.thread_time() - began_s
        for effect in step.effects:
            if isinstance(effect, Solve):
                solution = plan_for(effect.problem)
                self.core.handle(
                    self.instant(), EffectDone(effect.effect_id, solution.chosen is not None, solution=solution)
                )
        return took_s


def _ticks(nodes: int) -> list[Metric]:
    fleet = _Fleet(nodes)
    for _ in range(20):
        fleet.second()
    fleet.tick(Level.INSTANCE)
    fleet.core.close_journal(fleet.instant())  # the first frame has every node in full
    took: list[float] = []
    began_s, ingest_s = fleet.now_s, 0.0
    for _ in range(TICKS):
        started_s = time.thread_time()
        for _ in range(5):
            fleet.second()
        ingest_s += time.thread_time() - started_s
        took.append(fleet.tick(Level.INSTANCE))
    fleet.core.close_journal(fleet.instant())
    frame = [record for record in fleet.records if isinstance(record, InputFrame)][-1]
    packing_s = time.thread_time()
    stored = len(str(to_row(frame).values["body"]))
    packing_s = time.thread_time() - packing_s
    seconds = fleet.now_s - began_s
    took.sort()
    return [
        Metric(
            f"instance tick, {nodes} nodes x {PER_NODE}, p99", took[-1], "s", statistics.pstdev(took),
            1.0 if nodes == max(NODES) else None,
        ),
        Metric(f"instance tick, {nodes} nodes x {PER_NODE}, median", statistics.median(took), "s", 0.0),
        Metric(f"observations taken by the core, {nodes} nodes at 1 s", ingest_s / seconds, "cores", 0.0),
        Metric(
            f"inputs kept, {nodes} nodes, busy", stored / seconds * MONTH_S / 1e9, "GB/month", 0.0,
            4.0 if nodes == max(NODES) else None,
        ),
        Metric(f"packing the inputs, {nodes} nodes", packing_s / seconds, "cores", 0.0),
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


def _layout(nodes: int) -> list[Metric]:
    """Placing and the next steps for a whole fleet that is cut anew."""
    fleet = _Fleet(nodes)
    fleet.second()
    state = fleet.core.state
    held = tuple(HeldInstance(i.instance_id, i.pool, i.node_id, i.gpu_uuids, keep=True) for i in state.layout.instances)
    wanted = {("short", 2): 3 * nodes // 2, ("short", 4): nodes // 4, ("long", 4): nodes // 2}
    numbers = count()
    began_s = time.thread_time()
    placed = place(
        wanted, MODEL, state.layout, held, state.placeable_nodes(fleet.now_s), lambda: f"new-{next(numbers)}"
    )
    actual = tuple(
        ActualInstance(i.instance_id, i.pool, i.node_id, i.gpu_uuids, InstanceState.READY, 1.0, 0.0)
        for i in state.layout.instances
    )
    profile = state.profile
    capacity = CapacityModel(
        {RequestClass.parse("MS"): float(nodes), RequestClass.parse("LM"): 0.3 * nodes},
        {(g.name, tp): state.fit.max_rate_rps(g.name, tp) for g in profile.groups for tp in profile.tps},
        {(g.name, c): profile.request_weight(g.name, c) for g in profile.groups for c in sorted(g.classes)},
    )
    usable = frozenset(gpu.uuid for node in state.placeable_nodes(fleet.now_s) for gpu in node.gpus)
    next_steps(placed.layout, actual, usable, capacity)
    took_s = time.thread_time() - began_s
    return [Metric(f"placement and transition, {nodes} nodes", took_s, "s", 0.0, 2.0)]


async def _streams(nodes: int) -> list[Metric]:
    """The whole runtime over as many agents, each a connection of its own, all served by one other process."""
    with tempfile.TemporaryDirectory(prefix="dl-") as folder:
        agents = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.many_agents", folder, str(nodes),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert agents.stdout is not None
        try:
            assert (await asyncio.wait_for(agents.stdout.readline(), 120)).strip() == b"ready"
            return await _streaming(nodes, folder)
        finally:
            agents.terminate()
            await agents.wait()


async def _streaming(nodes: int, folder: str) -> list[Metric]:
    fleet, clock, late_s = _Fleet(nodes), SystemClock(), list[float]()
    seen = 0

    def sink(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, NodeSeen)
        runtime.sink(event)

    agents = {
        f"n{n}": AgentClient(
            f"n{n}", f"unix:{folder}/{n}", sink, clock, owner="bench", term=2, interval_s=1.0, deadline_s=4.0
        )
        for n in range(nodes)
    }
    runtime = Runtime(
        fleet.core, agents, RoutingHub(), lambda _: None, clock, 60.0, on_tick=lambda _, seconds: late_s.append(seconds)
    )
    stop = asyncio.Event()
    running = asyncio.create_task(runtime.run(stop))
    give_up_s = time.monotonic() + 120
    while len(fleet.core.state.nodes) < nodes and time.monotonic() < give_up_s:  # noqa: ASYNC110 - as a person looks
        await asyncio.sleep(0.5)
    await asyncio.sleep(5)
    late_s.clear()
    seen, began_s, used_s = 0, time.monotonic(), time.process_time()
    arrived = 0
    while time.monotonic() < began_s + STREAMED_S:
        await asyncio.sleep(1.0)
        arrived += nodes
        counts = ClassCounters(arrived, arrived, 0, arrived, 500 * arrived, 150 * arrived)
        classes = {RequestClass.parse(name): counts for name in ("SS", "MS", "LM")}
        runtime.sink(LoadSeen(LoadObservation("g", "1", clock.monotonic_s(), MODEL, classes, {})))
    took_s, used_s = time.monotonic() - began_s, time.process_time() - used_s
    connected = len(fleet.core.state.nodes)
    stop.set()
    await running
    return [
        Metric(f"controller, {connected} agents streaming at 1 s", used_s / took_s, "cores", 0.0, 1.0),
        Metric(f"samples taken, {connected} agents", seen / took_s, "1/s", 0.0),
        Metric("controller, for each sample and its share of all else", used_s / max(1, seen) * 1e3, "ms", 0.0, 1.0),
        Metric(f"answer to a tick, {connected} agents, at most, wall", max(late_s, default=0.0), "s", 0.0),
    ]


def _memory() -> list[Metric]:
    """One small fleet's core and books over days of virtual time: what is kept must not grow with time."""
    fleet = _Fleet(4)
    grown: list[tuple[float, int]] = []
    books = WindowBook(2, MODEL, 60.0), EnergyBook(fleet.core.state.pool_of), OutcomeBook(60.0)
    period_s = {Level.INSTANCE: 60, Level.POOL: 300, Level.CLUSTER: 1800}
    gc.collect()
    tracemalloc.start()
    seconds = int(DAYS * 86_400)
    for second in range(0, seconds, 60):
        fleet.now_s += 59  # a sample and a fast tick a minute: what is kept for long does not depend on how often
        fleet.second()
        for node in fleet.core.state.nodes.values():
            for entry in books[1].add(node):
                books[0].add(entry)
                books[2].add(entry)
        for level, every_s in period_s.items():
            if second % every_s == 0:
                fleet.tick(level)
        books[0].close_due(fleet.instant())
        books[2].close_due(fleet.instant())
        fleet.records.clear()  # as the recorder does
        if second % 3600 == 0:
            gc.collect()
            grown.append((second / 86_400, tracemalloc.get_traced_memory()[0]))
    tracemalloc.stop()
    settled = [(day, size) for day, size in grown if day >= DAYS / 4]
    days, sizes = [day for day, _ in settled], [float(size) for _, size in settled]
    slope = statistics.linear_regression(days, sizes).slope
    return [
        Metric(
            f"core and books after {DAYS:g} days, 4 nodes", sizes[-1] / 2**20, "MiB", (max(sizes) - min(sizes)) / 2**20
        ),
        Metric("growth in a week, from the slope", 7 * slope / 2**20, "MiB", 0.0, 1.0),
    ]


def _stands_by(controller: Controller) -> bool:
    return "standby" in controller.said


def _takeovers(server: Postgres) -> list[Metric]:
    """Two real controllers on Postgres, agents on two emulated hosts: from the signal until the other one answers."""
    found: dict[str, list[float]] = {"SIGKILL": [], "SIGTERM": []}
    url = server.new_database()
    engine = open_engine(url)
    migrate.upgrade(engine)
    engine.dispose()
    with tempfile.TemporaryDirectory(prefix="dl-") as folder, ControllerRig(Path(folder), url) as rig:
        leads = rig.start("a")
        rig.wait(leads.status, 60, "the first one leads")
        for number in range(TAKEOVERS):
            for name, taken_s in found.items():
                waits = rig.start(f"{name.lower()}-{number}")
                rig.wait(partial(_stands_by, waits), 60, "the second one waits")
                leads.process.send_signal(getattr(signal, name))
                taken_s.append(rig.wait(waits.status, 60, "it leads"))
                leads = waits
    return [
        Metric(f"takeover after {name}, wall", max(taken_s), "s", max(taken_s) - min(taken_s), target)
        for (name, taken_s), target in zip(found.items(), (15.0, 2.0), strict=True)
    ]
