"""gRPC servicer of the controller: routing to gateways, load reports in, status and decision history out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from sqlalchemy import Engine

from controller.api.routing_hub import RoutingHub
from controller.api.wire import MODES, loads_from_wire, routing_to_wire, timestamp
from controller.domain.decision import canonical_json
from controller.domain.reasons import Level
from controller.fleet.port import Event, LoadSeen
from controller.loop.state import State
from controller.store.repositories import StoredDecision, get_decision, list_decisions
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
        recorder_counts: Callable[[], tuple[int, int]],
    ) -> None:
        """`recorder_counts` gives (recorded, waiting in memory or spool)."""
        self._state = state
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
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        for observation in observations:
            self._sink(LoadSeen(observation))
        return pb.ReportLoadResponse(term=self._state.term)

    async def ListNodes(
        self, request: pb.ListNodesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListNodesResponse:
        return pb.ListNodesResponse(nodes=self._nodes())

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStatusResponse:
        state, recorded = self._state, self._recorder_counts()
        return pb.GetStatusResponse(
            mode=MODES[state.mode],
            term=state.term,
            pools=self._pools(),
            nodes=self._nodes(),
            last_sentences={str(level): sentence for level, sentence in state.sentences.items()},
            decisions_recorded=recorded[0],
            decisions_spooled=recorded[1],
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
        )

    def _nodes(self) -> list[pb.NodeStatus]:
        state, now_s = self._state, self._monotonic_s()
        nodes = []
        for node_id, address in sorted(self._addresses.items()):
            seen = state.nodes.get(node_id)
            freshness = (
                pb.FRESHNESS_LOST
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
                    clock_mhz=clock.mhz or 0 if clock else 0,
                )
            )
        rates = state.load.rates_rps(self._monotonic_s(), state.settings.load_window_s) or {}
        return [
            pb.PoolStatus(
                name=name,
                model=state.settings.model,
                classes=sorted(str(c) for c in plan.group.classes),
                granted_gpus=plan.granted_gpus,
                instances=by_pool[name],
                request_rate=sum(rates.get(c, 0.0) for c in plan.group.classes),
            )
            for name, plan in sorted(state.pools.items())
        ]


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
