"""To the controller: the newest routing table comes in on a stream, load reports go out.

The gateway serves on without its controller: the last table stays in force, streams are tried again for ever, and a
restarted controller's empty table, published before it has read its nodes, does not wipe out a working one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc

from common.clock import Clock
from common.logs import get_logger
from common.tls import ClientTls, Renewing
from controller.api.wire import routing_from_wire, timestamp
from controller.fleet.port import QueueObservation, RoutingTable
from controller.gateway.choices import Choices, ChoiceSample
from controller.gateway.load import Histogram, LoadMeter
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import controller_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types

_log = get_logger(__name__)
# gRPC keeps an idle channel in back-off for up to two minutes by default; a controller restarts in seconds. Pings find
# a controller whose host has vanished without closing the connection.
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
RETRY_S = (0.2, 2.0)
REPORT_DEADLINE_S = 2.0
STATUS_INTERVAL_S = 5.0


def supersedes(new: RoutingTable, old: RoutingTable | None) -> bool:
    """Whether a table takes the place of the one in force.

    A term that is behind comes from a controller that has been replaced. A later term begins with what its controller
    knows, which is nothing until its agents have answered: an empty table then is silence, not an order, and the old
    one holds until instances are listed. Within one term an empty table means what it says.
    """
    if old is None:
        return True
    if new.term != old.term:
        return new.term > old.term and any(pool.instances for pool in new.pools)
    return new.version >= old.version


@dataclass(frozen=True, slots=True)
class InstanceNow:
    """What the controller knows of an instance at this moment. None: not known."""

    instance_id: str
    power_w: float | None
    requests: float | None  # at the engine, running or waiting
    kv_use: float | None = None  # share of its KV cache


def _instance_now(message: pb.InstanceStatus) -> InstanceNow:
    known = message.HasField("running") and message.HasField("waiting")
    return InstanceNow(
        message.instance_id,
        message.power_w if message.HasField("power_w") else None,
        message.running + message.waiting if known else None,
        message.kv_usage_ratio if message.HasField("kv_usage_ratio") else None,
    )


class ControllerClient:
    """Keeps `on_table` informed and the controller too. `models` and `queues` are asked at each report;
    `on_status` takes what the controller knows of the instances."""

    def __init__(
        self,
        address: str,
        gateway_id: str,
        epoch: str,
        clock: Clock,
        report_interval_s: float,
        meter: LoadMeter,
        on_table: Callable[[RoutingTable], None],
        models: Callable[[], Iterable[str]],
        queues: Callable[[float], Mapping[str, QueueObservation]],
        on_status: Callable[[Sequence[InstanceNow], float], None],
        choices: Choices | None = None,
        tls: ClientTls | None = None,
        tls_name: str = "",
    ) -> None:
        self._link = Renewing(rpc.ControllerStub, address, tls, tls_name, _CHANNEL_OPTIONS)
        self.connected = False
        self.reports_failed = 0
        self._gateway_id = gateway_id
        self._epoch = epoch
        self._clock = clock
        self._interval_s = report_interval_s
        self._meter = meter
        self._on_table = on_table
        self._models = models
        self._queues = queues
        self._on_status = on_status
        self._choices = choices
        self._table: RoutingTable | None = None

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch())
                group.create_task(self._report())
                group.create_task(self._follow_status())
        finally:
            await self._link.close()

    async def _watch(self) -> None:
        """Follows the routing stream; every break is logged once and tried again."""
        delay_s, told = RETRY_S[0], False
        while True:
            try:
                async for message in self._link.stub.WatchRouting(pb.WatchRoutingRequest(gateway_id=self._gateway_id)):
                    if not self.connected:
                        _log.info("controller_connected", term=message.term, version=message.version)
                    self.connected, delay_s, told = True, RETRY_S[0], False
                    self._take(message)
                reason = "the controller ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            if self.connected or not told:
                _log.warning(
                    "controller_lost", reason=reason, kept_version=self._table.version if self._table else None
                )
            self.connected, told = False, True
            await self._link.renew(REPORT_DEADLINE_S)
            await asyncio.sleep(delay_s)
            delay_s = min(RETRY_S[1], delay_s * 1.5)

    def _take(self, message: pb.WatchRoutingResponse) -> None:
        try:
            table = routing_from_wire(message)
        except ValueError as error:
            _log.error("routing_table_refused", term=message.term, version=message.version, reason=str(error))
            return
        if supersedes(table, self._table):
            self._table = table
            self._on_table(table)
        else:
            kept = self._table
            _log.warning(
                "routing_table_not_taken",
                term=table.term,
                version=table.version,
                kept_term=kept.term if kept else None,
                kept_version=kept.version if kept else None,
            )

    async def _report(self) -> None:
        """Reports are cumulative: one that is lost is made up for by the next."""
        told = False
        while True:
            await asyncio.sleep(self._interval_s)
            samples = self._choices.take() if self._choices is not None else ()
            try:
                await self._link.stub.ReportLoad(self.report(samples), timeout=REPORT_DEADLINE_S)
                told = False
                if self._choices is not None:
                    self._choices.sent(samples)
            except grpc.aio.AioRpcError as error:
                self.reports_failed += 1
                if not told:
                    _log.warning("load_report_failed", reason=f"{error.code().name}: {error.details()}")
                told = True

    async def _follow_status(self) -> None:
        """What each instance draws and holds, now and then. A controller that does not say costs the joules and the
        sight of others' work, nothing else."""
        while True:
            try:
                status = await self._link.stub.GetStatus(pb.GetStatusRequest(), timeout=REPORT_DEADLINE_S)
                instances = [_instance_now(each) for pool in status.pools for each in pool.instances]
                self._on_status(instances, self._clock.monotonic_s())
            except grpc.aio.AioRpcError as error:
                _log.debug("status_not_known", reason=f"{error.code().name}: {error.details()}")
            await asyncio.sleep(STATUS_INTERVAL_S)

    def report(self, samples: Sequence[ChoiceSample] = ()) -> pb.ReportLoadRequest:
        """All counters as they stand, and the sampled choices that have not arrived yet."""
        classes = self._meter.classes(self._models())
        queues = self._queues(self._clock.monotonic_s())
        return pb.ReportLoadRequest(
            gateway_id=self._gateway_id,
            epoch=self._epoch,
            reported_at=timestamp(self._clock.wall_s()),
            choices=[_sample(each) for each in samples],
            classes=[
                pb.ClassLoad(
                    model=model,
                    request_class=str(request_class),
                    arrived=meter.arrived,
                    completed=meter.completed,
                    failed=meter.failed,
                    in_slo=meter.in_slo,
                    input_tokens=meter.input_tokens,
                    output_tokens=meter.output_tokens,
                    ttft_seconds=_histogram(meter.ttft_s),
                    token_gap_seconds=_histogram(meter.gap_s),
                )
                for (model, request_class), meter in classes.items()
            ],
            queues=[
                pb.PoolQueue(
                    pool=pool,
                    waiting=queue.waiting,
                    in_flight=queue.in_flight,
                    oldest_wait_s=queue.oldest_wait_s,
                    at_risk=queue.at_risk,
                    refused=queue.refused,
                )
                for pool, queue in queues.items()
            ],
        )


def _histogram(histogram: Histogram) -> types.Histogram:
    return types.Histogram(bounds=histogram.bounds, counts=histogram.cumulative(), sum=histogram.sum)


def _sample(sample: ChoiceSample) -> pb.ChoiceSample:
    return pb.ChoiceSample(
        number=sample.number,
        chosen_at=timestamp(sample.chosen_wall_s),
        model=sample.model,
        request_class=str(sample.request_class),
        input_tokens=sample.input_tokens,
        pool=sample.pool,
        instance_id=sample.instance_id,
        decided_by=sample.decided_by.value,
        queue_ms=sample.queue_ms,
        speaks_for=sample.speaks_for,
        alternatives=[
            pb.ChoiceAlternative(
                instance_id=each.instance_id,
                pool=each.pool,
                lost_by=each.lost_by,
                in_flight=each.in_flight,
                pending_tokens=each.pending_tokens,
                score=each.score,
            )
            for each in sample.alternatives
        ],
    )
