"""A fleet for measuring the controller's core: as many busy hosts as are asked for, in virtual time.

Four TP2 instances a host, all serving. Requests come to each by chance, at a rate of its own, and stay for about ten
seconds: what the journal keeps is as hard to pack as it is in earnest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from controller.domain.classes import RequestClass
from controller.domain.layout import Layout, PlannedInstance
from controller.domain.reasons import Level
from controller.fleet.port import (
    ApplyCaps,
    ClassCounters,
    Effect,
    EffectDone,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    ReleaseCaps,
    Solve,
    Tick,
)
from controller.loop.core import Step
from controller.loop.journal import JournaledCore
from controller.loop.runtime import coarse
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from controller.profile.table import Profile
from controller.store.records import PlanRecord, Record
from tests.many_agents import PER_NODE, pool_of
from tests.synthetic_profile import MODEL, synthetic_profile

STAY_S = 10.0  # of a request
MOST_W = 700.0  # that a GPU can draw


class BusyFleet:
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
        return self.timed(lambda: self.core.handle(self.instant(), Tick(level)))[0]

    def timed(self, event: Callable[[], Step]) -> list[float]:
        """Seconds that the core took for the event, and for the end of each solve and each change of caps that follows
        from it: agents do at once what they are told."""
        took_s: list[float] = []
        waiting = deque([event])
        while waiting:
            began_s = time.thread_time()
            step = waiting.popleft()()
            took_s.append(time.thread_time() - began_s)
            ends = [done for effect in step.effects if (done := self._end_of(effect)) is not None]
            waiting.extend(partial(self.core.handle, self.instant(), done) for done in ends)
        return took_s

    def _end_of(self, effect: Effect) -> EffectDone | None:
        match effect:
            case Solve():
                solution = plan_for(effect.problem)
                return EffectDone(effect.effect_id, solution.chosen is not None, solution=solution)
            case ApplyCaps():
                limits_w = {uuid: target.watts for target in effect.targets for uuid in target.gpu_uuids}
            case ReleaseCaps():
                limits_w = dict.fromkeys(effect.gpu_uuids, MOST_W)
            case _:
                return None
        number = int(effect.node_id.removeprefix("n"))
        self.gpus[number] = tuple(replace(g, limit_w=limits_w.get(g.uuid, g.limit_w)) for g in self.gpus[number])
        return EffectDone(effect.effect_id, ok=True)

    def limits_w(self) -> float:
        """What the power limits of all GPUs add up to."""
        return sum(MOST_W if gpu.limit_w is None else gpu.limit_w for gpus in self.gpus.values() for gpu in gpus)
