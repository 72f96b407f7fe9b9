"""The virtual-time fleet: the controller's own core and the gateway's own dispatcher over simulated hosts.

The slow, plain reference of the twin: an event heap, one engine state machine per instance, everything exact. It
carries out the same effects as controller/loop/runtime.py and answers with the same observations, so the core
cannot tell it from a real fleet. Deterministic: the same inputs give the same result.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from controller.domain.classes import Bucket
from controller.domain.decision import Decision
from controller.domain.reasons import Level
from controller.domain.slo import Slo
from controller.fleet.port import (
    ApplyCaps,
    ApplyClocks,
    DrainInstance,
    Effect,
    EffectDone,
    Event,
    InstanceState,
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
from controller.gateway.classify import Classifier
from controller.gateway.dispatcher import Dispatcher, QueuedRequest
from controller.gateway.load import LoadMeter
from controller.loop.core import Core, Step
from controller.loop.orders import Order
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from simulator.incidents import Incident, IncidentKind
from simulator.physics import Physics
from simulator.traces import Request
from simulator.virtual_node import VirtualInstance, VirtualNode

WALL_AT_ZERO_S = 1_700_000_000.0
_GATEWAY, _EPOCH = "gateway", "1"


@dataclass(frozen=True, slots=True)
class FleetTimes:
    """Durations of the virtual hosts, as configured or measured on real ones."""

    start_s: float = 180.0  # from the start effect until ready, warm-up included
    stop_s: float = 2.0  # until its GPUs are proven free, also after a crash
    sleep_s: float = 5.0
    wake_s: float = 3.0
    off_s: float = 30.0  # from the order to a node until it draws nothing
    boot_s: float = 300.0  # from the order until it reports
    telemetry_s: float = 1.0
    report_s: float = 1.0


@dataclass(slots=True)
class ServedRequest:
    """What became of one request. Latencies are None when it was never answered."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    bucket: Bucket
    pool: str = ""
    queue_s: float = 0.0
    ttft_s: float | None = None
    tbt_s: float | None = None
    finished_s: float | None = None
    refused: bool = False  # no engine can hold it, or the gateway refused it: a clear error, counted as a miss
    failed: bool = False  # its engine crashed within the answer

    @property
    def ended(self) -> bool:
        return self.finished_s is not None or self.refused or self.failed


@dataclass(slots=True)
class FleetResult:
    requests: list[ServedRequest]
    decisions: list[Decision]
    observations: list[NodeObservation]
    gaps: dict[float, int] = field(default_factory=dict)  # token gap in s, rounded to 0.1 ms -> how often
    effects: list[tuple[float, Effect]] = field(default_factory=list)
    off_node_s: float = 0.0  # for which nodes drew nothing at all, their hosts neither


