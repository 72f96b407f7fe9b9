"""Shows what a demonstration came to: the table for people, the JSON for tools, and three queries on the history."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.latency import LatencySummary
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level
from controller.domain.slo import Slo
from simulator.demo.figures import LEAST_JUDGED, PhaseFigures


@dataclass(frozen=True)
class Facts:
    """What the figures belong to: without it none of them means anything."""

    source: str
    seed: int
    u: float  # realised in the window
    u_asked: float
    max_rps: float
    mean_rps: float
    warm_up_s: float
    window_s: float
    physics: str
    profile: str
    profile_checksum: str
    version: str
    at_once: bool  # both fleets ran side by side


QUERIES: tuple[tuple[str, str], ...] = (
    (
        "What was decided, at which level, and why",
        "SELECT level, reason, COUNT(*) AS decisions, MAX(sentence) AS for_example\n"
        "FROM v_decisions GROUP BY level, reason ORDER BY level, decisions DESC",
    ),
    (
        "How the layout changed",
        "SELECT time(started_at) AS at_utc, reason, layout_before, layout_after, starts, stops,\n"
        "       ROUND(duration_s, 1) AS seconds, completed\n"
        "FROM transitions ORDER BY started_at",
    ),
    (
        "Where the energy went",
        "SELECT state, ROUND(SUM(seconds)) AS gpu_seconds, ROUND(SUM(energy_j) / 1000, 1) AS kilojoules,\n"
        "       ROUND(SUM(energy_j) / SUM(seconds)) AS watts_per_gpu,\n"
        "       ROUND(SUM(mean_sm_mhz * seconds) / SUM(seconds)) AS mean_mhz\n"
        "FROM telemetry_minute GROUP BY state ORDER BY kilojoules DESC",
    ),
)
SHOWN_ROWS = 8


def saved(control: PhaseFigures, baseline: PhaseFigures) -> float:
    """Share of the baseline's energy that was not spent; negative when more was."""
    return 1 - control.energy.total_j / baseline.energy.total_j


def _without_parked_j(phase: PhaseFigures) -> float:
    return phase.energy.total_j - phase.energy.by_state_j.get(GpuState.PARKED.value, 0.0)


# ----------------------------------------------------------------------------------------------------- table


def show(console: Console, facts: Facts, control: PhaseFigures, baseline: PhaseFigures, slo: Slo) -> None:
    """Prints table and verdict."""
    phases = (control, baseline)
    table = Table(
        title=f"{facts.window_s:.0f} s of load at u = {facts.u:.2f}; latencies are P50 / P99", title_justify="left"
    )
    table.add_column("")
    for phase in phases:
        table.add_column(phase.name, justify="right")

    def row(name: str, *cells: str, section: bool = False) -> None:
        table.add_row(name, *cells, end_section=section)

    row("requests sent / served / lost", *(f"{p.load.sent} / {p.load.served} / {p.load.lost}" for p in phases))
    row("in SLO, of the window's", *(f"{p.load.attainment:.2%} of {p.load.in_window}" for p in phases), section=True)
    for index, bucket in enumerate(control.load.buckets):
        of = [p.load.buckets[index] for p in phases]
        if bucket.name != "all" and bucket.requests:
            row(f"{bucket.name} inputs, TTFT ms (SLO {_ttft_limit(slo, bucket.name):g})", *map(_ttft, of))
            row(f"{bucket.name} inputs, TBT ms (SLO {slo.tbt_ms:g})", *map(_tbt, of))
    gaps = (_number(p.load.buckets[-1].gap_p99_ms) for p in phases)
    row(f"token gap P99, ms (SLO {slo.token_gap_p99_ms:g})", *gaps, section=True)
    row("client's overhead per token, ms", *(_pair(p.load.overhead_p50_ms, p.load.overhead_p99_ms) for p in phases))
    seen = (" / ".join(_number(b.ttft_p99_ms) for b in p.load.client_buckets[:-1]) for p in phases)
    row("client's TTFT P99, S / M / L, ms", *seen, section=True)
    row("energy, kJ (mean power, W)", *(f"{p.energy.total_j / 1e3:.1f} ({p.energy.mean_power_w:.0f})" for p in phases))
    for state in GpuState:
        if any(p.energy.by_state_j.get(state.value) for p in phases):
            row(f"  {state.value}, kJ (GPU-seconds)", *(_state(p, state) for p in phases))
    row("average clock with an engine, MHz", *(_number(p.energy.mean_sm_mhz) for p in phases), section=True)
    for tp in sorted({tp for p in phases for counts in p.timeline for tp in counts}, reverse=True):
        row(f"TP{tp} instances over time", *(" ".join(str(c.get(tp, 0)) for c in p.timeline) for p in phases))
    row(
        "decisions: cluster / pool / instance",
        *(" / ".join(str(p.control.decisions[level]) for level in Level) for p in phases),
    )
    row("clock locks applied (GPUs)", *(str(p.control.clock_locks_applied) for p in phases))
    switches = (f"{p.control.switches} ({p.control.starts} / {p.control.stops})" for p in phases)
    row("switches (starts / stops)", *switches)
    if any(any(p.restarts.values()) for p in phases):
        row("processes restarted", *(_restarts(p.restarts) for p in phases))
    console.print(table)
    _verdict(console, control, baseline)


