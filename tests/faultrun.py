"""One controller's life under faults, in virtual time, from a seed: what fails, when, and what must hold all the same.

    report = run(seed)     # report.broken is empty, or says what was broken when; the same seed gives the same run

Agents die, hang, fall silent, lose their answers, come back; hosts reboot and start slowly; starts fail; GPUs break;
controllers are killed, frozen and wake again beside their successor; the wall clock jumps; the database loses the last
plan; load jumps. Every third life is rougher still (tests/roughworld.py). After every event the invariants of
tests/faultrules.py are checked, and after a quiet time at the end the fleet must carry its load again. Used by
tests/faults and the bench.
"""

from __future__ import annotations

import heapq
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode
from controller.fleet.breaker import Breaker
from controller.fleet.port import (
    ClassCounters,
    Effect,
    EffectDone,
    Event,
    InstanceState,
    LoadObservation,
    LoadSeen,
    NodeSeen,
    PublishRouting,
    RoutingTable,
    Solve,
    Tick,
)
from controller.gateway.client import supersedes
from controller.loop.core import Core, Step
from controller.loop.journal import JournaledCore
from controller.loop.orders import Order, PlanNow, SetMode, SetPowerBudget
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from controller.policy.routing import pools_for
from controller.store.records import PlanRecord, Record
from tests.byhand import ByHand
from tests.faultrules import Rules
from tests.faultworld import (
    FAULTY_S,
    FREE_W,
    LM,
    MS,
    NODES,
    PROFILE,
    QUIET_S,
    REPLY_S,
    SAMPLE_S,
    SETTINGS,
    WALL_S,
    Host,
)
from tests.roughworld import ROUGH_SETTINGS, RoughWorld, is_rough
from tests.synthetic_profile import MODEL

NO_ANSWER = ("UNAVAILABLE", "DEADLINE_EXCEEDED")


@dataclass
class Life:
    """One controller process."""

    core: Core
    term: int
    began_s: float
    alive: bool = True
    frozen_until_s: float = 0.0
    free_since_s: float = 0.0  # since it began, or woke
    pool_decided_s: float = float("-inf")
    held: list[Event] = field(default_factory=list)  # what waits in its queue while it is frozen
    heard_s: dict[str, float] = field(default_factory=dict)  # by node: of the newest sample that it was told
    load_heard_s: float = float("-inf")  # of the newest report that it was told
    met_s: float = float("inf")  # when a node was heard for the first time

    def silent_s(self, node_id: str, now_s: float) -> float:
        """For how long it has not heard of a node; whatever it makes of that itself."""
        return now_s - self.heard_s.get(node_id, float("-inf"))


@dataclass
class Report:
    seed: int
    broken: list[str] = field(default_factory=list)
    faults: int = 0
    decisions: int = 0
    effects: int = 0
    refused: int = 0  # by agents: an old term, or GPUs that are held
    unsent: int = 0  # to agents that had left calls unanswered
    events: int = 0
    checks: dict[str, int] = field(default_factory=dict)  # how often each rule had something to look at
    history: list[Decision] = field(default_factory=list)
    inputs: list[Record] = field(default_factory=list)


def run(seed: int, journal: bool = True) -> Report:
    """Without a journal it is the same life, only faster."""
    with tempfile.TemporaryDirectory(prefix="dynamollm-faults-") as folder:
        return Run(seed, Path(folder), journal).go()


