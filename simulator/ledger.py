"""The honest ledger: what a load costs under each system, counted the same way for all, and judged by the SLO.

`run_study` scales the load to the share `u` of the largest that SinglePool serves in SLO, runs every system for every
seed over the same requests, and gives one JSON value. Its schema (`DIR/result.json`):

    schema          1
    version         of the program
    command         the command line that makes this file again, less --out
    trace           {source, name, requests, duration_s, window_s, class_shares: {SS: share, ...}}, of the first seed
    nodes, gpus     size of the fleet: the GPU cap of every system
    u, k, k_max     load: u = k / k_max; k copies of the trace (generated load: k times the recorded hour's rate)
    k_max_overall   largest k at which 99 % of all requests together are in SLO, whatever their class (k_max asks it of
                    every class); u_overall: k / k_max_overall
    seed, seeds     first seed, and all of them
    physics, profile, profile_identity    physics variant; the profile's checksum; {model, gpu, engine, provenance}
    start_s         seconds that every start of an instance takes
    pools           {pool: [classes]} of the systems with pools
    predictor       {output_bucket_accuracy, method}: how often routing knows a request's output bucket
    assumptions     {parked_w, carbon_g_per_kwh, price_per_kwh, host_w: [empty, full], ...}: constants behind it
    notes           sentences that belong beside the figures
    bound_saved_off, bound_saved_parked   the clairvoyant bound against SinglePool, means over seeds; null without it
    bound           {energy_off_kwh, energy_parked_kwh, epoch_s, per_seed: [{seed, energy_off_kwh, energy_parked_kwh,
                    saved_off, saved_parked}], series: {minute, power_off_w, power_parked_w}}; null without it
    systems         {name: SYSTEM}, names in the order of presentation:
                    singlepool multipool scaleinst scaleshard scalefreq dynamollm best_clock reactive best_static

    SYSTEM (numbers are means over seeds unless said otherwise)
      title, about                what it is, for people
      layout                      of the first seed when the window opens, e.g. "short 3xTP4, long 6xTP8"
      verdict                     "misses SLO", or "saves 31.2 %" (parked), or "baseline"
      energy_off_kwh, energy_parked_kwh, wall_kwh
      saved_off, saved_parked, saved_wall          fractions against SinglePool of the same seed; negative: more
      attainment                  of the worst judged class, worst seed
      attainment_overall          of all requests together; mean over seeds
      attainment_by_class         {class: share}; a class of fewer than 1,000 requests stands in its input bucket
                                  ("S", "M", "L": the whole bucket); worst seed
      meets_slo                   in every seed
      ttft_p50_ms, ttft_p99_ms, tbt_p50_ms, tbt_p99_ms, gap_p99_ms, queue_p99_ms
      gpu_hours                   of GPUs that were held by an instance; gpu_hours_freed: of all others
      mean_gpus, peak_gpus        held; the peak is that of the worst seed
      switches, clock_changes     instances started, clocks set to another value, in the window
      carbon_kg, cost_usd         of energy_parked_kwh
      requests, lost              in the window; lost: refused, failed or not finished
      energy_by_state_kwh         {serving, idle, loading, draining, parked}
      latency_by_input            {S|M|L: {requests, ttft_p50_ms, ttft_p99_ms, tbt_p99_ms}}
      spread                      {key: largest less smallest over seeds} of every number above
      per_seed                    [{seed, ...the same keys..., gap_by_class_ms: {class: P99}}]
      series                      of the first seed, equally long columns, one row per minute of the window:
        minute                    0, 1, ...
        requests                  arrivals in that minute
        power_w                   mean of all GPUs, parked ones included
        gpus                      {"POOL/tpN": mean GPUs held}
        clock_mhz                 {POOL: mean clock of its GPUs, null while it holds none}

Attainment and P99 are of requests that arrived in the window. Numbers are finite; what does not exist is null.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version
from math import isfinite
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from controller.domain.classes import ALL_CLASSES, Bucket
from controller.domain.slo import Slo
from controller.profile.table import Profile
from simulator.bound import EPOCH_S, GROUPS, BoundColumn, BoundTable, clairvoyant, measure_kind, table_of
from simulator.cached import cached_json
from simulator.calibration import calibrate_twin
from simulator.fast.engines import QUANTILE
from simulator.fleet import FleetTimes
from simulator.loads import Load, load_named
from simulator.outcome import (
    BOOT_S,
    GPU_LIMIT_W,
    HOST_EMPTY_W,
    HOST_FULL_W,
    LEAST_REQUESTS,
    OFF_AFTER_S,
    SHUTDOWN_S,
    WARM_UP_S,
    classes_of,
    figures,
)
from simulator.physics import Physics
from simulator.references import REACTIVE_TARGET, LargestLoad, best_clock, best_static, largest_load, run_reactive
from simulator.systems import GPUS_PER_NODE, SYSTEMS, TWO_POOLS, run_system
from simulator.traces import Trace

SCHEMA = 1
BASELINE = "singlepool"
BOUND = "bound"
REFERENCES: dict[str, tuple[str, str]] = {
    "best_clock": ("Best clock", "SinglePool at the one clock that costs least in SLO, in hindsight"),
    "reactive": (
        "Reactive",
        f"one pool of TP8 at full clock, scaled every 15 s to {REACTIVE_TARGET:.0%} of the requests in flight that an"
        " instance holds at the largest load",
    ),
    "best_static": ("Best static", "the cheapest pools, TP, clock and instances that meet the SLO, in hindsight"),
}
ALL_SYSTEMS: tuple[str, ...] = (*SYSTEMS, *REFERENCES)
# World average of the grid and an industrial price, as round figures: give your own.
CARBON_G_PER_KWH = 450.0
PRICE_PER_KWH = 0.12

_MEANS = [
    "energy_off_kwh",
    "energy_parked_kwh",
    "wall_kwh",
    "saved_off",
    "saved_parked",
    "saved_wall",
    "attainment_overall",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tbt_p50_ms",
    "tbt_p99_ms",
    "gap_p99_ms",
    "queue_p99_ms",
    "gpu_hours",
    "gpu_hours_freed",
    "mean_gpus",
    "switches",
    "clock_changes",
    "carbon_kg",
    "cost_usd",
]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Steps:
    """A constant, or a value that holds from its hour on (hours since the trace's beginning)."""

    hours: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, hours: Iterable[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        rows = np.searchsorted(self.hours, list(hours), side="right") - 1
        found: np.ndarray[Any, np.dtype[np.float64]] = np.array(self.values)[np.maximum(rows, 0)]
        return found


def read_steps(text: str, option: str) -> Steps:
    """A number, or a CSV file of rows `hours,value` in order of time, with a header or without. Raises UserError."""
    try:
        value = float(text)
    except ValueError:
        pass
    else:
        if not isfinite(value) or value < 0:
            raise UserError(f"{option} {text}: must not be negative or infinite.", "Give a number or a CSV file.")
        return Steps((0.0,), (value,))
    path = Path(text)
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(f"{option} {text}: neither a number nor a CSV file that can be read.", "Check it.") from None
    steps: list[tuple[float, float]] = []
    for line, row in enumerate(rows, start=1):
        if not row:
            continue
        try:
            hour, value = (float(cell) for cell in row)
        except ValueError:
            if line == 1:
                continue  # the header
            raise UserError(f"{text}:{line}: is not `hours,value`.", "Correct that row.") from None
        if not isfinite(hour) or not isfinite(value) or value < 0 or (steps and hour <= steps[-1][0]):
            raise UserError(f"{text}:{line}: hours must rise and values not be negative.", "Correct that row.")
        steps.append((hour, value))
    if not steps:
        raise UserError(f"{text}: holds no rows.", "Give rows of hours,value.")
    return Steps(tuple(hour for hour, _ in steps), tuple(value for _, value in steps))


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared. `systems` may be any of ALL_SYSTEMS; SinglePool runs in any case. `physics` as in
    `Physics.from_text`."""

    source: str
    nodes: int = 12
    u: float = 0.6
    systems: tuple[str, ...] = ALL_SYSTEMS
    bound: bool = True
    seed: int = 1
    seeds: int = 3
    physics: str = "base"
    start_s: float = 180.0
    cache: Path = Path(".cache")
    workers: int = 2
    carbon: Steps = field(default_factory=lambda: Steps((0.0,), (CARBON_G_PER_KWH,)))
    price: Steps = field(default_factory=lambda: Steps((0.0,), (PRICE_PER_KWH,)))
    command: str = ""

    def __post_init__(self) -> None:
        unknown = [name for name in self.systems if name not in ALL_SYSTEMS]
        if unknown:
            raise UserError(f"There is no system {unknown[0]!r}.", f"Use all, or some of {', '.join(ALL_SYSTEMS)}.")
        if self.nodes < 1 or self.seeds < 1 or self.workers < 1 or not self.u > 0 or not self.start_s > 0:
            raise UserError("Nodes, seeds, workers, u and the start time must be positive.", "Correct the options.")


@dataclass(frozen=True, slots=True)
class _Common:
    """What every job needs; its load is made again in each process."""

    source: str
    nodes: int
    k: float
    largest: LargestLoad
    physics: str
    start_s: float
    profile: Profile
    table: BoundTable | None


# ------------------------------------------------------------------------------------------------------- study


def run_study(study: Study, progress: Progress | None = None) -> dict[str, Any]:
    """Everything; the value of `DIR/result.json`. The same study gives the same bytes with any number of workers."""
    say = progress or (lambda done, total, what: None)
    load = load_named(study.source)
    physics = Physics.from_text(study.physics)
    names = [name for name in ALL_SYSTEMS if name in study.systems or name == BASELINE]
    seeds = list(range(study.seed, study.seed + study.seeds))
    say(0, 0, "calibrating the twin")
    profile = calibrate_twin(
        physics, study.cache / "profiles", source=load.mix, start_s=study.start_s, workers=study.workers
    )
    # Spawned, not forked: the caller may be a program with threads.
    with ProcessPoolExecutor(study.workers, mp_context=get_context("spawn")) as pool:
        say(
            0,
            0,
            "searching the largest load of SinglePool" + (", measuring the bound's columns" if study.bound else ""),
        )
        searched = pool.submit(_largest, study, profile)
        table = _bound_table(study, physics, load, pool) if study.bound else None
        largest = searched.result()
        common = _Common(
            study.source, study.nodes, study.u * largest.k, largest, study.physics, study.start_s, profile, table
        )
        # The longest first, so that no worker is left with it at the end.
        order = sorted(names, key=lambda name: (name != "best_static", name != "best_clock"))
        jobs = [(name, seed) for name in order for seed in seeds] + [(BOUND, s) for s in seeds if study.bound]
        found: dict[tuple[str, int], Any] = {}
        running = {pool.submit(_job, common, name, seed): (name, seed) for name, seed in jobs}
        say(0, len(jobs), "simulating")
        for done in as_completed(running):
            found[running[done]] = done.result()
            say(len(found), len(jobs), f"{running[done][0]}, seed {running[done][1]}")
    return _assemble(study, load, physics, common, names, seeds, found)


def _largest(study: Study, profile: Profile) -> LargestLoad:
    load, physics = _load(study.source), Physics.from_text(study.physics)
    parts = [load.digest, study.nodes, study.seed, profile.checksum(), asdict(profile.slo)]
    value = cached_json(
        study.cache / "k-max",
        "k-max",
        physics,
        parts,
        lambda: asdict(largest_load(physics, profile, study.nodes, load, seed=study.seed)),
    )
    return LargestLoad(**value)


def _bound_table(study: Study, physics: Physics, load: Load, pool: ProcessPoolExecutor) -> BoundTable:
    def make() -> list[BoundColumn]:
        jobs = [
            pool.submit(measure_kind, physics, load.mix, group, tp, Slo()) for group in GROUPS for tp in physics.tps
        ]
        return [column for job in jobs for column in job.result()]

    columns = cached_json(study.cache / "bound", "columns", physics, [load.digest, asdict(Slo())], make)
    return table_of(physics, load.mix, [BoundColumn(*column) for column in columns])


@cache
def _load(source: str) -> Load:
    return load_named(source)


@lru_cache(maxsize=1)
def _trace(source: str, k: float, seed: int) -> Trace:
    return _load(source).at(k, seed)


def _job(common: _Common, name: str, seed: int) -> dict[str, Any]:
    """One system, or the bound, under one seed."""
    physics, profile, nodes = Physics.from_text(common.physics), common.profile, common.nodes
    trace = _trace(common.source, common.k, seed)
    times = FleetTimes(start_s=common.start_s)
    if name == BOUND:
        assert common.table is not None
        return asdict(clairvoyant(common.table, trace, nodes * GPUS_PER_NODE, profile.parked_w))
    if name == "best_clock":
        run = best_clock(physics, profile, nodes, trace, seed=seed)
    elif name == "best_static":
        run = best_static(physics, profile, nodes, trace, seed=seed)
    elif name == "reactive":
        run = run_reactive(profile, physics, nodes, trace, common.largest, times=times, seed=seed)
    else:
        run = run_system(SYSTEMS[name], profile, physics, nodes, trace, times=times, seed=seed)
    return {"figures": figures(run, profile.slo, profile.scheme), "series": run.series}


# ---------------------------------------------------------------------------------------------------- assembly


def _assemble(
    study: Study,
    load: Load,
    physics: Physics,
    common: _Common,
    names: list[str],
    seeds: list[int],
    found: Mapping[tuple[str, int], Any],
) -> dict[str, Any]:
    profile, largest, first = common.profile, common.largest, seeds[0]
    rows = {name: [_priced(study, found[name, seed], found[BASELINE, seed], seed) for seed in seeds] for name in names}
    systems = {name: _system(name, rows[name], found[name, first]["series"]) for name in names}
    bound = _bound(found, seeds) if study.bound else None
    trace = _trace(study.source, common.k, first)
    window_s = float(trace.arrival_s[-1]) - WARM_UP_S
    counts = np.bincount(classes_of(trace, profile.scheme), minlength=len(ALL_CLASSES))
    pools = {name: sorted(str(c) for c in profile.group(name).classes) for name in TWO_POOLS}
    return {
        "schema": SCHEMA,
        "version": version("dynamollm"),
        "command": study.command,
        "trace": {
            "source": study.source,
            "name": load.name,
            "requests": len(trace),
            "duration_s": trace.duration_s,
            "window_s": window_s,
            "class_shares": {str(c): int(n) / len(trace) for c, n in zip(ALL_CLASSES, counts, strict=True)},
        },
        "nodes": study.nodes,
        "gpus": study.nodes * GPUS_PER_NODE,
        "u": study.u,
        "k": common.k,
        "k_max": largest.k,
        "u_overall": common.k / largest.k_overall,
        "k_max_overall": largest.k_overall,
        "seed": first,
        "seeds": seeds,
        "physics": study.physics,
        "profile": profile.checksum(),
        "profile_identity": {
            "model": profile.model,
            "gpu": profile.gpu,
            "engine": profile.engine,
            "provenance": profile.provenance,
        },
        "start_s": study.start_s,
        "pools": pools,
        "predictor": _predictor(trace, profile),
        "assumptions": {
            "parked_w": profile.parked_w,
            "carbon_g_per_kwh": float(np.mean(study.carbon.values)),
            "price_per_kwh": float(np.mean(study.price.values)),
            "host_w": [HOST_EMPTY_W, HOST_FULL_W],
            "gpu_limit_w": GPU_LIMIT_W,
            "node_off_after_s": OFF_AFTER_S,
            "node_shutdown_s": SHUTDOWN_S,
            "node_boot_s": BOOT_S,
        },
        "notes": _notes(common, bound, systems),
        "bound_saved_off": bound["saved_off"] if bound else None,
        "bound_saved_parked": bound["saved_parked"] if bound else None,
        "bound": bound,
        "systems": systems,
    }


def _priced(study: Study, result: Mapping[str, Any], baseline: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One seed's figures, with what compares and prices them."""
    own, base, series = result["figures"], baseline["figures"], result["series"]
    power_w = np.array(series["power_w"])
    hours = (WARM_UP_S + 60.0 * np.arange(len(power_w))) / 3600

    def weighted(steps: Steps) -> float:
        return float((steps.at(hours) * power_w).sum() / power_w.sum())

    return {
        "seed": seed,
        **own,
        "saved_off": 1 - own["energy_off_kwh"] / base["energy_off_kwh"],
        "saved_parked": 1 - own["energy_parked_kwh"] / base["energy_parked_kwh"],
        "saved_wall": 1 - own["wall_kwh"] / base["wall_kwh"],
        "carbon_kg": own["energy_parked_kwh"] * weighted(study.carbon) / 1e3,
        "cost_usd": own["energy_parked_kwh"] * weighted(study.price),
    }


def _system(name: str, rows: list[dict[str, Any]], series: dict[str, Any]) -> dict[str, Any]:
    title, about = (SYSTEMS[name].title, SYSTEMS[name].about) if name in SYSTEMS else REFERENCES[name]
    means = {key: _mean([row[key] for row in rows]) for key in _MEANS}
    meets = all(row["meets_slo"] for row in rows)
    judged = sorted({c for row in rows for c in row["attainment_by_class"]})
    return {
        "title": title,
        "about": about,
        "layout": rows[0]["layout"],
        "verdict": _verdict(name, meets, means["saved_parked"] or 0.0),
        **means,
        "attainment": min(row["attainment"] for row in rows),
        "attainment_by_class": {
            c: min(row["attainment_by_class"][c] for row in rows if c in row["attainment_by_class"]) for c in judged
        },
        "meets_slo": meets,
        "peak_gpus": max(row["peak_gpus"] for row in rows),
        "requests": round(sum(row["requests"] for row in rows) / len(rows)),
        "lost": max(row["lost"] for row in rows),
        "energy_by_state_kwh": {
            state: _mean([row["energy_by_state_kwh"][state] for row in rows])
            for state in rows[0]["energy_by_state_kwh"]
        },
        "latency_by_input": {
            bucket.value: {
                key: _mean([row["latency_by_input"][bucket.value][key] for row in rows])
                for key in rows[0]["latency_by_input"][bucket.value]
            }
            for bucket in Bucket
        },
        "spread": {
            key: max(values) - min(values)
            for key in [*_MEANS, "attainment", "peak_gpus", "requests", "lost"]
            if (values := [row[key] for row in rows if row[key] is not None])
        },
        "per_seed": rows,
        "series": series,
    }


def _verdict(name: str, meets: bool, saved: float) -> str:
    if not meets:
        return "misses SLO"
    return "baseline" if name == BASELINE else f"saves {100 * saved + 0.0:.1f} %"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _bound(found: Mapping[tuple[str, int], Any], seeds: list[int]) -> dict[str, Any]:
    rows = []
    for seed in seeds:
        own, base = found[BOUND, seed], found[BASELINE, seed]["figures"]
        rows.append(
            {
                "seed": seed,
                "energy_off_kwh": own["energy_off_kwh"],
                "energy_parked_kwh": own["energy_parked_kwh"],
                "saved_off": 1 - own["energy_off_kwh"] / base["energy_off_kwh"],
                "saved_parked": 1 - own["energy_parked_kwh"] / base["energy_parked_kwh"],
                "overloaded_epochs": own["overloaded_epochs"],
            }
        )
    first = found[BOUND, seeds[0]]
    means = ("energy_off_kwh", "energy_parked_kwh", "saved_off", "saved_parked")
    return {
        **{key: sum(row[key] for row in rows) / len(rows) for key in means},
        "epoch_s": EPOCH_S,
        "per_seed": rows,
        "series": {
            "minute": list(range(len(first["power_off_w"]))),
            "power_off_w": [round(watts, 3) for watts in first["power_off_w"]],
            "power_parked_w": [round(watts, 3) for watts in first["power_parked_w"]],
        },
    }


def _predictor(trace: Trace, profile: Profile) -> dict[str, Any]:
    """How often the bucket that routing assumes is the true one, with the whole trace as experience."""
    classes = classes_of(trace, profile.scheme)
    right = 0
    for rank in range(len(Bucket)):
        counts = np.bincount(classes[classes // 3 == rank] % 3, minlength=len(Bucket))
        if counts.any():
            right += int(counts[np.searchsorted(np.cumsum(counts), QUANTILE * counts.sum())])
    return {
        "output_bucket_accuracy": right / len(trace),
        "method": f"the {QUANTILE:.0%} quantile of earlier outputs of the same input bucket; input buckets are exact",
    }


def _notes(common: _Common, bound: Mapping[str, Any] | None, systems: Mapping[str, Any]) -> list[str]:
    largest = common.largest
    notes = [
        f"u counts against the largest load that SinglePool serves with every class in SLO (k_max {largest.k:.2f}). "
        f"Where only 99 % of all requests together must be, it serves k = {largest.k_overall:.2f}, and this load is "
        f"u = {common.k / largest.k_overall:.2f} of that.",
        "MultiPool, ScaleInst, ScaleShard and ScaleFreq have two pools by input length, not the paper's nine by class: "
        "no controller here knows an output's length before it ends.",
        f"Classes with fewer than {LEAST_REQUESTS:,} requests in the window are judged within their input bucket.",
        "The bound may use all of the SLO's slack in every minute and switches for nothing: it is out of reach.",
    ]
    if bound is not None:
        better = [s["title"] for s in systems.values() if s["saved_parked"] > bound["saved_parked"] and s["meets_slo"]]
        if better:
            notes.append(f"{', '.join(better)} came out below the bound: that is a fault of the bound or of the run.")
        overloaded = sum(row["overloaded_epochs"] for row in bound["per_seed"])
        if overloaded:
            notes.append(f"In {overloaded} epochs more arrived than all GPUs serve in SLO; the bound counts them full.")
    return notes


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result without its series: what `--json` prints."""
    bound = result["bound"]
    return {
        **result,
        "bound": {key: value for key, value in bound.items() if key != "series"} if bound else None,
        "systems": {
            name: {key: value for key, value in system.items() if key != "series"}
            for name, system in result["systems"].items()
        },
    }
