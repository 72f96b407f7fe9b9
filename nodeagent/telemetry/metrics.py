"""The agent's own Prometheus metrics: counters that others raise, and one collector over the latest sample.

Base units, prefix `dynamollm_`, no label that grows with requests. Served over HTTP by daemon.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nodeagent.telemetry.sample import Sample


class AgentMetrics:
    """Counters of what the agent did."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.control_results = Counter(
            "dynamollm_agent_control_results",
            "Controls asked for, by what became of them.",
            ["control", "code"],
            registry=registry,
        )
        self.controls_clamped = Counter(
            "dynamollm_agent_controls_clamped",
            "Controls that were moved into the GPU's range or onto its grid.",
            ["control"],
            registry=registry,
        )
        self.leases_expired = Counter(
            "dynamollm_agent_leases_expired",
            "Leases that ran out without a renewal.",
            ["control"],
            registry=registry,
        )
        self.restores = Counter(
            "dynamollm_agent_restores",
            "Safe states restored, or tried to.",
            ["control", "result"],
            registry=registry,
        )
        self.foreign_writes = Counter(
            "dynamollm_agent_foreign_writes",
            "Times another program was found to have changed a control that this agent holds.",
            ["control"],
            registry=registry,
        )
        self.guard_acts = Counter(
            "dynamollm_agent_guard_acts",
            "What the guard did: trip and lift the watts floor, boost, take new rules.",
            ["act"],
            registry=registry,
        )
        self.guard_tripped = Gauge(
            "dynamollm_agent_guard_floor_tripped", "1 while the emergency caps stand.", registry=registry
        )
        self.guard_boosting = Gauge(
            "dynamollm_agent_guard_boosting", "1 while the SLO boost keeps clocks free.", registry=registry
        )
        self.audit_lost = Counter(
            "dynamollm_agent_audit_lost", "Lines that the audit log could not take.", registry=registry
        )
        self.calls_denied = Counter(
            "dynamollm_agent_calls_denied", "Calls refused for want of a scope.", ["scope"], registry=registry
        )
        self.instance_transitions = Counter(
            "dynamollm_agent_instance_transitions",
            "Engine instances that entered a state.",
            ["state"],
            registry=registry,
        )
        self.samples_lost = Counter(
            "dynamollm_agent_samples_lost",
            "Telemetry samples dropped because a reader was slow.",
            registry=registry,
        )


class SampleCollector(Collector):
    """Shows the latest telemetry sample; empty before the first."""

    def __init__(self, latest: Callable[[], Sample | None], unrestored: Callable[[], int]) -> None:
        self._latest = latest
        self._unrestored = unrestored

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "dynamollm_agent_unrestored_controls",
            "Controls that should be in their safe state and are not yet.",
            value=self._unrestored(),
        )
        sample = self._latest()
        if sample is not None:
            yield from _gpus(sample)
            yield from _instances(sample)
            yield from _host(sample)


