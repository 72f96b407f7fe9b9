"""gRPC servicer of the controller: routing to gateways, load reports in, status and decision history out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Container, Mapping
from dataclasses import asdict
from typing import Any

import grpc
from sqlalchemy import Engine

from controller.api.budgets import budget_from_wire, budgets_to_wire
from controller.api.choices import choices_from_wire
from controller.api.figures import DRIFT_LINE, drift_line, pool_figures, power_w, predicted_power_w
from controller.api.gate import asker
from controller.api.routing_hub import RoutingHub
from controller.api.wire import (
    MODE_OF,
    MODES,
    STAGES,
    latencies_from_wire,
    loads_from_wire,
    routing_to_wire,
    timestamp,
)
from controller.domain.decision import canonical_json
from controller.domain.reasons import Level, Mode
from controller.explain import explain
from controller.fleet.port import Event, LoadSeen
from controller.loop.emergency import stage_of
from controller.loop.orders import CLUSTER_SCOPE, NODE_PREFIX, POOL_PREFIX, PlanNow, SetMode
from controller.loop.profile_in_use import PROFILE_LINE, status_line
from controller.loop.runtime import Runtime
from controller.loop.snapshot import take
from controller.loop.state import State
from controller.preview import preview
from controller.store.recorder import RecorderCounts
from controller.store.records import OrderKind, Record
from controller.store.repositories import StoredDecision, get_decision, list_decisions
from controller.trials import TRIAL_LINE
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import controller_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types

MAX_PAGE = 1000


class ControllerService(rpc.ControllerServicer):
    """Translates; decides nothing."""

    def __init__(
        self,
        state: State,
        hub: RoutingHub,
        sink: Callable[[Event], None],
        monotonic_s: Callable[[], float],
        engine: Engine,
        addresses: dict[str, str],
        recorder_counts: Callable[[], RecorderCounts],
        runtime: Runtime,
        holder: str,
        record: Callable[[Record], None],
        trial: Callable[[], str],
        circuits_open: Callable[[], Mapping[str, bool]],
    ) -> None:
        """`record` must neither block nor raise (store/recorder.py). `trial` says how a trial stands. `circuits_open`:
        by node, whether calls to its agent fail at once."""
        self._circuits_open = circuits_open
        self._record = record
        self._trial = trial
        self._state = state
        self._runtime = runtime
        self._holder = holder
        self._hub = hub
        self._sink = sink
        self._monotonic_s = monotonic_s
        self._engine = engine
        self._addresses = addresses
        self._recorder_counts = recorder_counts

    async def WatchRouting(
        self, request: pb.WatchRoutingRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WatchRoutingResponse]:
        async for table in self._hub.watch():
            yield routing_to_wire(table)

    async def ReportLoad(
        self, request: pb.ReportLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReportLoadResponse:
        if not request.gateway_id or not request.epoch:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "gateway_id and epoch are needed")
        try:
            observations = loads_from_wire(request, self._monotonic_s())
            latencies = latencies_from_wire(request, self._state.settings.model)
            choices = choices_from_wire(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        for observation in observations:
            self._sink(LoadSeen(observation))
        for request_class, seen in latencies:
            self._runtime.latency(request.gateway_id, request.epoch, request_class, seen)
        for choice in choices:
            self._record(choice)
        return pb.ReportLoadResponse(term=self._state.term)

    async def ListNodes(
        self, request: pb.ListNodesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListNodesResponse:
        return pb.ListNodesResponse(nodes=self._nodes())

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStatusResponse:
        state, counts = self._state, self._recorder_counts()
        readings = [gpu.power_w for node in state.nodes.values() for gpu in node.gpus if gpu.power_w is not None]
        return pb.GetStatusResponse(
            mode=MODES[state.mode],
            term=state.term,
            pools=self._pools(),
            nodes=self._nodes(),
            last_sentences=_sentences(state, self._trial(), self._monotonic_s()),
            decisions_recorded=counts.recorded,
            decisions_spooled=counts.in_memory + counts.spooled,
            modes=_modes(state),
            holder=self._holder,
            power_w=sum(readings) if readings else None,
            predicted_power_w=predicted_power_w(state, self._monotonic_s()),
            database_up=counts.database_ok,
        )

    async def ListDecisions(
        self, request: pb.ListDecisionsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListDecisionsResponse:
        limit = min(request.page_size or 100, MAX_PAGE)
        if request.level and request.level not in set(Level):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{request.level!r} is no level: {', '.join(Level)}")
        found = await asyncio.to_thread(
            list_decisions,
            self._engine,
            level=Level(request.level) if request.level else None,
            limit=limit,
            before=request.before_id or None,
        )
        return pb.ListDecisionsResponse(decisions=[_decision(stored) for stored in found])

    async def GetDecision(
        self, request: pb.GetDecisionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetDecisionResponse:
        stored = await asyncio.to_thread(get_decision, self._engine, request.id)
        if stored is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no decision {request.id}")
        decision = stored.decision
        return pb.GetDecisionResponse(
            decision=_decision(stored),
            inputs_json=canonical_json(decision.inputs),
            alternatives_json=canonical_json(list(decision.alternatives)),
            outcome_json=canonical_json(decision.outcome),
            explanation=explain(decision, stored.outcome, stored.id),
            realised_json=canonical_json(asdict(stored.outcome)) if stored.outcome else "",
        )

    async def SetMode(
        self, request: pb.SetModeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetModeResponse:
        mode, state = MODE_OF.get(request.mode), self._state
        wrong = _wrong_scope(state, request.scope, self._addresses)
        if mode is None:
            wrong = "mode must be active, advisory or paused"
        if not request.who:
            wrong = "who asks is needed: it is kept in the history"
        if wrong or mode is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, wrong)
        before = state.mode if request.scope == CLUSTER_SCOPE else state.modes.get(request.scope, Mode.ACTIVE)
        await self._runtime.order(
            OrderKind.MODE, SetMode(request.scope, mode), mode.value, asker(request.who), request.why
        )
        return pb.SetModeResponse(before=MODES[before], modes=_modes(state))

    async def PlanNow(
        self, request: pb.PlanNowRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PlanNowResponse:
        if not request.who:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "who asks is needed: it is kept in the history")
        if not self._state.pools:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "there is no plan yet: nodes are awaited")
        await self._runtime.order(OrderKind.PLAN, PlanNow("operator"), "", asker(request.who), request.why)
        return pb.PlanNowResponse()

    async def SetPowerBudget(
        self, request: pb.SetPowerBudgetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetPowerBudgetResponse:
        try:
            order = budget_from_wire(request, self._state, self._runtime.now().wall_s)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        value = "" if order.watts is None else repr(order.watts)
        await self._runtime.order(OrderKind.BUDGET, order, value, asker(request.who), request.why, order.until_s)
        return pb.SetPowerBudgetResponse(budgets=budgets_to_wire(self._state, self._runtime.now()))

    async def GetPowerBudget(
        self, request: pb.GetPowerBudgetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetPowerBudgetResponse:
        return pb.GetPowerBudgetResponse(budgets=budgets_to_wire(self._state, self._runtime.now()))

    async def PreviewPlan(
        self, request: pb.PreviewPlanRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PreviewPlanResponse:
        state = self._state
        if not state.pools:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "there is no plan yet: nodes are awaited")
        snapshot = take(state, state.expected_nodes)
        now = self._runtime.now()
        found = await asyncio.to_thread(preview, snapshot, state.profile, state.term, now)
        return pb.PreviewPlanResponse(
            decisions=[_decision(StoredDecision(0, decision, None)) for decision in found.decisions],
            instances_now=found.now,
            instances_then=found.then,
            power_now_w=found.power_now_w,
            power_then_w=found.power_then_w,
            explanation=explain(found.decisions[-1])[:-1] if found.decisions else [],
        )

    def _nodes(self) -> list[pb.NodeStatus]:
        state, now_s, circuits_open = self._state, self._monotonic_s(), self._circuits_open()
        nodes = []
        for node_id, address in sorted(self._addresses.items()):
            seen = state.nodes.get(node_id)
            freshness = (
                pb.FRESHNESS_OFF
                if not state.is_on(node_id)
                else pb.FRESHNESS_LOST
                if state.is_lost(node_id, now_s)
                else pb.FRESHNESS_STALE
                if state.is_stale(node_id, now_s)
                else pb.FRESHNESS_FRESH
            )
            nodes.append(
                pb.NodeStatus(
                    node_id=node_id,
                    address=address,
                    freshness=freshness,
                    age_s=now_s - seen.observed_at_s if seen else 0.0,
                    gpus=len(seen.gpus) if seen else 0,
                    power_w=sum(gpu.power_w or 0.0 for gpu in seen.gpus) if seen else 0.0,
                    circuit_open=circuits_open.get(node_id, False),
                )
            )
        return nodes

    def _pools(self) -> list[pb.PoolStatus]:
        state = self._state
        by_pool: dict[str, list[pb.InstanceStatus]] = {name: [] for name in state.pools}
        for node_id, instance in state.instances().values():
            clock = state.clocks.get(instance.instance_id)
            by_pool.setdefault(state.pool_of(instance), []).append(
                pb.InstanceStatus(
                    instance_id=instance.instance_id,
                    node_id=node_id,
                    tensor_parallel=instance.tp,
                    state=types.InstanceState.Value(f"INSTANCE_STATE_{instance.state.name}"),
                    clock_mhz=clock.mhz or 0
                    if clock and state.mode_of(state.pool_of(instance), node_id) is Mode.ACTIVE
                    else 0,
                    running=instance.running,
                    waiting=instance.waiting,
                    kv_usage_ratio=instance.kv_usage_ratio,
                    power_w=power_w(state, node_id, instance.gpu_uuids),
                )
            )
        return [
            pb.PoolStatus(
                name=figures.name,
                model=state.settings.model,
                classes=sorted(str(c) for c in state.pools[figures.name].group.classes),
                granted_gpus=figures.granted_gpus,
                instances=by_pool[figures.name],
                request_rate=figures.request_rate,
                mode=MODES[state.mode_of(figures.name, "")],
                power_w=figures.power_w,
                planned_rate=figures.planned_rate,
                capacity_rate=figures.capacity_rate,
                slo_attainment=figures.slo_attainment,
                queued=figures.queued,
                emergency=STAGES.get(stage_of(state, figures.name), pb.EMERGENCY_STAGE_UNSPECIFIED),
            )
            for figures in pool_figures(state, self._monotonic_s())
        ]


def _sentences(state: State, trial: str, now_s: float) -> dict[str, str]:
    """What each level said last, and what is to be known of the profile, of a trial and of clocks set by others."""
    said = {str(level): sentence for level, sentence in state.sentences.items()}
    beside = {PROFILE_LINE: status_line(state), TRIAL_LINE: trial, DRIFT_LINE: drift_line(state, now_s)}
    return {**said, **{name: line for name, line in beside.items() if line}}


def _modes(state: State) -> list[pb.ScopeMode]:
    return [pb.ScopeMode(scope=scope, mode=MODES[mode]) for scope, mode in sorted(state.modes.items())]


def _wrong_scope(state: State, scope: str, nodes: Container[str]) -> str:
    """Why there is no such scope; "" when there is."""
    if scope == CLUSTER_SCOPE:
        return ""
    if scope.startswith(POOL_PREFIX):
        known = [group.name for group in state.profile.groups]
        pool = scope.removeprefix(POOL_PREFIX)
        return "" if pool in known else f"there is no pool {pool!r}: the profile has {', '.join(known)}"
    if scope.startswith(NODE_PREFIX):
        node = scope.removeprefix(NODE_PREFIX)
        return "" if node in nodes else f"there is no node {node!r}"
    return f"{scope!r} is no scope: cluster, pool:NAME or node:ID is needed"


def _decision(stored: StoredDecision) -> pb.Decision:
    decision = stored.decision
    message = pb.Decision(
        id=stored.id,
        decided_at=timestamp(decision.decided_at_s),
        level=str(decision.level),
        scope=decision.scope,
        trigger=decision.trigger,
        reason=str(decision.reason),
        sentence=decision.sentence,
        mode=MODES[decision.mode],
        term=decision.term,
    )
    if decision.predicted_power_w is not None:
        message.predicted_power_w = decision.predicted_power_w
    return message
