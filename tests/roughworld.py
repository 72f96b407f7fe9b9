"""What every third life of tests/faultrun.py has beside the faults of all: power budgets that come, change, end and are
lifted; single calls that never arrive or whose answer is lost; surges of the load, also while nobody reports; hosts
that are dead for minutes; and the circuits of agents that leave calls unanswered (controller/fleet/breaker.py), as the
real client of agents has them. It draws from streams of its own, so that the other lives stay what they were.

The rule of budgets (as in tests/faults/test_budget_seeds.py): once the limits of a scope add up to no more than its
budget, and the leader says so, they never do again until it is changed or ends, whoever dies meanwhile.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from controller.domain.classes import RequestClass
from controller.fleet.breaker import Breaker, breaker_of
from controller.fleet.port import ApplyCaps, DrainInstance, NodeEffect, ReleaseCaps, StartInstance, StopInstance
from controller.loop.orders import SetPowerBudget
from tests.faultworld import FAULTY_S, FREE_W, GPUS, LOW_W, NODES, SAMPLE_S, SETTINGS, Host

if TYPE_CHECKING:
    from tests.faultrun import Life, Run

ROW = ("n0", "n1")
SCOPES = {"cluster": tuple(f"n{i}" for i in range(NODES)), "row:r": ROW}
ROUGH_SETTINGS = replace(SETTINGS, rows={"r": ROW}, node_ids=SCOPES["cluster"], gpus_per_node=GPUS)
# Of the calls that begin something: those that never arrive, and those that do and whose answer is lost.
UNHEARD, UNANSWERED = 0.2, 0.1
_BEGINS = (StartInstance, DrainInstance, StopInstance, ApplyCaps, ReleaseCaps)


def is_rough(seed: int) -> bool:
    return seed % 3 == 2


class RoughWorld:
    def __init__(self, run: Run, seed: int) -> None:
        self.run = run
        self.chance = random.Random(f"{seed}/rough")
        self.trials = random.Random(f"{seed}/circuits")
        self.circuits: dict[tuple[int, str], Breaker] = {}  # by term and node: each controller has its own
        self.budgets: dict[str, SetPowerBudget] = {}  # the last order of each scope
        self.reached: set[str] = set()
        self.over: set[str] = set()  # those whose time has come, whatever the clock says later
        self.settling = False  # within an order
        self.before: dict[RequestClass, float] | None = None  # the load before the surge that is under way
        run.at(self.chance.uniform(35, 80), self.event)
        if self.chance.random() < 0.6:  # one that is only just over when the quiet time begins: its peak is remembered
            run.at(FAULTY_S - self.chance.uniform(35, 75), self.surge, 200.0)

    # --------------------------------------------------------------------------------------------- what happens

    def event(self) -> None:
        run = self.run
        if run.now_s >= FAULTY_S:
            return
        match self.chance.choice(("budget", "budget", "budget", "surge", "surge", "blind surge", "death")):
            case "budget":
                scope = self.chance.choice(list(SCOPES))
                watts = self.chance.choice((None, self.chance.uniform(0.5, 2.2) * self.lowest_w(scope)))
                ends_s = run.instant().wall_s + self.chance.uniform(5, 80)
                until_s = ends_s if watts is not None and self.chance.random() < 0.4 else None
                run.ordered(SetPowerBudget(scope, watts, until_s))
            case "death":
                run.dies_for(self.chance.choice(list(run.hosts.values())), self.chance.uniform(120, 250))
            case surge:
                lasts_s = self.chance.uniform(20, 90)
                self.surge(lasts_s)
                if surge == "blind surge":
                    run.reporting = False
                    run.at(run.now_s + lasts_s, run.reports_back)
        run.at(run.now_s + self.chance.uniform(20, 90), self.event)

    def surge(self, lasts_s: float) -> None:
        if self.before is not None:
            return
        run, self.before = self.run, self.run.rates
        run.calm_since_s = run.now_s
        run.load({c: min(4.0, rate * self.chance.choice((2.0, 3.0, 4.0))) for c, rate in self.before.items()})
        run.at(run.now_s + lasts_s, self.surge_ends, run.rates)

    def surge_ends(self, surge: dict[RequestClass, float]) -> None:
        if self.run.rates is surge and self.before is not None:  # nothing else has changed it meanwhile
            self.run.calm_since_s = self.run.now_s
            self.run.load(self.before)
        self.before = None

    def fate(self, effect: NodeEffect) -> str:
        """What becomes of a call: "unheard", "unanswered", or "" when all is well."""
        if self.run.now_s >= FAULTY_S or not isinstance(effect, _BEGINS):
            return ""
        drawn = self.chance.random()
        return "unheard" if drawn < UNHEARD else "unanswered" if drawn < UNHEARD + UNANSWERED else ""

    def circuit(self, life: Life, node_id: str) -> Breaker:
        made = self.circuits.get((life.term, node_id))
        if made is None:
            made = breaker_of(SETTINGS.rpc_deadline_s, SAMPLE_S, self.trials.random)
            self.circuits[life.term, node_id] = made
        return made

    def agent_gone(self, host: Host) -> None:
        """Its streams break."""
        for life in self.run.lives:
            self.circuit(life, host.node_id).stream_lost()

    def heal(self) -> None:
        """Some budgets stay to the end, so that they must be held then."""
        self.surge_ends(self.run.rates)
        for scope in SCOPES:
            stays = self.chance.random() < 0.4
            self.run.ordered(SetPowerBudget(scope, self.lowest_w(scope) * self.chance.uniform(1, 2) if stays else None))

    # ------------------------------------------------------------------------------------------------- budgets

    @staticmethod
    def lowest_w(scope: str) -> float:
        return LOW_W * GPUS * len(SCOPES[scope])

    def takes(self, order: SetPowerBudget) -> None:
        self.budgets[order.scope] = order
        self.reached.discard(order.scope)
        self.over.discard(order.scope)

    def standing(self) -> dict[str, float]:
        """Watts by scope, of the budgets that hold now."""
        wall_s = self.run.instant().wall_s
        for scope, order in self.budgets.items():
            if order.until_s is not None and order.until_s <= wall_s and scope not in self.over:
                self.over.add(scope)
                self.reached.discard(scope)
                self.run.calm_since_s = self.run.now_s
        return {s: o.watts for s, o in self.budgets.items() if o.watts is not None and s not in self.over}

    def total_w(self, scope: str) -> float:
        return sum(watts for node_id in SCOPES[scope] for watts in self.run.hosts[node_id].limits_w.values())

    def always(self) -> None:
        run, leader = self.run, self.run.leader
        alone = not any(life.alive for life in run.lives[:-1])  # else one that was followed may still be obeyed
        for scope, watts in self.standing().items():
            if self.total_w(scope) <= watts + 1:
                if alone and leader.alive and not self.settling and scope in leader.core.state.budgets_held:
                    self.reached.add(scope)
            elif not alone:
                self.reached.discard(scope)
            elif scope in self.reached:
                run.breaks(f"the limits of {scope} add up to {self.total_w(scope):.0f} W, its budget is {watts:.0f} W")

    def sent(self, life: Life, effect: ApplyCaps) -> None:
        self.run.rules.looked("cap")
        for target in effect.targets:
            if not LOW_W <= target.watts <= FREE_W:
                self.run.breaks(f"a cap of {target.watts:g} W on {effect.node_id}")
            if not set(target.gpu_uuids) <= set(self.run.hosts[effect.node_id].gpus):
                self.run.breaks(f"a cap on GPUs that {effect.node_id} does not have")

    def at_the_end(self) -> None:
        """What can be held is held; what no budget covers is free; who answers is called."""
        for node_id in self.run.hosts:
            self.run.rules.looked("circuit")
            if not self.circuit(self.run.leader, node_id).admits(self.run.now_s):
                self.run.breaks(f"{node_id} has answered for minutes, and is still not called")
        standing = self.standing()
        for scope, watts in standing.items():
            self.run.rules.looked("budget held")
            held = scope in self.run.leader.core.state.budgets_held and self.total_w(scope) <= watts + 1
            if watts >= self.lowest_w(scope) and not held:
                self.run.breaks(f"the budget of {scope}, {watts:.0f} W, is not held: {self.total_w(scope):.0f} W")
        covered = {node_id for scope in standing for node_id in SCOPES[scope]}
        for host in self.run.hosts.values():
            self.run.rules.looked("cap gone")
            if host.node_id not in covered and set(host.limits_w.values()) != {FREE_W}:
                self.run.breaks(f"{host.node_id} is still capped, and no budget covers it")