def _gpus(sample: Sample) -> Iterator[Metric]:
    labels = ["gpu", "gpu_uuid"]
    up = GaugeMetricFamily("dynamollm_gpu_up", "1 while the GPU answers its driver.", labels=labels)
    power = GaugeMetricFamily("dynamollm_gpu_power_watts", "Power drawn.", labels=labels)
    limit = GaugeMetricFamily("dynamollm_gpu_power_limit_watts", "Power limit set.", labels=labels)
    clock = GaugeMetricFamily("dynamollm_gpu_sm_clock_hertz", "SM clock.", labels=labels)
    locked = GaugeMetricFamily("dynamollm_gpu_locked_clock_hertz", "Clock lock this agent wrote.", labels=labels)
    temperature = GaugeMetricFamily("dynamollm_gpu_temperature_celsius", "GPU temperature.", labels=labels)
    busy = GaugeMetricFamily("dynamollm_gpu_utilization_ratio", "Share of time with work.", labels=labels)
    energy = CounterMetricFamily("dynamollm_gpu_energy_joules", "Energy drawn.", labels=labels)
    memory_temperature = GaugeMetricFamily(
        "dynamollm_gpu_memory_temperature_celsius", "Temperature of the GPU's memory.", labels=labels
    )
    drift = GaugeMetricFamily(
        "dynamollm_gpu_clock_drift_hertz",
        "SM clock outside the lock in force: above it positive, below negative.",
        labels=labels,
    )
    alarms = GaugeMetricFamily(
        "dynamollm_gpu_alarm",
        "1 for each thing about the GPU that an operator should look at.",
        labels=[*labels, "alarm"],
    )
    reasons = GaugeMetricFamily(
        "dynamollm_gpu_clock_event", "1 for each reason that holds the clock down.", labels=[*labels, "reason"]
    )
    for gpu in sample.gpus:
        name = [str(gpu.index), gpu.uuid]
        up.add_metric(name, float(gpu.healthy))
        reading = gpu.reading
        for family, value, factor in (
            (power, reading.power_w, 1.0),
            (limit, reading.power_limit_w, 1.0),
            (clock, reading.sm_mhz, 1e6),
            (locked, gpu.locked_mhz, 1e6),
            (temperature, reading.temperature_c, 1.0),
            (memory_temperature, reading.memory_temperature_c, 1.0),
            (busy, reading.utilization_ratio, 1.0),
            (energy, gpu.energy_j, 1.0),
            (drift, gpu.drift_mhz, 1e6),
        ):
            if value is not None:
                family.add_metric(name, value * factor)
        for reason in reading.event_reasons:
            reasons.add_metric([*name, reason], 1.0)
        for alarm in gpu.alarms:
            alarms.add_metric([*name, alarm], 1.0)
    yield from (up, power, limit, clock, locked, temperature, memory_temperature, busy, energy, drift, alarms, reasons)


def _instances(sample: Sample) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "dynamollm_instance_state", "1 for the state each engine instance is in.", labels=["instance", "state"]
    )
    running = GaugeMetricFamily("dynamollm_instance_requests_running", "Requests being served.", labels=["instance"])
    waiting = GaugeMetricFamily("dynamollm_instance_requests_waiting", "Requests in the queue.", labels=["instance"])
    cache = GaugeMetricFamily("dynamollm_instance_kv_cache_usage_ratio", "KV cache in use.", labels=["instance"])
    prompt = CounterMetricFamily("dynamollm_instance_prompt_tokens", "Input tokens computed.", labels=["instance"])
    generation = CounterMetricFamily("dynamollm_instance_generation_tokens", "Tokens generated.", labels=["instance"])
    power = GaugeMetricFamily(
        "dynamollm_instance_power_watts",
        "Power of its GPUs together, asleep too; missing while it shares one.",
        labels=["instance"],
    )
    for instance in sample.instances:
        state.add_metric([instance.instance_id, instance.state.value], 1.0)
        if instance.engine is not None:
            running.add_metric([instance.instance_id], instance.engine.running)
            waiting.add_metric([instance.instance_id], instance.engine.waiting)
            if instance.engine.kv_cache_usage_ratio is not None:
                cache.add_metric([instance.instance_id], instance.engine.kv_cache_usage_ratio)
            for family, total in (
                (prompt, instance.engine.prompt_tokens_total),
                (generation, instance.engine.generation_tokens_total),
            ):
                if total is not None:
                    family.add_metric([instance.instance_id], total)
        if instance.power_w is not None:
            power.add_metric([instance.instance_id], instance.power_w)
    yield from (state, running, waiting, cache, prompt, generation, power)


def _host(sample: Sample) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "dynamollm_host_cpu_utilization_ratio",
        "Share of the processors at work.",
        value=sample.host.cpu_utilization_ratio,
    )
    yield GaugeMetricFamily(
        "dynamollm_host_memory_available_bytes",
        "Memory that programs can have without swapping.",
        value=sample.host.memory_available_bytes,
    )
    numa = GaugeMetricFamily("dynamollm_host_numa_free_bytes", "Free memory of a NUMA node.", labels=["numa_node"])
    for number, free in sample.host.numa_free_bytes:
        numa.add_metric([str(number)], free)
    yield numa
    alarms = GaugeMetricFamily(
        "dynamollm_node_alarm", "1 for each thing about the node that an operator should look at.", labels=["alarm"]
    )
    for alarm in sample.alarms:
        alarms.add_metric([alarm], 1.0)
    yield alarms
    yield GaugeMetricFamily("dynamollm_node_draining", "1 while the node is out of service.", value=sample.draining)
