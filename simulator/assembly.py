"""From the figures of every run to the ledger's one value: comparisons, prices, means over seeds, notes.

The last step of `simulator/ledger.py`, whose schema it fills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.domain.classes import ALL_CLASSES, Bucket
from controller.profile.table import Profile
from simulator.bound import EPOCH_S
from simulator.cuts import PARTITIONS_BY_POOLS
from simulator.fast.engines import QUANTILE
from simulator.loads import Load
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
)
from simulator.prices import Steps
from simulator.references import LargestLoad
from simulator.study import BASELINE, REFERENCES, Study
from simulator.systems import GPUS_PER_NODE, SYSTEMS, TWO_POOLS
from simulator.traces import Trace

SCHEMA = 1
BOUND = "bound"
# What each job gave, by system (or BOUND) and seed.
Found = dict[tuple[str, int], Any]

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
    "power_p50_w",
    "power_p99_w",
    "power_peak_w",
    "gpu_hours",
    "gpu_hours_freed",
    "mean_gpus",
    "switches",
    "spilled",
    "mispredicted",
    "outgrown",
    "clock_changes",
    "carbon_kg",
    "cost_usd",
]


def trace_facts(trace: Trace, profile: Profile) -> dict[str, Any]:
    """What the result says of the load itself."""
    classes = classes_of(trace, profile.scheme)
    counts = np.bincount(classes, minlength=len(ALL_CLASSES))
    return {
        "requests": len(trace),
        "duration_s": trace.duration_s,
        "window_s": float(trace.arrival_s[-1]) - WARM_UP_S,
        "class_shares": {str(c): int(n) / len(trace) for c, n in zip(ALL_CLASSES, counts, strict=True)},
        "output_bucket_accuracy": _output_bucket_accuracy(classes),
    }


def _output_bucket_accuracy(classes: NDArray[np.int64]) -> float:
    """How often the bucket that routing assumes is the true one, with the whole trace as experience."""
    right = 0
    for rank in range(len(Bucket)):
        counts = np.bincount(classes[classes // 3 == rank] % 3, minlength=len(Bucket))
        if counts.any():
            right += int(counts[np.searchsorted(np.cumsum(counts), QUANTILE * counts.sum())])
    return right / len(classes)


def _predictor(study: Study, facts: Mapping[str, Any]) -> dict[str, Any]:
    if study.predictor_accuracy is not None:
        method = "a predictor of that accuracy, wrong guesses spread evenly; input buckets are exact"
        return {"output_bucket_accuracy": study.predictor_accuracy, "method": method}
    method = f"the {QUANTILE:.0%} quantile of earlier outputs of the same input bucket; input buckets are exact"
    return {"output_bucket_accuracy": facts["output_bucket_accuracy"], "method": method}


def assemble(
    study: Study,
    load: Load,
    facts: Mapping[str, Any],
    profile: Profile,
    largest: LargestLoad,
    k: float,
    names: list[str],
    seeds: list[int],
    found: Found,
    energies: dict[str, Any] | None,
) -> dict[str, Any]:
    """The whole value; `energies` is the energy table, None where it was not asked for."""
    rows = {name: [_priced(study, found[name, seed], found[BASELINE, seed], seed) for seed in seeds] for name in names}
    systems = {name: _system(name, rows[name], found[name, seeds[0]]["series"]) for name in names}
    bound = _bound(found, seeds) if study.bound else None
    pools = PARTITIONS_BY_POOLS[study.pools] if study.pools is not None else TWO_POOLS
    trace_keys = ("requests", "duration_s", "window_s", "class_shares")
    return {
        "schema": SCHEMA,
        "version": version("dynamollm"),
        "command": study.command,
        "trace": {
            "source": study.source,
            "name": load.name,
            **{key: facts[key] for key in trace_keys},
            "skipped": {"rows": load.skipped.rows, "examples": list(load.skipped.examples)},
        },
        "nodes": study.nodes,
        "gpus": study.nodes * GPUS_PER_NODE,
        "u": study.u,
        "k": k,
        "k_max": largest.k,
        "u_overall": k / largest.k_overall,
        "k_max_overall": largest.k_overall,
        "seed": seeds[0],
        "seeds": seeds,
        "physics": study.physics,
        "profile": profile.checksum(),
        "profile_identity": {
            "model": profile.model,
            "gpu": profile.gpu,
            "engine": profile.engine,
            "provenance": profile.provenance,
        },
        "mismatch": study.mismatch,
        "start_s": study.start_s,
        "crashes_per_day": study.crashes_per_day,
        "slo": asdict(profile.slo),
        "pools": {name: sorted(str(c) for c in profile.group(name).classes) for name in pools},
        "predictor": _predictor(study, facts),
        "assumptions": {
            "parked_w": profile.parked_w,
            "carbon_g_per_kwh": _window_mean(study.carbon, facts["window_s"]),
            "price_per_kwh": _window_mean(study.price, facts["window_s"]),
            "host_w": [HOST_EMPTY_W, HOST_FULL_W],
            "gpu_limit_w": GPU_LIMIT_W,
            "node_off_after_s": OFF_AFTER_S,
            "node_shutdown_s": SHUTDOWN_S,
            "node_boot_s": BOOT_S,
        },
        "notes": _notes(study, load, largest, k, bound, systems),
        "bound_saved_off": bound["saved_off"] if bound else None,
        "bound_saved_parked": bound["saved_parked"] if bound else None,
        "bound": bound,
        "systems": systems,
        "energy_table": energies,
        "sensitivity": {},
    }


def _hours(minutes: int) -> NDArray[np.float64]:
    """Of the window's minutes, since the trace's beginning."""
    return (WARM_UP_S + 60.0 * np.arange(minutes)) / 3600


def _window_mean(steps: Steps, window_s: float) -> float:
    """Over time, whatever was drawn."""
    return float(steps.at(_hours(max(1, round(window_s / 60)))).mean())


def _priced(study: Study, result: Mapping[str, Any], baseline: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One seed's figures, with what compares and prices them."""
    own, base, series = result["figures"], baseline["figures"], result["series"]
    power_w = np.array(series["power_w"])
    p50_w, p99_w, peak_w = np.quantile(power_w, (0.5, 0.99, 1.0)).tolist()
    hours = _hours(len(power_w))

    def weighted(steps: Steps) -> float:
        return float((steps.at(hours) * power_w).sum() / power_w.sum())

    return {
        "seed": seed,
        **own,
        "power_p50_w": p50_w,
        "power_p99_w": p99_w,
        "power_peak_w": peak_w,
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
        "attainment_worst_hour": min(
            (row["attainment_worst_hour"] for row in rows if row["hours_judged"]), default=None
        ),
        "hours_judged": sum(row["hours_judged"] for row in rows),
        "hours_missed": sum(row["hours_missed"] for row in rows),
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
        "latency_by_input": _means_by("latency_by_input", rows),
        "latency_by_class": _means_by("latency_by_class", rows),
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


def _means_by(table: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that have the line; lines in the order in which they come first."""
    names = dict.fromkeys(name for row in rows for name in row[table])
    found = {}
    for name in names:
        lines = [row[table][name] for row in rows if name in row[table]]
        found[name] = {key: _mean([line[key] for line in lines]) for key in lines[0]}
    return found


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


def _notes(
    study: Study,
    load: Load,
    largest: LargestLoad,
    k: float,
    bound: Mapping[str, Any] | None,
    systems: Mapping[str, Any],
) -> list[str]:
    notes = [
        f"u counts against the largest load that SinglePool serves with every class in SLO (k_max {largest.k:.2f}). "
        f"Where only 99 % of all requests together must be, it serves k = {largest.k_overall:.2f}, and this load is "
        f"u = {k / largest.k_overall:.2f} of that.",
        "MultiPool, ScaleInst, ScaleShard and ScaleFreq have two pools by input length, not the paper's nine by class: "
        "no controller here knows an output's length before it ends.",
        f"Classes with fewer than {LEAST_REQUESTS:,} requests in the window are judged within their input bucket.",
        "The bound may use all of the SLO's slack in every minute and switches for nothing: it is out of reach.",
    ]
    if load.skipped.rows:
        first = load.skipped.examples[0]
        notes.append(f"{load.skipped.rows} rows of the trace were no request and were left out, the first: {first}")
    if study.mismatch:
        less = "slower and hungrier" if study.mismatch > 0 else "faster and leaner"
        notes.append(f"The simulated GPUs are {abs(study.mismatch):.0%} {less} than those the profile was measured on.")
    if study.crashes_per_day:
        notes.append(
            f"Instances crash at random, {study.crashes_per_day:g} a day where all GPUs are held. Answers under way "
            "are lost and miss the SLO; best clock and best static do not crash."
        )
    if bound is not None:
        better = [s["title"] for s in systems.values() if s["saved_parked"] > bound["saved_parked"] and s["meets_slo"]]
        if better:
            notes.append(f"{', '.join(better)} came out below the bound: that is a fault of the bound or of the run.")
        overloaded = sum(row["overloaded_epochs"] for row in bound["per_seed"])
        if overloaded:
            notes.append(f"In {overloaded} epochs more arrived than all GPUs serve in SLO; the bound counts them full.")
    return notes
