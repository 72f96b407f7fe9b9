"""The gRPC front of the agent: messages in, calls, messages out. Decides nothing.

Every mutating call goes through the request log (once per id) and carries a term or an owner that the rooms below
check. Refusals become canonical status codes with one sentence.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from importlib.metadata import version
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from common.logs import get_logger
from common.scopes import Scope, caller
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types
from nodeagent import wire
from nodeagent.control.controls import Controls
from nodeagent.control.fence import Fence
from nodeagent.control.guard import Guard
from nodeagent.control.leases import Owner, OwnerKind
from nodeagent.drain import NodeDrain
from nodeagent.engine.instances import Instances
from nodeagent.errors import AlreadyExists, Denied, Invalid, NotFound, Precondition, Refused, Unavailable
from nodeagent.gpu.inventory import Inventory
from nodeagent.host import HostFacts
from nodeagent.idempotency import RequestLog
from nodeagent.security import require
from nodeagent.telemetry.stream import SampleStream

log = get_logger(__name__)
T = TypeVar("T")
Context = grpc.aio.ServicerContext[object, object]

_STATUS: dict[type[Refused], grpc.StatusCode] = {
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    Precondition: grpc.StatusCode.FAILED_PRECONDITION,
    Denied: grpc.StatusCode.PERMISSION_DENIED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}


class NodeAgentService(rpc.NodeAgentServicer):
    """One per daemon."""

    def __init__(
        self,
        node_id: str,
        host: HostFacts,
        inventory: Inventory,
        controls: Controls,
        fence: Fence,
        instances: Instances,
        stream: SampleStream,
        capabilities: list[str],
        guard: Guard,
        drain: NodeDrain,
    ) -> None:
        self._node_id = node_id
        self._host = host
        self._inventory = inventory
        self._controls = controls
        self._fence = fence
        self._instances = instances
        self._stream = stream
        self._capabilities = capabilities
        self._guard = guard
        self._drain = drain
        self._requests = RequestLog()

    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> pb.GetNodeResponse:
        return await _answer(context, self._get_node())

    async def WatchTelemetry(
        self, request: pb.WatchTelemetryRequest, context: Context
    ) -> AsyncIterator[pb.WatchTelemetryResponse]:
        if not 0.05 <= request.interval_s <= 60:
            await _refuse(context, Invalid(f"interval_s is {request.interval_s:g}; it must be 0.05 to 60"))
        reader = self._stream.subscribe(request.interval_s, request.history_samples)
        try:
            async for sequence, sample in reader:
                yield wire.sample_to(self._node_id, sequence, sample, sequence < reader.replayed)
        finally:
            self._stream.unsubscribe(reader)

    async def ApplyControls(self, request: pb.ApplyControlsRequest, context: Context) -> pb.ApplyControlsResponse:
        async def work() -> pb.ApplyControlsResponse:
            lease = request.lease
            owner, wishes = _allowed(wire.owner_from(lease.owner)), wire.wishes_from(request)
            results = await self._controls.apply(owner, lease.reason, lease.ttl_s, lease.term, wishes)
            response = pb.ApplyControlsResponse()
            wire.put_results(response.results, results)
            return response

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def ReleaseControls(self, request: pb.ReleaseControlsRequest, context: Context) -> pb.ReleaseControlsResponse:
        async def work() -> pb.ReleaseControlsResponse:
            owner = _allowed(wire.owner_from(request.owner))
            kinds = wire.kinds_from(request)
            results = await self._controls.release(owner, request.term, list(request.gpu_uuids), request.reason, kinds)
            response = pb.ReleaseControlsResponse()
            wire.put_results(response.results, results)
            return response

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def ListControls(self, request: pb.ListControlsRequest, context: Context) -> pb.ListControlsResponse:
        return pb.ListControlsResponse(controls=[wire.held_to(*held) for held in self._controls.held()])

    async def StartInstance(self, request: pb.StartInstanceRequest, context: Context) -> pb.StartInstanceResponse:
        async def work() -> pb.StartInstanceResponse:
            self._admit(request, new_work=True)
            view = await self._instances.start(wire.spec_from(request.spec), request.reason, _holder(request))
            return pb.StartInstanceResponse(instance=wire.instance_to(view))

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def DrainInstance(self, request: pb.DrainInstanceRequest, context: Context) -> pb.DrainInstanceResponse:
        async def work() -> pb.DrainInstanceResponse:
            self._admit(request)
            view = self._instances.drain(request.instance_id, request.reason, _holder(request))
            return pb.DrainInstanceResponse(instance=wire.instance_to(view))

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def StopInstance(self, request: pb.StopInstanceRequest, context: Context) -> pb.StopInstanceResponse:
        async def work() -> pb.StopInstanceResponse:
            self._admit(request)
            view = await self._instances.stop(request.instance_id, request.force, request.reason, _holder(request))
            return pb.StopInstanceResponse(instance=wire.instance_to(view))

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def RestartInstance(self, request: pb.RestartInstanceRequest, context: Context) -> pb.RestartInstanceResponse:
        async def work() -> pb.RestartInstanceResponse:
            self._admit(request, new_work=True)
            gpus = tuple(request.gpu_uuids)
            view, transaction_id = await self._instances.restart(
                request.instance_id, gpus, request.drain_deadline_s, request.reason, _holder(request)
            )
            return pb.RestartInstanceResponse(instance=wire.instance_to(view), transaction_id=transaction_id)

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def SleepInstance(self, request: pb.SleepInstanceRequest, context: Context) -> pb.SleepInstanceResponse:
        async def work() -> pb.SleepInstanceResponse:
            self._admit(request)
            view = await self._instances.sleep(request.instance_id, request.reason, _holder(request))
            return pb.SleepInstanceResponse(instance=wire.instance_to(view))

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def WakeInstance(self, request: pb.WakeInstanceRequest, context: Context) -> pb.WakeInstanceResponse:
        async def work() -> pb.WakeInstanceResponse:
            self._admit(request, new_work=True)
            view = await self._instances.wake(request.instance_id, request.reason, _holder(request))
            return pb.WakeInstanceResponse(instance=wire.instance_to(view))

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def SetGuard(self, request: pb.SetGuardRequest, context: Context) -> pb.SetGuardResponse:
        async def work() -> pb.SetGuardResponse:
            if not request.reason:
                raise Invalid("reason is empty; say why")
            who = self._admit(request)
            await self._guard.set_rules(*wire.rules_from(request), who, request.reason)
            return pb.SetGuardResponse(status=self._guard_status())

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def GetGuard(self, request: pb.GetGuardRequest, context: Context) -> pb.GetGuardResponse:
        return pb.GetGuardResponse(status=self._guard_status())

    async def TripGuard(self, request: pb.TripGuardRequest, context: Context) -> pb.TripGuardResponse:
        async def work() -> pb.TripGuardResponse:
            if not request.reason:
                raise Invalid("reason is empty; say why")
            why = f"by {caller.get().name}: {request.reason}"
            if request.trip:
                await self._guard.trip(why)
            else:
                require(Scope.ADMIN, "lifting the watts floor")
                await self._guard.lift(why)
            return pb.TripGuardResponse(status=self._guard_status())

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Context) -> pb.DrainNodeResponse:
        async def work() -> pb.DrainNodeResponse:
            await self._drain.begin(_operator(request.owner, request.reason), request.reason)
            return pb.DrainNodeResponse(instances=[wire.instance_to(view) for view in self._instances.views()])

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    async def ResumeNode(self, request: pb.ResumeNodeRequest, context: Context) -> pb.ResumeNodeResponse:
        async def work() -> pb.ResumeNodeResponse:
            await self._drain.end(_operator(request.owner, request.reason), request.reason)
            return pb.ResumeNodeResponse()

        return await _answer(context, self._requests.once(request.request_id, _content(request), work))

    def _guard_status(self) -> pb.GuardStatus:
        return wire.guard_to(self._guard.state, self._guard.boosting)

    async def ListInstances(self, request: pb.ListInstancesRequest, context: Context) -> pb.ListInstancesResponse:
        return pb.ListInstancesResponse(instances=[wire.instance_to(view) for view in self._instances.views()])

    async def WatchInstances(
        self, request: pb.WatchInstancesRequest, context: Context
    ) -> AsyncIterator[pb.WatchInstancesResponse]:
        reader = self._instances.feed.subscribe()
        try:
            yield pb.WatchInstancesResponse(instances=[wire.instance_to(view) for view in self._instances.views()])
            async for changed in reader:
                yield pb.WatchInstancesResponse(instances=[wire.instance_to(view) for view in changed])
        finally:
            self._instances.feed.unsubscribe(reader)

    async def _get_node(self) -> pb.GetNodeResponse:
        await asyncio.gather(*(worker.refresh_facts() for worker in self._inventory.workers))
        return pb.GetNodeResponse(
            node_id=self._node_id,
            hostname=self._host.hostname,
            agent_version=version("dynamollm"),
            driver_version=self._inventory.driver_version,
            boot_id=self._host.boot_id,
            term=self._fence.term,
            gpus=[wire.gpu_to(worker) for worker in self._inventory.workers],
            cpu_count=self._host.cpu_count,
            memory_bytes=self._host.memory_bytes,
            capabilities=self._capabilities,
            numa_nodes=[
                pb.NumaNode(id=node.id, memory_bytes=node.memory_bytes, cpus=node.cpus) for node in self._host.numa
            ],
            drain=wire.drain_to(self._drain.state),
        )

    def _admit(self, request: _Steering, new_work: bool = False) -> str:
        """Lets a controller of the present term through, and an operator without one; the caller in words.

        `new_work` marks what a node that is out of service refuses to controllers.
        """
        who = caller.get().name
        owner = Owner(OwnerKind.CONTROLLER, "")
        if request.HasField("owner"):
            owner = _allowed(wire.owner_from(request.owner))
            who += f" as {owner}"
        if owner.kind is OwnerKind.GUARD:
            raise Invalid("the guard is this node's own; nobody may speak for it")
        if owner.kind is OwnerKind.CONTROLLER:
            holder = Owner(OwnerKind.CONTROLLER, self._fence.holder)
            active = any(lease.owner == holder and left_s > 0 for _, _, lease, left_s in self._controls.held())
            self._fence.admit(request.term, owner.name, active)
            if new_work:
                self._drain.require_in_service()
        return who


_Steering = (
    pb.StartInstanceRequest
    | pb.DrainInstanceRequest
    | pb.StopInstanceRequest
    | pb.RestartInstanceRequest
    | pb.SleepInstanceRequest
    | pb.WakeInstanceRequest
    | pb.SetGuardRequest
)


def _holder(request: _Steering) -> str:
    """The operator who asks, "" for a controller: whose the instance is from now on."""
    return request.owner.name if request.owner.kind == types.OWNER_KIND_OPERATOR else ""


def _operator(message: types.Owner, reason: str) -> str:
    """Who it is; raises Refused for anybody but an operator, and for one without a reason."""
    owner = _allowed(wire.owner_from(message))
    if owner.kind is not OwnerKind.OPERATOR:
        raise Invalid("only an operator takes a node out of service and puts it back; set owner.kind")
    if not 0 < len(reason) <= wire.MAX_REASON:
        raise Invalid(f"reason must have 1 to {wire.MAX_REASON} characters; say why")
    return f"{caller.get().name} as {owner}"


def _allowed(owner: Owner) -> Owner:
    if owner.kind is OwnerKind.OPERATOR:
        require(Scope.ADMIN, "acting as an operator")
    return owner


def _content(request: Message) -> bytes:
    """What makes two requests the same: type and bytes."""
    return request.DESCRIPTOR.full_name.encode() + b"\0" + request.SerializeToString(deterministic=True)


async def _answer(context: Context, work: Awaitable[T]) -> T:
    try:
        return await work
    except Refused as refusal:
        await _refuse(context, refusal)
    except Exception as error:
        log.error("internal error", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the agent's log")


async def _refuse(context: Context, refusal: Refused) -> NoReturn:
    log.warning("refused", why=str(refusal), peer=context.peer())
    await context.abort(_STATUS[type(refusal)], str(refusal))