class VirtualFleet:
    """One model's fleet, its gateway and its controller in virtual time, and what befalls its instances.

    `observations` of the result hold every telemetry sample, so that energy is booked by the same code as live.
    """

    def __init__(
        self,
        core: Core,
        physics: Physics,
        nodes: int,
        times: FleetTimes | None = None,
        gpus_per_node: int = 8,
        incidents: Iterable[Incident] = (),
        orders: Iterable[tuple[float, Order]] = (),
    ) -> None:
        """`orders` are those of an operator, with the instants at which they are given."""
        self._core = core
        self._model = core.state.settings.model
        self._times = times or FleetTimes()
        self._slo: Slo = core.state.profile.slo
        self._heap: list[tuple[float, int, str, Any]] = []
        self._order = count()
        self._now_s = 0.0
        self._nodes = {f"node-{i}": VirtualNode(f"node-{i}", physics, gpus_per_node, 0.0) for i in range(nodes)}
        self._dispatcher = Dispatcher()
        self._classifier = Classifier(core.state.profile.scheme)
        self._meter = LoadMeter(self._slo)
        self._requests: dict[str, ServedRequest] = {}
        self._result = FleetResult([], [], [])
        self._incidents = tuple(incidents)
        self._orders = tuple(orders)
        self._table: RoutingTable | None = None

    def run(self, requests: Iterable[Request], start_s: float = 0.0, tail_s: float = 600.0) -> FleetResult:
        """Serves `requests`, whose arrivals count from `start_s` (before it, the fleet lays itself out), and ends
        once all are answered, or `tail_s` after the last arrival."""
        settings = self._core.state.settings
        for node in self._nodes.values():
            self._at(0.0, "telemetry", node)
        self._at(0.0, "report", None)
        # The first plan is made as soon as every node has reported, as the runtime does.
        for level, period_s in (
            (Level.INSTANCE, settings.instance_s),
            (Level.POOL, settings.pool_s),
            (Level.CLUSTER, settings.cluster_s),
        ):
            self._at(period_s, "tick", (level, period_s))
        for incident in self._incidents:
            self._at(incident.at_s, "incident", incident)
        for at_s, order in self._orders:
            self._at(at_s, "order", order)
        last_s = start_s
        for number, request in enumerate(requests):
            last_s = start_s + request.arrival_s
            self._at(last_s, "arrival", (f"r{number}", request))
        end_s = last_s + tail_s
        while self._heap:
            at_s, _, kind, data = heapq.heappop(self._heap)
            if at_s > end_s or (at_s > last_s and not self._open()):
                break
            self._now_s = at_s
            getattr(self, f"_on_{kind}")(data)
        self._now_s = max(self._now_s, last_s)
        self._result.observations.extend(node.observe(self._now_s) for node in self._nodes.values())
        self._result.requests = list(self._requests.values())
        self._result.off_node_s = sum(node.off_for_s(self._now_s) for node in self._nodes.values())
        return self._result

    def _open(self) -> bool:
        return any(not request.ended for request in self._requests.values())

    def _at(self, at_s: float, kind: str, data: Any) -> None:
        heapq.heappush(self._heap, (at_s, next(self._order), kind, data))

    # ------------------------------------------------------------------------------------- the controller's side

    def _handle(self, event: Event) -> None:
        self._follow(self._core.handle(self._instant, event))

    def _on_order(self, order: Order) -> None:
        self._follow(self._core.order(self._instant, order))

    @property
    def _instant(self) -> Instant:
        return Instant(self._now_s, WALL_AT_ZERO_S + self._now_s)

    def _follow(self, step: Step) -> None:
        self._result.decisions.extend(step.decisions)
        for effect in step.effects:
            self._result.effects.append((self._now_s, effect))
            done = self._carry_out(effect)
            self._at(self._now_s, "done", done)
        if step.tick_early:
            self._handle(Tick(Level.INSTANCE, early=True))

    def _on_done(self, done: EffectDone) -> None:
        self._handle(done)

    def _on_tick(self, data: tuple[Level, float]) -> None:
        level, period_s = data
        self._handle(Tick(level))
        self._at(self._now_s + period_s, "tick", data)

    def _on_telemetry(self, node: VirtualNode) -> None:
        for instance in node.copy_out(self._now_s):
            self._at(self._now_s + self._times.sleep_s, "slept", (node, instance))
            self._route()
        self._observe(node)
        self._at(self._now_s + self._times.telemetry_s, "telemetry", node)

    def _on_off(self, node: VirtualNode) -> None:
        node.go_dark(self._now_s)

    def _on_booted(self, node: VirtualNode) -> None:
        node.booted()

    def _observe(self, node: VirtualNode) -> None:
        if not node.reports:
            return
        seen = node.observe(self._now_s)
        self._result.observations.append(seen)
        self._handle(NodeSeen(seen))

    def _on_report(self, _: None) -> None:
        queues = self._dispatcher.queues(self._now_s)
        self._handle(LoadSeen(self._meter.observation(_GATEWAY, _EPOCH, self._now_s, self._model, queues)))
        self._at(self._now_s + self._times.report_s, "report", None)

    def _carry_out(self, effect: Effect) -> EffectDone:
        if isinstance(effect, Solve):
            solution = plan_for(effect.problem)
            return EffectDone(effect.effect_id, ok=solution.chosen is not None, solution=solution)
        if isinstance(effect, PublishRouting):
            self._table = effect.table
            self._dispatcher.obey(effect.table.pools, self._now_s)
            self._route()
            return EffectDone(effect.effect_id, ok=True)
        node = self._nodes[effect.node_id]
        wrong = ""
        if isinstance(effect, PowerNode):
            if effect.on:
                node.boot(self._now_s)
                self._at(self._now_s + self._times.boot_s, "booted", node)
            elif node.instances:
                wrong = "instances run there"
            else:
                node.reports = False
                self._at(self._now_s + self._times.off_s, "off", node)
            return EffectDone(effect.effect_id, ok=not wrong, detail=wrong)
        match effect:
            case ApplyClocks():
                for target in effect.targets:
                    node.lock(target.gpu_uuids, target.mhz, self._now_s + effect.ttl_s)
                self._at(self._now_s + effect.ttl_s, "lease", node)
                self._clocks_changed(node)
            case ReleaseClocks():
                node.release(effect.gpu_uuids)
                self._clocks_changed(node)
            case ApplyCaps():
                for cap in effect.targets:
                    node.cap(cap.gpu_uuids, cap.watts)
                self._clocks_changed(node)
            case ReleaseCaps():
                node.cap(effect.gpu_uuids, None)
                self._clocks_changed(node)
            case StartInstance():
                wrong = node.start(effect.instance_id, effect.model, effect.pool, effect.gpu_uuids, self._now_s)
                if not wrong:
                    self._at(self._now_s + self._times.start_s, "ready", (node, node.instances[effect.instance_id]))
            case DrainInstance():
                wrong = node.drain(effect.instance_id, self._now_s)
            case StopInstance():
                wrong = node.stop(effect.instance_id, self._now_s)
                if not wrong:
                    self._at(self._now_s + self._times.stop_s, "stopped", (node, node.instances[effect.instance_id]))
        return EffectDone(effect.effect_id, ok=not wrong, detail=wrong)

    # ------------------------------------------------------------------------------------------ the hosts' side

    def _on_ready(self, data: tuple[VirtualNode, VirtualInstance]) -> None:
        node, instance = data
        if instance.state is InstanceState.STARTING:
            node.ready(instance, self._now_s)
            self._route()
            self._observe(node)  # a real agent's stream tells at once

    def _on_stopped(self, data: tuple[VirtualNode, VirtualInstance]) -> None:
        node, instance = data
        if instance.state is InstanceState.STOPPING:
            node.stopped(instance, self._now_s)

    def _on_incident(self, incident: Incident) -> None:
        node = self._nodes[f"node-{incident.node}"]
        instance = node.holder(incident.gpu)
        if instance is None:
            return
        match incident.kind:
            case IncidentKind.CRASH:
                self._crash(node, instance)
            case IncidentKind.SLEEP:
                if not node.drain_to_sleep(instance, self._now_s):
                    return
            case IncidentKind.WAKE:
                if not node.wake(instance, self._now_s):
                    return
                self._at(self._now_s + self._times.wake_s, "woken", (node, instance))
        self._route()
        self._observe(node)

    def _crash(self, node: VirtualNode, instance: VirtualInstance) -> None:
        """What no client has heard of yet waits again; the rest is lost."""
        for request in node.crash(instance, self._now_s):
            served = self._requests[request.request_id]
            if served.ttft_s is None:
                self._dispatcher.fail_over(request.request_id, self._now_s)
            else:
                served.failed = True
                self._fail(request.request_id, served)
        self._at(self._now_s + self._times.stop_s, "failed", (node, instance))

    def _on_failed(self, data: tuple[VirtualNode, VirtualInstance]) -> None:
        node, instance = data
        node.failed(instance, self._now_s)
        self._observe(node)

    def _on_slept(self, data: tuple[VirtualNode, VirtualInstance]) -> None:
        node, instance = data
        if node.slept(instance, self._now_s):
            self._observe(node)

    def _on_woken(self, data: tuple[VirtualNode, VirtualInstance]) -> None:
        node, instance = data
        if node.woken(instance, self._now_s):
            self._route()
            self._observe(node)

    def _on_lease(self, node: VirtualNode) -> None:
        self._clocks_changed(node)

    def _clocks_changed(self, node: VirtualNode) -> None:
        for instance in node.instances.values():
            if node.clock_changed(instance, self._now_s):
                self._schedule_end(node, instance)

    def _schedule_end(self, node: VirtualNode, instance: VirtualInstance) -> None:
        if instance.iteration is not None:
            self._at(instance.iteration.end_s, "iteration_end", (node, instance, instance.version))

    def _begin(self, node: VirtualNode, instance: VirtualInstance) -> None:
        if node.begin(instance, self._now_s) is not None:
            self._schedule_end(node, instance)

    def _on_iteration_end(self, data: tuple[VirtualNode, VirtualInstance, int]) -> None:
        node, instance, version = data
        iteration = instance.iteration
        if iteration is None or version != instance.version:
            return
        instance.iteration = None
        for exact_s, gaps in iteration.gaps:
            gap_s = round(exact_s, 4)
            self._result.gaps[gap_s] = self._result.gaps.get(gap_s, 0) + gaps
        finished = False
        for token in instance.engine.finish_iteration(iteration, every_token=False):
            served = self._requests[token.request_id]
            if token.gap_s is not None and token.gap_s > iteration.seconds:
                # The pause of a preempted request is a gap that no iteration's own length shows.
                gap_s = round(token.gap_s, 4)
                self._result.gaps[gap_s] = self._result.gaps.get(gap_s, 0) + 1
            if served.ttft_s is None:
                served.ttft_s = self._now_s - served.arrival_s
                self._dispatcher.first_token(token.request_id)
                finished |= self._dispatcher.ordered  # a prompt less to read is room, then
            if token.finished:
                self._finish(token.request_id, served)
                finished = True
        self._begin(node, instance)
        if finished:
            self._dispatch()

    # --------------------------------------------------------------------------------------- the gateway's side

    def _on_arrival(self, data: tuple[str, Request]) -> None:
        request_id, request = data
        scheme = self._core.state.profile.scheme
        bucket = scheme.input_bucket(request.input_tokens)
        self._requests[request_id] = ServedRequest(self._now_s, request.input_tokens, request.output_tokens, bucket)
        classified = self._classifier.classify(request.input_tokens)
        self._meter.arrived(self._model, classified.load, request.input_tokens)
        due_s = self._now_s + self._slo.ttft_ms(bucket) / 1e3
        queued = QueuedRequest(request_id, self._model, classified.routing, due_s, request.input_tokens)
        if self._dispatcher.offer(queued, self._now_s):
            self._dispatch()
        else:
            self._refuse(queued, "queue_full")

    def _refuse(self, queued: QueuedRequest, reason: str) -> None:
        """A clear error to the client, and a miss."""
        served = self._requests[queued.request_id]
        served.refused = True
        served.pool, served.queue_s = "", 0.0  # also where an instance had it that crashed
        self._dispatcher.count_refused(queued, reason)
        scheme = self._core.state.profile.scheme
        self._meter.failed(self._model, scheme.classify(served.input_tokens, served.output_tokens))

    def _dispatch(self) -> None:
        for late, _ in self._dispatcher.refuse_late(self._now_s):
            self._refuse(late, "too_late")
        for queued, routed in self._dispatcher.dispatch(self._now_s):
            node, instance = self._instance(routed.instance_id)
            served = self._requests[queued.request_id]
            served.queue_s = self._now_s - served.arrival_s
            served.pool = self._dispatcher.pool_of(queued.request_id) or ""
            try:
                instance.engine.add(queued.request_id, served.input_tokens, served.output_tokens, self._now_s)
            except ValueError:
                served.refused = True
                self._fail(queued.request_id, served)
                continue
            if instance.iteration is None:
                self._begin(node, instance)
            elif node.cut(instance, self._now_s):
                self._schedule_end(node, instance)

    def _route(self) -> None:
        """Routes by the table, less those whose port is closed: a gateway hears that at its first try."""
        if self._table is None:
            return
        open_ = {i.instance_id for node in self._nodes.values() for i in node.instances.values() if i.answers}
        pools = tuple(
            replace(pool, instances=tuple(i for i in pool.instances if i.instance_id in open_))
            for pool in self._table.pools
        )
        self._dispatcher.update_routing(replace(self._table, pools=pools))
        self._dispatch()

    def _fail(self, request_id: str, served: ServedRequest) -> None:
        self._dispatcher.complete(request_id)
        scheme = self._core.state.profile.scheme
        self._meter.failed(self._model, scheme.classify(served.input_tokens, served.output_tokens))

    def _instance(self, instance_id: str) -> tuple[VirtualNode, VirtualInstance]:
        for node in self._nodes.values():
            if instance_id in node.instances:
                return node, node.instances[instance_id]
        raise KeyError(f"routed to {instance_id}, which does not exist")

    def _finish(self, request_id: str, served: ServedRequest) -> None:
        served.finished_s = self._now_s
        gaps = served.output_tokens - 1
        first_s = served.arrival_s + (served.ttft_s or 0.0)
        served.tbt_s = (self._now_s - first_s) / gaps if gaps else 0.0
        self._dispatcher.complete(request_id)
        self._classifier.observe(served.input_tokens, served.output_tokens)
        true_class = self._core.state.profile.scheme.classify(served.input_tokens, served.output_tokens)
        self._meter.completed(
            self._model, true_class, served.output_tokens, served.ttft_s or 0.0, [served.tbt_s] * gaps
        )
