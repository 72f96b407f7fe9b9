"""How late the fast tick is while what is slow is under way: one long solve, a Postgres that answers in a second.

The real runtime, recorder, leadership and trials on a real Postgres behind a proxy that holds every answer back, with
clients that ask for decisions all the time. Late is what lies between the moment a tick was due by its schedule and
its answer. What the machine itself makes late is measured beside it: by a process that does nothing, and by how long
the loop's thread was ready and had no core, which Linux counts.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.clock import SystemClock
from controller.api.routing_hub import RoutingHub
from controller.domain.classes import RequestClass
from controller.domain.reasons import Level
from controller.fleet.port import (
    ClassCounters,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
)
from controller.leading import take_lead
from controller.loop.journal import JournaledCore
from controller.loop.runtime import Runtime
from controller.loop.settings import LoopSettings
from controller.loop.solver import Solve, Solver
from controller.policy.milp.plan import plan_for
from controller.policy.milp.problem import PlanProblem, PlanSolution
from controller.store import migrate
from controller.store.engine import StoreUnavailable, open_engine
from controller.store.recorder import open_recorder
from controller.store.repositories import list_decisions
from controller.trials import Trials, run_trials
from tests.pg import Postgres
from tests.synthetic_profile import MODEL, synthetic_profile

ANSWER_S = 1.0  # of the database
TICK_S = 0.25
NODES = 20
CLIENTS = 8  # that ask for decisions: more than asyncio has threads for them on a small machine
SETTLE_S = 2.0
MS = RequestClass.parse("MS")
SETTINGS = LoopSettings(
    model=MODEL, cluster_s=4, pool_s=1, instance_s=TICK_S, lease_ttl_s=1, rpc_deadline_s=0.2, load_window_s=2,
    initial_rps={MS: 1.0},
)  # fmt: skip

IDLE = """
import asyncio, sys, time
async def main():
    late, until = [], time.monotonic() + float(sys.argv[1])
    while time.monotonic() < until:
        due = time.monotonic() + 0.1
        await asyncio.sleep(0.1)
        late.append(time.monotonic() - due)
    print(sorted(late)[int(0.99 * len(late))])
asyncio.run(main())
"""

PROXY = """
import asyncio, sys
delay_s = 0.0
async def pipe(reader, writer, back):
    loop = asyncio.get_running_loop()
    while data := await reader.read(65536):
        loop.call_later(delay_s if back else 0.0, writer.write, data)
    loop.call_later(delay_s, writer.close)
