"""Real agents behind the fleet port: one streamed telemetry channel each, effects as unary calls.

Observations are pushed into `sink` as they arrive; effects run as tasks under a deadline and report `EffectDone`.
A lost agent is retried for ever with back-off; meanwhile its observations simply stop and the core sees their age.
Effects of an agent that leaves calls unanswered fail at once (controller/fleet/breaker.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import grpc
import stamina

from common.clock import Clock
from common.logs import get_logger
from common.tls import ClientTls, Renewing
from controller.fleet.arrival import Arrivals
from controller.fleet.breaker import breaker_of
from controller.fleet.port import (
    ApplyCaps,
    ApplyClocks,
    DrainInstance,
    EffectDone,
    Event,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    NodeEffect,
    NodeObservation,
    NodeSeen,
    ReleaseCaps,
    ReleaseClocks,
    StartInstance,
    StopInstance,
)
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types

_log = get_logger(__name__)
# gRPC keeps an idle channel in back-off for up to two minutes by default; an agent restarts in a second.
_CHANNEL_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000)]
# Any other code is the answer of an agent that is there.
_NO_ANSWER = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


class AgentClient:
    """One node agent: its streams and its calls."""

    def __init__(
        self,
        node_id: str,
        address: str,
        sink: Callable[[Event], None],
        clock: Clock,
        *,
        owner: str,
        term: int,
        interval_s: float,
        deadline_s: float,
        tls: ClientTls | None = None,
        tls_name: str = "",
        most_late_s: float = 30.0,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`tls` counts for addresses that are no unix socket; `tls_name` is what the agent's certificate says where
        that is not the address's host. A sample that came later than `most_late_s` is taken for that old. `chance`
        (0 … 1) spreads trials of agents that do not answer. Raises UserError when a certificate cannot be read."""
        self.node_id = node_id
        self.address = address
        self._sink = sink
        self._clock = clock
        self._owner = types.Owner(kind=types.OWNER_KIND_CONTROLLER, name=owner)
        self._term = term
        self._interval_s = interval_s
        self._deadline_s = deadline_s
        self._most_late_s = most_late_s
        self._breaker = breaker_of(deadline_s, interval_s, chance)
        self._link = Renewing(rpc.NodeAgentStub, self.address, tls, tls_name, _CHANNEL_OPTIONS)
        self._instances: dict[str, types.Instance] = {}
        self._indices: dict[str, int] = {}
        self._limits_w: dict[str, tuple[float, float]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def circuit_open(self) -> bool:
        """True while calls fail at once, because the agent has left the last ones unanswered."""
        return self._breaker.is_open

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._watch(loop)) for loop in (self._telemetry, self._watch_instances)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._link.close()

    async def _watch(self, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs one stream for ever; every break is logged once and tried again."""
        delay_s, down = 0.2, False
        while True:
            try:
                await loop()
                delay_s, down = 0.2, False
            except grpc.aio.AioRpcError as error:
                if not down:
                    _log.warning("agent_stream_lost", node=self.node_id, code=error.code().name, detail=error.details())
                down = True
            await self._link.renew(self._deadline_s)
            # Not all of a large fleet at the same instant.
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))
            delay_s = min(2.0, delay_s * 1.5)

    async def _telemetry(self) -> None:
        node = await self._link.stub.GetNode(pb.GetNodeRequest(), timeout=self._deadline_s)
        self._indices = {gpu.uuid: gpu.index for gpu in node.gpus}
        self._limits_w = {
            gpu.uuid: (gpu.min_power_limit_w, gpu.max_power_limit_w) for gpu in node.gpus if gpu.max_power_limit_w > 0
        }
        listed = await self._link.stub.ListInstances(pb.ListInstancesRequest(), timeout=self._deadline_s)
        self._instances = {instance.spec.instance_id: instance for instance in listed.instances}
        arrivals = Arrivals(self._most_late_s)
        try:
            async for sample in self._link.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=self._interval_s)):
                taken_s = came_s = self._clock.monotonic_s()
                if sample.HasField("sampled_at"):
                    taken_s = arrivals.taken_s(came_s, sample.sampled_at.seconds + sample.sampled_at.nanos / 1e9)
                self._closed(self._breaker.heard(came_s))
                self._sink(NodeSeen(self._observe(sample, taken_s)))
        finally:
            self._breaker.stream_lost()

    async def _watch_instances(self) -> None:
        first = True
        async for update in self._link.stub.WatchInstances(pb.WatchInstancesRequest()):
            if first:
                self._instances = {}
                first = False
            self._instances.update((instance.spec.instance_id, instance) for instance in update.instances)

    def _observe(self, sample: pb.WatchTelemetryResponse, taken_s: float) -> NodeObservation:
        live = {item.instance_id: item for item in sample.instances}
        seen = [_instance(instance, live.get(instance.spec.instance_id)) for instance in self._instances.values()]
        observation = NodeObservation(
            node_id=self.node_id,
            observed_at_s=taken_s,
            gpus=tuple(
                _gpu(gpu, self._indices.get(gpu.uuid, 0), sample.draining, self._limits_w.get(gpu.uuid))
                for gpu in sample.gpus
            ),
            instances=tuple(instance for instance in seen if not instance.held_by),
            held=tuple(instance for instance in seen if instance.held_by),
        )
        # One that has stopped is shown once and then forgotten.
        self._instances = {
            instance_id: instance
            for instance_id, instance in self._instances.items()
            if instance.state != types.INSTANCE_STATE_STOPPED
        }
        return observation

    async def execute(self, effect: NodeEffect) -> EffectDone:
        """Carries one effect out. Never raises: a failure is an EffectDone that says what went wrong."""
        if not self._breaker.lets_out(effect, self._clock.monotonic_s()):
            unsent = (
                f"not sent: {self.node_id} left the last {self._breaker.failed_calls} calls unanswered; "
                "one is tried now and then until it answers or reports again"
            )
            return EffectDone(effect.effect_id, ok=False, detail=unsent)
        try:
            # Idempotent by request id, so one retry within the deadline is safe.
            for attempt in stamina.retry_context(on=_transient, attempts=2, wait_initial=0.1, timeout=self._deadline_s):
                with attempt:
                    detail = await self._call(effect)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _NO_ANSWER:
                self._closed(self._breaker.answered())
            elif self._breaker.failed(self._clock.monotonic_s()):
                _log.warning("agent_circuit_open", node=self.node_id, code=error.code().name, detail=error.details())
            return EffectDone(effect.effect_id, ok=False, detail=f"{error.code().name}: {error.details()}")
        self._closed(self._breaker.answered())
        return EffectDone(effect.effect_id, ok=not detail, detail=detail)

    def _closed(self, news: bool) -> None:
        if news:
            _log.info("agent_circuit_closed", node=self.node_id)

    async def _call(self, effect: NodeEffect) -> str:
        """Returns what went wrong in part, "" for success."""
        # The term makes ids unique over controller restarts.
        request_id, timeout = f"{self._term}-{effect.effect_id}", self._deadline_s
        match effect:
            case ApplyClocks():
                lease = types.Lease(owner=self._owner, reason=effect.reason, ttl_s=effect.ttl_s, term=self._term)
                controls = [
                    pb.ControlRequest(gpu_uuid=uuid, clock_lock=pb.ClockLock(min_mhz=target.mhz, max_mhz=target.mhz))
                    for target in effect.targets
                    for uuid in target.gpu_uuids
                ]
                applied = await self._link.stub.ApplyControls(
                    pb.ApplyControlsRequest(request_id=request_id, lease=lease, controls=controls), timeout=timeout
                )
                return _complaints(applied.results)
            case ApplyCaps():
                lease = types.Lease(owner=self._owner, reason=effect.reason, ttl_s=effect.ttl_s, term=self._term)
                controls = [
                    pb.ControlRequest(
                        gpu_uuid=uuid, power_limit=pb.PowerLimit(limit_w=target.watts, protects=effect.protects)
                    )
                    for target in effect.targets
                    for uuid in target.gpu_uuids
                ]
                applied = await self._link.stub.ApplyControls(
                    pb.ApplyControlsRequest(request_id=request_id, lease=lease, controls=controls), timeout=timeout
                )
                return _complaints(applied.results)
            case ReleaseClocks() | ReleaseCaps():
                released = await self._link.stub.ReleaseControls(
                    pb.ReleaseControlsRequest(
                        request_id=request_id,
                        owner=self._owner,
                        term=self._term,
                        gpu_uuids=effect.gpu_uuids,
                        reason=effect.reason,
                        kinds=_CAPS if isinstance(effect, ReleaseCaps) else _CLOCKS,
                    ),
                    timeout=timeout,
                )
                return _complaints(released.results)
            case StartInstance():
                spec = types.InstanceSpec(
                    instance_id=effect.instance_id,
                    model=effect.model,
                    gpu_uuids=effect.gpu_uuids,
                    labels={"pool": effect.pool},
                )
                await self._link.stub.StartInstance(
                    pb.StartInstanceRequest(request_id=request_id, term=self._term, spec=spec, reason=effect.reason),
                    timeout=timeout,
                )
            case DrainInstance():
                await self._link.stub.DrainInstance(
                    pb.DrainInstanceRequest(
                        request_id=request_id,
                        term=self._term,
                        instance_id=effect.instance_id,
                        reason=effect.reason,
                    ),
                    timeout=timeout,
                )
            case StopInstance():
                await self._link.stub.StopInstance(
                    pb.StopInstanceRequest(
                        request_id=request_id,
                        term=self._term,
                        instance_id=effect.instance_id,
                        reason=effect.reason,
                    ),
                    timeout=timeout,
                )
        return ""


# A clock that is let go must not take the cap of a budget with it, nor the other way round.
_CLOCKS = (pb.CONTROL_KIND_CLOCK_LOCK, pb.CONTROL_KIND_MEMORY_CLOCK_LOCK)
_CAPS = (pb.CONTROL_KIND_POWER_LIMIT,)


def _transient(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE


def _complaints(results: Any) -> str:
    bad = [result for result in results if result.code != pb.CONTROL_CODE_APPLIED]
    return "; ".join(f"{result.gpu_uuid}: {pb.ControlCode.Name(result.code)} {result.detail}".strip() for result in bad)


def _gpu(gpu: pb.GpuSample, index: int, draining: bool, limits_w: tuple[float, float] | None) -> GpuObservation:
    """GPUs of a node that is out of service are as good as ill: nothing is placed on them."""
    return GpuObservation(
        uuid=gpu.uuid,
        index=index,
        healthy=gpu.health == pb.GPU_HEALTH_OK and not draining,
        power_w=gpu.power_w if gpu.HasField("power_w") else None,
        energy_j=gpu.energy_j if gpu.HasField("energy_j") else None,
        sm_mhz=gpu.sm_mhz if gpu.HasField("sm_mhz") else None,
        locked_mhz=gpu.locked_mhz if gpu.HasField("locked_mhz") else None,
        limit_w=round(gpu.power_limit_w, 1) if gpu.HasField("power_limit_w") else None,
        limits_w=limits_w,
    )


def _state(state: types.InstanceState.ValueType) -> InstanceState:
    return InstanceState(types.InstanceState.Name(state).removeprefix("INSTANCE_STATE_").lower())


def _instance(instance: types.Instance, sample: pb.InstanceSample | None) -> InstanceObservation:
    seen = InstanceObservation(
        instance_id=instance.spec.instance_id,
        model=instance.spec.model,
        pool=instance.spec.labels.get("pool", ""),
        gpu_uuids=tuple(instance.spec.gpu_uuids),
        state=_state(instance.state),
        endpoint=instance.endpoint,
        detail=instance.detail,
        step_seconds=dict(instance.step_seconds),
        held_by=instance.held_by,
    )
    if sample is None:
        return seen
    return replace(
        seen,
        running=sample.requests_running if sample.HasField("requests_running") else None,
        waiting=sample.requests_waiting if sample.HasField("requests_waiting") else None,
        kv_usage_ratio=sample.kv_cache_usage_ratio if sample.HasField("kv_cache_usage_ratio") else None,
    )
