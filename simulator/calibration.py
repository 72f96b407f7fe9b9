"""The twin's measuring backend: calibrates a profile on the virtual engine, and finds the ledger's k_max there.

This is the one way from the physics to the planner: `calibrate_twin` runs the same sweep (controller/calibrate) that a
real node would run, only in virtual time, in two processes. Results are kept on disk under a key made of everything
that they depend on: changed physics, engine, mix or settings give another key, a second run reads the file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

import controller.calibrate.assembly
import controller.calibrate.sweep
import controller.policy.routing.load
import simulator.engine
import simulator.grid
import simulator.grid_file
import simulator.iteration
import simulator.physics
import simulator.steady
from common.clock import SystemClock
from common.errors import UserError
from controller.calibrate.assembly import ProfileIdentity, build_profile, rarest_share, samples_by_group
from controller.calibrate.sweep import (
    FileCache,
    Phase,
    PointRequest,
    Progress,
    SweepPlan,
    Tokens,
    remaining_s,
    sweep_kind,
)
from controller.domain.classes import Bucket, ClassScheme
from controller.domain.decision import canonical_json
from controller.domain.slo import Slo
from controller.profile.table import OperatingPoint, Profile, StartCost
from simulator.engine import DEFAULT_CHUNK_TOKENS, Engine
from simulator.fast.steady import serve_fast
from simulator.iteration import Iteration
from simulator.physics import Physics
from simulator.steady import Outcome, Steady, serve_steadily
from simulator.traces import CONV_ARRIVAL_CV, Kind, Request, Trace, scale_to_rate, token_mix
from simulator.workers import open_processes

# Loads are shared by this many instances while one is measured: what a router evens out belongs to the surface.
MEASURED_INSTANCES = 2
MIX_SAMPLES = 20_000
MIX_SEED = 11
# Buckets with fewer requests than this in a measurement have no attainment of their own.
LEAST_REQUESTS = 100
SATURATING_REQUESTS = 1024
WORKERS = 2
Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class TwinBackend:
    """Measures on virtual instances. `samples` are the requests to draw from, by group."""

    physics: Physics
    plan: SweepPlan
    samples: dict[str, tuple[Tokens, ...]]

    def measure(self, request: PointRequest) -> OperatingPoint:
        rate_rps = request.rate_rps * MEASURED_INSTANCES
        count = request.requests * MEASURED_INSTANCES
        requests = arrivals(self.samples[request.group], rate_rps, count, request.seed)
        point = self.physics, request.tp, request.mhz, MEASURED_INSTANCES, requests
        # Power caps are the plain engine's alone.
        steady = serve_fast(*point) if request.cap_w is None else serve_steadily(*point, cap_w=request.cap_w)
        return operating_point(request, steady, self.plan.slo, self.plan.scheme)

    def idle_w(self, tp: int, mhz: int) -> float:
        return self.physics.idle_w(mhz, context=True) * tp

    def parked_w(self) -> float:
        return self.physics.idle_w(self.plan.clocks_mhz[-1], context=False)

    def saturated(
        self, phase: Phase, tp: int, mhz: int, mean_tokens: tuple[float, float], cap_w: float | None = None
    ) -> tuple[float, float]:
        """All requests at once, so that every iteration is full. Decoding is timed while nothing prefills and the
        batch is as large as it gets, over contexts of the mean length."""
        engine = Engine(self.physics, tp)
        inputs, outputs = (max(1, round(tokens)) for tokens in mean_tokens)
        if phase is Phase.PREFILL:
            count, answer = SATURATING_REQUESTS, 1
        else:
            count, inputs = engine.max_running, inputs + outputs // 2
            # So long that the first still decodes when the last has prefilled, and a little longer.
            answer = count * inputs // (engine.chunk_tokens - engine.max_running) + 64
        for number in range(count):
            engine.add(str(number), inputs, answer, 0.0)
        flights: list[Iteration] = []
        while (flight := engine.begin_iteration(flights[-1].end_s if flights else 0.0, mhz, cap_w)) is not None:
            flights.append(flight)
            engine.finish_iteration(flight, every_token=False)
        if phase is Phase.PREFILL:
            joules = sum(flight.joules_per_gpu for flight in flights) * tp
            return flights[-1].end_s / (count * inputs), joules / flights[-1].end_s
        alone = [flight for flight in flights if not flight.chunks]  # the last answers always decode alone
        most = max(flight.batch for flight in alone)
        full = [flight for flight in alone if flight.batch > 0.9 * most]
        seconds = sum(flight.seconds for flight in full)
        joules = sum(flight.joules_per_gpu for flight in full) * tp
        return seconds / sum(flight.batch for flight in full), joules / seconds


def arrivals(samples: Sequence[Tokens], rate_rps: float, count: int, seed: int) -> list[Request]:
    """Requests drawn from `samples` with gamma gaps, somewhat over-dispersed as the chat hour's are.

    Equal seeds give the same requests in the same order at every rate, only closer together.
    """
    rng = np.random.default_rng(seed)
    shape = 1 / CONV_ARRIVAL_CV**2
    chosen = rng.integers(len(samples), size=count)
    at_s = np.cumsum(rng.gamma(shape, 1 / shape, size=count)) / rate_rps
    return [Request(float(t), *samples[i]) for t, i in zip(at_s, chosen, strict=True)]


def operating_point(request: PointRequest, steady: Steady, slo: Slo, scheme: ClassScheme) -> OperatingPoint:
    by_bucket: dict[Bucket, list[Outcome]] = {}
    for outcome in steady.outcomes:
        by_bucket.setdefault(scheme.input_bucket(outcome.input_tokens), []).append(outcome)
    good = {b: sum(_in_slo(o, b, slo) for o in mine) / len(mine) for b, mine in by_bucket.items()}
    attainment = sum(good[b] * len(mine) for b, mine in by_bucket.items()) / len(steady.outcomes)
    # A run that gave up is no steady state, whatever share was served before.
    ceiling = 0.0 if steady.gave_up else 1.0
    ttft = {b: np.array([o.ttft_ms for o in mine]) for b, mine in sorted(by_bucket.items())}
    return OperatingPoint(
        group=request.group,
        tp=request.tp,
        mhz=request.mhz,
        rate_rps=request.rate_rps,
        power_w=steady.power_w,
        attainment=min(attainment, ceiling),
        attainment_worst=min(
            attainment, ceiling, *(good[b] for b, mine in by_bucket.items() if len(mine) >= LEAST_REQUESTS)
        ),
        ttft_p50_ms={b: float(np.quantile(values, 0.5)) for b, values in ttft.items()},
        ttft_p99_ms={b: float(np.quantile(values, 0.99)) for b, values in ttft.items()},
        tbt_p99_ms=float(np.quantile([o.tbt_ms for o in steady.outcomes], 0.99)),
        gap_p99_ms=steady.gap_quantile_ms(0.99),
        running_mean=steady.running_mean,
        running_p99=steady.running_quantile(0.99),
        requests=len(steady.outcomes),
        cap_w=request.cap_w,
    )


def _in_slo(outcome: Outcome, bucket: Bucket, slo: Slo) -> bool:
    return outcome.served and slo.met(bucket, outcome.ttft_ms, outcome.tbt_ms)


# ---------------------------------------------------------------------------------------------- calibration


def calibrate_twin(
    physics: Physics,
    cache_dir: Path,
    progress: Report | None = None,
    *,
    model: str = "llama-70b",
    source: Kind | Trace = "conv",
    plan: SweepPlan | None = None,
    start_s: float = 60.0,
    workers: int = WORKERS,
) -> Profile:
    """The profile of the twin for the token mix of `source`; read from `cache_dir` where it was made before.

    `start_s` prices a start (every GPU draws the loading power meanwhile); it is not part of what is measured. Tensor
    parallelisms that the physics do not know are left out of the plan. Raises UserError.
    """
    plan = plan or SweepPlan()
    plan = replace(plan, tps=tuple(tp for tp in plan.tps if tp in physics.tps) or plan.tps)
    for tp in plan.tps:
        for mhz in (plan.standby_mhz, *plan.clocks_mhz):
            # A grid may not reach so far: told now, not after minutes.
            physics.idle_w(mhz, context=True)
            physics.iteration(tp, mhz, 1, 1)
    samples = samples_by_group(token_mix(source, MIX_SAMPLES, MIX_SEED), plan.groups, plan.scheme)
    empty = [name for name, mine in samples.items() if not mine]
    if empty:
        raise UserError(
            f"Calibration: the token mix holds no request of group {', '.join(empty)}.", "Use another trace or groups."
        )
    plan = replace(plan, rarest=rarest_share(samples, plan.scheme))
    key = _key(physics, plan_value(plan), _digest(canonical_json(samples)))
    file = cache_dir / f"profile-{key}.json"
    if file.exists():
        profile = Profile.from_json(file.read_text(encoding="utf-8"))
    else:
        points = _sweep(physics, plan, samples, cache_dir / f"points-{key}", progress, workers)
        scheduling = "prefill first" if physics.prefill_first else f"chunked prefill {DEFAULT_CHUNK_TOKENS}"
        engine = f"twin engine {_digest(_sources())[:12]}, {scheduling}, bf16"
        identity = ProfileIdentity(
            model=model,
            gpu=f"{physics.name} ({', '.join([physics.variant, *physics.modes])})",
            engine=engine,
            provenance=f"twin, {MEASURED_INSTANCES} instances, seed {plan.settings.seed}, key {key}",
        )
        profile = build_profile(TwinBackend(physics, plan, samples), plan, identity, points, samples, {})
        _write(file, profile.to_json())
    loading_j = physics.loading_w * start_s
    return replace(profile, model=model, starts={tp: StartCost(start_s, loading_j * tp) for tp in plan.tps})


def _sweep(
    physics: Physics,
    plan: SweepPlan,
    samples: dict[str, tuple[Tokens, ...]],
    folder: Path,
    progress: Report | None,
    workers: int,
) -> list[OperatingPoint]:
    """Kinds of instances side by side, each with a point cache of its own in `folder`."""
    kinds = plan.kinds()
    found: dict[tuple[str, int], list[OperatingPoint]] = {}
    clock = SystemClock()
    began_s = clock.monotonic_s()
    # They may be ended at any time: what was measured is on disk.
    with open_processes(workers) as pool:
        jobs = {
            pool.submit(_sweep_one, physics, plan, samples, folder / f"{group}-tp{tp}.jsonl", group, tp): (group, tp)
            for group, tp in kinds
        }
        for job in as_completed(jobs):
            found[jobs[job]] = job.result()
            if progress is not None:
                group, tp = jobs[job]
                total = sum(len(points) for points in found.values())
                left_s = remaining_s(clock.monotonic_s() - began_s, len(found), len(kinds))
                progress(Progress(len(found), len(kinds), total, f"{group} TP{tp}", left_s))
    return [point for kind in kinds for point in found[kind]]


def _sweep_one(
    physics: Physics, plan: SweepPlan, samples: dict[str, tuple[Tokens, ...]], file: Path, group: str, tp: int
) -> list[OperatingPoint]:
    return sweep_kind(TwinBackend(physics, plan, samples), plan, group, tp, FileCache(file))


# ---------------------------------------------------------------------------------------------------- k_max


def single_pool_max_rps(
    physics: Physics,
    instances: int,
    source: Kind | Trace,
    cache_dir: Path,
    *,
    tp: int = 8,
    slo: Slo | None = None,
    requests: int = 12_000,
    precision: float = 0.01,
) -> float:
    """The largest load, in requests/s of the whole fleet, that SinglePool serves with 99 % of requests in SLO.

    SinglePool is `instances` equal instances at full clock. A `Trace` is scaled as the ledger says (copies, jittered);
    for the name of a mix, requests are drawn from it with the chat hour's arrivals.
    """
    slo = slo or Slo()
    rows = canonical_json(source) if isinstance(source, str) else _trace_digest(source)
    key = _key(physics, instances, tp, asdict(slo), requests, precision, rows)
    file = cache_dir / f"single-pool-{key}.json"
    if file.exists():
        return float(file.read_text(encoding="utf-8"))
    samples = token_mix(source, MIX_SAMPLES, MIX_SEED)
    scheme = ClassScheme()

    def in_slo(rate_rps: float) -> bool:
        if isinstance(source, Trace):
            load: Sequence[Request] = list(scale_to_rate(source, rate_rps, MIX_SEED))
        else:
            load = arrivals(samples, rate_rps, requests, MIX_SEED)
        steady = serve_fast(physics, tp, physics.clocks_mhz[-1], instances, load)
        request = PointRequest("all", tp, physics.clocks_mhz[-1], rate_rps / instances, len(load), MIX_SEED)
        point = operating_point(request, steady, slo, scheme)
        return point.attainment >= slo.attainment and point.gap_p99_ms <= slo.token_gap_p99_ms

    good, bad = 0.0, 0.5 * instances
    while in_slo(bad):
        good, bad = bad, bad * 2
    while bad > 0.01 * instances and (good == 0 or bad > good * (1 + precision)):
        middle = (good * bad) ** 0.5 if good else bad / 2
        good, bad = (middle, bad) if in_slo(middle) else (good, middle)
    if good == 0:
        raise UserError(
            f"SinglePool of {instances} x TP{tp} meets the SLO at no load.", "Check the physics, the trace and the SLO."
        )
    _write(file, repr(good))
    return good


# ------------------------------------------------------------------------------------------------------ keys


def plan_value(plan: SweepPlan) -> dict[str, object]:
    """A sweep plan as plain JSON values."""
    return {
        "groups": {group.name: sorted(str(c) for c in group.classes) for group in plan.groups},
        "tps": plan.tps,
        "clocks_mhz": plan.clocks_mhz,
        "standby_mhz": plan.standby_mhz,
        "slo": asdict(plan.slo),
        "scheme": asdict(plan.scheme),
        "settings": asdict(plan.settings),
        "rarest": dict(plan.rarest),
        "caps_w": plan.caps_w,
    }


def _key(physics: Physics, *parts: object) -> str:
    return _digest(canonical_json([physics.identity(), _digest(_sources()), *parts]))[:16]


_FAST = sorted((Path(__file__).parent / "fast").glob("*.py"))


@cache
def _sources() -> str:
    """The code that a measurement depends on."""
    modules = (
        controller.calibrate.assembly,
        controller.calibrate.sweep,
        controller.policy.routing.load,
        simulator.engine,
        simulator.grid,
        simulator.grid_file,
        simulator.iteration,
        simulator.physics,
        simulator.steady,
    )
    files = [Path(str(module.__file__)) for module in modules] + [Path(__file__), *_FAST]
    return "".join(file.read_text(encoding="utf-8") for file in files)


def _trace_digest(trace: Trace) -> str:
    columns = (trace.arrival_s, trace.input_tokens, trace.output_tokens)
    return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(file: Path, text: str) -> None:
    """Whole or not at all: another process may read it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)
