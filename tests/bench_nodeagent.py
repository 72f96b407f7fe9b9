"""The node agent's figures on an emulated host of eight GPUs: `python -m tests.bench_nodeagent [--json] [--kills N]`.

Everything goes through a real agent process and its unix socket. `measure` has the form of the other benchmarks.
"""

from __future__ import annotations

import itertools
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from nodeagent.engine.vllm import parse_metrics
from simulator.bench.metric import Metric, of_repeats, report
from simulator.host.nvml.state import Calls
from tests.hostile import requests, send
from tests.killing import kill_many
from tests.nodehost import NodeHost

GPUS = 8
NVML_S = 0.0045
FUZZ = 10_000
KILLS = 200
Say = Callable[[str], None]


def measure(say: Say, kills: int = KILLS) -> list[Metric]:
    """All of it; about ten minutes, most of them killing."""
    metrics: list[Metric] = []
    for text, part in (
        ("starting", _start),
        ("locking clocks", _apply),
        ("letting leases expire", _expiry),
        ("tripping the floor", _guard),
        ("idling with four engines", _footprint),
        ("fuzzing", _fuzz),
    ):
        say(text)
        with tempfile.TemporaryDirectory(prefix="dynamollm-") as folder:
            metrics += part(Path(folder))
    say(f"killing it {kills} times")
    with tempfile.TemporaryDirectory(prefix="dynamollm-") as folder:
        metrics += _kill(Path(folder), kills)
    return metrics


def _start(folder: Path) -> list[Metric]:
    """From fork to READY=1, as systemd sees it."""
    took = []
    with NodeHost(folder, GPUS) as host, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        manager.settimeout(30)
        host.environment["NOTIFY_SOCKET"] = str(folder / "notify")
        for _ in range(7):
            began = time.perf_counter()
            host.start(wait=False)
            while b"READY=1" not in manager.recv(4096):
                pass
            took.append(time.perf_counter() - began)
            host.terminate()
            manager.setblocking(False)
            try:
                while manager.recv(4096):
                    pass
            except BlockingIOError:
                pass
            manager.settimeout(30)
    return [of_repeats("nodeagent_start_to_ready", took[1:], "s", 1.5)]


def _apply(folder: Path) -> list[Metric]:
    with NodeHost(folder, GPUS, config={"telemetry": {"interval_s": 1.0}}) as host:
        host.start()
        first = _timed(lambda: host.lock(range(GPUS), 990))
        clocks = itertools.cycle((1005, 1200))

        def batch(work: Callable[[], object], count: int = 400) -> list[float]:
            return [_timed(work) for _ in range(count)]

        # In rounds, because a neighbour's burst on a shared machine otherwise decides what the P99 is.
        rounds = [
            (
                batch(lambda: host.lock(range(GPUS), next(clocks))),
                batch(lambda: host.lock(range(GPUS), 1200)),
                batch(lambda: host.stub.ListControls(pb.ListControlsRequest(), timeout=5)),
            )
            for _ in range(5)
        ]
        write, renew, nothing = ([one[kind] for one in rounds] for kind in range(3))
        for index in range(GPUS):
            host.gpus.set_fault(index, Calls.CLOCK_WRITE, delay_s=NVML_S)
        slow, direct = [], []
        for _ in range(4):  # side by side
            slow += batch(lambda: host.lock(range(GPUS), next(clocks)), 40)
            direct += _direct(host)

    def of_rounds(name: str, parts: list[list[float]], share: float, target: float | None = None) -> Metric:
        return of_repeats(name, [_quantile(part, share) * 1e3 for part in parts], "ms", target)

    return [
        of_rounds("nodeagent_apply_8_gpus_p50", write, 0.5),
        of_rounds("nodeagent_apply_8_gpus_p99", write, 0.99, 3.0),
        of_rounds("nodeagent_renew_8_gpus_p50", renew, 0.5),
        of_rounds("nodeagent_renew_8_gpus_p99", renew, 0.99, 3.0),
        of_rounds("nodeagent_call_that_does_nothing_p50", nothing, 0.5),
        of_rounds("nodeagent_call_that_does_nothing_p99", nothing, 0.99),
        Metric("nodeagent_first_apply_8_gpus", first * 1e3, "ms"),
        Metric("nvml_8_slow_calls_direct_p50", _quantile(direct, 0.5) * 1e3, "ms"),
        Metric("nvml_8_slow_calls_direct_p99", _quantile(direct, 0.99) * 1e3, "ms"),
        Metric("nodeagent_apply_8_gpus_slow_nvml_p50", _quantile(slow, 0.5) * 1e3, "ms"),
        Metric("nodeagent_apply_8_gpus_slow_nvml_p99", _quantile(slow, 0.99) * 1e3, "ms"),
        Metric(
            "nodeagent_apply_over_direct_nvml_p50", _quantile(slow, 0.5) / _quantile(direct, 0.5), "ratio", target=1.1
        ),
    ]


