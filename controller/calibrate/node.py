"""Calibration's backend for a real, idle GPU host: its agent starts the engines and holds clocks and caps under leases,
the load generator sends the requests, and energy comes from the GPUs' counters.

Everything is an operator's action with a limited lease: a calibration that dies leaves free clocks behind. As many
instances of one kind as the host holds are measured at once, as requests are routed among equals. The sensors are
checked after every point (calibrate/sensors.py).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil

import grpc
import numpy as np

from common.errors import UserError
from common.latency import Latency
from common.loadgen import Arrival, LoadOptions, Record, Status, run_load
from controller.calibrate import sensors
from controller.calibrate.sensors import GpuFacts, GpuReading
from controller.calibrate.sweep import Phase, PointRequest, SweepPlan, Tokens
from controller.domain.classes import Bucket
from controller.profile.table import OperatingPoint, StartCost
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types

ARRIVAL_CV = 1.1  # of the gaps between requests: somewhat over-dispersed, as the public chat hour's are
SAMPLE_S = 0.25
SETTLE_S = 2.0  # after a change of clock or cap
START_TIMEOUT_S = 900.0
LATE_S = 0.1  # P99 that the load generator itself may be behind
WARM_UP_SHARE = 0.1
GATE_LEAST = 30  # requests of a bucket for an attainment of its own
_RPC_S = 30.0
_GONE = (types.INSTANCE_STATE_STOPPED, types.INSTANCE_STATE_FAILED)


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """What keeps a calibration on a real host to about an hour: every point takes as long, however light its load."""

    point_s: float = 10.0
    saturating_requests: int = 64

    @property
    def idle_s(self) -> float:
        """Of watching GPUs that serve nothing: their power hardly varies."""
        return min(10.0, self.point_s)


class SensorError(UserError):
    """A measurement that may not be believed. What was measured before stays and is not measured again."""


@dataclass(slots=True)
class _Served:
    """One measurement's raw material."""

    records: list[Record]
    readings: list[GpuReading]
    running: list[float]  # requests in the batch of one instance, per sample
    began_s: float
    ended_s: float


