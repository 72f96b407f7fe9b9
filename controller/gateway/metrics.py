"""The gateway's Prometheus metrics, read from the brain's own counters when scraped: nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from common.clock import Clock
from controller.gateway.brain import REFUSED, Brain
from controller.gateway.client import ControllerClient
from controller.gateway.load import Histogram
from controller.policy.routing import Decided

if TYPE_CHECKING:
    from controller.picker.picker import Picker


def make_registry(
    brain: Brain, controller: ControllerClient, clock: Clock, picker: Picker | None = None
) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_GatewayCollector(brain, controller, clock, picker))
    return registry


class _GatewayCollector(Collector):
    def __init__(self, brain: Brain, controller: ControllerClient, clock: Clock, picker: Picker | None) -> None:
        self._brain = brain
        self._picker = picker
        self._controller = controller
        self._clock = clock

    def describe(self) -> list[Metric]:
        """Empty: registering must not scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        brain, dispatcher = self._brain, self._brain.dispatcher
        requests = CounterMetricFamily(
            "dynamollm_gateway_requests", "Requests ended, by outcome and routing class.", labels=["outcome", "class"]
        )
        for (outcome, routed_as), count in brain.outcomes.items():
            requests.add_metric([outcome.value, routed_as], count)
        yield requests

        waiting = GaugeMetricFamily("dynamollm_gateway_waiting", "Requests waiting, by own pool.", labels=["pool"])
        running = GaugeMetricFamily("dynamollm_gateway_in_flight", "Requests in flight, by pool.", labels=["pool"])
        at_risk = GaugeMetricFamily(
            "dynamollm_gateway_at_risk",
            "Requests about to miss their deadline, or past it without a first token, by pool.",
            labels=["pool"],
        )
        refused = CounterMetricFamily(
            "dynamollm_gateway_refused", "Requests refused, by own pool and why.", labels=["pool", "reason"]
        )
        stage = GaugeMetricFamily(
            "dynamollm_gateway_emergency_stage",
            "Order that stands: 0 none, 1 reorder, 2 full clock, 3 move, 4 refuse.",
            labels=["pool"],
        )
        now_s = self._clock.monotonic_s()
        stages = dispatcher.stages(now_s)
        for pool, queue in brain.queues(now_s).items():
            waiting.add_metric([pool], queue.waiting)
            running.add_metric([pool], queue.in_flight)
            at_risk.add_metric([pool], queue.at_risk)
            for why in sorted(REFUSED):
                refused.add_metric([pool, why], queue.refused.get(why, 0))
            stage.add_metric([pool], stages[pool].rank)
        yield from (waiting, running, at_risk, refused, stage)

        choices = CounterMetricFamily(
            "dynamollm_gateway_choices", "Choices of an instance, by what decided them.", labels=["reason"]
        )
        chosen = brain.chosen()
        for reason in Decided:
            choices.add_metric([reason.value], chosen[reason])
        yield choices
        yield CounterMetricFamily(
            "dynamollm_gateway_failovers", "Requests sent to another instance.", value=dispatcher.failed_over
        )
        yield CounterMetricFamily(
            "dynamollm_gateway_spills",
            "Requests served by a larger pool than their own.",
            value=dispatcher.spilled + brain.overflow.spilled,
        )
        predictions = CounterMetricFamily(
            "dynamollm_gateway_output_predictions",
            "Finished requests, by predictor and whether the likeliest output bucket came true.",
            labels=["predictor", "verdict"],
        )
        for (source, verdict), number in brain.predictions.items():
            predictions.add_metric([source, verdict], number)
        yield predictions
        yield CounterMetricFamily(
            "dynamollm_gateway_outgrown",
            "Requests whose answer became longer than the class they were routed as.",
            value=brain.outgrown,
        )
        joules = CounterMetricFamily(
            "dynamollm_gateway_request_joules",
            "Energy of requests, by routing class: their share in their instance's. Those of unknown energy left out.",
            labels=["class"],
        )
        for routed_as, energy_j in brain.joules.items():
            joules.add_metric([routed_as], energy_j)
        yield joules
        yield GaugeMetricFamily(
            "dynamollm_gateway_overflow",
            "Requests in flight beyond the instances' limits, waiting inside engines.",
            value=sum(brain.overflow.in_flight().values()),
        )
        if self._picker is not None:
            held = self._picker.held
            yield GaugeMetricFamily(
                "dynamollm_gateway_tickets", "Requests in flight that Envoy or a tool carries.", value=len(held)
            )
            yield CounterMetricFamily(
                "dynamollm_gateway_tickets_unknown", "Reports of requests that are not known (any more).", held.unknown
            )
        ttft = HistogramMetricFamily(
            "dynamollm_gateway_ttft_seconds", "From a request's arrival to its first token.", labels=["model", "class"]
        )
        gap = HistogramMetricFamily(
            "dynamollm_gateway_token_gap_seconds", "Between two tokens of an answer.", labels=["model", "class"]
        )
        for (model, request_class), meter in brain.meter.classes(brain.models()).items():
            labels = [model, str(request_class)]
            ttft.add_metric(labels, _buckets(meter.ttft_s), meter.ttft_s.sum)
            gap.add_metric(labels, _buckets(meter.gap_s), meter.gap_s.sum)
        yield from (ttft, gap)

        yield GaugeMetricFamily(
            "dynamollm_gateway_controller_connected",
            "1 while the routing stream of the controller is open.",
            value=float(self._controller.connected),
        )
        yield CounterMetricFamily(
            "dynamollm_gateway_load_reports_failed", "Load reports lost.", value=self._controller.reports_failed
        )
        if dispatcher.table is not None:
            yield GaugeMetricFamily(
                "dynamollm_gateway_routing_term", "Term of the table in force.", value=dispatcher.table.term
            )


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(repr(bound) for bound in histogram.bounds), "+Inf"]
    return [(bound, float(count)) for bound, count in zip(bounds, histogram.cumulative(), strict=True)]
