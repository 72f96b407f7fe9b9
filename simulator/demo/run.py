"""One whole demonstration: the controlled fleet and the static one under the same load, then table, JSON and queries.

The static fleet is laid out while the last requests of the first one finish, and serves when those are done. With
`at_once` both serve side by side, each with hosts of its own: nothing is shared but this machine's cores.
"""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from common.clock import Clock, SystemClock
from common.errors import UserError
from simulator.demo import report
from simulator.demo.fleet import CONTROL, ENGINE_START_S, GPUS_PER_HOST, HOSTS, LEASE, MODEL, PERIODS, STATIC, lay_out
from simulator.demo.load import Load, make_load
from simulator.demo.phase import Phase
from simulator.demo.prepare import Prepared
from simulator.demo.supervisor import Supervisor, end_descendants
from simulator.traces import Trace

LINE_EVERY_S = 5.0
BASELINE_PREFIX = "baseline-"


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    trace: Trace | None
    u: float
    seed: int
    physics: str
    duration_s: float  # of the load, warm-up included
    warm_up_s: float
    at_once: bool
    folder: Path
    json_file: Path | None
    gateway_port: int


def run(options: Options, prepared: Prepared, console: Console) -> None:
    """Raises UserError; ends every process that it started, whatever happens."""
    load = make_load(options.trace, options.u, prepared.max_rps, options.duration_s, options.warm_up_s, options.seed)
    profile = options.folder / "profile.json"
    profile.write_text(prepared.profile.to_json(), encoding="utf-8")
    _introduce(console, options, prepared, load)
    try:
        phases = asyncio.run(_both(options, load, profile, console))
    finally:
        end_descendants()  # in case a second Ctrl-C cut the orderly end short
    slo = prepared.profile.slo
    control, baseline = (phase.figures(slo) for phase in phases)
    facts = report.Facts(
        source=load.source,
        seed=options.seed,
        u=load.u,
        u_asked=options.u,
        max_rps=load.max_rps,
        mean_rps=len(load.arrivals) / load.duration_s,
        warm_up_s=load.warm_up_s,
        window_s=load.window_close_s - load.window_open_s,
        physics=prepared.profile.gpu,
        profile=f"{prepared.mix} mix",
        profile_checksum=prepared.profile.checksum(),
        version=version("dynamollm"),
        at_once=options.at_once,
    )
    if options.json_file is not None:
        text = json.dumps(report.to_json_value(facts, control, baseline), indent=1)
        options.json_file.write_text(text + "\n", encoding="utf-8")
    report.show(console, facts, control, baseline, slo)
    report.show_queries(console, control.database)


def _introduce(console: Console, options: Options, prepared: Prepared, load: Load) -> None:
    mean_rps = len(load.arrivals) / load.duration_s
    order = "side by side, each on hosts of its own" if options.at_once else "one after the other"
    lines = (
        f"[bold]{HOSTS} emulated hosts, {GPUS_PER_HOST} x H100 each[/bold], model {MODEL}, {prepared.profile.gpu}; "
        "agents, engines, controller, gateway and client are processes of their own.",
        f"Load: {load.source}; {len(load.arrivals)} requests, {mean_rps:.1f}/s on average: u = {options.u:g} of the "
        f"{load.max_rps:.1f}/s that the static fleet serves within the SLO. {load.warm_up_s:.0f} s of warm-up, then "
        f"{load.duration_s - load.warm_up_s:.0f} s are measured; seed {options.seed}.",
        f"Real time. Shortened by configuration: control periods {PERIODS.instance_s:g} / {PERIODS.pool_s:g} / "
        f"{PERIODS.cluster_s:g} s (production: 5 / 300 / 1800), clock leases {LEASE.ttl_s:g} s, engine start "
        f"{ENGINE_START_S:g} s (production: minutes).",
        f"DynamoLLM and the static fleet at full clocks serve the same requests, {order}.",
        f"Logs, configuration, databases: {options.folder}",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


async def _both(options: Options, load: Load, profile: Path, console: Console) -> tuple[Phase, Phase]:
    clock = SystemClock()

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    supervisor = Supervisor(options.folder / "processes.json", say)
    initial = load.initial_rps
    controlled = lay_out(
        "DynamoLLM", options.folder / "dynamollm", profile, options.physics, CONTROL, initial, options.gateway_port
    )
    static = lay_out("SinglePool, full clocks", options.folder / "baseline", profile, options.physics, STATIC, {})
    first = Phase(controlled, load, supervisor, clock)
    second = Phase(static, load, supervisor, clock, BASELINE_PREFIX)
    ticker = asyncio.create_task(_tell(console, (first, second), clock))
    try:
        async with asyncio.TaskGroup() as group:
            served = group.create_task(_serve(first, before=None))
            group.create_task(_serve(second, before=None if options.at_once else (first.all_sent, served)))
    except* UserError as errors:
        raise errors.exceptions[0] from None
    finally:
        ticker.cancel()
        with suppress(asyncio.CancelledError):
            await ticker
        for phase in (first, second):
            await phase.watch.close()
        await supervisor.stop_all()
    return first, second


async def _serve(phase: Phase, before: tuple[asyncio.Event, asyncio.Task[None]] | None) -> None:
    """Runs one phase. `before`: its fleet starts after the event, its load after the end of the task."""
    if before is not None:
        await before[0].wait()
    await phase.start()
    await phase.wait_ready()
    if before is not None:
        await asyncio.wait({before[1]})
    await phase.serve()
    await phase.stop()


# ------------------------------------------------------------------------------------------------- progress


async def _tell(console: Console, phases: tuple[Phase, ...], clock: Clock) -> None:
    """One line that is written over at a terminal; elsewhere a line every few seconds."""
    if console.is_terminal:
        with Live(console=console, transient=True, refresh_per_second=2) as live:
            while True:
                live.update(Text("\n".join(_line(phase, clock) for phase in phases if phase.under_way)))
                await asyncio.sleep(0.5)
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        for phase in phases:
            if phase.under_way:
                console.print(_line(phase, clock), markup=False, highlight=False, soft_wrap=True)


def _line(phase: Phase, clock: Clock) -> str:
    watch, progress = phase.watch, phase.progress
    power_w, mhz = watch.power_w(), watch.mean_sm_mhz()
    ready = " ".join(f"{count}xTP{tp}" for tp, count in sorted(watch.ready().items(), reverse=True) if count)
    parts = [
        f"{phase.fleet.name}:",
        f"{clock.monotonic_s() - phase.started_s:.0f} s" if phase.started_s is not None else "starting",
        f"{power_w:.0f} W" if power_w is not None else "",
        f"{mhz:.0f} MHz" if mhz is not None else "",
        ready,
    ]
    if progress.sent:
        in_slo = f"{progress.in_slo / progress.judged:.1%} in SLO" if progress.judged else ""
        parts += [f"{progress.sent} sent, {progress.in_flight} in flight, {progress.served} served", in_slo]
    return "  ".join(part for part in parts if part)