class Run:
    def __init__(self, seed: int, folder: Path, journal: bool = True) -> None:
        self.chance = random.Random(seed)
        self.journal = journal
        self.report = Report(seed)
        self.now_s = 0.0
        self.wall_offset_s = WALL_S
        self.order = count()
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.hosts = {f"n{i}": Host(f"n{i}", folder, self.chance) for i in range(NODES)}
        self.table: RoutingTable | None = None
        self.rates = {MS: 3.0, LM: 1.5}
        self.rates_log: list[tuple[float, dict[RequestClass, float]]] = [(0.0, self.rates)]
        self.arrived = {MS: 0.0, LM: 0.0}
        self.epoch = 1
        self.reporting = True
        self.reporting_since_s = 0.0
        self.plans: list[PlanRecord] = []
        self.lives: list[Life] = []
        self.calm_since_s = 0.0
        # The orders that hold, as the database keeps them: scope -> mode; and since when nothing of them changed.
        self.modes: dict[str, Mode] = {}
        self.modes_since_s = 0.0
        self.rules = Rules(self)
        self.rough = RoughWorld(self, seed) if is_rough(seed) else None
        self.by_hand = ByHand(self, seed) if seed % 3 == 1 else None  # its own stream: other lives stay what they were
        self.settings = ROUGH_SETTINGS if self.rough else SETTINGS
        if self.rough is not None:
            for host in self.hosts.values():
                host.limits_w = dict.fromkeys(host.gpus, FREE_W)

    # ------------------------------------------------------------------------------------------------- the run

    def go(self) -> Report:
        self.begin_life()
        for number, host in enumerate(self.hosts.values()):
            self.at(0.1 * number, self.telemetry, host)
        self.at(0.5, self.gateway)
        for level, period_s in (
            (Level.INSTANCE, SETTINGS.instance_s),
            (Level.POOL, SETTINGS.pool_s),
            (Level.CLUSTER, SETTINGS.cluster_s),
        ):
            self.at(period_s, self.tick, level, period_s)
        self.at(30.0, self.fault)
        end_s = FAULTY_S + QUIET_S
        while self.heap and self.heap[0][0] <= end_s and not self.report.broken:
            self.now_s, _, act, arguments = heapq.heappop(self.heap)
            act(*arguments)
            self.report.events += 1
            self.rules.always()
            if self.rough is not None:
                self.rough.always()
        if not self.report.broken:
            self.rules.at_the_end()
            if self.rough is not None:
                self.rough.at_the_end()
        for life in self.lives:
            if isinstance(life.core, JournaledCore):
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
        """A new controller under a new term; the plan it finds may be an older one, if the database lost the last.
        What operators ordered holds."""
        self.calm_since_s = self.now_s
        plan = None
        if self.plans:
            lost = self.chance.random() < 0.3
            plan = self.plans[-2] if lost and len(self.plans) > 1 else self.plans[-1]
        term = len(self.lives) + 1
        kind = JournaledCore if self.journal else Core
        core = kind(self.settings, PROFILE, term=term, expected_nodes=NODES, plan=plan)
        if isinstance(core, JournaledCore):
            core.keep_journal(self.report.inputs.append)
        life = Life(core, term, self.now_s, free_since_s=self.now_s)
        self.lives.append(life)
        self.rules.before_step(life)  # what it found recorded is no step of its own
        for scope, mode in self.modes.items():
            self.took(life, core.order(self.instant(), SetMode(scope, mode)))
        for budget in self.rough.budgets.values() if self.rough else ():
            self.took(life, core.order(self.instant(), budget))

    def told(self, life: Life, event: Event) -> None:
        if not life.alive:
            return
        if self.now_s < life.frozen_until_s:
            life.held.append(event)
            return
        if isinstance(event, NodeSeen):
            life.met_s = min(life.met_s, self.now_s)
            life.heard_s[event.observation.node_id] = event.observation.observed_at_s
            if self.rough is not None:
                self.rough.circuit(life, event.observation.node_id).heard(self.now_s)
        elif isinstance(event, LoadSeen):
            life.load_heard_s = event.observation.observed_at_s
        self.rules.before_step(life)
        self.took(life, life.core.handle(self.instant(), event))

    def took(self, life: Life, step: Step) -> None:
        self.report.decisions += len(step.decisions)
        self.report.history += step.decisions
        for decision in step.decisions:
            if decision.level is Level.POOL:
                life.pool_decided_s = self.now_s
            plan = decision.outcome.get("plan")
            if plan is not None and decision.outcome.get("accepted"):
                self.plans.append(PlanRecord(life.term, decision.number, 0.0, life.core.state.layout, plan["pools"]))
        for effect in step.effects:
            self.report.effects += 1
            self.carry_out(life, effect)
        self.rules.after_step(life, step)

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
        life.free_since_s = self.calm_since_s = self.now_s
        held, life.held = life.held, []
        for event in held:
            self.told(life, event)
        if life is not self.leader:
            if life.core.state.routing is not None:  # a gateway that finds this one again is told what it knows
                self.offer(life.core.state.routing)
            self.at(self.now_s + self.chance.uniform(2, 12), self.dies, life)

    def dies(self, life: Life) -> None:
        life.alive = False
        self.calm_since_s = self.now_s

    # --------------------------------------------------------------------------------------------------- effects

    def offer(self, table: RoutingTable) -> None:
        """The gateway hears of a table."""
        if supersedes(table, self.table):
            self.rules.table_taken(table)
            self.table = table

    def carry_out(self, life: Life, effect: Effect) -> None:
        if isinstance(effect, Solve):
            solution = plan_for(effect.problem)
            done = EffectDone(effect.effect_id, solution.chosen is not None, solution=solution)
            self.at(self.now_s + self.chance.uniform(0.05, 3.0), self.told, life, done)
            return
        if isinstance(effect, PublishRouting):
            self.offer(effect.table)
            self.at(self.now_s, self.told, life, EffectDone(effect.effect_id, ok=True))
            return
        host = self.hosts[effect.node_id]
        self.rules.sent(life, effect)
        circuit = self.rough.circuit(life, host.node_id) if self.rough else None
        if circuit is not None and not circuit.lets_out(effect, self.now_s):
            self.report.unsent += 1
            self.at(self.now_s, self.told, life, EffectDone(effect.effect_id, ok=False, detail="not sent"))
            return
        delay_s = REPLY_S
        fate = self.rough.fate(effect) if self.rough else ""
        if host.hangs or not host.up or fate == "unheard":
            wrong, delay_s = "UNAVAILABLE", SETTINGS.rpc_deadline_s
        else:
            wrong = host.obey(life.term, effect, self.now_s)
            if not wrong:
                self.rules.obeyed(life, host)
            if host.deaf or fate:
                wrong, delay_s = "DEADLINE_EXCEEDED", SETTINGS.rpc_deadline_s
        self.report.refused += bool(wrong)
        done = EffectDone(effect.effect_id, ok=not wrong, detail=wrong)
        self.at(self.now_s + delay_s, self.call_ends, life, circuit, done)

    def call_ends(self, life: Life, circuit: Breaker | None, done: EffectDone) -> None:
        if circuit is not None and life.alive and self.now_s < life.frozen_until_s:
            self.at(life.frozen_until_s, self.call_ends, life, circuit, done)  # it finds out when it wakes
            return
        if circuit is not None and done.detail in NO_ANSWER:
            circuit.failed(self.now_s)
        elif circuit is not None:
            circuit.answered()
        self.told(life, done)

    # ------------------------------------------------------------------------------------------------ the hosts

    def telemetry(self, host: Host) -> None:
        host.second(self.now_s)
        if host.up and host.heard:
            self.everyone(NodeSeen(host.observation(self.now_s)))
            host.forget_stopped()
        elif not host.up and self.rough is not None:
            self.rough.agent_gone(host)
        self.at(self.now_s + SAMPLE_S, self.telemetry, host)

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
        self.rules.every_second()
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
                if engine is None:
                    continue
                if engine.state in (InstanceState.READY, InstanceState.DRAINING):  # who drains still answers
                    engine.running += requests * item.weight / total
                elif engine.ordered_off:
                    self.breaks(f"a request was sent to {item.instance_id}, which a controller had {engine.state}")
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
            ("agent", "silence", "hang", "deaf", "slow", "gpu", "engine", "controller", "freeze", "clock", "load",
             "reports", "gateway", "mode", "plan", "reboot")
        )  # fmt: skip
        match kind:
            case "agent":
                host.up = False
                host.locks.clear()  # what its unit runs after a death restores the clocks
                self.at(back_s, self.agent_back, host)
            case "silence":
                host.heard = False
                self.at(back_s, self.back, host, "heard", True)
            case "hang":
                host.hangs = True
                self.at(back_s, self.back, host, "hangs", False)
            case "deaf":
                host.deaf = True
                self.at(back_s, self.back, host, "deaf", False)
            case "slow":
                host.slow = True
                self.at(back_s, self.back, host, "slow", False)
            case "gpu":
                uuid = self.chance.choice(host.gpus)
                host.breaks_gpu(uuid)
                self.at(back_s, host.bad.discard, uuid)
            case "engine":
                alive = [e for e in host.engines.values() if e.state is InstanceState.READY]
                if alive:
                    dead = self.chance.choice(alive)
                    dead.state, dead.running = InstanceState.FAILED, 0.0
            case "reboot":
                self.dies_for(host, back_s - self.now_s)
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
                self.load({c: min(3.0, max(0.05, r * factor)) for c, r in self.rates.items()})
            case "reports":
                self.reporting = False
                self.at(back_s, self.reports_back)
            case "gateway":
                self.epoch += 1
                self.arrived = dict.fromkeys(self.arrived, 0.0)
                self.reporting_since_s = self.now_s
            case "mode":
                scope = self.chance.choice(("cluster", "pool:short", "pool:all", f"node:{host.node_id}"))
                self.ordered(SetMode(scope, self.chance.choice((Mode.ADVISORY, Mode.PAUSED))))
                self.at(back_s, self.ordered, SetMode(scope, Mode.ACTIVE))
            case "plan":
                self.ordered(PlanNow("operator"))
        # In bursts, with room between them to come to rest.
        pause_s = self.chance.expovariate(1 / 6) if self.chance.random() < 0.75 else self.chance.uniform(91, 120)
        self.at(min(self.now_s + pause_s, FAULTY_S), self.fault)

    def dies_for(self, host: Host, seconds: float) -> None:
        """A host with all that runs on it."""
        self.calm_since_s = self.now_s
        host.engines.clear()
        host.locks.clear()
        host.up = False
        self.at(self.now_s + seconds, self.agent_back, host)

    def back(self, host: Host, name: str, value: bool) -> None:
        setattr(host, name, value)
        host.well_since_s = self.calm_since_s = self.now_s

    def agent_back(self, host: Host) -> None:
        host.begin_agent()
        self.rules.agent_began(host)
        self.back(host, "up", True)

    def reports_back(self) -> None:
        self.reporting = True
        self.reporting_since_s = self.calm_since_s = self.now_s

    def load(self, rates: dict[RequestClass, float]) -> None:
        self.rates = rates
        self.rates_log.append((self.now_s, rates))

    def ordered(self, order: Order) -> None:
        """An order is refused while nobody leads."""
        life = self.leader
        self.calm_since_s = self.now_s
        if not life.alive or self.now_s < life.frozen_until_s:
            return
        if isinstance(order, SetMode):
            self.modes[order.scope] = order.mode
            self.modes_since_s = self.now_s
        self.rules.before_step(life)
        if self.rough is not None and isinstance(order, SetPowerBudget):
            self.rough.takes(order)
            self.rough.settling = True
        self.took(life, life.core.order(self.instant(), order))
        if self.rough is not None:
            self.rough.settling = False

    def heal(self) -> None:
        """From here on nothing fails; what is still to come back comes back now."""
        self.calm_since_s = self.now_s
        for host in self.hosts.values():
            if not host.up:
                host.begin_agent()
            host.up = host.heard = True
            host.hangs = host.deaf = host.slow = False
            host.bad.clear()
            host.well_since_s = self.now_s
        if not self.reporting:
            self.reports_back()
        for life in self.lives[:-1]:
            life.alive = False
        self.leader.frozen_until_s = 0.0
        self.wakes(self.leader)
        if not self.leader.alive:
            self.begin_life()
        held_back = [scope for scope, mode in self.modes.items() if mode is not Mode.ACTIVE]
        # An order makes a controller look at everything anew: in a rough life no needless one helps it.
        for scope in held_back if self.rough is not None else ("cluster", *self.modes):
            self.ordered(SetMode(scope, Mode.ACTIVE))
        if self.rough is not None:
            self.rough.heal()
        if self.by_hand is not None:
            self.by_hand.heal()
        self.load({c: min(rate, 1.5) for c, rate in self.rates.items()})


def first_broken(seeds: range) -> tuple[list[str], int, int, dict[str, int]]:
    """What was broken, over many seeds; their faults and events; how often each rule had something to look at."""
    broken: list[str] = []
    checks: dict[str, int] = {}
    faults = events = 0
    for seed in seeds:
        report = run(seed, journal=False)
        broken += report.broken
        faults += report.faults
        events += report.events
        for rule, times in report.checks.items():
            checks[rule] = checks.get(rule, 0) + times
    return broken, faults, events, checks


__all__ = ["NODES", "PROFILE", "Report", "first_broken", "run"]
