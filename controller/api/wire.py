"""Between wire messages and the controller's values, in both directions. Pure."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from controller.domain.classes import ClassScheme, RequestClass
from controller.domain.reasons import Mode, Stage
from controller.fleet.port import (
    ClassCounters,
    LoadObservation,
    PoolOrder,
    QueueObservation,
    RoutedInstance,
    RoutedPool,
    RoutingTable,
)
from controller.loop.latency import ClassLatency, Histogram
from dynamollm.v1 import controller_pb2 as pb

MODES = {Mode.ACTIVE: pb.MODE_ACTIVE, Mode.ADVISORY: pb.MODE_ADVISORY, Mode.PAUSED: pb.MODE_PAUSED}
MODE_OF = {wire: mode for mode, wire in MODES.items()}


STAGES = {
    Stage.REORDER: pb.EMERGENCY_STAGE_REORDER,
    Stage.FULL_CLOCK: pb.EMERGENCY_STAGE_FULL_CLOCK,
    Stage.MOVE: pb.EMERGENCY_STAGE_MOVE,
    Stage.REFUSE: pb.EMERGENCY_STAGE_REFUSE,
}
STAGE_OF = {wire: stage for stage, wire in STAGES.items()}


def timestamp(epoch_s: float) -> Timestamp:
    nanos = round(epoch_s * 1e9)
    return Timestamp(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def routing_to_wire(table: RoutingTable) -> pb.WatchRoutingResponse:
    return pb.WatchRoutingResponse(
        version=table.version,
        term=table.term,
        input_cuts_tokens=table.scheme.input_cuts_tokens,
        output_cuts_tokens=table.scheme.output_cuts_tokens,
        pools=[
            pb.RoutingPool(
                name=pool.name,
                model=pool.model,
                classes=sorted(str(request_class) for request_class in pool.classes),
                instances=[
                    pb.RoutingInstance(
                        instance_id=instance.instance_id,
                        endpoint=instance.endpoint,
                        tensor_parallel=instance.tp,
                        max_in_flight=instance.max_in_flight,
                        weight=instance.weight,
                        accepts_new=instance.accepts_new,
                        marginal_joules=instance.marginal_j,
                        standby_load=instance.standby_load,
                        rank_load=instance.rank_load,
                    )
                    for instance in pool.instances
                ],
                order=_order_to_wire(pool.order) if pool.order is not None else None,
            )
            for pool in table.pools
        ],
    )


def routing_from_wire(message: pb.WatchRoutingResponse) -> RoutingTable:
    """Raises ValueError for cut points or class names that make no sense."""
    if len(message.input_cuts_tokens) != 2 or len(message.output_cuts_tokens) != 2:
        raise ValueError("a routing table needs two input and two output cut points")
    scheme = ClassScheme(
        (message.input_cuts_tokens[0], message.input_cuts_tokens[1]),
        (message.output_cuts_tokens[0], message.output_cuts_tokens[1]),
    )
    pools = tuple(
        RoutedPool(
            name=pool.name,
            model=pool.model,
            classes=frozenset(RequestClass.parse(name) for name in pool.classes),
            instances=tuple(
                RoutedInstance(
                    instance_id=instance.instance_id,
                    endpoint=instance.endpoint,
                    tp=instance.tensor_parallel,
                    max_in_flight=instance.max_in_flight,
                    weight=instance.weight,
                    accepts_new=instance.accepts_new,
                    marginal_j=tuple(instance.marginal_joules),
                    standby_load=instance.standby_load,
                    rank_load=instance.rank_load,
                )
                for instance in pool.instances
            ),
            order=_order_from_wire(pool.order) if pool.HasField("order") else None,
        )
        for pool in message.pools
    )
    return RoutingTable(term=message.term, version=message.version, pools=pools, scheme=scheme)


def _order_to_wire(order: PoolOrder) -> pb.PoolOrder:
    return pb.PoolOrder(
        stage=STAGES[order.stage],
        ttl_s=order.ttl_s,
        first_token_s=order.first_token_s,
        retry_after_s=order.retry_after_s,
        limits=order.limits,
        prompt_tokens=order.prompt_tokens,
    )


def _order_from_wire(order: pb.PoolOrder) -> PoolOrder | None:
    """None for a stage that this version does not know: then the gateway does what it does by itself."""
    stage = STAGE_OF.get(order.stage)
    if stage is None:
        return None
    short, middle, long = (*order.first_token_s, 0.0, 0.0, 0.0)[:3]
    first_token_s = (short, middle, long)
    return PoolOrder(
        stage, order.ttl_s, first_token_s, order.retry_after_s, dict(order.limits), dict(order.prompt_tokens)
    )


def loads_from_wire(message: pb.ReportLoadRequest, observed_at_s: float) -> list[LoadObservation]:
    """One observation per model the gateway reports. Raises ValueError for an unknown class name."""
    queues = {
        queue.pool: QueueObservation(
            queue.waiting, queue.in_flight, queue.oldest_wait_s, queue.at_risk, dict(queue.refused)
        )
        for queue in message.queues
    }
    by_model: dict[str, dict[RequestClass, ClassCounters]] = {}
    for load in message.classes:
        by_model.setdefault(load.model, {})[RequestClass.parse(load.request_class)] = ClassCounters(
            arrived=load.arrived,
            completed=load.completed,
            failed=load.failed,
            in_slo=load.in_slo,
            input_tokens=load.input_tokens,
            output_tokens=load.output_tokens,
        )
    return [
        LoadObservation(message.gateway_id, message.epoch, observed_at_s, model, classes, queues)
        for model, classes in by_model.items()
    ]


def latencies_from_wire(message: pb.ReportLoadRequest, model: str) -> list[tuple[RequestClass, ClassLatency]]:
    """Of one model's classes that report both histograms. Raises ValueError for ones that make no sense."""
    return [
        (
            RequestClass.parse(load.request_class),
            ClassLatency(
                Histogram.from_cumulative(load.ttft_seconds.bounds, load.ttft_seconds.counts),
                Histogram.from_cumulative(load.token_gap_seconds.bounds, load.token_gap_seconds.counts),
            ),
        )
        for load in message.classes
        if load.model == model and load.ttft_seconds.counts and load.token_gap_seconds.counts
    ]