# The same eight calls without an agent: what 8 x NVML time is on this machine.
DIRECT = """
import json, pynvml, sys, time
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(8)]
took = []
for mhz in [1005, 1200] * 20:
    began = time.perf_counter()
    for handle in handles:
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, mhz, mhz)
    took.append(time.perf_counter() - began)
sys.stdout.write(json.dumps(took))
"""


def _direct(host: NodeHost) -> list[float]:
    command = [sys.executable, "-c", DIRECT]
    outcome = subprocess.run(command, env=host.environment, check=True, capture_output=True, timeout=120)
    found: list[float] = json.loads(outcome.stdout)
    return found


def _expiry(folder: Path) -> list[Metric]:
    late = []
    with NodeHost(folder, GPUS, config={"telemetry": {"interval_s": 1.0}}) as host:
        host.start()
        for number in range(60):
            ttl_s = 0.15 + 0.013 * (number % 10)
            began = time.monotonic()
            host.lock(range(GPUS), 990, ttl_s=ttl_s)
            answered = time.monotonic()
            while any(host.locks()):
                time.sleep(0.0005)
            # The lease began between the call and its answer: the later end is what is charged.
            late.append(time.monotonic() - began - ttl_s)
            assert time.monotonic() - answered < 2
    return [
        Metric("nodeagent_lease_expiry_late_p50", _quantile(late, 0.5) * 1e3, "ms"),
        Metric("nodeagent_lease_expiry_late_max", max(late) * 1e3, "ms", target=100.0),
    ]


def _guard(folder: Path) -> list[Metric]:
    trips, lost = [], []
    with NodeHost(folder, GPUS, config={"telemetry": {"interval_s": 1.0}}) as host:
        host.start()

        def rules(age_s: float) -> None:
            floor = pb.WattsFloorRule(enabled=True, limit_w=300.0, heartbeat_age_s=age_s)
            request = pb.SetGuardRequest(request_id=host.request_id(), term=1, watts_floor=floor, reason="benchmark")
            host.stub.SetGuard(request, timeout=10)

        def lift() -> None:
            host.stub.TripGuard(
                pb.TripGuardRequest(request_id=host.request_id(), trip=False, reason="benchmark"), timeout=10
            )

        def capped() -> bool:
            return all(host.gpus.observe(index).power_limit_w == 300.0 for index in range(GPUS))

        rules(0.0)
        for _ in range(20):
            request = pb.TripGuardRequest(request_id=host.request_id(), trip=True, reason="benchmark")
            began = time.monotonic()
            waiting = host.stub.TripGuard.future(request, timeout=10)
            while not capped():
                time.sleep(0.0005)
            trips.append(time.monotonic() - began)
            waiting.result()
            lift()
        for _ in range(10):
            rules(0.3)
            began = time.monotonic()
            while not capped():
                time.sleep(0.0005)
            lost.append(time.monotonic() - began - 0.3)
            rules(0.0)
            lift()
    return [
        Metric("nodeagent_watts_floor_trip_max", max(trips) * 1e3, "ms", target=1000.0),
        Metric("nodeagent_watts_floor_lost_heartbeat_max", max(lost) * 1e3, "ms", target=1000.0),
    ]


