"""The fast fleet under the controller's own core: the counterpart of `simulator/fleet.py` over compiled engines.

Requests never pass through Python. The core is handed the same observations and its effects are carried out in the
same way and order as by the reference, so both give the same decisions.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controller.domain.decision import Decision
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level
from controller.fleet.port import (
    ApplyCaps,
    ApplyClocks,
    ClassCounters,
    DrainInstance,
    Effect,
    EffectDone,
    Event,
    InstanceState,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    PowerNode,
    PublishRouting,
    ReleaseCaps,
    ReleaseClocks,
    RoutingTable,
    Solve,
    StartInstance,
    StopInstance,
    Tick,
)
from controller.loop.core import Core
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from simulator.fast.engines import FastEngines, Shown
from simulator.fast.layout import AT_ASLEEP, AT_DRAINING, AT_LOADING, IDLE, SERVING
from simulator.fast.node import Hosted, Node
from simulator.fleet import WALL_AT_ZERO_S, FleetTimes
from simulator.incidents import Incident, IncidentKind
from simulator.physics import Physics
from simulator.traces import Trace

_GATEWAY, _EPOCH = "gateway", "1"


class _Totals(NamedTuple):
    """Of every GPU of the fleet, from the beginning to `at_s`."""

    energy_j: dict[GpuState, float]
    parked_gpu_s: float
    off_node_s: float
    at_s: float


@dataclass(frozen=True, slots=True)
class FastResult:
    """What came of a run. `requests` is in the trace's order (see `simulator.fast.layout.RESULT`), its instants count
    from the beginning of the run. Energy and GPU-seconds are those of the window, which closes with the last arrival;
    gaps those of the window's requests and of what was still running when it opened."""

    trace: Trace
    start_s: float  # of the trace
    requests: NDArray[np.void]
    pools: tuple[str, ...]  # by the numbers in `requests`
    gaps: NDArray[np.int64]  # by bin and class
    refused: int
    spilled: int
    mispredicted: int
    outgrown: int
    decisions: list[Decision]
    observations: list[NodeObservation]
    effects: list[tuple[float, Effect]]
    energy_j: Mapping[GpuState, float]
    parked_gpu_s: float
    window_s: float
    off_node_s: float  # for which the provisioner had nodes off

    def ttft_s(self) -> NDArray[np.float64]:
        """NaN for a request that was refused."""
        ttft_s: NDArray[np.float64] = self.requests["first_s"] - self.start_s - self.trace.arrival_s
        return ttft_s

    def tbt_s(self) -> NDArray[np.float64]:
        """0 for an answer of one token."""
        span_s = self.requests["finished_s"] - self.requests["first_s"]
        tbt_s: NDArray[np.float64] = span_s / np.maximum(self.trace.output_tokens - 1, 1)
        return tbt_s


