"""Between the API's messages and the agent's own values. Checks only what the values themselves cannot express."""

from __future__ import annotations

import math
from collections.abc import Iterable

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.timestamp_pb2 import Timestamp

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from nodeagent.control.guard_rules import GuardState, SloBoost, WattsFloor
from nodeagent.control.leases import Lease, Owner, OwnerKind
from nodeagent.control.results import Code, Result, Wish
from nodeagent.control.settings import ClockLock, ControlKey, ControlKind, MemoryClockLock, PowerLimit, Setting
from nodeagent.drain import Drained
from nodeagent.engine.feed import InstanceView
from nodeagent.engine.lifecycle import State
from nodeagent.engine.records import Spec
from nodeagent.engine.vllm import Histogram
from nodeagent.errors import Invalid
from nodeagent.gpu.driver import GpuHealth
from nodeagent.gpu.worker import GpuWorker
from nodeagent.telemetry.sample import GpuSample, InstanceSample, Sample

MAX_REASON = 500
MAX_CONTROLS = 256
"""Per batch; a host has a few dozen at most."""

_OWNER_KINDS = {
    types.OWNER_KIND_CONTROLLER: OwnerKind.CONTROLLER,
    types.OWNER_KIND_OPERATOR: OwnerKind.OPERATOR,
    types.OWNER_KIND_GUARD: OwnerKind.GUARD,
}
_CONTROL_KINDS = {pb.ControlKind.Value(f"CONTROL_KIND_{kind.name}"): kind for kind in ControlKind}
_OWNER_KIND_NUMBERS = {kind: number for number, kind in _OWNER_KINDS.items()}
_CODES = {code: pb.ControlCode.Value(f"CONTROL_CODE_{code.name}") for code in Code}
_STATES = {state: types.InstanceState.Value(f"INSTANCE_STATE_{state.name}") for state in State}
_HEALTH = {health: pb.GpuHealth.Value(f"GPU_HEALTH_{health.name}") for health in GpuHealth}


def owner_from(message: types.Owner) -> Owner:
    """Raises Invalid for an owner without kind or name."""
    kind = _OWNER_KINDS.get(message.kind)
    if kind is None:
        raise Invalid("owner.kind is not set")
    if not 0 < len(message.name) <= 128:
        raise Invalid("owner.name must have 1 to 128 characters")
    return Owner(kind, message.name)


def wishes_from(request: pb.ApplyControlsRequest) -> list[Wish]:
    """Raises Invalid for an empty or oversized batch and for a control without a value."""
    if not 0 < len(request.controls) <= MAX_CONTROLS:
        raise Invalid(f"controls must hold 1 to {MAX_CONTROLS} entries, not {len(request.controls)}")
    if not request.lease.reason:
        raise Invalid("lease.reason is empty; say why")
    if len(request.lease.reason) > MAX_REASON:
        raise Invalid(f"lease.reason has {len(request.lease.reason)} characters; {MAX_REASON} are enough")
    return [Wish(control.gpu_uuid, _setting_from(control)) for control in request.controls]


def kinds_from(request: pb.ReleaseControlsRequest) -> frozenset[ControlKind]:
    """Those to release; all where none is named. Raises Invalid for one that is not known."""
    unknown = [number for number in request.kinds if number not in _CONTROL_KINDS]
    if unknown:
        raise Invalid(f"kinds holds {unknown[0]}, which is no kind of control")
    return frozenset(_CONTROL_KINDS[number] for number in request.kinds) or frozenset(ControlKind)


def _setting_from(control: pb.ControlRequest) -> Setting:
    which = control.WhichOneof("control")
    if which == "clock_lock":
        return ClockLock(control.clock_lock.min_mhz, control.clock_lock.max_mhz)
    if which == "power_limit":
        return PowerLimit(control.power_limit.limit_w, control.power_limit.protects)
    if which == "memory_clock_lock":
        return MemoryClockLock(control.memory_clock_lock.min_mhz, control.memory_clock_lock.max_mhz)
    raise Invalid(f"control for {control.gpu_uuid!r} has neither clock_lock nor power_limit nor memory_clock_lock")


def _put_control(message: pb.ControlRequest, uuid: str, setting: Setting) -> None:
    message.gpu_uuid = uuid
    if isinstance(setting, PowerLimit):
        limit = message.power_limit
        limit.SetInParent()  # a limit of plain zeros is one all the same
        limit.limit_w, limit.protects = setting.limit_w, setting.protects
        return
    lock = message.clock_lock if isinstance(setting, ClockLock) else message.memory_clock_lock
    lock.SetInParent()
    lock.min_mhz, lock.max_mhz = setting.min_mhz, setting.max_mhz


