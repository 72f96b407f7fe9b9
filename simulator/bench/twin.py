"""How fast the twin simulates: requests per second of one core by number of instances, a week, and compilation.

Rates count the core's own time, so that other work on the machine disturbs them little; the week's duration is on the
wall. Chat load in all of them, at about half of what the instances carry (the week: three quarters at its peak).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

from simulator.bench.metric import Metric, of_repeats
from simulator.calibration import calibrate_twin
from simulator.fast.static import gap_quantile_s, static_engines
from simulator.fleet import FleetTimes
from simulator.loads import load_named, week_shape
from simulator.outcome import figures
from simulator.physics import Physics
from simulator.systems import SYSTEMS, run_system
from simulator.traces import Trace, generate
from simulator.workers import open_processes

INSTANCES = (12, 40, 160)
RATE_RPS = 4.0  # per instance of TP8 at full clock; twelve of them carry about 7.6 each
REQUESTS = 400_000
REPEATS = 3
SEED = 1
TICK_S = 5.0  # how often a controller would look
CACHE = Path(".cache") / "profiles"

WEEK_S = 7 * 86_400.0
WEEK_REQUESTS = 27_300_000
WEEK_SWING = 0.26  # 57 requests/s at the peak: ten instances carry 76
WEEK_INSTANCES = (10, 40)
# Under the whole loop, in the shape of the public week: nodes, and requests. Ten nodes then peak at about u = 0.75, and
# forty carry the public week's 27.3 M.
WEEKS = ((10, 17_000_000), (40, WEEK_REQUESTS))

TARGET_RPS = 500_000.0
TARGET_WEEK_S = 900.0
TARGET_WEEK_GIB = 4.0

# A process that has to make the machine code, or finds it made.
FIRST_CALL = """
from time import perf_counter
from simulator.fast.engines import FastEngines
from simulator.physics import Physics
from simulator.traces import generate
engines = FastEngines(Physics.load(), generate("conv", 1.0, 1.0, 0))
began = perf_counter()
engines.advance(1.0)
engines.lock([engines.start(8, 1980)], [1200])
print(perf_counter() - began)
"""

Say = Callable[[str], None]


def measure(say: Say) -> list[Metric]:
    """Everything about the simulator; `say` hears what is being done."""
    metrics: list[Metric] = []
    say("compilation")
    metrics += compilation()
    exact: dict[int, float] = {}
    drawn: dict[int, float] = {}
    for instances in INSTANCES:
        say(f"requests/s at {instances} instances")
        trace = generate("conv", REQUESTS / (RATE_RPS * instances), RATE_RPS * instances, SEED)
        for name, choices, found in (("exact", None, exact), ("drawn_two", 2, drawn)):
            rates = [serve_rate(trace, instances, choices) for _ in range(REPEATS)]
            metric = of_repeats(f"requests_per_s.{name}.{instances}", rates, "requests/s", TARGET_RPS)
            metrics.append(metric)
            found[instances] = metric.value
    few, many = INSTANCES[0], INSTANCES[-1]
    metrics.append(Metric(f"slowdown.exact.{few}_to_{many}", exact[few] / exact[many], "ratio"))
    metrics.append(Metric(f"slowdown.drawn_two.{few}_to_{many}", drawn[few] / drawn[many], "ratio"))
    say("error of the drawing router")
    metrics += router_error(40)
    for instances in WEEK_INSTANCES:
        say(f"a week of {WEEK_REQUESTS / 1e6:.1f} M requests on {instances} instances")
        # In a process of its own, so that its peak of memory is its own.
        with open_processes(1) as pool:
            seconds, generate_s, gib = pool.submit(week, instances).result()
        metrics += [
            Metric(f"week_static_s.{instances}", seconds, "s", target=TARGET_WEEK_S),
            Metric(f"week_generate_s.{instances}", generate_s, "s"),
            Metric(f"week_static_peak_memory.{instances}", gib, "GiB", target=TARGET_WEEK_GIB),
        ]
    metrics += controlled_weeks(say)
    return metrics


def controlled_weeks(say: Say) -> list[Metric]:
    """A week under the controller's whole loop: 30 min, 5 min, 5 s, every MILP solved where something changed."""
    metrics: list[Metric] = []
    seconds_per_million = []
    for nodes, requests in WEEKS:
        say(f"a week of {requests / 1e6:.1f} M requests on {nodes} nodes under the controller")
        with open_processes(1) as pool:
            wall_s, cpu_s, served, gib, attainment = pool.submit(controlled_week, nodes, requests).result()
        seconds_per_million.append(1e6 * cpu_s / served)
        metrics += [
            Metric(f"week_requests.{nodes}", float(served), "requests"),
            Metric(f"week_s.{nodes}", wall_s, "s", target=TARGET_WEEK_S),
            Metric(f"week_cpu_s.{nodes}", cpu_s, "s", target=TARGET_WEEK_S),
            Metric(f"week_peak_memory.{nodes}", gib, "GiB", target=TARGET_WEEK_GIB),
            Metric(f"week_attainment.{nodes}", attainment, "ratio", target=0.99),
        ]
    growth = seconds_per_million[-1] / seconds_per_million[0]
    metrics.append(Metric(f"week_growth_per_request.{WEEKS[0][0]}_to_{WEEKS[-1][0]}", growth, "ratio"))
    return metrics


