"""An operator's hands in every third life of tests/faultrun.py: engines of theirs come and go on free GPUs, and engines
of the controller's are drained and stopped under it.

The rule: what an operator holds, and the GPUs it is on, no controller touches that has seen it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from controller.fleet.port import (
    HOLDS_GPUS,
    ApplyClocks,
    DrainInstance,
    InstanceState,
    NodeEffect,
    NodeObservation,
    ReleaseClocks,
    StartInstance,
    StopInstance,
)
from tests.faultworld import FAULTY_S, Engine, Host

if TYPE_CHECKING:
    from tests.faultrun import Run

WHO = "ada"


class ByHand:
    def __init__(self, run: Run, seed: int) -> None:
        self.run = run
        self.chance = random.Random(f"{seed}/by hand")
        self.started = 0
        run.at(self.chance.uniform(40, 90), self.event)

    def event(self) -> None:
        run = self.run
        if run.now_s >= FAULTY_S:
            return
        hosts = [host for host in run.hosts.values() if host.up and not host.hangs]
        if hosts:
            host = self.chance.choice(hosts)
            if self.chance.random() < 0.5:
                self.start(host)
            else:
                self.take(host)
        run.at(run.now_s + self.chance.uniform(25, 100), self.event)

    def start(self, host: Host) -> None:
        held = {uuid for engine in host.engines.values() if engine.state in HOLDS_GPUS for uuid in engine.gpus}
        free = [uuid for uuid in host.gpus if uuid not in held | host.bad]
        gpus = tuple(free[: self.chance.choice((1, 2))])
        if not gpus:
            return
        self.started += 1
        name = f"by-hand-{self.started}"
        host.engines[name] = Engine(name, "short", gpus, InstanceState.READY, held_by=WHO)
        self.changed()
        self.run.at(self.run.now_s + self.chance.uniform(15, 120), self.stop, host, name)

    def take(self, host: Host) -> None:
        ready = [
            engine for engine in host.engines.values() if engine.state is InstanceState.READY and not engine.held_by
        ]
        if not ready:
            return
        engine = self.chance.choice(ready)
        engine.state, engine.held_by = InstanceState.DRAINING, WHO
        self.changed()
        self.run.at(self.run.now_s + self.chance.uniform(1, 40), self.stop, host, engine.instance_id)

    def stop(self, host: Host, name: str) -> None:
        engine = host.engines.get(name)
        if engine is not None and engine.held_by and engine.state in HOLDS_GPUS:
            engine.state, engine.running = InstanceState.STOPPED, 0.0
            self.changed()

    def changed(self) -> None:
        self.run.calm_since_s = self.run.now_s

    def heal(self) -> None:
        for host in self.run.hosts.values():
            for name in list(host.engines):
                self.stop(host, name)

    # ------------------------------------------------------------------------------------------------ the rule

    def sent(self, effect: NodeEffect, node: NodeObservation | None) -> None:
        """`node` is what the controller has seen of it."""
        if node is None or not node.held:
            return
        self.run.rules.looked("by hand")
        names, gpus = {i.instance_id for i in node.held}, node.held_gpus
        match effect:
            case StartInstance():
                touched = gpus & set(effect.gpu_uuids)
            case DrainInstance() | StopInstance():
                touched = names & {effect.instance_id}
            case ApplyClocks():
                touched = gpus & {uuid for target in effect.targets for uuid in target.gpu_uuids}
            case ReleaseClocks():
                touched = gpus & set(effect.gpu_uuids)
            case _:  # caps guard breakers, whoever holds the GPUs
                return
        if touched:
            self.run.breaks(f"{type(effect).__name__} touches {sorted(touched)} on {effect.node_id}, which {WHO} holds")