class FastFleet:
    """One model's fleet, its gateway and its controller in virtual time.

    Arrivals count from `start_s`; the window opens `warm_up_s` later. `keep_observations` keeps every one, and every
    effect, as the reference does; a week holds too many. With `sparse`, nodes are observed once per instance tick,
    `telemetry_s` before it, which is when the tick's inputs were seen anyway; a start is reported at once either way.
    Decisions are kept for the result, unless `on_decision` takes them. `choices` and `accuracy` are those of
    `FastEngines`.
    """

    def __init__(
        self,
        core: Core,
        physics: Physics,
        nodes: int,
        trace: Trace,
        *,
        start_s: float = 0.0,
        warm_up_s: float = 0.0,
        times: FleetTimes | None = None,
        gpus_per_node: int = 8,
        choices: int | None = None,
        accuracy: float | None = None,
        seed: int = 0,
        sparse: bool = False,
        keep_observations: bool = False,
        on_decision: Callable[[Decision], None] | None = None,
        incidents: Iterable[Incident] = (),
    ) -> None:
        self._core = core
        self._model = core.state.settings.model
        self._times = times or FleetTimes()
        self._heap: list[tuple[float, int, str, Any]] = []
        self._order = count()
        self._trace = trace
        self._start_s = start_s
        self._open_s = start_s + warm_up_s
        self._sparse = sparse
        self._keep = keep_observations
        profile = core.state.profile
        self.engines = FastEngines(
            physics,
            trace,
            start_s=start_s,
            choices=choices,
            accuracy=accuracy,
            seed=seed,
            slo=profile.slo,
            scheme=profile.scheme,
        )
        self._parked_w = physics.idle_w(physics.clocks_mhz[-1], context=False)
        self._nodes = {f"node-{i}": Node(f"node-{i}", self.engines, gpus_per_node) for i in range(nodes)}
        self._rows: dict[str, int] = {}  # of every instance, by id
        self._decisions: list[Decision] = []
        self._on_decision = on_decision or self._decisions.append
        self._observations: list[NodeObservation] = []
        self._effects: list[tuple[float, Effect]] = []
        self._shown: Shown | None = None  # of this instant, until something is changed
        self._opened = _Totals({}, 0.0, 0.0, 0.0)
        self._closed = self._opened
        self._gaps_before = np.zeros_like(self.engines.gaps)
        self._incidents = tuple(incidents)
        self._table: RoutingTable | None = None

    def run(self, tail_s: float = 600.0) -> FastResult:
        """Serves the trace to its end, or until `tail_s` after the last arrival."""
        engines, settings = self.engines, self._core.state.settings
        for node in self._nodes.values():
            self._at(0.0, "telemetry", node)
        self._at(0.0, "report", None)
        for level, period_s in (
            (Level.INSTANCE, settings.instance_s),
            (Level.POOL, settings.pool_s),
            (Level.CLUSTER, settings.cluster_s),
        ):
            self._at(period_s, "tick", (level, period_s))
        for incident in self._incidents:
            self._at(incident.at_s, "incident", incident)
        last_s = self._start_s + float(self._trace.arrival_s[-1]) if len(self._trace) else self._start_s
        self._at(min(self._open_s, last_s), "open", None)
        self._at(last_s, "close", None)
        while self._heap:
            at_s, _, kind, data = heapq.heappop(self._heap)
            if at_s > last_s + tail_s:
                break
            if at_s > engines.now_s:
                engines.advance(at_s)
                self._shown = None
            if at_s > last_s and not engines.open:
                break
            getattr(self, f"_on_{kind}")(data)
        return FastResult(
            trace=self._trace,
            start_s=self._start_s,
            requests=engines.results,
            pools=engines.pool_names(),
            gaps=engines.gaps - self._gaps_before,
            refused=engines.refused,
            spilled=engines.spilled,
            mispredicted=engines.mispredicted,
            outgrown=engines.outgrown,
            decisions=self._decisions,
            observations=self._observations,
            effects=self._effects,
            energy_j={state: end_j - self._opened.energy_j[state] for state, end_j in self._closed.energy_j.items()},
            parked_gpu_s=self._closed.parked_gpu_s - self._opened.parked_gpu_s,
            window_s=self._closed.at_s - self._opened.at_s,
            off_node_s=self._closed.off_node_s - self._opened.off_node_s,
        )

    def _totals(self) -> _Totals:
        drawn_j = self.engines.energy_j()
        parked_gpu_s = sum(node.parked_gpu_s() for node in self._nodes.values())
        return _Totals(
            {
                GpuState.SERVING: float(drawn_j[SERVING]),
                GpuState.IDLE: float(drawn_j[IDLE]),
                GpuState.LOADING: float(drawn_j[AT_LOADING]),
                GpuState.DRAINING: float(drawn_j[AT_DRAINING]),
                GpuState.ASLEEP: float(drawn_j[AT_ASLEEP]),
                GpuState.PARKED: parked_gpu_s * self._parked_w,
            },
            parked_gpu_s,
            sum(node.off_for_s() for node in self._nodes.values()),
            self.engines.now_s,
        )

    def _at(self, at_s: float, kind: str, data: Any) -> None:
        heapq.heappush(self._heap, (at_s, next(self._order), kind, data))

    def _on_open(self, _: None) -> None:
        self._opened = self._totals()
        self._gaps_before = self.engines.gaps.copy()

    def _on_close(self, _: None) -> None:
        self._closed = self._totals()

    # ------------------------------------------------------------------------------------- the controller's side

    def _handle(self, event: Event) -> None:
        now_s = self.engines.now_s
        step = self._core.handle(Instant(now_s, WALL_AT_ZERO_S + now_s), event)
        for decision in step.decisions:
            self._on_decision(decision)
        for effect in step.effects:
            if self._keep:
                self._effects.append((now_s, effect))
            self._at(now_s, "done", self._carry_out(effect))
        if step.tick_early:
            self._handle(Tick(Level.INSTANCE, early=True))

    def _on_done(self, done: EffectDone) -> None:
        self._handle(done)

    def _on_tick(self, data: tuple[Level, float]) -> None:
        level, period_s = data
        self._handle(Tick(level))
        self._at(self.engines.now_s + period_s, "tick", data)

    def _next_s(self, period_s: float) -> float:
        """When to observe again."""
        if not self._sparse:
            return self.engines.now_s + period_s
        instance_s = self._core.state.settings.instance_s
        ticks = round((self.engines.now_s + period_s) / instance_s)
        return (ticks + 1) * instance_s - period_s

    def _on_telemetry(self, node: Node) -> None:
        for hosted in node.copy_out():
            self._at(self.engines.now_s + self._times.sleep_s, "slept", (node, hosted))
            self._route()
        self._observe(node)
        self._at(self._next_s(self._times.telemetry_s), "telemetry", node)

    def _on_off(self, node: Node) -> None:
        node.go_dark()

    def _on_booted(self, node: Node) -> None:
        node.booted()

    def _observe(self, node: Node) -> None:
        if not node.reports:
            return
        if self._shown is None:
            self._shown = self.engines.shown()
        seen = node.observe(self._shown)
        if self._keep:
            self._observations.append(seen)
        self._handle(NodeSeen(seen))

    def _on_report(self, _: None) -> None:
        counters = {name: ClassCounters(*row) for name, row in self.engines.counters().items()}
        now_s, queues = self.engines.now_s, self.engines.queues()
        self._handle(LoadSeen(LoadObservation(_GATEWAY, _EPOCH, now_s, self._model, counters, queues)))
        self._at(now_s + self._times.report_s, "report", None)

    def _route(self) -> None:
        """Routes by the table, less those whose port is closed."""
        self._shown = None
        if self._table is not None:
            self.engines.route(self._table.pools, self._rows)

    def _carry_out(self, effect: Effect) -> EffectDone:
        if isinstance(effect, Solve):
            solution = plan_for(effect.problem)
            return EffectDone(effect.effect_id, ok=solution.chosen is not None, solution=solution)
        if isinstance(effect, PublishRouting):
            self._table = effect.table
            self._route()
            return EffectDone(effect.effect_id, ok=True)
        node, now_s = self._nodes[effect.node_id], self.engines.now_s
        self._shown = None
        wrong = ""
        if isinstance(effect, PowerNode):
            if effect.on:
                node.boot()
                self._at(now_s + self._times.boot_s, "booted", node)
            elif node.instances:
                wrong = "instances run there"
            else:
                node.reports = False
                self._at(now_s + self._times.off_s, "off", node)
            return EffectDone(effect.effect_id, ok=not wrong, detail=wrong)
        match effect:
            case ApplyClocks():
                for target in effect.targets:
                    node.lock(target.gpu_uuids, target.mhz, now_s + effect.ttl_s)
                self._at(now_s + effect.ttl_s, "lease", node)
                node.clocks_changed()
            case ReleaseClocks():
                node.release(effect.gpu_uuids)
                node.clocks_changed()
            case ApplyCaps():
                for cap in effect.targets:
                    node.cap(cap.gpu_uuids, cap.watts)
                node.clocks_changed()
            case ReleaseCaps():
                node.cap(effect.gpu_uuids, None)
                node.clocks_changed()
            case StartInstance():
                wrong = node.start(effect.instance_id, effect.model, effect.pool, effect.gpu_uuids)
                if not wrong:
                    hosted = node.instances[effect.instance_id]
                    self._rows[effect.instance_id] = hosted.row
                    self._at(now_s + self._times.start_s, "ready", (node, hosted))
            case DrainInstance():
                wrong = node.drain(effect.instance_id)
            case StopInstance():
                wrong = node.stop(effect.instance_id)
                if not wrong:
                    self._at(now_s + self._times.stop_s, "stopped", (node, node.instances[effect.instance_id]))
        return EffectDone(effect.effect_id, ok=not wrong, detail=wrong)

    # ------------------------------------------------------------------------------------------ the hosts' side

    def _on_ready(self, data: tuple[Node, Hosted]) -> None:
        node, hosted = data
        if hosted.state is InstanceState.STARTING:
            node.ready(hosted)
            self._route()
            self._observe(node)  # a real agent's stream tells at once

    def _on_stopped(self, data: tuple[Node, Hosted]) -> None:
        node, hosted = data
        if hosted.state is InstanceState.STOPPING:
            node.stopped(hosted)
            self._shown = None
            del self._rows[hosted.instance_id]

    def _on_incident(self, incident: Incident) -> None:
        node = self._nodes[f"node-{incident.node}"]
        hosted = node.holder(incident.gpu)
        if hosted is None:
            return
        now_s = self.engines.now_s
        match incident.kind:
            case IncidentKind.CRASH:
                node.crash(hosted)
                self._at(now_s + self._times.stop_s, "failed", (node, hosted))
            case IncidentKind.SLEEP:
                if not node.drain_to_sleep(hosted):
                    return
            case IncidentKind.WAKE:
                if not node.wake(hosted):
                    return
                self._at(now_s + self._times.wake_s, "woken", (node, hosted))
        self._route()
        self._observe(node)

    def _on_failed(self, data: tuple[Node, Hosted]) -> None:
        node, hosted = data
        del self._rows[hosted.instance_id]
        node.failed(hosted)
        self._shown = None
        self._observe(node)

    def _on_slept(self, data: tuple[Node, Hosted]) -> None:
        node, hosted = data
        if node.slept(hosted):
            self._shown = None
            self._observe(node)

    def _on_woken(self, data: tuple[Node, Hosted]) -> None:
        node, hosted = data
        if node.woken(hosted):
            self._route()
            self._observe(node)

    def _on_lease(self, node: Node) -> None:
        node.clocks_changed()
        self._shown = None
