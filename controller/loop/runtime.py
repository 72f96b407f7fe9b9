"""Drives the core on a real fleet: APScheduler ticks, agents' observations, effects, recording, leadership.

One asyncio loop owns the core; nothing else touches it. Solving runs in a process of its own (loop/solver.py), database
writes in the recorder's thread, calls to agents as tasks: a slow one of these never delays the next tick.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import floor
from typing import Any, Protocol

from apscheduler.events import (
    EVENT_JOB_ERROR,
    EVENT_JOB_MISSED,
    EVENT_JOB_SUBMITTED,
    JobExecutionEvent,
    JobSubmissionEvent,
)
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from common.clock import Clock
from common.logs import get_logger
from controller.api.routing_hub import RoutingHub
from controller.domain.classes import RequestClass
from controller.domain.decision import Decision
from controller.domain.layout import Layout
from controller.domain.reasons import Level
from controller.fleet.engines import EngineWatch
from controller.fleet.grpc import AgentClient
from controller.fleet.port import (
    ApplyCaps,
    ApplyClocks,
    CapTarget,
    ClockTarget,
    DrainInstance,
    Effect,
    EffectDone,
    Event,
    InstanceState,
    LoadSeen,
    NodeEffect,
    NodeObservation,
    NodeSeen,
    PowerNode,
    PublishRouting,
    ReleaseCaps,
    ReleaseClocks,
    Solve,
    StartInstance,
    StopInstance,
    Tick,
)
from controller.fleet.provisioner import PowerHook
from controller.loop.accounting import EnergyBook
from controller.loop.failing import FailingCalls, News
from controller.loop.history import ForecastLog, OutcomeBook, TransitionLog, WindowBook
from controller.loop.journal import JournaledCore
from controller.loop.latency import ClassLatency, LatencyBook
from controller.loop.load import LoadBook
from controller.loop.measured import PowerBook
from controller.loop.orders import CLUSTER_SCOPE, NoteEngines, Order, SetMode, SetPowerBudget
from controller.loop.planning import counts_json, transition_pending
from controller.loop.profile_in_use import curves_of
from controller.loop.solver import Solver, SolverFailed
from controller.loop.state import Instant, State
from controller.policy.provision import NodePower
from controller.store.records import ActionKind, ActionRecord, NodeRecord, OrderKind, OrderRecord, PlanRecord, Record

_log = get_logger(__name__)

_KINDS: dict[type[Effect], ActionKind] = {
    ApplyClocks: ActionKind.APPLY_CLOCKS,
    ReleaseClocks: ActionKind.RELEASE_CLOCKS,
    ApplyCaps: ActionKind.APPLY_CAPS,
    ReleaseCaps: ActionKind.RELEASE_CAPS,
    PowerNode: ActionKind.POWER_NODE,
    StartInstance: ActionKind.START_INSTANCE,
    DrainInstance: ActionKind.DRAIN_INSTANCE,
    StopInstance: ActionKind.STOP_INSTANCE,
}


_ENGINES_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class _Ordered:
    """An order in the queue; `taken` is told when the core has it."""

    order: Order
    taken: asyncio.Future[None] | None


class Keeper(Protocol):
    """What tells whether this controller still leads (controller/leading.py)."""

    @property
    def sure(self) -> bool: ...

    def superseded(self) -> None: ...


class Runtime:
    """One controller's loop. `record` must neither block nor raise (controller/store/recorder.py)."""

    def __init__(
        self,
        core: JournaledCore,
        agents: dict[str, AgentClient],
        hub: RoutingHub,
        record: Callable[[Record], None],
        clock: Clock,
        telemetry_window_s: float,
        on_decision: Callable[[Decision], None] = lambda _: None,
        keeper: Keeper | None = None,
        on_tick: Callable[[Level, float], None] = lambda _, __: None,
        hook: PowerHook | None = None,
        solver: Solver | None = None,
    ) -> None:
        settings, term = core.state.settings, core.state.term
        self._core = core
        self._agents = agents
        self._hub = hub
        self._record = record
        self._clock = clock
        self._on_decision = on_decision
        self._keeper = keeper
        self._hook = hook
        self._on_tick = on_tick
        self._due_s: dict[Level, float] = {}
        self._events: asyncio.Queue[Event | _Ordered] = asyncio.Queue()
        self._orders = 0
        self._windows = WindowBook(term, settings.model, telemetry_window_s)
        self._energy = EnergyBook(core.state.pool_of)
        self._outcomes = OutcomeBook(max(60.0, settings.instance_s))
        self._latencies = LatencyBook()
        self._measured = PowerBook(curves_of(settings, core.state.profile), telemetry_window_s)
        self._engines = EngineWatch(core.state.profile.engine)
        self._engines_asked_s = 0.0
        self._powered: dict[str, NodePower] = {}
        self._noted: dict[str, int] = {}  # nodes in the history, with the GPUs they had
        self._reports = LoadBook(keep_s=telemetry_window_s)
        self._transitions = TransitionLog(term, settings.model)
        self._forecasts = ForecastLog(term, settings.model)
        self._scheduler = AsyncIOScheduler()
        self._solver = solver or Solver()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_said: dict[Level, str] = {}
        self._last_asked: dict[tuple[str, str], tuple[ClockTarget | CapTarget, ...]] = {}
        self._failing = FailingCalls()
        self.missed_ticks = 0

    @property
    def state(self) -> State:
        return self._core.state

    @property
    def failed_actions(self) -> Mapping[tuple[str, str], int]:
        """How many calls have failed, by node and kind."""
        return dict(self._failing.counts)

    def sink(self, event: Event) -> None:
        """Takes an observation from within the event loop."""
        self._events.put_nowait(coarse(event))

    async def order(
        self, kind: OrderKind, order: Order, value: str, who: str, why: str, until_s: float | None = None
    ) -> None:
        """Keeps who gave an order; returns when the core has taken it."""
        self._orders += 1
        scope = order.scope if isinstance(order, SetMode | SetPowerBudget) else CLUSTER_SCOPE
        now_s = self._clock.wall_s()
        self._write([OrderRecord(self.state.term, self._orders, now_s, kind, scope, value, who, why, until_s)])
        _log.info("order", kind=str(kind), scope=scope, value=value, who=who, why=why)
        taken = asyncio.get_running_loop().create_future()
        self._events.put_nowait(_Ordered(order, taken))
        await taken

    def now(self) -> Instant:
        return self._now()

    def restore(self, orders: Iterable[Order]) -> None:
        """Gives the core the orders that still hold from before; they are in the history already."""
        for order in orders:
            self._events.put_nowait(_Ordered(order, None))

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set. Locks are left to their leases: a restart within the TTL keeps the saving."""
        self._schedule()
        for agent in self._agents.values():
            agent.start()
        worker = asyncio.create_task(self._work())
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait({worker, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if worker in done:
                worker.result()  # a defect in the core: let it end the process, systemd restarts it
        finally:
            self._scheduler.shutdown(wait=False)
            for task in (worker, stopping, *self._tasks):
                task.cancel()
            await asyncio.gather(worker, stopping, *self._tasks, return_exceptions=True)
            await asyncio.gather(*(agent.close() for agent in self._agents.values()))
            await self._solver.close()
            self._write(self._windows.close_due(self._now(), force=True))
            self._core.close_journal(self._now())

    def _schedule(self) -> None:
        settings = self.state.settings
        periods = {
            Level.INSTANCE: settings.instance_s,
            Level.POOL: settings.pool_s,
            Level.CLUSTER: settings.cluster_s,
        }
        for level, period_s in periods.items():
            self._scheduler.add_job(
                self._due,
                "interval",
                args=[level],
                seconds=period_s,
                id=level.value,
                coalesce=True,
                max_instances=1,
                # A late tick is still worth a decision until the next one is due; the default of 1 s drops it silently.
                misfire_grace_time=max(1, int(period_s)),
            )
        self._scheduler.add_listener(self._tick_due, EVENT_JOB_SUBMITTED)
        self._scheduler.add_listener(self._tick_lost, EVENT_JOB_MISSED | EVENT_JOB_ERROR)
        self._scheduler.start()

    async def _due(self, level: Level) -> None:
        # A coroutine: APScheduler runs plain functions in asyncio's threads, where they wait for those that wait for
        # the database.
        self._events.put_nowait(Tick(level))

    def _tick_due(self, event: JobSubmissionEvent) -> None:
        late_s = self._clock.wall_s() - event.scheduled_run_times[-1].timestamp()
        self._due_s.setdefault(Level(event.job_id), time.monotonic() - max(0.0, late_s))

    def _tick_lost(self, event: JobExecutionEvent) -> None:
        self.missed_ticks += 1
        _log.warning("tick_lost", manager=event.job_id, error=str(event.exception or "missed"))

    async def _work(self) -> None:
        while True:
            event = await self._events.get()
            before = self.state.layout
            if isinstance(event, _Ordered):
                step = self._core.order(self._now(), event.order)
                if event.taken is not None and not event.taken.done():
                    event.taken.set_result(None)
            else:
                self._observe(event)
                step = self._core.handle(self._now(), event)
            for decision in step.decisions:
                self._take_decision(decision, before)
            self._note_power()
            for effect in step.effects:
                self._begin(effect)
            if step.tick_early:
                self._events.put_nowait(Tick(Level.INSTANCE, early=True))
            if isinstance(event, Tick) and not event.early:
                self._after_tick()
                due_s = self._due_s.pop(event.level, None)
                if due_s is not None:
                    self._on_tick(event.level, time.monotonic() - due_s)

    def _observe(self, event: Event) -> None:
        match event:
            case NodeSeen():
                routed = {item.instance_id: self.state.pool_of(item) for item in event.observation.instances}
                self._measured.observe(event.observation, routed)
                for entry in self._energy.add(event.observation):
                    self._windows.add(entry)
                    self._outcomes.add(entry)
                    self._measured.spent(entry)
                self._note_node(event.observation)
            case LoadSeen() if event.observation.model == self.state.settings.model:
                window = self._reports.add(event.observation)
                if window is not None:
                    self._windows.add_load(window)
                    self._outcomes.add_load(window, self._pool_classes())

    def latency(self, gateway_id: str, epoch: str, request_class: RequestClass, seen: ClassLatency) -> None:
        """Takes what a gateway has measured of one class since its start: for the history alone."""
        fresh = self._latencies.add(gateway_id, epoch, str(request_class), seen)
        if fresh is not None:
            self._windows.add_latency(request_class, fresh)
            self._outcomes.add_latency(request_class, fresh, self._pool_classes())

    def _pool_classes(self) -> dict[str, frozenset[RequestClass]]:
        return {name: plan.group.classes for name, plan in self.state.pools.items()}

    def _note_node(self, seen: NodeObservation) -> None:
        if self._noted.get(seen.node_id) != len(seen.gpus):
            self._noted[seen.node_id] = len(seen.gpus)
            agent = self._agents.get(seen.node_id)
            address = agent.address if agent is not None else ""
            self._write([NodeRecord(seen.node_id, self._clock.wall_s(), len(seen.gpus), address)])

    def _take_decision(self, decision: Decision, before: Layout) -> None:
        self._write([decision, *self._outcomes.decided(decision, self._now())])
        self._on_decision(decision)
        plan = decision.outcome.get("plan")
        if plan is not None and decision.outcome.get("accepted"):
            self._write(
                [PlanRecord(decision.term, decision.number, decision.decided_at_s, self.state.layout, plan["pools"])]
            )
            was, after = (counts_json(layout.counts()) for layout in (before, self.state.layout))
            if after != was:
                self._write(self._transitions.began(decision, self._now(), was, after))
        # One sentence per decision of the slow levels; the fast one is said only when it is new.
        if decision.level is not Level.INSTANCE or self._last_said.get(decision.level) != decision.sentence:
            _log.info(decision.sentence, manager=str(decision.level))
        self._last_said[decision.level] = decision.sentence

    def _after_tick(self) -> None:
        if self.state.pools and not transition_pending(self.state):
            self._write(self._transitions.settled(self._now()))
        self._write(self._windows.close_due(self._now()))
        self._write(self._outcomes.close_due(self._now()))
        self._write(self._forecasts.judged(self.state.forecast_errors, self._now()))
        now_s, state = self._clock.monotonic_s(), self.state
        correction = self._measured.close_due(now_s, state.corrections, frozenset(state.drifted))
        if correction is not None:
            self._events.put_nowait(_Ordered(correction, None))
        if now_s - self._engines_asked_s >= _ENGINES_EVERY_S:
            self._engines_asked_s = now_s
            self._spawn(self._look_at_engines())

    async def _look_at_engines(self) -> None:
        seen = self.state.instances().values()
        ready = {i.instance_id: i.endpoint for _, i in seen if i.state is InstanceState.READY and i.endpoint}
        foreign = await self._engines.look(ready)
        # With no engine left to ask, what was found stands.
        if ready and foreign != self.state.foreign_engines:
            self._events.put_nowait(_Ordered(NoteEngines(foreign), None))

    def _note_power(self) -> None:
        """A node that is off must not be taken for lost by the next controller."""
        for node_id, powered in self.state.powered.items():
            if self._powered.get(node_id) is not powered.power:
                self._powered[node_id] = powered.power
                agent = self._agents.get(node_id)
                gpus, address = self._noted.get(node_id, 0), agent.address if agent is not None else ""
                self._write([NodeRecord(node_id, self._clock.wall_s(), gpus, address, {"power": powered.power.value})])
                _log.info("node_power", node=node_id, power=powered.power.value)

    def _begin(self, effect: Effect) -> None:
        match effect:
            case PublishRouting():
                if self._keeper is None or self._keeper.sure:
                    self._hub.publish(effect.table)
                self.sink(EffectDone(effect.effect_id, ok=True))
            case Solve():
                self._spawn(self._solve(effect))
            case _:
                self._spawn(self._execute(effect))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _solve(self, effect: Solve) -> None:
        try:
            solution = await self._solver.solve(effect.problem)
        except SolverFailed as error:
            _log.error("not_solved", problem=effect.problem.problem_id, detail=str(error))
            self.sink(EffectDone(effect.effect_id, ok=False, detail=str(error)))
            return
        self.sink(EffectDone(effect.effect_id, ok=solution.chosen is not None, solution=solution))

    async def _execute(self, effect: NodeEffect) -> None:
        started_at_s, started = self._clock.wall_s(), time.monotonic()
        agent = self._agents.get(effect.node_id)
        if self._keeper is not None and not self._keeper.sure:
            done = EffectDone(effect.effect_id, ok=False, detail="not sent: this controller may no longer lead")
        elif isinstance(effect, PowerNode):
            wrong = await self._hook.run(effect.node_id, effect.on) if self._hook else "no hook is configured"
            done = EffectDone(effect.effect_id, ok=not wrong, detail=wrong)
        elif agent is None:
            done = EffectDone(effect.effect_id, ok=False, detail=f"no agent {effect.node_id} is configured")
        else:
            done = await agent.execute(effect)
        if self._keeper is not None and not done.ok and "no longer the leader" in done.detail:
            self._keeper.superseded()
        self.sink(done)
        kind = _KINDS[type(effect)].value
        news = self._failing.ended(effect.node_id, kind, done.ok, done.detail)
        if news is News.FAILS:
            _log.warning("effect_failed", kind=kind, node=effect.node_id, detail=done.detail)
        elif news is News.GOES_AGAIN:
            _log.info("effect_goes_again", kind=kind, node=effect.node_id)
        if isinstance(effect, ApplyClocks | ApplyCaps):
            same = self._last_asked.get((kind, effect.node_id)) == effect.targets
            self._last_asked[kind, effect.node_id] = effect.targets
            if same and news is News.NONE and not getattr(effect, "protects", False):
                return  # a mere renewal, or one that fails as the one before did: history keeps changes
        self._write([_action(self.state.term, effect, done, started_at_s, time.monotonic() - started)])

    def _write(self, records: Iterable[Record]) -> None:
        for record in records:
            self._record(record)

    def _now(self) -> Instant:
        # To the microsecond, as databases keep times: more digits would only fill the journal.
        return Instant(round(self._clock.monotonic_s(), 6), round(self._clock.wall_s(), 6))


def keep_collections_short() -> None:
    """To be called when all is loaded: Python's garbage collector does not look at it any more. A look at all of it
    takes a tenth of a second, in which nothing else runs."""
    gc.collect()
    gc.freeze()


def coarse(event: Event) -> Event:
    """An observation in numbers no finer than decisions need, so that the journal of a large fleet stays small."""
    match event:
        case NodeSeen(seen):
            instances = tuple(
                replace(item, kv_usage_ratio=round(item.kv_usage_ratio, 2)) if item.kv_usage_ratio is not None else item
                for item in seen.instances
            )
            # Never later than it was: data must not look fresher than it is.
            seen_s = floor(seen.observed_at_s * 10) / 10
            return NodeSeen(replace(seen, observed_at_s=seen_s, instances=instances))
        case LoadSeen(report):
            queues = {
                pool: replace(queue, oldest_wait_s=round(queue.oldest_wait_s, 3))
                for pool, queue in report.queues.items()
            }
            return LoadSeen(replace(report, observed_at_s=round(report.observed_at_s, 3), queues=queues))
        case _:
            return event


def _action(term: int, effect: NodeEffect, done: EffectDone, started_at_s: float, duration_s: float) -> ActionRecord:
    asked = asdict(effect)
    for key in ("effect_id", "node_id", "instance_id"):
        asked.pop(key, None)
    gpus = (
        sum(len(target.gpu_uuids) for target in effect.targets)
        if isinstance(effect, ApplyClocks | ApplyCaps)
        else len(getattr(effect, "gpu_uuids", ()))
    )
    return ActionRecord(
        term=term,
        effect_id=effect.effect_id,
        kind=_KINDS[type(effect)],
        started_at_s=started_at_s,
        duration_s=duration_s,
        ok=done.ok,
        detail=done.detail,
        node_id=effect.node_id,
        instance_id=getattr(effect, "instance_id", ""),
        gpus=gpus,
        asked=asked,
    )