@dataclass(slots=True)
class NodeBackend:
    """`samples` are the requests to draw from, by group. Use as a context: it stops its engines at the end."""

    stub: rpc.NodeAgentStub
    plan: SweepPlan
    samples: Mapping[str, Sequence[Tokens]]
    model: str
    owner: types.Owner
    limits: NodeLimits = field(default_factory=NodeLimits)
    starts: dict[int, StartCost] = field(default_factory=dict)  # by tp, as they were measured
    _gpus: list[pb.Gpu] = field(default_factory=list)
    _instances: list[types.Instance] = field(default_factory=list)
    _tp: int = 0
    _held: tuple[int, float | None] | None = None
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __enter__(self) -> NodeBackend:
        node = self.stub.GetNode(pb.GetNodeRequest(), timeout=_RPC_S)
        self._gpus = sorted(node.gpus, key=lambda gpu: gpu.index)
        listed = self.stub.ListInstances(pb.ListInstancesRequest(), timeout=_RPC_S).instances
        facts = [GpuFacts(g.uuid, g.index, g.health == pb.GPU_HEALTH_OK, g.mig_enabled, g.detail) for g in self._gpus]
        wrong = sensors.before(facts, [i.spec.instance_id for i in listed if i.state not in _GONE])
        if wrong:
            raise SensorError(f"{node.node_id}: {wrong}.", "Calibrate on an idle, healthy host.")
        self._check_settings()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(grpc.RpcError, UserError):
            self._stop_all()
            self._release()

    @property
    def gpu_name(self) -> str:
        return self._gpus[0].name if self._gpus else "unknown"

    def _check_settings(self) -> None:
        """Clocks and caps must be what the GPUs can do, so that what is asked for is what is enforced."""
        for gpu in self._gpus:
            grid = set(gpu.sm_clocks_mhz)
            off = [mhz for mhz in (self.plan.standby_mhz, *self.plan.clocks_mhz) if grid and mhz not in grid]
            if off:
                near = min(grid, key=lambda mhz: abs(mhz - off[0]))
                raise UserError(f"GPU {gpu.index} cannot be locked at {off[0]} MHz.", f"The nearest is {near} MHz.")
            for cap_w in self.plan.caps_w:
                if not gpu.min_power_limit_w <= cap_w <= gpu.max_power_limit_w:
                    bounds = f"{gpu.min_power_limit_w:.0f} to {gpu.max_power_limit_w:.0f} W"
                    raise UserError(f"GPU {gpu.index} takes no power limit of {cap_w:.0f} W.", f"It takes {bounds}.")
        most = len(self._gpus)
        if max(self.plan.tps) > most:
            raise UserError(f"TP{max(self.plan.tps)} needs more than the {most} GPUs there are.", "Leave it out.")

    # ----------------------------------------------------------------------------------------------- measurements

    def measure(self, request: PointRequest) -> OperatingPoint:
        self._ensure(request.tp)
        self._hold(request.mhz, request.cap_w)
        rate_rps = request.rate_rps * len(self._instances)
        # As long as a point may take, whatever the sweep asks for: a short overload looks like none.
        count = max(2, ceil(rate_rps * self.limits.point_s))
        arrivals = draw(self.samples[request.group], rate_rps, count, request.seed)
        served = self._serve(arrivals)
        return self._point(request, served)

    def endpoint(self, tp: int) -> str:
        """Where an instance of that size listens; it is started where there is none."""
        self._ensure(tp)
        return self._instances[0].endpoint

    def idle_w(self, tp: int, mhz: int) -> float:
        self._ensure(tp)
        self._hold(mhz, None)
        return self._watch(self.limits.idle_s, self._uuids()) / len(self._instances)

    def parked_w(self) -> float:
        self._stop_all()
        self._release()
        self._settle()
        uuids = [gpu.uuid for gpu in self._gpus]
        return self._watch(self.limits.idle_s, uuids) / len(uuids)

    def saturated(
        self, phase: Phase, tp: int, mhz: int, mean_tokens: tuple[float, float], cap_w: float | None = None
    ) -> tuple[float, float]:
        """All requests at once: prompts of the mean length with one token of answer, or short prompts with answers of
        the mean length (whose prefill is a small part)."""
        self._ensure(tp)
        self._hold(mhz, cap_w)
        inputs, outputs = (max(1, round(tokens)) for tokens in mean_tokens)
        size = (inputs, 1) if phase is Phase.PREFILL else (16, outputs)
        served = self._serve([(0.0, *size)] * (self.limits.saturating_requests * len(self._instances)))
        tokens = sum(size[0] if phase is Phase.PREFILL else r.tokens for r in served.records)
        seconds = served.ended_s - served.began_s
        power_w = energy_j(served.readings, served.began_s, served.ended_s)[0] / len(self._instances)
        return seconds * len(self._instances) / max(1, tokens), power_w

    def _point(self, request: PointRequest, served: _Served) -> OperatingPoint:
        """From the records after the warm-up."""
        first = int(len(served.records) * WARM_UP_SHARE)
        records = served.records[first:]
        scheme, slo = self.plan.scheme, self.plan.slo
        by_bucket: dict[Bucket, list[Latency]] = {}
        for record in records:
            by_bucket.setdefault(scheme.input_bucket(record.input_tokens), []).append(record.latency())
        good = {b: sum(_in_slo(each, b, slo.met) for each in mine) for b, mine in sorted(by_bucket.items())}
        attainment = sum(good.values()) / len(records)
        worst = [good[b] / len(mine) for b, mine in by_bucket.items() if len(mine) >= GATE_LEAST]
        every = [latency for mine in by_bucket.values() for latency in mine if latency.served]
        ttft = {
            b: np.array([1e3 * each.ttft_s for each in mine if each.ttft_s is not None])
            for b, mine in sorted(by_bucket.items())
        }
        gaps = np.array([gap for each in every for gap in each.gaps_s])
        tbt = np.array([each.tbt_s for each in every if each.tbt_s is not None])
        power_w, _ = energy_j(served.readings, served.began_s, served.ended_s)
        running = np.array(served.running or [0.0])
        return OperatingPoint(
            group=request.group,
            tp=request.tp,
            mhz=request.mhz,
            rate_rps=request.rate_rps,
            power_w=power_w / len(self._instances),
            attainment=attainment,
            attainment_worst=min([attainment, *worst]),
            ttft_p50_ms={b: float(np.quantile(values, 0.5)) for b, values in ttft.items() if values.size},
            ttft_p99_ms={b: float(np.quantile(values, 0.99)) for b, values in ttft.items() if values.size},
            tbt_p99_ms=1e3 * float(np.quantile(tbt, 0.99)) if tbt.size else 0.0,
            gap_p99_ms=1e3 * float(np.quantile(gaps, 0.99)) if gaps.size else 0.0,
            running_mean=float(running.mean()),
            running_p99=float(np.quantile(running, 0.99)),
            requests=len(records),
            cap_w=request.cap_w,
        )

    # --------------------------------------------------------------------------------------------- load and sensors

    def _serve(self, arrivals: Sequence[Arrival]) -> _Served:
        """Sends the load to the instances in turn, while the telemetry is read."""
        with self._telemetry() as (readings, held):
            sent_s = time.monotonic()
            records = asyncio.run(self._load(arrivals))
            done_s = time.monotonic()
            time.sleep(2 * SAMPLE_S)
        # From the end of the warm-up to the last arrival; to the last answer where all come at once.
        began_s = sent_s + arrivals[int(len(arrivals) * WARM_UP_SHARE)][0]
        last_s = sent_s + arrivals[-1][0]
        ended_s = last_s if last_s > began_s else done_s
        self._believe(readings)
        late = sorted(record.sent_late_s for record in records)
        if late[int(0.99 * (len(late) - 1))] > LATE_S:
            raise SensorError(
                f"the load generator was up to {late[-1]:.2f} s behind: this machine is too busy to measure with.",
                "Run the calibration from an idle machine.",
            )
        failed = [record for record in records if record.status is Status.FAILED]
        if len(failed) > len(records) / 2:
            raise UserError(f"most requests failed: {failed[0].detail}.", "Look at the engine's log.")
        running = [requests for at_s, requests in held if began_s <= at_s <= ended_s]
        return _Served(records, readings, running, began_s, ended_s)

    async def _load(self, arrivals: Sequence[Arrival]) -> list[Record]:
        shares = [arrivals[i :: len(self._instances)] for i in range(len(self._instances))]
        done = await asyncio.gather(
            *(
                run_load(share, LoadOptions(instance.endpoint, self.model))
                for share, instance in zip(shares, self._instances, strict=True)
                if share
            )
        )
        return sorted((record for records in done for record in records), key=lambda record: record.arrival_s)

    def _watch(self, seconds: float, uuids: Sequence[str]) -> float:
        """Mean power of these GPUs together while nothing is sent."""
        with self._telemetry() as (readings, _):
            began_s = time.monotonic()
            time.sleep(seconds)
            ended_s = time.monotonic()
            time.sleep(2 * SAMPLE_S)
        mine = [reading for reading in readings if reading.uuid in uuids]
        self._believe(mine)
        return energy_j(mine, began_s, ended_s)[0]

    def _believe(self, readings: Sequence[GpuReading]) -> None:
        wrong = sensors.during(readings)
        if wrong:
            raise SensorError(f"{wrong}.", "Mend it and start again: points that were measured are not repeated.")

    @contextmanager
    def _telemetry(self) -> Iterator[tuple[list[GpuReading], list[tuple[float, float]]]]:
        """Reads samples in a thread until the block ends: of the GPUs in use, or of all when no engine runs, and when
        how many requests were in a batch."""
        readings: list[GpuReading] = []
        held: list[tuple[float, float]] = []
        wanted = set(self._uuids()) or {gpu.uuid for gpu in self._gpus}
        stream = self.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=SAMPLE_S))

        def follow() -> None:
            with suppress(grpc.RpcError):
                for sample in stream:
                    now_s = time.monotonic()
                    readings.extend(_reading(gpu, now_s) for gpu in sample.gpus if gpu.uuid in wanted)
                    held.extend((now_s, i.requests_running) for i in sample.instances if i.HasField("requests_running"))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        time.sleep(2 * SAMPLE_S)
        try:
            yield readings, held
        finally:
            stream.cancel()
            thread.join(5.0)

    # ------------------------------------------------------------------------------------------ engines and controls

    def _uuids(self) -> list[str]:
        return [uuid for instance in self._instances for uuid in instance.spec.gpu_uuids]

    def _ensure(self, tp: int) -> None:
        """As many instances of `tp` GPUs as the host holds, ready."""
        if self._tp == tp:
            return
        self._stop_all()
        began_s = time.monotonic()
        names = []
        with self._telemetry() as (readings, _):
            for first in range(0, len(self._gpus) - tp + 1, tp):
                names.append(f"calibrate-{next(self._numbers)}")
                gpus = [gpu.uuid for gpu in self._gpus[first : first + tp]]
                spec = types.InstanceSpec(instance_id=names[-1], model=self.model, gpu_uuids=gpus)
                request = pb.StartInstanceRequest(
                    request_id=str(uuid.uuid4()), spec=spec, reason="calibration", owner=self.owner
                )
                self.stub.StartInstance(request, timeout=_RPC_S)
            self._instances = self._wait(names, types.INSTANCE_STATE_READY, START_TIMEOUT_S)
            ready_s = time.monotonic()
            time.sleep(2 * SAMPLE_S)
        self._tp = tp
        watts, _ = energy_j(readings, began_s, ready_s)
        took_s = max(sum(i.step_seconds.get(step, 0.0) for step in ("start", "warm")) for i in self._instances)
        self.starts[tp] = StartCost(took_s, watts / len(self._instances) * took_s)

    def _wait(self, names: Sequence[str], state: int, timeout_s: float) -> list[types.Instance]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            listed = self.stub.ListInstances(pb.ListInstancesRequest(), timeout=_RPC_S).instances
            mine = [instance for instance in listed if instance.spec.instance_id in names]
            failed = [i for i in mine if i.state == types.INSTANCE_STATE_FAILED and state != i.state]
            if failed:
                raise UserError(f"{failed[0].spec.instance_id} failed: {failed[0].detail}.", "Look at its log.")
            if sum(instance.state == state for instance in mine) == len(names):
                return sorted(mine, key=lambda instance: instance.spec.instance_id)
            if time.monotonic() > deadline_s:
                raise UserError(f"{', '.join(names)}: not ready after {timeout_s:.0f} s.", "Look at the agent's log.")
            time.sleep(0.2)

    def _stop_all(self) -> None:
        for instance in self._instances:
            request = pb.StopInstanceRequest(
                request_id=str(uuid.uuid4()),
                instance_id=instance.spec.instance_id,
                force=True,
                reason="calibration",
                owner=self.owner,
            )
            self.stub.StopInstance(request, timeout=_RPC_S)
        if self._instances:
            self._wait([i.spec.instance_id for i in self._instances], types.INSTANCE_STATE_STOPPED, 120.0)
        self._instances, self._tp, self._held = [], 0, None

    def _hold(self, mhz: int, cap_w: float | None) -> None:
        """Locks the clocks, or caps the power with the clocks free, for a little longer than a point takes."""
        changed = self._held != (mhz, cap_w)
        if changed:
            self._release()
        lease = types.Lease(owner=self.owner, reason="calibration", ttl_s=3 * self.limits.point_s + 300.0)
        for gpu_uuid in self._uuids():
            control = (
                pb.ControlRequest(gpu_uuid=gpu_uuid, clock_lock=pb.ClockLock(min_mhz=mhz, max_mhz=mhz))
                if cap_w is None
                else pb.ControlRequest(gpu_uuid=gpu_uuid, power_limit=pb.PowerLimit(limit_w=cap_w))
            )
            answer = self.stub.ApplyControls(
                pb.ApplyControlsRequest(request_id=str(uuid.uuid4()), lease=lease, controls=[control]), timeout=_RPC_S
            )
            for result in answer.results:
                if result.code != pb.CONTROL_CODE_APPLIED:
                    why = f"{pb.ControlCode.Name(result.code)} {result.detail}".strip()
                    raise UserError(f"{gpu_uuid}: the control was not applied: {why}.", "Calibration holds the GPUs.")
        self._held = (mhz, cap_w)
        if changed:
            self._settle()

    def _settle(self) -> None:
        time.sleep(min(SETTLE_S, self.limits.point_s / 4))

    def _release(self) -> None:
        request = pb.ReleaseControlsRequest(
            request_id=str(uuid.uuid4()),
            owner=self.owner,
            gpu_uuids=[gpu.uuid for gpu in self._gpus],
            reason="calibration",
        )
        self.stub.ReleaseControls(request, timeout=_RPC_S)
        self._held = None


