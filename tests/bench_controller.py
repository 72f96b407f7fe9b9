"""The controller's benchmark: ticks at 10, 100 and 1,000 nodes, a power budget at 1,000, a thousand agents' streams
over real gRPC, the journal's size, writing to both databases, how late ticks are beside what is slow, takeover times,
memory over days of virtual time.

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
from itertools import chain, count
from math import inf
from pathlib import Path

import structlog
from sqlalchemy import Engine

from common.clock import SystemClock
from controller.api.routing_hub import RoutingHub
from controller.domain.classes import RequestClass
from controller.domain.reasons import Level
from controller.fleet.grpc import AgentClient
from controller.fleet.port import ClassCounters, Event, InstanceState, LoadObservation, LoadSeen, NodeSeen, Tick
from controller.loop.accounting import EnergyBook
from controller.loop.history import OutcomeBook, WindowBook
from controller.loop.orders import CLUSTER_SCOPE, SetPowerBudget
from controller.loop.runtime import Runtime, keep_collections_short
from controller.policy.placement import HeldInstance, place
from controller.policy.transition import ActualInstance, CapacityModel, next_steps
from controller.store import migrate
from controller.store.codec import to_row
from controller.store.engine import open_engine
from controller.store.records import InputFrame
from controller.store.repositories import write_records
from simulator.bench.metric import Metric
from tests import lateness
from tests.busy_fleet import MOST_W, BusyFleet
from tests.controllerrig import Controller, ControllerRig
from tests.many_agents import PER_NODE
from tests.pg import Postgres, missing
from tests.store_suite import decision
from tests.synthetic_profile import MODEL

NODES = (10, 100, 1000)
TICKS = 30
STREAMED_S = 20.0
DAYS = 7.0
TAKEOVERS = 3
LATE_RUNS, LATE_S = 3, 30.0  # of ticks beside a long solve
ROWS = 2000
MONTH_S = 30 * 86_400.0


def measure(say: Callable[[str], None]) -> list[Metric]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    metrics: list[Metric] = []
    keep_collections_short()  # as the controller does
    for nodes in NODES:
        say(f"ticks at {nodes} nodes")
        metrics += _ticks(nodes)
    say(f"planning at {NODES[-1]} nodes")
    metrics += _layout(NODES[-1])
    say(f"a power budget at {NODES[-1]} nodes")
    metrics += _budget(NODES[-1])
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
            say("lateness of ticks")
            metrics += _lateness(server)
            say("takeovers")
            metrics += _takeovers(server)
    return metrics


def _ticks(nodes: int) -> list[Metric]:
    fleet = BusyFleet(nodes)
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
    fleet = BusyFleet(nodes)
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


def _budget(nodes: int) -> list[Metric]:
    """A budget of half of what all GPUs may draw is set, held for a while and lifted: what the longest single answer
    takes, since that is what a tick may have to wait for, and how many ticks pass before limits and plans hold it."""
    fleet = BusyFleet(nodes)
    for _ in range(30):
        fleet.second()
    fleet.tick(Level.INSTANCE)
    state, budget_w = fleet.core.state, 8 * nodes * MOST_W / 2
    took_s = list[float]()
    held_after = None
    for watts in (budget_w, None):
        took_s += fleet.timed(partial(fleet.core.order, fleet.instant(), SetPowerBudget(CLUSTER_SCOPE, watts, None)))
        for tick in range(4):
            if watts and held_after is None and fleet.limits_w() <= budget_w and not state.solving:
                held_after = tick
            for _ in range(5):
                fleet.second()
            took_s += fleet.timed(partial(fleet.core.handle, fleet.instant(), Tick(Level.INSTANCE)))
    return [
        Metric(f"longest answer while a power budget comes and goes, {nodes} nodes", max(took_s), "s", 0.0, 1.0),
        Metric(
            f"ticks until a power budget holds, {nodes} nodes", inf if held_after is None else held_after, "", 0.0, 2.0
        ),
    ]


def _lateness(server: Postgres) -> list[Metric]:
    """The whole runtime, with the real solver at work all the time and a database that takes a second to answer."""
    runs = []
    for _ in range(LATE_RUNS):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(lateness.measure(server, Path(folder), LATE_S))
    assert all(run.solving for run in runs)
    late_s, own_s = (sorted(chain(*each)) for each in zip(*((run.late_s, run.own_s) for run in runs), strict=True))
    each_s = [lateness.p99(run.late_s) for run in runs]
    return [
        Metric(
            f"tick late beside a {LATE_S:g} s solve and a database that answers in {lateness.ANSWER_S:g} s, p99, wall",
            lateness.p99(late_s), "s", max(each_s) - min(each_s), 0.05,
        ),
        Metric("the same less what the loop waited for a core, p99", lateness.p99(own_s), "s", 0.0, 0.05),
        Metric("the same, median, wall", statistics.median(late_s), "s", 0.0),
        Metric("a process that does nothing, p99, wall", max(run.noise_s for run in runs), "s", 0.0),
    ]  # fmt: skip


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
    fleet, clock, late_s = BusyFleet(nodes), SystemClock(), list[float]()
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
    fleet = BusyFleet(4)
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
