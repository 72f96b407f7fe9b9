"""The small world of tests/faultrun.py: hosts and their engines as a controller meets them, and how they are set up.

A host's fence is the agent's own (nodeagent/control/fence.py), its term on disk: what that forgets, is forgotten.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from common.clock import VirtualClock
from controller.domain.classes import RequestClass
from controller.fleet.port import (
    HOLDS_GPUS,
    ApplyCaps,
    ApplyClocks,
    DrainInstance,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    NodeEffect,
    NodeObservation,
    ReleaseCaps,
    ReleaseClocks,
    StartInstance,
    StopInstance,
)
from controller.loop.settings import LoopSettings
from controller.profile.table import Profile
from nodeagent.control.fence import Fence
from nodeagent.errors import Precondition
from tests.synthetic_profile import MODEL, synthetic_profile

NODES, GPUS = 3, 8
FAULTY_S, QUIET_S = 420.0, 150.0
START_S, STOP_S, REPLY_S = 12.0, 2.0, 0.05
SAMPLE_S = 1.0  # between two samples of a host
LOW_W, FREE_W = 200.0, 700.0  # the range of a GPU's power limit; it is free at the upper end
SLOW = 6.0  # times as long as usual a slow host takes to start an engine
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
    held_by: str = ""  # the operator who took it


@dataclass
class Host:
    """A node agent and its engines."""

    node_id: str
    folder: Path
    chance: random.Random
    engines: dict[str, Engine] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    locks: dict[str, tuple[int, float]] = field(default_factory=dict)  # GPU -> MHz, until
    limits_w: dict[str, float] = field(default_factory=dict)  # by GPU, where its driver tells; as it stands
    up: bool = True  # the agent's process
    heard: bool = True  # its telemetry gets through
    hangs: bool = False  # it answers no call
    deaf: bool = False  # it obeys, and its answers are lost
    slow: bool = False
    well_since_s: float = 0.0
    obeyed_term: int = 0  # the highest that it ever obeyed, as the test knows it

    def __post_init__(self) -> None:
        self.begin_agent()

    def begin_agent(self) -> None:
        """What an agent remembers when it begins is what is on its disk."""
        self.fence = Fence(self.folder / f"{self.node_id}.json", VirtualClock())

    @property
    def gpus(self) -> list[str]:
        return [f"{self.node_id}-g{i}" for i in range(GPUS)]

    @property
    def well(self) -> bool:
        return self.up and self.heard and not self.hangs

    # ----------------------------------------------------------------------------------------------- its agent

    def obey(self, term: int, effect: NodeEffect, now_s: float) -> str:
        """As the agent does: the fence first. Returns why it was refused, "" when it was done."""
        try:
            self.fence.admit(term)
        except Precondition as refused:
            return str(refused)
        match effect:
            case ApplyClocks():
                for target in effect.targets:
                    for uuid in target.gpu_uuids:
                        self.locks[uuid] = (target.mhz, now_s + effect.ttl_s)
            case ReleaseClocks():
                for uuid in effect.gpu_uuids:
                    self.locks.pop(uuid, None)
            case ApplyCaps():  # outlives the agent and a reboot
                for cap in effect.targets:
                    self.limits_w.update(dict.fromkeys(cap.gpu_uuids, cap.watts))
            case ReleaseCaps():
                self.limits_w.update(dict.fromkeys(effect.gpu_uuids, FREE_W))
            case StartInstance():
                return self._start(effect, now_s)
            case DrainInstance():
                engine = self.engines.get(effect.instance_id)
                if engine is None or engine.state is not InstanceState.READY:
                    return "not ready"
                engine.state = InstanceState.DRAINING
                engine.ordered_off = True
            case StopInstance():
                engine = self.engines.get(effect.instance_id)
                if engine is None:
                    return "there is no such instance"
                if engine.running > 0.5:
                    return "it still has work"
                engine.state, engine.due_s, engine.ordered_off = InstanceState.STOPPING, now_s + STOP_S, True
        return ""

    def _start(self, effect: StartInstance, now_s: float) -> str:
        known = self.engines.get(effect.instance_id)
        if known is not None and known.state in HOLDS_GPUS:
            return ""  # one that has ended may be started again
        held = {u for e in self.engines.values() if e.state in HOLDS_GPUS for u in e.gpus}
        if held & set(effect.gpu_uuids):
            return "a GPU is held by another instance"
        takes_s = START_S * self.chance.uniform(0.8, 1.3) * (SLOW if self.slow else 1.0)
        self.engines[effect.instance_id] = Engine(
            effect.instance_id,
            effect.pool,
            effect.gpu_uuids,
            InstanceState.STARTING,
            now_s + takes_s,
            fails=(now_s < FAULTY_S and self.chance.random() < 0.1) or bool(self.bad & set(effect.gpu_uuids)),
        )
        return ""

    # ------------------------------------------------------------------------------------------- as time passes

    def second(self, now_s: float) -> None:
        for engine in list(self.engines.values()):
            if engine.state is InstanceState.STARTING and now_s >= engine.due_s:
                engine.state = InstanceState.FAILED if engine.fails else InstanceState.READY
            elif engine.state is InstanceState.STOPPING and now_s >= engine.due_s:
                engine.state = InstanceState.STOPPED
            # Requests take some seconds.
            engine.running = max(0.0, engine.running * 0.8 - 0.05)
        for uuid, (_, until_s) in list(self.locks.items()):
            if until_s <= now_s:
                del self.locks[uuid]

    def observation(self, now_s: float) -> NodeObservation:
        gpus = tuple(
            GpuObservation(
                uuid, i, uuid not in self.bad, 100.0, now_s * 100, 1000, None,
                self.limits_w.get(uuid), (LOW_W, FREE_W) if uuid in self.limits_w else None,
            )
            for i, uuid in enumerate(self.gpus)
        )  # fmt: skip
        engines = tuple(
            InstanceObservation(
                e.instance_id, MODEL, e.pool, e.gpus, e.state, f"http://{e.instance_id}", round(e.running), 0.0,
                round(e.running / 100, 2), "", {"start": START_S} if e.state is InstanceState.READY else {}, e.held_by,
            )
            for e in self.engines.values()
        )  # fmt: skip
        mine, held = tuple(e for e in engines if not e.held_by), tuple(e for e in engines if e.held_by)
        return NodeObservation(self.node_id, now_s, gpus, mine, held)

    def forget_stopped(self) -> None:
        """Shown once, then forgotten."""
        for engine in list(self.engines.values()):
            if engine.state is InstanceState.STOPPED:
                del self.engines[engine.instance_id]

    def breaks_gpu(self, uuid: str) -> None:
        self.bad.add(uuid)
        for engine in self.engines.values():
            if uuid in engine.gpus and engine.state in HOLDS_GPUS:
                engine.state, engine.running = InstanceState.FAILED, 0.0
