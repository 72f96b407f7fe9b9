"""The honest ledger: what a load costs under each system, counted the same way for all, and judged by the SLO.

`run_study` scales the load to the share `u` of the largest that SinglePool serves in SLO, runs every system for every
seed over the same requests, and gives one JSON value. Its schema (`DIR/result.json`):

    schema          1
    version         of the program
    command         the command line that makes this file again, less --out
    trace           {source, name, requests, duration_s, window_s, class_shares: {SS: share, ...},
                    skipped: {rows, examples: ["FILE:LINE: why", ...]}}, of the first seed
    nodes, gpus     size of the fleet: the GPU cap of every system
    u, k, k_max     load: u = k / k_max; k copies of the trace (generated load: k times the recorded hour's rate)
    k_max_overall   largest k at which 99 % of all requests together are in SLO, whatever their class (k_max asks it of
                    every class); u_overall: k / k_max_overall
    seed, seeds     first seed, and all of them
    physics, profile, profile_identity    physics variant; the profile's checksum; {model, gpu, engine, provenance}
    mismatch        share by which the simulated GPUs are slower and hungrier than those the profile was measured on
    start_s         seconds that every start of an instance takes
    crashes_per_day    of instances, in the whole fleet while all its GPUs are held (best_clock, best_static: none)
    pools           {pool: [classes]} of the systems with pools
    predictor       {output_bucket_accuracy, method}: how often routing knows a request's output bucket
    energy_table    see simulator/energy_table.py; null where it was not asked for
    sensitivity     {u|start_s|physics|mismatch|predictor_accuracy|pools|crashes_per_day: [{value, headline, k, u,
                    k_max, bound_saved_parked, systems: {name: {saved_off, saved_parked, energy_parked_kwh, attainment,
                    attainment_overall, meets_slo, ttft_p99_ms, gap_p99_ms, mean_gpus, switches, spilled,
                    mispredicted, outgrown, spread}}}]}: one option
                    varied, all else as here
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
      attainment_worst_hour       of the worst judged class in the worst whole hour, worst seed; null where no hour has
                                  enough requests
      hours_judged, hours_missed  of all seeds; missed: some judged class below the SLO within the hour
      attainment_by_class         {class: share}; a class of fewer than 1,000 requests stands in its input bucket
                                  ("S", "M", "L": the whole bucket); worst seed
      meets_slo                   in every seed
      ttft_p50_ms, ttft_p99_ms, tbt_p50_ms, tbt_p99_ms, gap_p99_ms, queue_p99_ms
      gpu_hours                   of GPUs that were held by an instance; gpu_hours_freed: of all others
      mean_gpus, peak_gpus        held; the peak is that of the worst seed
      switches, clock_changes     instances started, clocks set to another value, in the window
      carbon_kg, cost_usd         of energy_parked_kwh
      requests, lost              in the window; lost: refused, failed or not finished
      spilled                     requests that a larger pool than their own served, with the warm-up's
      mispredicted                requests routed for another output bucket than the true one, with the warm-up's
      outgrown                    of these, routed for a shorter one
      energy_by_state_kwh         {serving, idle, loading, draining, parked}
      latency_by_input            {S|M|L: {requests, ttft_p50_ms, ttft_p99_ms, tbt_p50_ms, tbt_p99_ms}}
      latency_by_class            {SS|...|LL: the same, and gap_p99_ms}, classes of at least 100 requests
      power_p50_w, power_p99_w, power_peak_w       over the minutes of the window, all GPUs
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

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import Any

from controller.domain.slo import Slo
from controller.profile.table import Profile
from simulator.assembly import BOUND, Found, assemble, trace_facts
from simulator.bound import GROUPS, BoundColumn, BoundTable, clairvoyant, measure_kind, table_of
from simulator.cached import cached_json
from simulator.calibration import calibrate_twin
from simulator.cuts import plan_for, with_pools
from simulator.energy_table import energy_table
from simulator.fleet import FleetTimes
from simulator.incidents import crashes
from simulator.loads import Load, load_named
from simulator.logs import LogColumns
from simulator.outcome import figures
from simulator.physics import Physics
from simulator.references import LargestLoad, best_clock, best_static, largest_load, run_reactive
from simulator.study import ALL_SYSTEMS, BASELINE, Study, world
from simulator.systems import GPUS_PER_NODE, SYSTEMS, run_system
from simulator.traces import Trace
from simulator.workers import Workers, open_workers

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class _Common:
    """What every job needs; its load is made again in each process."""

    source: str
    columns: LogColumns | None
    nodes: int
    k: float
    largest: LargestLoad
    physics: str
    mismatch: float
    start_s: float
    pools: int | None
    accuracy: float | None
    crashes_per_day: float
    profile: Profile
    table: BoundTable | None


# ------------------------------------------------------------------------------------------------------- study


def run_study(study: Study, progress: Progress | None = None) -> dict[str, Any]:
    """Everything; the value of `DIR/result.json`. The same study gives the same bytes with any number of workers."""
    load_named(study.source, study.columns)  # a bad trace is told before processes are started
    with open_workers(study.workers, study.ray) as workers:
        return run_on(workers, study, progress)


def run_on(workers: Workers, study: Study, progress: Progress | None = None) -> dict[str, Any]:
    """The same on workers that are there already."""
    say = progress or (lambda done, total, what: None)
    load = _load(study.source, study.columns)
    names = [name for name in ALL_SYSTEMS if name in study.systems or name == BASELINE]
    seeds = list(range(study.seed, study.seed + study.seeds))
    say(0, 0, "calibrating the twin")
    profile = calibrate_twin(
        Physics.from_text(study.physics),
        study.cache / "profiles",
        source=load.mix,
        start_s=study.start_s,
        workers=study.workers,
        plan=plan_for(study.pools),
    )
    say(0, 0, "searching the largest load of SinglePool" + (", measuring the bound's columns" if study.bound else ""))
    searched = [workers.submit(_largest, study, profile, seed) for seed in seeds]
    table = _bound_table(study, load, workers) if study.bound else None
    energies = _energy_table(study, load, workers) if study.energy_table else None
    largest = _least([job.result() for job in searched])
    common = _Common(
        source=study.source,
        columns=study.columns,
        nodes=study.nodes,
        k=study.u * largest.k,
        largest=largest,
        physics=study.physics,
        mismatch=study.mismatch,
        start_s=study.start_s,
        pools=study.pools,
        accuracy=study.predictor_accuracy,
        crashes_per_day=study.crashes_per_day,
        profile=profile,
        table=table,
    )
    # Seed by seed, so that a worker makes each load once; the longest first, so that no worker is left with it.
    order = sorted(names, key=lambda name: (name != "best_static", name != "best_clock"))
    jobs = [(name, seed) for seed in seeds for name in ([*order, BOUND] if study.bound else order)]
    running = {workers.submit(_job, common, name, seed): (name, seed) for name, seed in jobs}
    facts = workers.submit(_facts, common, seeds[0])
    found: Found = {}
    say(0, len(jobs), "simulating")
    for done in as_completed(running):
        found[running[done]] = done.result()
        say(len(found), len(jobs), f"{running[done][0]}, seed {running[done][1]}")
    return assemble(study, load, facts.result(), profile, largest, common.k, names, seeds, found, energies)


def _largest(study: Study, profile: Profile, seed: int) -> LargestLoad:
    load, physics = _load(study.source, study.columns), study.world
    # How long a start takes is no matter to a fleet that never starts anything.
    measured = replace(profile, starts={}).checksum()
    parts = [load.digest, study.nodes, seed, measured, asdict(profile.slo)]
    value = cached_json(
        study.cache / "k-max",
        "k-max",
        physics,
        parts,
        lambda: asdict(largest_load(physics, profile, study.nodes, load, seed=seed)),
    )
    return LargestLoad(**value)


def _least(found: Sequence[LargestLoad]) -> LargestLoad:
    """What SinglePool serves in SLO under every seed: a baseline that misses it under one of them is none."""
    least = min(found, key=lambda one: one.k)
    return replace(least, k_overall=min(one.k_overall for one in found))


def _bound_table(study: Study, load: Load, workers: Workers) -> BoundTable:
    physics = study.world

    def make() -> list[BoundColumn]:
        jobs = [
            workers.submit(measure_kind, physics, load.mix, group, tp, Slo()) for group in GROUPS for tp in physics.tps
        ]
        return [column for job in jobs for column in job.result()]

    columns = cached_json(study.cache / "bound", "columns", physics, [load.digest, asdict(Slo())], make)
    return table_of(physics, load.mix, [BoundColumn(*column) for column in columns])


def _energy_table(study: Study, load: Load, workers: Workers) -> dict[str, Any]:
    physics = study.world

    def make() -> dict[str, Any]:
        made: dict[str, Any] = workers.submit(energy_table, physics, load.mix, Slo()).result()
        return made

    value: dict[str, Any] = cached_json(
        study.cache / "energy-table", "table", physics, [load.digest, asdict(Slo())], make
    )
    return value


@cache
def _load(source: str, columns: LogColumns | None) -> Load:
    return load_named(source, columns)


@lru_cache(maxsize=1)
def _trace(source: str, columns: LogColumns | None, k: float, seed: int) -> Trace:
    return _load(source, columns).at(k, seed)


def _facts(common: _Common, seed: int) -> dict[str, Any]:
    """In a worker, where the load is in memory: a week is too large to hold it once more for this."""
    return trace_facts(_trace(common.source, common.columns, common.k, seed), common.profile)


def _job(common: _Common, name: str, seed: int) -> dict[str, Any]:
    """One system, or the bound, under one seed."""
    physics, profile, nodes = world(common.physics, common.mismatch), common.profile, common.nodes
    trace = _trace(common.source, common.columns, common.k, seed)
    times = FleetTimes(start_s=common.start_s)
    befalls = crashes(common.crashes_per_day, nodes, GPUS_PER_NODE, float(trace.arrival_s[-1]), seed)
    if name == BOUND:
        assert common.table is not None
        return asdict(clairvoyant(common.table, trace, nodes * GPUS_PER_NODE, profile.parked_w))
    if name == "best_clock":
        run = best_clock(physics, profile, nodes, trace, seed=seed)
    elif name == "best_static":
        run = best_static(physics, profile, nodes, trace, seed=seed)
    elif name == "reactive":
        run = run_reactive(profile, physics, nodes, trace, common.largest, times=times, seed=seed, incidents=befalls)
    else:
        system = SYSTEMS[name] if common.pools is None else with_pools(SYSTEMS[name], common.pools)
        run = run_system(
            system,
            profile,
            physics,
            nodes,
            trace,
            times=times,
            seed=seed,
            accuracy=common.accuracy,
            incidents=befalls,
        )
    return {"figures": figures(run, profile.slo, profile.scheme), "series": run.series}


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