def rules_from(request: pb.SetGuardRequest) -> tuple[SloBoost, WattsFloor]:
    """A rule that is left out is switched off. Whether the values make sense is for the guard to say."""
    boost, floor = request.slo_boost, request.watts_floor
    return (
        SloBoost(
            boost.enabled,
            boost.max_waiting if boost.HasField("max_waiting") else None,
            boost.max_ttft_p99_ms if boost.HasField("max_ttft_p99_ms") else None,
            boost.max_token_gap_p99_ms if boost.HasField("max_token_gap_p99_ms") else None,
            boost.hold_s,
        ),
        WattsFloor(floor.enabled, floor.limit_w, dict(floor.limit_w_by_gpu), floor.heartbeat_age_s),
    )


def guard_to(state: GuardState, boosting: bool) -> pb.GuardStatus:
    boost, floor = state.slo_boost, state.watts_floor
    return pb.GuardStatus(
        slo_boost=pb.SloBoostRule(
            enabled=boost.enabled,
            max_waiting=boost.max_waiting,
            max_ttft_p99_ms=boost.max_ttft_p99_ms,
            max_token_gap_p99_ms=boost.max_token_gap_p99_ms,
            hold_s=boost.hold_s,
        ),
        watts_floor=pb.WattsFloorRule(
            enabled=floor.enabled,
            limit_w=floor.limit_w,
            limit_w_by_gpu=floor.limit_w_by_gpu,
            heartbeat_age_s=floor.heartbeat_age_s,
        ),
        boosting=boosting,
        floor_tripped=state.tripped,
        last_act=state.last_act,
        last_act_at=_timestamp(state.last_act_wall_s) if state.last_act else None,
    )


def put_results(messages: RepeatedCompositeFieldContainer[pb.ControlResult], results: Iterable[Result]) -> None:
    """Fills a response in place: messages inside messages are otherwise copied, and this is on every call's way."""
    for result in results:
        message, seen = messages.add(), result.observed
        message.gpu_uuid, message.code, message.detail = result.gpu_uuid, _CODES[result.code], result.detail
        if result.requested is not None:
            _put_control(message.requested, result.gpu_uuid, result.requested)
        if result.applied is not None:
            _put_control(message.applied, result.gpu_uuid, result.applied)
        if seen.sm_mhz is not None:
            message.observed_sm_mhz = seen.sm_mhz
        if seen.power_limit_w is not None:
            message.observed_power_limit_w = seen.power_limit_w


def held_to(key: ControlKey, setting: Setting, lease: Lease, remaining_s: float) -> pb.HeldControl:
    owner = types.Owner(kind=_OWNER_KIND_NUMBERS[lease.owner.kind], name=lease.owner.name)
    held = pb.HeldControl(
        lease=types.Lease(owner=owner, reason=lease.reason, ttl_s=lease.ttl_s, term=lease.term),
        remaining_s=remaining_s,
    )
    _put_control(held.control, key.gpu_uuid, setting)
    return held


def spec_from(message: types.InstanceSpec) -> Spec:
    return Spec(message.instance_id, message.model, tuple(message.gpu_uuids), dict(message.labels))


def instance_to(view: InstanceView) -> types.Instance:
    record = view.record
    nap = record.nap if record.state is State.ASLEEP else None
    spec = types.InstanceSpec(
        instance_id=record.spec.instance_id,
        model=record.spec.model,
        gpu_uuids=record.spec.gpu_uuids,
        labels=record.spec.labels,
    )
    return types.Instance(
        spec=spec,
        state=_STATES[record.state],
        endpoint=view.endpoint,
        detail=record.detail,
        seconds_in_state=view.seconds_in_state,
        step_seconds=record.step_s,
        pid=record.process.pid if record.process is not None else 0,
        asleep_power_w=nap.power_w if nap is not None else None,
        asleep_gpu_bytes=sum(nap.asleep_bytes.values()) if nap is not None else 0,
        asleep_host_bytes=nap.host_bytes if nap is not None else 0,
        drained=record.drained and record.state is State.DRAINING,
        held_by=record.held_by,
    )


