"""The Gateway service: `Route` and `ReportCompletion`, for tools that carry requests with a proxy of their own."""

from __future__ import annotations

from typing import Any

import grpc

from controller.gateway.asked import GENERATING, Asked
from controller.gateway.brain import Outcome
from controller.gateway.classify import PromptSize
from controller.picker.callers import TOOL, Callers
from controller.picker.exchange import Desk
from controller.predictor.port import Features
from dynamollm.v1 import gateway_pb2 as pb
from dynamollm.v1 import gateway_pb2_grpc as rpc

OUTCOMES = {
    pb.COMPLETION_OUTCOME_SERVED: Outcome.SERVED,
    pb.COMPLETION_OUTCOME_REJECTED: Outcome.REJECTED,
    pb.COMPLETION_OUTCOME_FAILED: Outcome.FAILED,
    pb.COMPLETION_OUTCOME_CLIENT_LEFT: Outcome.CLIENT_LEFT,
}
# No engine writes longer answers; each token is counted by itself.
MOST_TOKENS = 1_000_000
Context = grpc.aio.ServicerContext[Any, Any]


class GatewayService(rpc.GatewayServicer):
    """Translates; the brain decides."""

    def __init__(self, desk: Desk, callers: Callers) -> None:
        self._desk = desk
        self._callers = callers

    async def Route(self, request: pb.RouteRequest, context: Context) -> pb.RouteResponse:
        await self._callers.admit(TOOL, context)
        brain, held = self._desk.brain, self._desk.held
        served = brain.models()
        if not served:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no instances are known yet")
        if request.model not in served:
            message = f"the model {request.model[:100]!r} is not served here; served: {', '.join(served)}"
            await context.abort(grpc.StatusCode.NOT_FOUND, message)
        ticket = brain.arrive(_asked(request))
        instance = brain.choose(ticket)
        if instance is None:
            order = brain.refusing(ticket)
            brain.done(ticket, Outcome.QUEUE_FULL if order is None else Outcome.TOO_LATE)
            why = "" if order is None else f", the first token would come too late; again in {order.retry_after_s:g} s"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"all instances are full{why}")
        others = brain.alternatives(ticket, instance, self._desk.picker.alternatives)
        return pb.RouteResponse(
            ticket=held.hold(ticket, instance),
            request_class=str(ticket.classified.routing),
            pool=brain.pool_of(ticket),
            instance_id=instance.instance_id,
            endpoint=instance.endpoint,
            alternative_endpoints=[each.endpoint for each in others],
            confidence=ticket.classified.confidence,
            expires_in_s=held.forget_s,
        )

    async def ReportCompletion(
        self, request: pb.ReportCompletionRequest, context: Context
    ) -> pb.ReportCompletionResponse:
        await self._callers.admit(TOOL, context)
        running = request.outcome == pb.COMPLETION_OUTCOME_RUNNING
        if not running and request.outcome not in OUTCOMES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "outcome is needed")
        if request.total_s < 0 or request.time_to_first_token_s < 0:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "times cannot be below zero")
        if request.output_tokens > MOST_TOKENS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"output_tokens cannot be above {MOST_TOKENS:,}")
        held = self._desk.held.hear(request.ticket)
        if held is None or running:
            return pb.ReportCompletionResponse(known=held is not None)
        outcome = OUTCOMES[request.outcome]
        if outcome is Outcome.FAILED:
            self._desk.brain.suspect(held.instance.instance_id)
        elif outcome is Outcome.SERVED and request.output_tokens:
            usage = {
                "prompt_tokens": request.input_tokens,
                "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
            }
            tokens = request.output_tokens
            if request.HasField("time_to_first_token_s"):
                first_s = request.time_to_first_token_s
                gaps = tokens - 1
                # Only their mean is known.
                gaps_s = [max(0.0, request.total_s - first_s) / gaps] * gaps if gaps else []
                self._desk.brain.completed(held.ticket, tokens, usage, first_s, gaps_s)
            else:
                self._desk.brain.completed_whole(held.ticket, tokens, usage, request.total_s)
        self._desk.held.end(request.ticket, outcome)
        return pb.ReportCompletionResponse(known=True)


def _asked(request: pb.RouteRequest) -> Asked:
    limit = request.max_tokens if request.HasField("max_tokens") and request.max_tokens else None
    features = Features(
        input_tokens=0,
        model=request.model,
        route="chat" if request.chat else "completions",
        tenant=request.tenant[:64],
        limit_tokens=limit,
        stops=request.stop,
        json_mode=request.json_mode,
        text=request.excerpt[:4_000],
    )
    size = PromptSize(request.input_tokens, 0 if request.input_tokens else request.prompt_bytes)
    return Asked(GENERATING[request.chat], request.model, size, (), 0, limit, False, False, features)