def draw(samples: Sequence[Tokens], rate_rps: float, count: int, seed: int) -> list[Arrival]:
    """Requests drawn from `samples` with gamma gaps. Equal seeds give the same requests at every rate, only closer."""
    rng = np.random.default_rng(seed)
    shape = 1 / ARRIVAL_CV**2
    chosen = rng.integers(len(samples), size=count)
    at_s = np.cumsum(rng.gamma(shape, 1 / shape, size=count)) / rate_rps
    return [(float(t), *samples[i]) for t, i in zip(at_s, chosen, strict=True)]


def energy_j(readings: Sequence[GpuReading], began_s: float, ended_s: float) -> tuple[float, float]:
    """Mean watts of all GPUs together between the samples that enclose the span, and those samples' seconds apart."""
    by_gpu: dict[str, list[GpuReading]] = {}
    for reading in readings:
        if reading.energy_j is not None:
            by_gpu.setdefault(reading.uuid, []).append(reading)
    watts, seconds = 0.0, 0.0
    for mine in by_gpu.values():
        first = max((r for r in mine if r.at_s <= began_s), key=lambda r: r.at_s, default=mine[0])
        last = min((r for r in mine if r.at_s >= ended_s), key=lambda r: r.at_s, default=mine[-1])
        seconds = last.at_s - first.at_s
        if seconds > 0:
            watts += ((last.energy_j or 0.0) - (first.energy_j or 0.0)) / seconds
    return watts, seconds


def _reading(gpu: pb.GpuSample, now_s: float) -> GpuReading:
    return GpuReading(
        at_s=now_s,
        uuid=gpu.uuid,
        healthy=gpu.health == pb.GPU_HEALTH_OK,
        power_w=gpu.power_w if gpu.HasField("power_w") else None,
        energy_j=gpu.energy_j if gpu.HasField("energy_j") else None,
        integrated=gpu.energy_is_integrated,
        reasons=tuple(gpu.event_reasons),
        alarms=tuple(gpu.alarms),
        drift_mhz=gpu.drift_mhz if gpu.HasField("drift_mhz") else None,
    )


def _in_slo(latency: Latency, bucket: Bucket, met: Callable[[Bucket, float, float], bool]) -> bool:
    return (
        latency.served
        and latency.ttft_s is not None
        and met(bucket, 1e3 * latency.ttft_s, 1e3 * (latency.tbt_s or 0.0))
    )