def gpu_to(worker: GpuWorker) -> pb.Gpu:
    """A GPU that never answered has no UUID and no facts, only its index and what is wrong."""
    facts = worker.facts
    if facts is None:
        return pb.Gpu(index=worker.index, health=_HEALTH[worker.health], detail=worker.detail)
    return pb.Gpu(
        uuid=facts.uuid,
        index=facts.index,
        name=facts.name,
        memory_bytes=facts.memory_bytes,
        min_sm_mhz=facts.sm_clocks_mhz[0] if facts.sm_clocks_mhz else 0,
        max_sm_mhz=facts.sm_clocks_mhz[-1] if facts.sm_clocks_mhz else 0,
        sm_clocks_mhz=facts.sm_clocks_mhz,
        min_power_limit_w=facts.min_power_limit_w,
        max_power_limit_w=facts.max_power_limit_w,
        default_power_limit_w=facts.default_power_limit_w,
        mig_enabled=facts.mig_enabled,
        persistence_enabled=facts.persistence_enabled,
        numa_node=facts.numa_node,
        health=_HEALTH[worker.health],
        detail=worker.detail,
    )


def sample_to(node_id: str, sequence: int, sample: Sample, replayed: bool = False) -> pb.WatchTelemetryResponse:
    return pb.WatchTelemetryResponse(
        node_id=node_id,
        sampled_at=_timestamp(sample.wall_s),
        sequence=sequence,
        gpus=[_gpu_sample_to(gpu) for gpu in sample.gpus],
        instances=[_instance_sample_to(instance) for instance in sample.instances],
        host=pb.HostSample(
            cpu_utilization_ratio=sample.host.cpu_utilization_ratio,
            memory_used_ratio=sample.host.memory_used_ratio,
            memory_available_bytes=sample.host.memory_available_bytes,
            numa=[pb.NumaSample(id=number, memory_free_bytes=free) for number, free in sample.host.numa_free_bytes],
        ),
        alarms=sample.alarms,
        replayed=replayed,
        draining=sample.draining,
    )


def drain_to(drained: Drained | None) -> pb.NodeDrain | None:
    if drained is None:
        return None
    return pb.NodeDrain(by=drained.by, reason=drained.reason, since=_timestamp(drained.since_wall_s))


def _timestamp(wall_s: float) -> Timestamp:
    seconds = math.floor(wall_s)
    return Timestamp(seconds=seconds, nanos=int((wall_s - seconds) * 1e9))


def _gpu_sample_to(gpu: GpuSample) -> pb.GpuSample:
    reading = gpu.reading
    return pb.GpuSample(
        uuid=gpu.uuid,
        health=_HEALTH[gpu.health],
        power_w=reading.power_w,
        energy_j=gpu.energy_j,
        sm_mhz=reading.sm_mhz,
        memory_mhz=reading.memory_mhz,
        temperature_c=reading.temperature_c,
        utilization_ratio=reading.utilization_ratio,
        power_limit_w=reading.power_limit_w,
        event_reasons=reading.event_reasons,
        locked_mhz=gpu.locked_mhz,
        energy_is_integrated=gpu.energy_is_integrated,
        memory_temperature_c=reading.memory_temperature_c,
        alarms=gpu.alarms,
        drift_mhz=gpu.drift_mhz,
    )


def _instance_sample_to(instance: InstanceSample) -> pb.InstanceSample:
    message = pb.InstanceSample(
        instance_id=instance.instance_id,
        state=_STATES[instance.state],
        prompt_tokens_per_s=instance.prompt_tokens_per_s,
        generation_tokens_per_s=instance.generation_tokens_per_s,
        power_w=instance.power_w,
    )
    engine = instance.engine
    if engine is None:
        return message
    message.requests_running, message.requests_waiting = engine.running, engine.waiting
    if engine.kv_cache_usage_ratio is not None:
        message.kv_cache_usage_ratio = engine.kv_cache_usage_ratio
    if engine.prompt_tokens_total is not None:
        message.prompt_tokens_total = engine.prompt_tokens_total
    if engine.generation_tokens_total is not None:
        message.generation_tokens_total = engine.generation_tokens_total
    if engine.ttft_seconds is not None:
        message.ttft_seconds.CopyFrom(_histogram_to(engine.ttft_seconds))
    if engine.token_gap_seconds is not None:
        message.token_gap_seconds.CopyFrom(_histogram_to(engine.token_gap_seconds))
    if engine.tbt_seconds is not None:
        message.tbt_seconds.CopyFrom(_histogram_to(engine.tbt_seconds))
    return message


def _histogram_to(histogram: Histogram) -> types.Histogram:
    return types.Histogram(bounds=histogram.bounds, counts=histogram.counts, sum=histogram.sum)