def controlled_week(nodes: int, requests: int) -> tuple[float, float, int, float, float]:
    """Seconds on the wall and of the processor for load, run and verdict; requests, peak GiB, attainment of the worst
    class. The profile is measured before, or read."""
    physics = Physics.load()
    profile = calibrate_twin(physics, CACHE, start_s=180.0)
    load = load_named("week-conv")
    peak_rps = requests / WEEK_S / float(week_shape("conv").mean())
    began, began_cpu = perf_counter(), process_time()
    trace = load.at(peak_rps / load.native_rps, SEED)
    run = run_system(SYSTEMS["dynamollm"], profile, physics, nodes, trace, times=FleetTimes(), seed=SEED)
    attainment = float(figures(run, profile.slo, profile.scheme)["attainment"])
    wall_s, cpu_s = perf_counter() - began, process_time() - began_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return wall_s, cpu_s, len(trace), peak / 2**20, attainment


def serve_rate(trace: Trace, instances: int, choices: int | None) -> float:
    """Requests per second of processor time, advanced in the steps of a controller."""
    engines = static_engines(Physics.load(), trace, instances, choices=choices)
    engines.advance(0.0)
    began = process_time()
    ticks = int(trace.duration_s / TICK_S)
    for tick in range(1, ticks + 1):
        engines.advance(tick * TICK_S)
    return engines.arrived / (process_time() - began)


def router_error(instances: int) -> list[Metric]:
    """What drawing two instances for a request changes against looking at all of them."""
    trace = generate("conv", REQUESTS / 2 / (RATE_RPS * instances), RATE_RPS * instances, SEED + 1)
    found = []
    for choices in (None, 2):
        engines = static_engines(Physics.load(), trace, instances, choices=choices)
        engines.advance(trace.duration_s)
        energy_j = float(engines.energy_j().sum())
        engines.finish()
        ttft_s = engines.results["first_s"] - trace.arrival_s
        p50_s, p99_s = np.quantile(ttft_s, (0.5, 0.99)).tolist()
        found.append((energy_j, p50_s, p99_s, gap_quantile_s(engines.gaps, 0.99)))
    exact, drawn = found
    names = ("energy", "ttft_p50", "ttft_p99", "gap_p99")
    return [
        Metric(f"drawn_two_error.{name}.{instances}", 100 * (there / here - 1), "%")
        for name, here, there in zip(names, exact, drawn, strict=True)
    ]


def week(instances: int) -> tuple[float, float, float]:
    """Seconds to serve and to generate a week, and the process's peak memory in GiB."""
    began = perf_counter()
    trace = week_trace()
    generated = perf_counter()
    engines = static_engines(Physics.load(), trace, instances)
    for tick in range(1, int(WEEK_S / TICK_S) + 1):
        engines.advance(tick * TICK_S)
    engines.finish()
    served = perf_counter()
    if engines.open or engines.refused:
        raise RuntimeError(f"{engines.open} requests are open and {engines.refused} were refused")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return served - generated, generated - began, peak / 2**20


def week_trace() -> Trace:
    """Seven days, each with a swing of its own: generated day by day, so that no more than a day is in memory twice."""
    days, day_s = 7, WEEK_S / 7
    arrival_s = np.empty(WEEK_REQUESTS)
    tokens = np.empty((2, WEEK_REQUESTS), np.int64)
    at = 0
    for day in range(days):
        part = generate("conv", day_s, WEEK_REQUESTS / WEEK_S, SEED + day, swing=WEEK_SWING)
        end = min(at + len(part), WEEK_REQUESTS)
        arrival_s[at:end] = part.arrival_s[: end - at] + day * day_s
        tokens[0, at:end], tokens[1, at:end] = part.input_tokens[: end - at], part.output_tokens[: end - at]
        at = end
    return Trace("week", WEEK_S, arrival_s[:at], tokens[0, :at], tokens[1, :at])


def compilation() -> list[Metric]:
    """Seconds of the first call of a process: with nothing on disk, and with the machine code there."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        seconds = [
            float(subprocess.check_output([sys.executable, "-c", FIRST_CALL], env=environment)) for _ in range(2)
        ]
    return [Metric("compile_s", seconds[0], "s"), Metric("load_machine_code_s", seconds[1], "s")]