def _footprint(folder: Path) -> list[Metric]:
    """Memory and processor time at 1 s sampling of eight GPUs and four engines, with one stream read."""
    with NodeHost(folder, GPUS, config={"telemetry": {"interval_s": 1.0}}) as host:
        host.start()
        assert host.process is not None
        agent = psutil.Process(host.process.pid)
        for number in range(4):
            host.launch(f"engine-{number}", [2 * number, 2 * number + 1])
        for number in range(4):
            host.wait_state(f"engine-{number}", types.INSTANCE_STATE_READY)
        import urllib.request

        with urllib.request.urlopen(f"{host.instance('engine-0').endpoint}/metrics", timeout=10) as answer:
            page = answer.read()
        assert parse_metrics(page).running == 0
        stream = host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=1.0))
        reader = iter(stream)
        for _ in range(3):
            next(reader)
        shares, at = [], []
        for _ in range(3):
            before, began = agent.cpu_times(), time.monotonic()
            while time.monotonic() - began < 10:
                next(reader)
            after = agent.cpu_times()
            used = after.user + after.system - before.user - before.system
            shares.append(100 * used / (time.monotonic() - began))
            at.append(agent.memory_info().rss / 2**20)
        stream.cancel()
    series = sum(1 for line in page.splitlines() if line and not line.startswith(b"#"))
    return [
        of_repeats("nodeagent_cpu_of_one_core", shares, "%", 4.0),
        of_repeats("nodeagent_resident_memory", at, "MiB", 80.0),
        Metric("engine_metrics_page_series", series, "series"),
    ]


def _fuzz(folder: Path) -> list[Metric]:
    with NodeHost(folder, GPUS) as host:
        host.start()
        before = [host.gpus.observe(index) for index in range(GPUS)]
        gone = 0
        for request in requests(FUZZ, host.uuids, seed=2):
            code = send(host.channel, request)
            gone += code.name in ("UNAVAILABLE", "UNKNOWN", "INTERNAL")
        after = [host.gpus.observe(index) for index in range(GPUS)]
        touched = sum(
            (was.lock_mhz, was.power_limit_w) != (now.lock_mhz, now.power_limit_w)
            for was, now in zip(before, after, strict=True)
        )
        assert host.process is not None
        crashed = host.process.poll() is not None
    return [
        Metric("nodeagent_fuzzed_requests", FUZZ, "requests", target=FUZZ),
        Metric("nodeagent_fuzz_crashes_and_internal_errors", gone + crashed, "count", target=0),
        Metric("nodeagent_fuzz_gpus_touched", touched, "count", target=0),
    ]


def _kill(folder: Path, kills: int) -> list[Metric]:
    config = {"gpu": {"call_deadline_s": 0.5}, "controls": {"restore_retry_s": 0.2}}
    with NodeHost(folder, 4, config=config) as host:
        told = kill_many(host, kills, seed=time.time_ns() % (1 << 32))
    for problem in told.problems:
        sys.stderr.write(f"{problem}\n")
    return [
        Metric("nodeagent_kills", told.kills, "kills", target=kills),
        Metric("nodeagent_kills_between_journal_and_write", told.between_journal_and_write, "kills"),
        Metric("nodeagent_kills_that_left_a_clock_locked_until_the_restore", told.found_locked, "kills"),
        Metric("nodeagent_kills_with_a_tripped_floor", told.tripped, "kills"),
        Metric("nodeagent_unsafe_after_restore", len(told.problems), "count", target=0),
    ]


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def main(arguments: list[str]) -> None:
    kills = int(arguments[arguments.index("--kills") + 1]) if "--kills" in arguments else KILLS
    metrics = measure(lambda text: sys.stderr.write(f"{text} ...\n"), kills)
    if "--json" in arguments:
        sys.stdout.write(json.dumps(report("nodeagent", metrics), indent=1) + "\n")
        return
    for metric in metrics:
        target = "" if metric.target is None else f"  (target {metric.target:g})"
        sys.stdout.write(f"{metric.name:62} {metric.value:10.4g} {metric.unit}{target}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
