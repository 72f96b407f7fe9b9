"""A node that reports but starts nothing: planned around, tried again after a while, trusted after a start."""

from __future__ import annotations

from itertools import pairwise

from controller.domain.reasons import Level, Reason
from controller.fleet.port import Effect, EffectDone, StartInstance, Tick
from controller.loop.refusing import FAILED_STARTS
from tests.unit.test_loop_core import Bench, make, ready, starts


class Fleet:
    """Nodes "a" and "b"; the agents of `deaf` report and answer no start, the others' instances are up at once."""

    def __init__(self, deaf: set[str]) -> None:
        self.bench: Bench = make(nodes=2)
        self.deaf = deaf
        self.up: dict[str, StartInstance] = {}
        self.asked: list[tuple[float, str]] = []

    def run(self, seconds: float) -> None:
        end_s = self.bench.now_s + seconds
        while self.bench.now_s < end_s:
            for node in ("a", "b"):
                mine = [ready(effect) for effect in self.up.values() if effect.node_id == node]
                self._carry_out(self.bench.see(node, *mine))
            for level in (Level.POOL,) if self.bench.now_s % 15 == 0 else ():
                self._carry_out(self.bench.send(Tick(level)))
            self._carry_out(self.bench.send(Tick(Level.INSTANCE)))
            self.bench.wait(5.0)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in starts(effects):
            self.asked.append((self.bench.now_s, effect.node_id))
            works = effect.node_id not in self.deaf
            if works:
                self.up[effect.instance_id] = effect
            self._carry_out(self.bench.send(EffectDone(effect.effect_id, works, "" if works else "DEADLINE_EXCEEDED")))

    def asked_of(self, node: str) -> list[float]:
        return [at_s for at_s, asked in self.asked if asked == node]

    @property
    def told(self) -> list[str]:
        decisions = [decision for step in self.bench.steps for decision in step.decisions]
        return [decision.sentence for decision in decisions if decision.reason is Reason.NODE_REFUSES]


def test_a_node_that_starts_nothing_is_left_alone_for_longer_each_time() -> None:
    fleet = Fleet({"b"})
    fleet.run(400)
    times = fleet.asked_of("b")
    assert len(times) >= FAILED_STARTS + 2  # tried again, too
    tried = sorted(set(times))
    pauses = [after - before for before, after in pairwise(tried) if after - before > 30]
    assert pauses == sorted(pauses)
    assert pauses[0] >= 60
    assert "b starts nothing (3 starts failed in a row, the last: DEADLINE_EXCEEDED)" in fleet.told[0]
    assert {effect.node_id for effect in fleet.up.values()} == {"a"}  # what can be served is


def test_it_is_used_again_once_it_starts_something() -> None:
    fleet = Fleet({"b"})
    fleet.run(30)
    assert fleet.told
    fleet.deaf.clear()
    fleet.run(120)
    assert {effect.node_id for effect in fleet.up.values()} == {"a", "b"}
    assert fleet.bench.core.state.refusing == {}


def test_a_whole_fleet_that_refuses_is_tried_again() -> None:
    fleet = Fleet({"a", "b"})
    fleet.run(40)
    assert not fleet.up
    fleet.deaf.clear()
    fleet.run(120)
    assert {effect.node_id for effect in fleet.up.values()} == {"a", "b"}
