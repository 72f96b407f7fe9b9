"""Runs one controller over the fast fleet and keeps what the ledger needs: minutes of power, clocks and GPUs, empty
nodes, starts. It only listens to what the fleet tells the controller, and changes nothing of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import numpy as np

from controller.domain.decision import Decision
from controller.domain.gpu_state import GpuState
from controller.fleet.port import (
    HOLDS_GPUS,
    ApplyClocks,
    Event,
    InstanceObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    ReleaseClocks,
    StartInstance,
)
from controller.loop.core import Core, Step
from controller.loop.planning import say_counts
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.profile.table import Profile
from simulator.fast.fleet import FastFleet
from simulator.fleet import FleetTimes
from simulator.incidents import Incident
from simulator.outcome import WARM_UP_S, SystemRun, node_off_s
from simulator.physics import Physics
from simulator.traces import Trace

MINUTE_S = 60.0


@dataclass
class Recorder:
    """Minutes of the window from two successive observations of each node; what stood at the first holds between."""

    open_s: float
    close_s: float
    minutes: int
    energy_j: list[float] = field(init=False)
    seen_s: list[float] = field(init=False)  # node-seconds
    gpu_s: dict[str, list[float]] = field(default_factory=dict)  # by pool/tp
    clock: dict[str, list[float]] = field(default_factory=dict)  # MHz x GPU-seconds by pool
    empty_s: list[tuple[float, float]] = field(default_factory=list)  # spans in which a node held nothing
    peak_gpus: int = 0
    switches: int = 0
    clock_changes: int = 0
    layout: str = ""
    _before: dict[str, tuple[float, float, tuple[tuple[str, int, int], ...]]] = field(default_factory=dict)
    _empty_since: dict[str, float] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)  # GPUs by node
    _held_gpus: int = 0  # of all nodes
    _clocks_mhz: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.energy_j, self.seen_s = [0.0] * self.minutes, [0.0] * self.minutes

    def node_seen(self, seen: NodeObservation, held: Iterable[tuple[str, int, int]]) -> None:
        """`held`: pool, TP and clock of its instances."""
        name, at_s, now = seen.node_id, seen.observed_at_s, tuple(held)
        joules = sum([gpu.energy_j for gpu in seen.gpus if gpu.energy_j is not None])
        before = self._before.get(name)
        if before is not None:
            self._add(before, at_s, joules)
        self._before[name] = (at_s, joules, now)
        if now:
            since_s = self._empty_since.pop(name, None)
            if since_s is not None:
                self.empty_s.append((since_s, at_s))
        else:
            self._empty_since.setdefault(name, at_s)
        held_gpus = sum([tp for _, tp, _ in now])
        self._held_gpus += held_gpus - self._held.get(name, 0)
        self._held[name] = held_gpus
        if self.open_s <= at_s <= self.close_s:
            self.peak_gpus = max(self.peak_gpus, self._held_gpus)

    def _add(self, before: tuple[float, float, tuple[tuple[str, int, int], ...]], at_s: float, joules: float) -> None:
        since_s, joules_before, held = before
        middle_s = (since_s + at_s) / 2
        minute = int((middle_s - self.open_s) // MINUTE_S)
        if not 0 <= minute < self.minutes:
            return
        seconds = at_s - since_s
        self.energy_j[minute] += joules - joules_before
        self.seen_s[minute] += seconds
        for pool, tp, mhz in held:
            self._row(self.gpu_s, f"{pool}/tp{tp}")[minute] += tp * seconds
            self._row(self.clock, pool)[minute] += mhz * tp * seconds

    def _row(self, table: dict[str, list[float]], key: str) -> list[float]:
        row = table.get(key)
        if row is None:
            row = table[key] = [0.0] * self.minutes
        return row

    def effects_seen(self, step: Step, at_s: float) -> None:
        for effect in step.effects:
            if isinstance(effect, StartInstance):
                self.switches += self.open_s <= at_s <= self.close_s
            elif isinstance(effect, ApplyClocks):
                for target in effect.targets:
                    self._clock_set(target.gpu_uuids, target.mhz, at_s)
            elif isinstance(effect, ReleaseClocks):
                for uuid in effect.gpu_uuids:
                    self._clock_set((uuid,), None, at_s)

    def _clock_set(self, uuids: tuple[str, ...], mhz: int | None, at_s: float) -> None:
        """A lock of a whole instance counts once."""
        if self._clocks_mhz.get(uuids[0]) != mhz:
            self._clocks_mhz[uuids[0]] = mhz
            self.clock_changes += self.open_s <= at_s <= self.close_s

    def off_node_s(self) -> float:
        spans = [*self.empty_s, *((since_s, self.close_s) for since_s in self._empty_since.values())]
        return sum(node_off_s(span, self.open_s, self.close_s) for span in spans)

    def series(self, nodes: int, trace: Trace, warm_up_s: float) -> dict[str, Any]:
        per_node_s = [max(seconds, 1e-9) / nodes for seconds in self.seen_s]
        pools: dict[str, list[float]] = defaultdict(lambda: [0.0] * self.minutes)
        for key, row in self.gpu_s.items():
            for minute, gpu_s in enumerate(row):
                pools[key.split("/")[0]][minute] += gpu_s
        return minute_series(
            trace,
            warm_up_s,
            self.minutes,
            power_w=[joules / seconds for joules, seconds in zip(self.energy_j, per_node_s, strict=True)],
            gpus={
                key: [gpu_s / seconds for gpu_s, seconds in zip(row, per_node_s, strict=True)]
                for key, row in sorted(self.gpu_s.items())
            },
            clock_mhz={
                pool: [mhz / gpu_s if gpu_s else None for mhz, gpu_s in zip(row, pools[pool], strict=True)]
                for pool, row in sorted(self.clock.items())
            },
        )


def minute_series(
    trace: Trace,
    warm_up_s: float,
    minutes: int,
    power_w: list[float],
    gpus: dict[str, list[float]],
    clock_mhz: dict[str, list[float | None]],
) -> dict[str, Any]:
    """The ledger's columns (simulator/ledger.py), rounded: three decimals are beyond what they mean."""
    inside = trace.arrival_s[trace.arrival_s >= warm_up_s] - warm_up_s
    counts = np.bincount((inside // MINUTE_S).astype(int), minlength=minutes)[:minutes]
    return {
        "minute": list(range(minutes)),
        "requests": counts.tolist(),
        "power_w": [round(value, 3) for value in power_w],
        "gpus": {key: [round(value, 3) for value in row] for key, row in gpus.items()},
        "clock_mhz": {
            key: [None if value is None else round(value, 1) for value in row] for key, row in clock_mhz.items()
        },
    }


def minutes_of(window_s: float) -> int:
    return max(1, ceil(window_s / MINUTE_S - 1e-9))


class RecordedCore(Core):
    """The core itself; a recorder listens. Reports of load begin with the load: a gateway that nobody sends to yet
    would otherwise teach the forecast a silence that is none."""

    def __init__(
        self, settings: LoopSettings, profile: Profile, expected_nodes: int, recorder: Recorder, load_from_s: float
    ) -> None:
        super().__init__(settings, profile, term=1, expected_nodes=expected_nodes)
        self._recorder = recorder
        self._load_from_s = load_from_s

    def handle(self, now: Instant, event: Event) -> Step:
        if isinstance(event, LoadSeen) and now.monotonic_s < self._load_from_s:
            return Step((), ())
        step = super().handle(now, event)
        if isinstance(event, NodeSeen):
            self._recorder.node_seen(event.observation, self._instances(event.observation.instances, event.observation))
        if not self._recorder.layout and now.monotonic_s >= self._recorder.open_s and self.state.pools:
            self._recorder.layout = say_counts(self.state.layout.counts())
        if step.effects:
            self._recorder.effects_seen(step, now.monotonic_s)
        return step

    def _instances(
        self, instances: Iterable[InstanceObservation], node: NodeObservation
    ) -> Iterable[tuple[str, int, int]]:
        clocks = {gpu.uuid: gpu.sm_mhz for gpu in node.gpus} if node.instances else {}
        for instance in instances:
            if instance.state in HOLDS_GPUS:
                mhz = clocks.get(instance.gpu_uuids[0]) or self.state.profile.full_mhz
                yield self.state.pool_of(instance), instance.tp, mhz


def run_loop(
    make_core: Callable[[LoopSettings, Profile, int, Recorder, float], RecordedCore],
    settings: LoopSettings,
    profile: Profile,
    physics: Physics,
    nodes: int,
    trace: Trace,
    *,
    times: FleetTimes,
    seed: int,
    choices: int | None = None,
    accuracy: float | None = None,
    incidents: Iterable[Incident] = (),
) -> SystemRun:
    """The whole trace under one controller. The fleet is given the time of two rounds of starts to stand ready.
    `incidents` count from the trace's beginning."""
    # Between two observations of the nodes, and not at a tick's own instant.
    start_s = 2 * times.start_s + 30.0
    open_s, close_s = start_s + WARM_UP_S, start_s + float(trace.arrival_s[-1])
    recorder = Recorder(open_s, close_s, minutes_of(close_s - open_s))
    core = make_core(settings, profile, nodes, recorder, start_s)
    fleet = FastFleet(
        core,
        physics,
        nodes,
        trace,
        start_s=start_s,
        warm_up_s=WARM_UP_S,
        times=times,
        gpus_per_node=settings.gpus_per_node,
        choices=choices,
        accuracy=accuracy,
        seed=seed,
        sparse=True,
        on_decision=_forget,
        incidents=(replace(incident, at_s=start_s + incident.at_s) for incident in incidents),
    )
    result = fleet.run()
    first_s, finished_s = result.requests["first_s"], result.requests["finished_s"]
    return SystemRun(
        trace=trace,
        warm_up_s=WARM_UP_S,
        ttft_s=result.ttft_s(),
        tbt_s=result.tbt_s(),
        finished=np.isfinite(first_s) & np.isfinite(finished_s),
        queue_s=result.requests["queue_s"].astype(np.float64),
        gaps=result.gaps,
        nodes=nodes,
        gpus=nodes * settings.gpus_per_node,
        energy_j={state.value: result.energy_j.get(state, 0.0) for state in _STATES},
        parked_gpu_s=result.parked_gpu_s,
        window_s=result.window_s,
        off_node_s=recorder.off_node_s(),
        peak_gpus=recorder.peak_gpus,
        switches=recorder.switches,
        clock_changes=recorder.clock_changes,
        layout=recorder.layout,
        spilled=result.spilled,
        mispredicted=result.mispredicted,
        outgrown=result.outgrown,
        series=recorder.series(nodes, trace, WARM_UP_S),
    )


_STATES = (GpuState.SERVING, GpuState.IDLE, GpuState.LOADING, GpuState.DRAINING, GpuState.PARKED)


def _forget(_: Decision) -> None:
    """A week makes millions of decisions; the ledger counts what came of them."""