async def serve(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(pipe(reader, there[1], False), pipe(there[0], writer, True))
async def main():
    global delay_s
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        delay_s = float(line)
asyncio.run(main())
"""


@dataclass(frozen=True, slots=True)
class Lateness:
    late_s: list[float]  # of every tick, rising
    own_s: list[float]  # the same less the time that the loop's thread waited for a core
    solving: bool  # at the end of it the solve was still under way
    decisions: int
    noise_s: float  # P99 of the process that does nothing


def p99(rising: list[float]) -> float:
    return rising[int(0.99 * len(rising))]


class Waiting:
    """How long this thread has waited for a core, as it was at any time: looked at every few milliseconds."""

    def __init__(self) -> None:
        self._at_s: list[float] = []
        self._waited_s: list[float] = []

    async def watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(0.005)

    def look(self) -> None:
        self._at_s.append(time.monotonic())
        self._waited_s.append(int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9)

    def since_s(self, at_s: float) -> float:
        """Up to the last look."""
        return self._waited_s[-1] - self._waited_s[max(0, bisect_right(self._at_s, at_s) - 1)]


def solve_long(seconds: float, problem: PlanProblem) -> PlanSolution:
    """The real solver over and over, the model's making in Python included."""
    began_s = time.monotonic()
    while True:
        solution = plan_for(problem)
        if time.monotonic() >= began_s + seconds:
            return solution


@contextmanager
def slowly(port: int) -> Iterator[tuple[int, Callable[[float], None]]]:
    """A port that leads to the database, and what sets how long its answers take."""
    proxy = subprocess.Popen(
        [sys.executable, "-c", PROXY, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert proxy.stdin is not None
    assert proxy.stdout is not None
    slow = proxy.stdin

    def answer_after(seconds: float) -> None:
        slow.write(f"{seconds}\n")
        slow.flush()

    try:
        yield int(proxy.stdout.readline()), answer_after
    finally:
        proxy.kill()
        proxy.wait()
        proxy.stdin.close()
        proxy.stdout.close()


def see(runtime: Runtime, clock: SystemClock, second: int) -> None:
    """A sample of every node and a load report."""
    for node in range(NODES):
        gpus = tuple(GpuObservation(f"g{node}-{i}", i, True, 300.0, 300.0 * second, 1200, None) for i in range(8))
        instances = tuple(
            InstanceObservation(
                f"i{node}-{slot}", MODEL, "all", (f"g{node}-{2 * slot}", f"g{node}-{2 * slot + 1}"),
                InstanceState.READY, f"http://{node}-{slot}", float((node + slot + second) % 9), 0.0, 0.1,
            )
            for slot in range(4)
        )  # fmt: skip
        runtime.sink(NodeSeen(NodeObservation(f"n{node}", clock.monotonic_s(), gpus, instances)))
    counts = ClassCounters(20 * second, 20 * second, 0, 20 * second, 10_000 * second, 3_000 * second)
    runtime.sink(LoadSeen(LoadObservation("g", "1", clock.monotonic_s(), MODEL, {MS: counts}, {})))


def measure(server: Postgres, folder: Path, seconds: float, solve: Solve | None = None) -> Lateness:
    """Over so many seconds of one solve: of the real solver, unless another one is given."""
    solver = Solver(solve or partial(solve_long, seconds + SETTLE_S))
    url = server.new_database()
    engine = open_engine(url)
    migrate.upgrade(engine)
    engine.dispose()
    with slowly(server.port) as (port, answer_after):
        slow_url = url.replace(f":{server.port}/", f":{port}/")
        return asyncio.run(_measure(slow_url, answer_after, folder, seconds, solver))


async def _measure(
    url: str, answer_after: Callable[[float], None], folder: Path, seconds: float, solver: Solver
) -> Lateness:
    clock, stop, waiting = SystemClock(), asyncio.Event(), Waiting()
    late_s, own_s = list[float](), list[float]()
    keeper = await take_lead(url, "test", stop, lambda _: None, lambda: None)
    assert keeper is not None
    recorder = await asyncio.to_thread(open_recorder, url, folder)
    core = JournaledCore(SETTINGS, synthetic_profile(), keeper.lead.term, NODES)
    core.keep_journal(recorder.record, folder / "frame")

    def ticked(level: Level, seconds: float) -> None:
        if level is Level.INSTANCE:
            late_s.append(seconds)
            waiting.look()
            own_s.append(max(0.0, seconds - waiting.since_s(time.monotonic() - seconds)))

    runtime = Runtime(core, {}, RoutingHub(), recorder.record, clock, 2.0, keeper=keeper, on_tick=ticked, solver=solver)
    engine = open_engine(url)

    async def ask() -> None:
        while True:
            with suppress(StoreUnavailable):
                await asyncio.to_thread(list_decisions, engine, limit=10)

    tasks = [
        asyncio.create_task(runtime.run(stop)),
        asyncio.create_task(waiting.watch()),
        asyncio.create_task(keeper.keep(stop.set)),
        asyncio.create_task(run_trials(Trials(runtime, engine, clock))),
        *(asyncio.create_task(ask()) for _ in range(CLIENTS)),
    ]
    see(runtime, clock, 0)
    answer_after(ANSWER_S)
    await asyncio.sleep(SETTLE_S)
    late_s.clear()
    own_s.clear()
    command = [sys.executable, "-c", IDLE, str(seconds - 1)]
    idle = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    began_s = time.monotonic()
    for second in range(1, int(seconds)):
        see(runtime, clock, second)
        await asyncio.sleep(began_s + second - time.monotonic())
    solving = bool(core.state.solving)
    said, _ = await idle.communicate()
    assert not stop.is_set(), "the lead was lost"
    answer_after(0.0)
    stop.set()
    for task in tasks[1:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(recorder.close)
    engine.dispose()
    return Lateness(sorted(late_s), sorted(own_s), solving, core.state.decision_numbers, float(said))
