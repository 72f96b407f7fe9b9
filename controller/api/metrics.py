"""Prometheus metrics of the controller: read from the state at scrape time, plus counters of what was decided.

Base units, prefix `dynamollm_`, reasons from the closed enums as labels, never a label per request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.errors import EXIT_UNAVAILABLE, UserError
from controller.domain.decision import Decision
from controller.loop.state import State
from controller.store.recorder import RecorderCounts


class ControllerMetrics(Collector):
    """Collects on demand. The scrape runs in its own thread and only reads."""

    def __init__(self, state: State, recorder: Callable[[], RecorderCounts], missed_ticks: Callable[[], int]) -> None:
        self._state = state
        self._recorder = recorder
        self._missed_ticks = missed_ticks
        self._decisions: Counter[tuple[str, str]] = Counter()

    def decided(self, decision: Decision) -> None:
        self._decisions[decision.level.value, decision.reason.value] += 1

    def collect(self) -> Iterator[Metric]:
        state, counts = self._state, self._recorder()
        decisions = CounterMetricFamily(
            "dynamollm_decisions", "Decisions by level and reason.", labels=["level", "reason"]
        )
        for (level, reason), total in sorted(self._decisions.items()):
            decisions.add_metric([level, reason], total)
        yield decisions
        power = GaugeMetricFamily("dynamollm_node_power_watts", "Power of a node's GPUs, last sample.", labels=["node"])
        for node in sorted(dict(state.nodes).values(), key=lambda node: node.node_id):
            power.add_metric([node.node_id], sum(gpu.power_w or 0.0 for gpu in node.gpus))
        yield power
        granted = GaugeMetricFamily("dynamollm_pool_granted_gpus", "GPUs granted to a pool.", labels=["pool"])
        for name, plan in sorted(dict(state.pools).items()):
            granted.add_metric([name], plan.granted_gpus)
        yield granted
        clocks = GaugeMetricFamily(
            "dynamollm_instance_locked_clock_hertz",
            "Clock chosen for an instance; absent while unlocked.",
            labels=["instance"],
        )
        for instance_id, chosen in sorted(dict(state.clocks).items()):
            if chosen.mhz is not None:
                clocks.add_metric([instance_id], chosen.mhz * 1e6)
        yield clocks
        yield GaugeMetricFamily("dynamollm_controller_term", "Leadership term of this controller.", state.term)
        yield CounterMetricFamily("dynamollm_ticks_lost", "Ticks that were skipped or failed.", self._missed_ticks())
        yield CounterMetricFamily("dynamollm_history_rows_written", "Rows in the database.", counts.recorded)
        yield CounterMetricFamily("dynamollm_history_rows_spooled", "Rows that went to the spool.", counts.spooled)
        yield CounterMetricFamily("dynamollm_history_values_dropped", "History lost for good.", counts.dropped)
        yield GaugeMetricFamily("dynamollm_history_database_up", "1 while the database answers.", counts.database_ok)


def serve_metrics(collector: ControllerMetrics, address: str) -> Callable[[], None]:
    """Serves `/metrics` on host:port in a thread; returns what stops it. Raises UserError when it cannot listen."""
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    try:
        server, _ = start_http_server(int(port), host or "127.0.0.1", registry)
    except (OSError, ValueError) as error:
        raise UserError(
            f"metrics_listen = {address!r}: cannot listen there: {error}.",
            "Name a free host:port, or leave it empty.",
            EXIT_UNAVAILABLE,
        ) from None
    return server.shutdown