def _verdict(console: Console, control: PhaseFigures, baseline: PhaseFigures) -> None:
    for phase in (control, baseline):
        if phase.slo_missed:
            console.print(f"{phase.name} misses the SLO: {'; '.join(phase.slo_missed)}.")
        for problem in phase.load.problems:
            console.print(f"{phase.name}, a request was lost: {problem}", markup=False)
        if phase.energy.coverage < 0.98:
            console.print(f"{phase.name}: only {phase.energy.coverage:.0%} of the GPU time was observed.")
    if control.slo_missed:
        console.print("Energy saved: none to speak of, it misses the SLO.")
        return
    off = 1 - _without_parked_j(control) / _without_parked_j(baseline)
    against = " (against a baseline that misses its SLO)" if baseline.slo_missed else ""
    console.print(
        f"Energy saved: [bold]{saved(control, baseline):.1%}[/bold]{against}; {off:.1%} if freed GPUs drew nothing.\n"
        f"The SLO is judged for each input bucket of {LEAST_JUDGED} requests or more, and over all."
    )


def _ttft_limit(slo: Slo, bucket: str) -> float:
    return {"S": slo.ttft_s_ms, "M": slo.ttft_m_ms, "L": slo.ttft_l_ms}[bucket]


def _ttft(bucket: LatencySummary) -> str:
    return _pair(bucket.ttft_p50_ms, bucket.ttft_p99_ms)


def _tbt(bucket: LatencySummary) -> str:
    return _pair(bucket.tbt_p50_ms, bucket.tbt_p99_ms)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _pair(low: float | None, high: float | None) -> str:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"

    return f"{text(low)} / {text(high)}"


def _state(phase: PhaseFigures, state: GpuState) -> str:
    seconds = phase.energy.gpu_seconds_by_state.get(state.value, 0.0)
    return f"{phase.energy.by_state_j.get(state.value, 0.0) / 1e3:.1f} ({seconds:.0f})"


def _restarts(restarts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in restarts.items() if count) or "none"


# --------------------------------------------------------------------------------------------------- queries


def show_queries(console: Console, database: Path) -> None:
    """Runs the queries on the finished history and prints them with their first rows."""
    console.print(f"\nEvery decision is in {database}. For example:", soft_wrap=True, highlight=False)
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        for title, query in QUERIES:
            found = connection.execute(query)
            names = [column[0] for column in found.description]
            rows = found.fetchall()
            console.print(f"\n[bold]{title}[/bold]")
            console.print(query, style="dim", markup=False, highlight=False)
            table = Table(*names)
            for row in rows[:SHOWN_ROWS]:
                table.add_row(*("" if value is None else str(value) for value in row))
            console.print(table)
            if len(rows) > SHOWN_ROWS:
                console.print(f"… and {len(rows) - SHOWN_ROWS} more")


# ------------------------------------------------------------------------------------------------------ JSON


def to_json_value(facts: Facts, control: PhaseFigures, baseline: PhaseFigures) -> dict[str, Any]:
    """The first twelve keys are a promise to other tools; the rest says what they belong to."""
    return {
        "requests_sent": control.load.sent,
        "requests_served": control.load.served,
        "requests_lost": control.load.lost,
        "energy_j": control.energy.total_j,
        "baseline_energy_j": baseline.energy.total_j,
        "slo_attainment": control.load.attainment,
        "baseline_slo_attainment": baseline.load.attainment,
        "decisions": dict(control.control.decisions),
        "clock_locks_applied": control.control.clock_locks_applied,
        "switches": control.control.switches,
        "u": facts.u,
        "database": str(control.database),
        # Null where the SLO is missed: that is no saving.
        "saved_ratio": None if control.slo_missed else saved(control, baseline),
        "facts": asdict(facts),
        "phases": {"dynamollm": _phase_json(control), "baseline": _phase_json(baseline)},
    }


def _phase_json(phase: PhaseFigures) -> dict[str, Any]:
    return {
        "name": phase.name,
        "requests": {"sent": phase.load.sent, "lost": phase.load.lost, "in_window": phase.load.in_window}
        | dict(phase.load.by_status),
        "slo_missed": list(phase.slo_missed),
        "latency": _by_bucket(phase.load.buckets),
        "client_latency": _by_bucket(phase.load.client_buckets),
        "client_overhead_ms": {"p50": phase.load.overhead_p50_ms, "p99": phase.load.overhead_p99_ms},
        "client_late_p99_ms": phase.load.sent_late_p99_ms,
        "energy": asdict(phase.energy),
        "control": asdict(phase.control),
        "ready_by_tp": [{str(tp): count for tp, count in sorted(counts.items())} for counts in phase.timeline],
        "restarts": dict(phase.restarts),
        "database": str(phase.database),
    }


def _by_bucket(buckets: Sequence[LatencySummary]) -> dict[str, Any]:
    return {bucket.name: {k: v for k, v in asdict(bucket).items() if k != "name"} for bucket in buckets}
