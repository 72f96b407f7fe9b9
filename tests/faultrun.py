"""One controller's life under faults, in virtual time, from a seed: what fails, when, and what must hold all the same.

    report = run(seed)     # report.broken is empty, or says what was broken when; the same seed gives the same run

Agents die, hang, fall silent, come back; starts fail; GPUs break; controllers are killed, frozen and wake again beside
their successor; the wall clock jumps; the database loses the last plan; load jumps. After every event the invariants
are checked, and after a quiet time at the end the fleet must carry its load again. Used by tests/faults and the bench.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode
from controller.fleet.port import (
    HOLDS_GPUS,
    ApplyClocks,
    ClassCounters,
    DrainInstance,
    Effect,
    EffectDone,
    Event,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    PublishRouting,
    ReleaseClocks,
    RoutingTable,
    Solve,
    StartInstance,
    StopInstance,
    Tick,
)
from controller.loop.journal import JournaledCore
from controller.loop.orders import Order, PlanNow, SetMode
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.policy.milp.model import solve
from controller.policy.routing import pools_for
from controller.profile.table import Profile
from controller.store.records import PlanRecord, Record
from tests.synthetic_profile import MODEL, synthetic_profile

NODES, GPUS = 3, 8
FAULTY_S, QUIET_S = 420.0, 150.0
# After this long without a new fault, what can be carried is carried: a node counts as lost, a plan, a start, slack.
CALM_S = 90.0
START_S, STOP_S, REPLY_S = 12.0, 2.0, 0.05
WALL_S = 1.8e9
MS, LM = RequestClass.parse("MS"), RequestClass.parse("LM")
PROFILE = Profile.from_json(synthetic_profile(START_S).to_json())
SETTINGS = LoopSettings(
    model=MODEL,
    cluster_s=90,
    pool_s=30,
    instance_s=5,
    lease_ttl_s=20,
    rpc_deadline_s=4,
    load_window_s=10,
    stale_s=15,
    lost_s=40,
    min_dwell_s=20,
    start_s=START_S,
    initial_rps={MS: 1.0, LM: 0.5},
)


@dataclass
class Engine:
    """One instance as its host knows it."""

    instance_id: str
    pool: str
    gpus: tuple[str, ...]
    state: InstanceState
    due_s: float = 0.0  # of the end of what is under way
    running: float = 0.0
    fails: bool = False
    ordered_off: bool = False  # a controller stopped it, it did not die


@dataclass
class Host:
    """A node agent and its engines."""

    node_id: str
    engines: dict[str, Engine] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    locks: dict[str, tuple[int, float]] = field(default_factory=dict)  # GPU -> MHz, until
    term: int = 0
    up: bool = True  # the agent's process
    heard: bool = True  # its telemetry gets through
    hangs: bool = False  # it answers no call

    @property
    def gpus(self) -> list[str]:
        return [f"{self.node_id}-g{i}" for i in range(GPUS)]


@dataclass
class Life:
    """One controller process."""

    core: JournaledCore
    term: int
    alive: bool = True
    frozen_until_s: float = 0.0
    held: list[Event] = field(default_factory=list)  # what waits in its queue while it is frozen


@dataclass
class Report:
    seed: int
    broken: list[str] = field(default_factory=list)
    faults: int = 0
    decisions: int = 0
    effects: int = 0
    refused: int = 0  # by agents: an old term, or GPUs that are held
    events: int = 0
    history: list[Decision] = field(default_factory=list)
    inputs: list[Record] = field(default_factory=list)


def run(seed: int) -> Report:
    return Run(seed).go()


class Run:
    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.report = Report(seed)
        self.now_s = 0.0
        self.wall_offset_s = WALL_S
        self.order = count()
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.hosts = {f"n{i}": Host(f"n{i}") for i in range(NODES)}
        self.table: RoutingTable | None = None
        self.rates = {MS: 3.0, LM: 1.5}
        self.arrived = {MS: 0.0, LM: 0.0}
        self.epoch = 1
        self.reporting = True
        self.plans: list[PlanRecord] = []
        self.lives: list[Life] = []
        self.calm_since_s = 0.0

    # ------------------------------------------------------------------------------------------------- the run

    def go(self) -> Report:
        self.begin_life()
        for number, host in enumerate(self.hosts.values()):
            self.at(0.1 * number, self.telemetry, host)
        self.at(0.5, self.gateway)
        for level, period_s in ((Level.INSTANCE, 5.0), (Level.POOL, 30.0), (Level.CLUSTER, 90.0)):
            self.at(period_s, self.tick, level, period_s)
        self.at(30.0, self.fault)
        end_s = FAULTY_S + QUIET_S
        while self.heap and self.heap[0][0] <= end_s and not self.report.broken:
            self.now_s, _, act, arguments = heapq.heappop(self.heap)
            act(*arguments)
            self.report.events += 1
            self.check()
        if not self.report.broken:
            self.check_recovery()
        for life in self.lives:
            life.core.close_journal(self.instant())
        return self.report

    def at(self, at_s: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.heap, (at_s, next(self.order), act, arguments))

    def instant(self) -> Instant:
        return Instant(self.now_s, self.wall_offset_s + self.now_s)

    def breaks(self, what: str) -> None:
        self.report.broken.append(f"seed {self.report.seed}, {self.now_s:.2f} s: {what}")

    # ------------------------------------------------------------------------------------------- the controllers

    @property
    def leader(self) -> Life:
        return self.lives[-1]

    def begin_life(self) -> None:
        """A new controller under a new term; the plan it finds may be an older one, if the database lost the last."""
        self.calm_since_s = self.now_s
        plan = None
        if self.plans:
            lost = self.chance.random() < 0.3
            plan = self.plans[-2] if lost and len(self.plans) > 1 else self.plans[-1]
        term = len(self.lives) + 1
        core = JournaledCore(SETTINGS, PROFILE, term=term, expected_nodes=NODES, plan=plan)
        core.keep_journal(self.report.inputs.append)
        self.lives.append(Life(core, term))

    def told(self, life: Life, event: Event) -> None:
        if not life.alive:
            return
        if self.now_s < life.frozen_until_s:
            life.held.append(event)
            return
        self.took(life, life.core.handle(self.instant(), event))

    def took(self, life: Life, step: Any) -> None:
        self.report.decisions += len(step.decisions)
        self.report.history += step.decisions
        for decision in step.decisions:
            plan = decision.outcome.get("plan")
            if plan is not None and decision.outcome.get("accepted"):
                self.plans.append(PlanRecord(life.term, decision.number, 0.0, life.core.state.layout, plan["pools"]))
        for effect in step.effects:
            self.report.effects += 1
            self.carry_out(life, effect)

    def everyone(self, event: Event) -> None:
        for life in self.lives:
            self.told(life, event)

    def tick(self, level: Level, period_s: float) -> None:
        for life in self.lives:
            self.told(life, Tick(level))
        self.at(self.now_s + period_s, self.tick, level, period_s)

    def wakes(self, life: Life) -> None:
        """A frozen controller finds everything in its queue at once. (What asks the database first is left out on
        purpose: the fence alone must hold.)"""
        held, life.held = life.held, []
        for event in held:
            self.told(life, event)
        if life is not self.leader:
            self.at(self.now_s + self.chance.uniform(2, 12), self.dies, life)

    def dies(self, life: Life) -> None:
        life.alive = False

    # --------------------------------------------------------------------------------------------------- effects

    def carry_out(self, life: Life, effect: Effect) -> None:
        if isinstance(effect, Solve):
            solution = solve(effect.problem)
            done = EffectDone(effect.effect_id, solution.chosen is not None, solution=solution)
            self.at(self.now_s + self.chance.uniform(0.05, 3.0), self.told, life, done)
            return
        if isinstance(effect, PublishRouting):
            if (
                self.table is None
                or effect.table.term > self.table.term
                or (effect.table.term == self.table.term and effect.table.version > self.table.version)
            ):
                self.table = effect.table
            self.at(self.now_s, self.told, life, EffectDone(effect.effect_id, ok=True))
            return
        host = self.hosts[effect.node_id]
        delay_s = REPLY_S
        if host.hangs or not host.up:
            wrong, delay_s = "UNAVAILABLE", SETTINGS.rpc_deadline_s
        else:
            wrong = self.obey(host, life.term, effect)
        self.report.refused += bool(wrong)
        self.at(self.now_s + delay_s, self.told, life, EffectDone(effect.effect_id, ok=not wrong, detail=wrong))

    def obey(self, host: Host, term: int, effect: Effect) -> str:
        """As the agent does: the fence first."""
        if term < host.term:
            return f"term {term} is older than {host.term}"
        host.term = term
        match effect:
            case ApplyClocks():
                if 3 * SETTINGS.instance_s > effect.ttl_s:
                    self.breaks("a lease that a late tick lets expire")
                for target in effect.targets:
                    for uuid in target.gpu_uuids:
                        host.locks[uuid] = (target.mhz, self.now_s + effect.ttl_s)
            case ReleaseClocks():
                for uuid in effect.gpu_uuids:
                    host.locks.pop(uuid, None)
            case StartInstance():
                return self.start(host, effect)
            case DrainInstance():
                engine = host.engines.get(effect.instance_id)
                if engine is None or engine.state is not InstanceState.READY:
                    return "not ready"
                engine.state = InstanceState.DRAINING
                engine.ordered_off = True
            case StopInstance():
                engine = host.engines.get(effect.instance_id)
                if engine is None:
                    return "there is no such instance"
                if engine.running > 0.5:
                    return "it still has work"
                engine.state, engine.due_s, engine.ordered_off = InstanceState.STOPPING, self.now_s + STOP_S, True
        return ""

    def start(self, host: Host, effect: StartInstance) -> str:
        known = host.engines.get(effect.instance_id)
        if known is not None and known.state in HOLDS_GPUS:
            return ""  # one that has ended may be started again
        if not set(effect.gpu_uuids) <= set(host.gpus):
            self.breaks(f"{effect.instance_id} was to start on GPUs that {host.node_id} does not have")
        held = {u for e in host.engines.values() if e.state in HOLDS_GPUS for u in e.gpus}
        if held & set(effect.gpu_uuids):
            return "a GPU is held by another instance"
        host.engines[effect.instance_id] = Engine(
            effect.instance_id,
            effect.pool,
            effect.gpu_uuids,
            InstanceState.STARTING,
            self.now_s + START_S * self.chance.uniform(0.8, 1.3),
            fails=(self.now_s < FAULTY_S and self.chance.random() < 0.1) or bool(host.bad & set(effect.gpu_uuids)),
        )
        return ""

    # ------------------------------------------------------------------------------------------------ the hosts

    def telemetry(self, host: Host) -> None:
        for engine in list(host.engines.values()):
            if engine.state is InstanceState.STARTING and self.now_s >= engine.due_s:
                engine.state = InstanceState.FAILED if engine.fails else InstanceState.READY
            elif engine.state is InstanceState.STOPPING and self.now_s >= engine.due_s:
                engine.state = InstanceState.STOPPED
            # Requests take some seconds.
            engine.running = max(0.0, engine.running * 0.8 - 0.05)
        for uuid, (_, until_s) in list(host.locks.items()):
            if until_s <= self.now_s:
                del host.locks[uuid]
        if host.up and host.heard:
            self.everyone(NodeSeen(self.observation(host)))
            for engine in list(host.engines.values()):
                if engine.state is InstanceState.STOPPED:  # shown once, then forgotten
                    del host.engines[engine.instance_id]
        self.at(self.now_s + 1.0, self.telemetry, host)

    def observation(self, host: Host) -> NodeObservation:
        gpus = tuple(
            GpuObservation(uuid, i, uuid not in host.bad, 100.0, self.now_s * 100, 1000, None)
            for i, uuid in enumerate(host.gpus)
        )
        instances = tuple(
            InstanceObservation(
                e.instance_id, MODEL, e.pool, e.gpus, e.state, f"http://{e.instance_id}", round(e.running), 0.0,
                round(e.running / 100, 2), "", {"start": START_S} if e.state is InstanceState.READY else {},
            )
            for e in host.engines.values()
        )  # fmt: skip
        return NodeObservation(host.node_id, self.now_s, gpus, instances)

    def gateway(self) -> None:
        """A second of requests by the routing in force, and the report."""
        for request_class, rate in self.rates.items():
            self.arrived[request_class] += rate
            self.route(request_class, rate)
        if self.reporting:
            counters = {
                c: ClassCounters(int(n), int(n), 0, int(n), 500 * int(n), 150 * int(n)) for c, n in self.arrived.items()
            }
            self.everyone(LoadSeen(LoadObservation("g", str(self.epoch), self.now_s, MODEL, counters, {})))
        self.at(self.now_s + 1.0, self.gateway)

    def route(self, request_class: RequestClass, requests: float) -> None:
        if self.table is None:
            return
        engines = {e.instance_id: e for host in self.hosts.values() for e in host.engines.values()}
        for pool in pools_for(self.table.pools, request_class):
            open_to = [i for i in pool.instances if i.accepts_new]
            total = sum(i.weight for i in open_to)
            if not total:
                continue
            for item in open_to:
                engine = engines.get(item.instance_id)
                if engine is not None and engine.state is InstanceState.READY:
                    engine.running += requests * item.weight / total
                elif engine is not None and engine.ordered_off and engine.state is not InstanceState.DRAINING:
                    self.breaks(f"a request was sent to {item.instance_id}, which a controller had stopped")
            return

    # --------------------------------------------------------------------------------------------------- faults

    def fault(self) -> None:
        if self.now_s >= FAULTY_S:
            self.heal()
            return
        self.report.faults += 1
        self.calm_since_s = self.now_s
        host = self.chance.choice(list(self.hosts.values()))
        back_s = self.now_s + self.chance.choice((self.chance.uniform(3, 70), self.chance.uniform(120, 250)))
        kind = self.chance.choice(
            ("agent", "silence", "hang", "gpu", "engine", "controller", "freeze", "clock", "load", "reports", "gateway",
             "mode", "plan", "reboot")
        )  # fmt: skip
        match kind:
            case "agent":
                host.up = False
                host.locks.clear()  # what its unit runs after a death restores the clocks
                self.at(back_s, self.back, host, "up", True)
            case "silence":
                host.heard = False
                self.at(back_s, self.back, host, "heard", True)
            case "hang":
                host.hangs = True
                self.at(back_s, self.back, host, "hangs", False)
            case "gpu":
                uuid = self.chance.choice(host.gpus)
                host.bad.add(uuid)
                for engine in host.engines.values():
                    if uuid in engine.gpus and engine.state in HOLDS_GPUS:
                        engine.state, engine.running = InstanceState.FAILED, 0.0
                self.at(back_s, host.bad.discard, uuid)
            case "engine":
                alive = [e for e in host.engines.values() if e.state is InstanceState.READY]
                if alive:
                    dead = self.chance.choice(alive)
                    dead.state, dead.running = InstanceState.FAILED, 0.0
            case "reboot":
                host.engines.clear()
                host.locks.clear()
                host.up = False
                self.at(back_s, self.back, host, "up", True)
            case "controller":
                self.dies(self.leader)
                self.at(self.now_s + self.chance.uniform(1, 15), self.begin_life)
            case "freeze" if self.now_s >= self.leader.frozen_until_s:
                frozen = self.leader
                frozen.frozen_until_s = self.now_s + self.chance.uniform(12, 60)
                self.at(frozen.frozen_until_s, self.wakes, frozen)
                if self.chance.random() < 0.7:  # long enough for another to take over
                    self.at(self.now_s + 10.5, self.begin_life)
            case "clock":
                self.wall_offset_s += self.chance.choice((-3600.0, -1.0, 30.0, 86_400.0))
            case "load":
                factor = self.chance.choice((0.05, 0.3, 2.0, 4.0))
                self.rates = {c: min(3.0, max(0.05, r * factor)) for c, r in self.rates.items()}
            case "reports":
                self.reporting = False
                self.at(back_s, self.back, self, "reporting", True)
            case "gateway":
                self.epoch += 1
                self.arrived = dict.fromkeys(self.arrived, 0.0)
            case "mode":
                scope = self.chance.choice(("cluster", "pool:short", "pool:all", f"node:{host.node_id}"))
                self.ordered(SetMode(scope, self.chance.choice((Mode.ADVISORY, Mode.PAUSED))))
                self.at(back_s, self.ordered, SetMode(scope, Mode.ACTIVE))
            case "plan":
                self.ordered(PlanNow("operator"))
        # In bursts, with room between them to come to rest.
        pause_s = self.chance.expovariate(1 / 6) if self.chance.random() < 0.75 else self.chance.uniform(91, 120)
        self.at(min(self.now_s + pause_s, FAULTY_S), self.fault)

    def back(self, thing: object, name: str, value: bool) -> None:
        setattr(thing, name, value)
        self.calm_since_s = self.now_s

    def ordered(self, order: Order) -> None:
        life = self.leader
        self.calm_since_s = self.now_s
        if life.alive and self.now_s >= life.frozen_until_s:
            self.took(life, life.core.order(self.instant(), order))

    def heal(self) -> None:
        """From here on nothing fails; what is still to come back comes back now."""
        for host in self.hosts.values():
            host.up = host.heard = True
            host.hangs = False
            host.bad.clear()
        self.reporting = True
        for life in self.lives[:-1]:
            life.alive = False
        self.leader.frozen_until_s = 0.0
        self.wakes(self.leader)
        if not self.leader.alive:
            self.begin_life()
        for scope in ("cluster", *self.leader.core.state.modes):
            self.ordered(SetMode(scope, Mode.ACTIVE))
        self.rates = {c: min(rate, 1.5) for c, rate in self.rates.items()}

    # ----------------------------------------------------------------------------------------------- invariants

    def check(self) -> None:
        for host in self.hosts.values():
            held: dict[str, str] = {}
            for engine in host.engines.values():
                if engine.state not in HOLDS_GPUS:
                    continue
                for uuid in engine.gpus:
                    if uuid in held:
                        self.breaks(f"{uuid} belongs to {held[uuid]} and {engine.instance_id}")
                    held[uuid] = engine.instance_id
        state = self.leader.core.state
        planned = [uuid for i in state.layout.instances for uuid in i.gpu_uuids]
        if len(set(planned)) < len(planned):
            self.breaks("the layout gives a GPU to two instances")
        for item in state.layout.instances:
            if not set(item.gpu_uuids) <= set(self.hosts[item.node_id].gpus):
                self.breaks(f"{item.instance_id} is laid out on GPUs of another node")
        life = self.leader
        free = life.alive and self.now_s >= life.frozen_until_s and state.mode is Mode.ACTIVE and not state.modes
        if self.now_s - self.calm_since_s > CALM_S and free and self.reporting:
            self.check_capacity(f"for {CALM_S:g} s nothing has changed")

    def check_recovery(self) -> None:
        life = self.leader
        if not life.alive:
            self.breaks("no controller leads at the end")
            return
        state = life.core.state
        last = {
            level: max(
                (d.decided_at_s for d in self.report.history if d.level is level and d.term == life.term), default=0
            )
            for level in (Level.CLUSTER, Level.POOL)
        }
        if self.now_s + self.wall_offset_s - last[Level.POOL] > 2 * SETTINGS.pool_s + 5:
            self.breaks(
                f"the loop is stuck: the last pool decision was at {last[Level.POOL] - self.wall_offset_s:.0f} s"
            )
        self.check_capacity(f"every GPU has been healthy for {QUIET_S:g} s")
        wanted = {i.instance_id for i in state.layout.instances}
        there = {e.instance_id for h in self.hosts.values() for e in h.engines.values() if e.state in HOLDS_GPUS}
        if wanted - there and self.now_s - state.layout_changed_s > 20:
            self.breaks(f"{sorted(wanted - there)} are wanted, and nobody starts them")

    def check_capacity(self, since: str) -> None:
        """What serves must carry the load: there are GPUs enough for it on any one node."""
        state = self.leader.core.state
        short = {}
        serving: dict[str, float] = {}
        for host in self.hosts.values():
            for engine in host.engines.values():
                if engine.state is InstanceState.READY:
                    pool = state.routed_as.get(engine.instance_id, engine.pool)
                    serving[pool] = serving.get(pool, 0.0) + state.fit.max_rate_rps(pool, len(engine.gpus))
        for request_class, rate in self.rates.items():
            own = next((p.name for p in pools_for(state.routing.pools, request_class)), None) if state.routing else None
            if own is None:
                self.breaks(f"no pool serves {request_class}")
                continue
            weight = state.profile.request_weight(own, request_class, (500.0, 150.0))
            short[own] = short.get(own, serving.get(own, 0.0)) - rate * weight
        for pool, spare in short.items():
            if spare < -1e-9:
                self.breaks(f"pool {pool} is short of {-spare:.2f} requests/s, and {since}")


def first_broken(seeds: range) -> tuple[list[str], int, int]:
    """What was broken, over many seeds; and how many faults and events they had."""
    broken: list[str] = []
    faults = events = 0
    for seed in seeds:
        report = run(seed)
        broken += report.broken
        faults += report.faults
        events += report.events
    return broken, faults, events


__all__ = ["NODES", "PROFILE", "Report", "first_broken", "replace", "run"]
