"""Prometheus metrics of the controller: read from the state at scrape time, plus counters of what was decided.

Base units, prefix `dynamollm_`, reasons from the closed enums as labels, never a label per request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.errors import EXIT_UNAVAILABLE, UserError
from controller.api.figures import drifts, held_by_hand, pool_figures, predicted_power_w
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode
from controller.loop.state import State
from controller.store.recorder import RecorderCounts

_TICK_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class ControllerMetrics(Collector):
    """Collects on demand. The scrape runs in its own thread and only reads."""

    def __init__(
        self,
        state: State,
        recorder: Callable[[], RecorderCounts],
        missed_ticks: Callable[[], int],
        monotonic_s: Callable[[], float],
        circuits_open: Callable[[], Mapping[str, bool]],
        failed_actions: Callable[[], Mapping[tuple[str, str], int]],
    ) -> None:
        """`circuits_open`: by node, whether calls to its agent fail at once. `failed_actions`: by node and kind, how
        many calls have failed."""
        self._state = state
        self._recorder = recorder
        self._missed_ticks = missed_ticks
        self._monotonic_s = monotonic_s
        self._circuits_open = circuits_open
        self._failed_actions = failed_actions
        self._decisions: Counter[tuple[str, str]] = Counter()
        self.ticks = Histogram(
            "dynamollm_tick_seconds",
            "From the moment a tick was due until it was answered.",
            labelnames=["level"],
            buckets=_TICK_BOUNDS_S,
            registry=None,
        )

    def decided(self, decision: Decision) -> None:
        self._decisions[decision.level.value, decision.reason.value] += 1

    def ticked(self, level: Level, seconds: float) -> None:
        self.ticks.labels(level.value).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        state, counts, now_s = self._state, self._recorder(), self._monotonic_s()
        decisions = CounterMetricFamily(
            "dynamollm_decisions", "Decisions by level and reason.", labels=["level", "reason"]
        )
        for (level, reason), total in sorted(self._decisions.items()):
            decisions.add_metric([level, reason], total)
        yield decisions
        yield from self.ticks.collect()
        yield from _nodes(state, now_s)
        circuit = GaugeMetricFamily(
            "dynamollm_agent_circuit_open",
            "1 while calls to a node's agent fail at once, because it left the last ones unanswered.",
            labels=["node"],
        )
        for node_id, is_open in sorted(self._circuits_open().items()):
            circuit.add_metric([node_id], is_open)
        yield circuit
        failed = CounterMetricFamily(
            "dynamollm_actions_failed",
            "Calls to nodes that failed, were refused or were not sent, by kind.",
            labels=["node", "kind"],
        )
        for (node_id, kind), total in sorted(self._failed_actions().items()):
            failed.add_metric([node_id, kind], total)
        yield failed
        yield from _pools(state, now_s)
        clocks = GaugeMetricFamily(
            "dynamollm_instance_locked_clock_hertz",
            "Clock chosen for an instance; absent while unlocked.",
            labels=["instance"],
        )
        for instance_id, chosen in sorted(dict(state.clocks).items()):
            if chosen.mhz is not None:
                clocks.add_metric([instance_id], chosen.mhz * 1e6)
        yield clocks
        yield GaugeMetricFamily(
            "dynamollm_instances_drifted",
            "Instances whose GPUs are not at the clock chosen for them, and those that an operator holds.",
            len(drifts(state, now_s)) + len(held_by_hand(state)),
        )
        mode = GaugeMetricFamily("dynamollm_controller_mode", "1 for the cluster's mode.", labels=["mode"])
        for each in Mode:
            mode.add_metric([each.value], state.mode is each)
        yield mode
        yield GaugeMetricFamily(
            "dynamollm_controller_restrained_scopes",
            "Pools and nodes with a more cautious mode than the cluster's.",
            len(state.modes),
        )
        predicted = GaugeMetricFamily(
            "dynamollm_planned_power_watts", "What the wanted layout was planned to draw, empty GPUs included."
        )
        if (watts := predicted_power_w(state, now_s)) is not None:
            predicted.add_metric([], watts)
        yield predicted
        yield from _budgets(state)
        yield GaugeMetricFamily(
            "dynamollm_nodes_off",
            "Nodes that the provisioner has turned off, on their way there or back.",
            sum(not state.is_on(node_id) for node_id in dict(state.powered)),
        )
        yield from _profile(state)
        yield GaugeMetricFamily("dynamollm_controller_term", "Leadership term of this controller.", state.term)
        age = GaugeMetricFamily("dynamollm_load_report_age_seconds", "Since a gateway last reported; absent before.")
        if (age_s := state.load.age_s(now_s)) is not None:
            age.add_metric([], age_s)
        yield age
        yield CounterMetricFamily("dynamollm_ticks_lost", "Ticks that were skipped or failed.", self._missed_ticks())
        yield CounterMetricFamily("dynamollm_history_rows_written", "Rows in the database.", counts.recorded)
        yield CounterMetricFamily("dynamollm_history_rows_spooled", "Rows that went to the spool.", counts.spooled)
        yield CounterMetricFamily("dynamollm_history_rows_refused", "Rows the database never took.", counts.refused)
        yield CounterMetricFamily("dynamollm_history_values_dropped", "History lost for good.", counts.dropped)
        yield GaugeMetricFamily("dynamollm_history_spool_bytes", "On disk, not in the database.", counts.spool_bytes)
        yield GaugeMetricFamily("dynamollm_history_database_up", "1 while the database answers.", counts.database_ok)


def _budgets(state: State) -> Iterator[Metric]:
    watts = GaugeMetricFamily("dynamollm_power_budget_watts", "Power budget of a scope.", labels=["scope"])
    held = GaugeMetricFamily(
        "dynamollm_power_budget_held", "1 once caps are confirmed that add up to no more than it.", labels=["scope"]
    )
    for scope, budget in sorted(dict(state.budgets).items()):
        watts.add_metric([scope], budget.watts)
        held.add_metric([scope], scope in state.budgets_held)
    yield from (watts, held)


def _profile(state: State) -> Iterator[Metric]:
    correction = GaugeMetricFamily(
        "dynamollm_profile_correction_ratio",
        "What the profile's power is multiplied with, from live power; absent without any.",
        labels=["pool", "tensor_parallel"],
    )
    for (pool, tp), factor in sorted(dict(state.corrections).items()):
        correction.add_metric([pool, str(tp)], factor)
    yield correction
    pace = GaugeMetricFamily(
        "dynamollm_profile_pace_ratio",
        "How many times as long as the profile says engines are taken to need; absent where it is believed.",
        labels=["pool"],
    )
    for pool, factor in sorted(dict(state.paces).items()):
        pace.add_metric([pool], factor)
    yield pace
    drifted = GaugeMetricFamily(
        "dynamollm_profile_drifted", "1 where the profile must be measured again.", labels=["pool", "tensor_parallel"]
    )
    for pool, tp in sorted(set(state.drifted)):
        drifted.add_metric([pool, str(tp)], 1.0)
    for pool in sorted(set(state.pace_drifted)):
        drifted.add_metric([pool, "all"], 1.0)
    yield drifted
    yield GaugeMetricFamily(
        "dynamollm_profile_valid",
        "0 while engines run that the profile was not measured on.",
        not state.foreign_engines,
    )


def _nodes(state: State, now_s: float) -> Iterator[Metric]:
    power = GaugeMetricFamily("dynamollm_node_power_watts", "Power of a node's GPUs, last sample.", labels=["node"])
    age = GaugeMetricFamily("dynamollm_node_age_seconds", "Since a node's last sample.", labels=["node"])
    up = GaugeMetricFamily("dynamollm_node_fresh", "1 while a node's samples are fresh.", labels=["node"])
    for node in sorted(dict(state.nodes).values(), key=lambda node: node.node_id):
        power.add_metric([node.node_id], sum(gpu.power_w or 0.0 for gpu in node.gpus))
        age.add_metric([node.node_id], now_s - node.observed_at_s)
        up.add_metric([node.node_id], not state.is_stale(node.node_id, now_s))
    yield from (power, age, up)


def _pools(state: State, now_s: float) -> Iterator[Metric]:
    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"dynamollm_pool_{name}", text, labels=["pool"])

    granted = gauge("granted_gpus", "GPUs granted to a pool.")
    used = gauge("used_gpus", "GPUs of a pool's instances.")
    ready = gauge("ready_instances", "Instances that serve.")
    rate = gauge("load_requests_per_second", "Requests that arrive, all classes of the pool.")
    planned = gauge("planned_load_requests_per_second", "Equivalent requests that the pool was planned for.")
    carried = gauge("capacity_requests_per_second", "Equivalent requests that its ready instances carry in SLO.")
    slo = gauge("slo_attainment_ratio", "Share of the requests of the last minutes in SLO; absent without any.")
    queued = gauge("queued_requests", "Requests that wait at gateways.")
    power = gauge("power_watts", "Power of a pool's instances; absent while unknown.")
    off = gauge("forecast_error_ratio", "Mean distance of its load from the forecast, over its mean load; of a day.")
    above = gauge("forecast_exceeded_ratio", "Share of the forecasts whose quantile its load was above; of a day.")
    for figures in pool_figures(state, now_s):
        error = state.forecast_errors.get(figures.name)
        for family, value in (
            (granted, figures.granted_gpus),
            (used, figures.used_gpus),
            (ready, figures.ready_instances),
            (rate, figures.request_rate),
            (planned, figures.planned_rate),
            (carried, figures.capacity_rate),
            (slo, figures.slo_attainment),
            (queued, figures.queued),
            (power, figures.power_w),
            (off, error.ratio if error else None),
            (above, error.above if error else None),
        ):
            if value is not None:
                family.add_metric([figures.name], value)
    yield from (granted, used, ready, rate, planned, carried, slo, queued, power, off, above)
    yield GaugeMetricFamily(
        "dynamollm_forecast_week_slots", "Half hours of the week, of 336, whose load is known.", len(state.week.slots)
    )


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
