"""The metrics page against a golden file: names, types, help and labels are what dashboards and alerts rest on."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest

from nodeagent.control.settings import ControlKind
from nodeagent.engine.lifecycle import State
from nodeagent.engine.vllm import EngineReading
from nodeagent.gpu.driver import GpuHealth, GpuReading
from nodeagent.telemetry.metrics import AgentMetrics, SampleCollector
from nodeagent.telemetry.sample import GpuSample, HostSample, InstanceSample, Sample

GOLDEN = Path(__file__).with_name("nodeagent_metrics.txt")


def page() -> str:
    disable_created_metrics()  # type: ignore[no-untyped-call] # as in the daemon
    registry = CollectorRegistry()
    metrics = AgentMetrics(registry)
    metrics.control_results.labels("clock_lock", "applied").inc(3)
    metrics.controls_clamped.labels("clock_lock").inc()
    metrics.leases_expired.labels("clock_lock").inc()
    metrics.restores.labels("power_limit", "done").inc()
    metrics.foreign_writes.labels(ControlKind.POWER_LIMIT.value).inc()
    metrics.guard_acts.labels("trip").inc()
    metrics.guard_tripped.set(1)
    metrics.calls_denied.labels("control").inc()
    metrics.instance_transitions.labels("ready").inc()
    reading = GpuReading(
        power_w=412.5,
        energy_counter_j=1000.0,
        sm_mhz=1050,
        memory_mhz=2619,
        temperature_c=61.0,
        utilization_ratio=0.75,
        power_limit_w=650.0,
        event_reasons=("sw_power_cap", "hw_power_brake_slowdown"),
        memory_temperature_c=72.0,
    )
    well = GpuSample(
        "GPU-a", 0, GpuHealth.OK, reading, 1000.0, False, 990, 60, ("hw_power_brake_slowdown", "foreign_power_limit")
    )
    lost = GpuSample("GPU-b", 1, GpuHealth.LOST, GpuReading(), None, False, None)
    instances = (
        InstanceSample("chat-0", State.READY, EngineReading(3, 1, 0.5, 1200.0, 340.0), power_w=412.5),
        InstanceSample("chat-1", State.STARTING, None),
    )
    host = HostSample(0.25, 0.5, 64 << 30, ((0, 10 << 30), (1, 20 << 30)))
    sample = Sample(0.0, 0.0, (well, lost), instances, host, ("watts_floor_tripped",), draining=True)
    registry.register(SampleCollector(lambda: sample, lambda: 0))
    return generate_latest(registry).decode()


def test_the_page_is_the_golden_file() -> None:
    if os.environ.get("DYNAMOLLM_WRITE_GOLDEN"):
        GOLDEN.write_text(page())
    assert page() == GOLDEN.read_text(), "looked at the difference? DYNAMOLLM_WRITE_GOLDEN=1 writes it anew"


def test_every_name_has_our_prefix_and_a_base_unit() -> None:
    names = [line.split()[2] for line in page().splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names))
    assert all(name.startswith("dynamollm_") for name in names)
    assert not any(word in name for name in names for word in ("_mhz", "_ms", "_mib", "_percent", "_kw"))


def test_a_gpu_that_does_not_answer_has_no_figures() -> None:
    lines = [line for line in page().splitlines() if 'gpu="1"' in line]
    assert lines == ['dynamollm_gpu_up{gpu="1",gpu_uuid="GPU-b"} 0.0']
