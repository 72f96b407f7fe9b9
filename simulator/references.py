"""What stands beside every figure: one pool with its best clock, the best static configuration in hindsight, and a
reactive autoscaler as people run it today.

The two hindsight references see the whole trace and try out what they choose from, on the physics itself; nothing
about them can be run live. The autoscaler is a horizontal pod autoscaler over the loop's own transitions and routing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from common.errors import UserError
from controller.domain.classes import ALL_CLASSES, ClassGroup
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level
from controller.fleet.port import Event, InstanceState, RoutedInstance, RoutedPool, Tick
from controller.loop.core import Step
from controller.loop.planning import lay_out
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.policy.routing import weight
from controller.profile.fit import fit
from controller.profile.table import Profile
from simulator.fast.engines import FastEngines
from simulator.fast.layout import AT_DRAINING, AT_LOADING, IDLE, SERVING
from simulator.fast.static import UNLIMITED
from simulator.fleet import FleetTimes
from simulator.incidents import Incident
from simulator.loads import Load
from simulator.outcome import WARM_UP_S, SystemRun, classes_of, energies_kwh, judge, node_off_s
from simulator.physics import Physics
from simulator.record import MINUTE_S, RecordedCore, Recorder, minute_series, minutes_of, run_loop
from simulator.systems import GPUS_PER_NODE, ONE_POOL, SYSTEMS, TWO_POOLS, WIDEST_TP, expected_rps, settings_of
from simulator.traces import Trace

# ---------------------------------------------------------------------------------------------------- static


@dataclass(frozen=True, slots=True)
class StaticPool:
    """`instances` equal instances that serve a group's classes at one clock, all the time."""

    group: ClassGroup
    instances: int
    tp: int
    mhz: int

    @property
    def gpus(self) -> int:
        return self.instances * self.tp

    def __str__(self) -> str:
        return f"{self.group.name} {self.instances}xTP{self.tp} at {self.mhz} MHz"


def run_static(
    physics: Physics,
    profile: Profile,
    nodes: int,
    trace: Trace,
    pools: Sequence[StaticPool],
    *,
    seed: int,
    choices: int | None = None,
) -> SystemRun:
    """Serves the trace on pools that stand ready from the beginning, with the loop's router.

    Nothing waits at the gateway: a limit from the planner's profile would hold a full fleet back, and so lower the bar
    that others are measured by.
    """
    curves = fit(profile)
    engines = FastEngines(physics, trace, choices=choices, seed=seed, slo=profile.slo, scheme=profile.scheme)
    rows: dict[str, int] = {}
    routed = []
    for pool in pools:
        name = pool.group.name
        ids = [f"{name}-{number:05d}" for number in range(pool.instances)]
        rows.update({one: engines.start(pool.tp, pool.mhz) for one in ids})
        share = weight(curves, name, pool.tp)
        members = tuple(RoutedInstance(one, "", pool.tp, UNLIMITED, share, accepts_new=True) for one in ids)
        routed.append(RoutedPool(name, profile.model, pool.group.classes, members))
    for row in rows.values():
        engines.ready(row)
    engines.route(routed, rows)
    open_s, close_s = WARM_UP_S, float(trace.arrival_s[-1])
    engines.advance(open_s)
    gaps = engines.gaps.copy()
    opened_j = engines.energy_j()
    minutes = minutes_of(close_s - open_s)
    held, gpus = sum(pool.gpus for pool in pools), nodes * GPUS_PER_NODE
    parked_w = physics.idle_w(physics.clocks_mhz[-1], context=False)
    power_w, before_j, now_s = [], opened_j.sum(), open_s
    for minute in range(1, minutes + 1):
        until_s = min(open_s + minute * MINUTE_S, close_s)
        engines.advance(until_s)
        joules = engines.energy_j().sum()
        power_w.append(float((joules - before_j) / max(until_s - now_s, 1e-9)) + parked_w * (gpus - held))
        before_j, now_s = joules, until_s
    drawn_j = engines.energy_j() - opened_j
    engines.finish()
    window_s = close_s - open_s
    parked_gpu_s = (gpus - held) * window_s
    # Instances are packed: whole nodes stay off from the beginning.
    empty_nodes = nodes - math.ceil(held / GPUS_PER_NODE)
    first_s, finished_s = engines.results["first_s"], engines.results["finished_s"]
    return SystemRun(
        trace=trace,
        warm_up_s=WARM_UP_S,
        ttft_s=first_s - trace.arrival_s,
        tbt_s=(finished_s - first_s) / np.maximum(trace.output_tokens - 1, 1),
        finished=np.isfinite(first_s) & np.isfinite(finished_s),
        queue_s=engines.results["queue_s"].astype(np.float64),
        gaps=engines.gaps - gaps,
        nodes=nodes,
        gpus=gpus,
        energy_j={
            GpuState.SERVING.value: float(drawn_j[SERVING]),
            GpuState.IDLE.value: float(drawn_j[IDLE]),
            GpuState.LOADING.value: float(drawn_j[AT_LOADING]),
            GpuState.DRAINING.value: float(drawn_j[AT_DRAINING]),
            GpuState.PARKED.value: parked_gpu_s * parked_w,
        },
        parked_gpu_s=parked_gpu_s,
        window_s=window_s,
        off_node_s=empty_nodes * node_off_s((-math.inf, math.inf), open_s, close_s),
        peak_gpus=held,
        switches=0,
        clock_changes=0,
        layout=", ".join(str(pool) for pool in pools),
        spilled=engines.spilled,
        mispredicted=engines.mispredicted,
        outgrown=engines.outgrown,
        series=minute_series(
            trace,
            WARM_UP_S,
            minutes,
            power_w=power_w,
            gpus={f"{pool.group.name}/tp{pool.tp}": [float(pool.gpus)] * minutes for pool in pools},
            clock_mhz={pool.group.name: [float(pool.mhz)] * minutes for pool in pools},
        ),
    )


def single_pool(profile: Profile, nodes: int, mhz: int) -> tuple[StaticPool, ...]:
    (name,) = ONE_POOL
    return (StaticPool(profile.group(name), nodes * GPUS_PER_NODE // WIDEST_TP, WIDEST_TP, mhz),)


def best_clock(
    physics: Physics, profile: Profile, nodes: int, trace: Trace, *, seed: int, choices: int | None = None
) -> SystemRun:
    """SinglePool's layout at the one clock that costs least and meets the SLO; at full clock when none does."""
    best: SystemRun | None = None
    for mhz in reversed(profile.clocks_mhz):
        run = run_static(physics, profile, nodes, trace, single_pool(profile, nodes, mhz), seed=seed, choices=choices)
        if best is None or (_meets(run, profile) and _parked_kwh(run) < _parked_kwh(best)):
            best = run
    assert best is not None
    return best


# Candidates run together, cheapest first, before giving up.
MOST_TRIED = 20


def best_static(
    physics: Physics, profile: Profile, nodes: int, trace: Trace, *, seed: int, choices: int | None = None
) -> SystemRun:
    """The static configuration that costs least (parked) and meets the SLO, over pools x TP x clock x instances.

    A pool's requests meet nobody of another pool, so each is searched alone on its own requests; the winners are then
    run together, the cheapest first, because a pool may spill into another. SinglePool when nothing else meets the SLO.
    """
    gpus = nodes * GPUS_PER_NODE
    parked_kwh = physics.idle_w(physics.clocks_mhz[-1], context=False) * (trace.arrival_s[-1] - WARM_UP_S) / 3.6e6
    candidates: list[tuple[float, tuple[StaticPool, ...]]] = []
    for names in (ONE_POOL, TWO_POOLS):
        for parts in product(*(list(_alone(physics, profile, nodes, trace, name, seed)) for name in names)):
            held = sum(pool.gpus for _, pool in parts)
            if held <= gpus:
                kwh = sum(kwh for kwh, _ in parts) + (gpus - held) * parked_kwh
                candidates.append((kwh, tuple(pool for _, pool in parts)))
    for _, pools in sorted(candidates, key=lambda candidate: candidate[0])[:MOST_TRIED]:
        run = run_static(physics, profile, nodes, trace, pools, seed=seed, choices=choices)
        if _meets(run, profile):
            return run
    return run_static(
        physics, profile, nodes, trace, single_pool(profile, nodes, profile.full_mhz), seed=seed, choices=choices
    )


def _alone(
    physics: Physics, profile: Profile, nodes: int, trace: Trace, name: str, seed: int
) -> Iterator[tuple[float, StaticPool]]:
    """For each TP and clock the fewest instances of one pool that meet the SLO for its own requests, and what they
    draw in kWh."""
    group = profile.group(name)
    numbers = [number for number, c in enumerate(ALL_CLASSES) if c in group.classes]
    mine = np.isin(classes_of(trace, profile.scheme), numbers)
    own = Trace(
        trace.name, trace.duration_s, trace.arrival_s[mine], trace.input_tokens[mine], trace.output_tokens[mine]
    )
    for tp in profile.tps:
        least, most = 1, nodes * GPUS_PER_NODE // tp
        best_kwh = math.inf
        for mhz in reversed(profile.clocks_mhz):
            runs: dict[int, SystemRun] = {}

            def meets(n: int, tp: int = tp, mhz: int = mhz, runs: dict[int, SystemRun] = runs) -> bool:
                runs[n] = run_static(physics, profile, nodes, own, [StaticPool(group, n, tp, mhz)], seed=seed)
                return _meets(runs[n], profile)

            # A lower clock needs no fewer instances than the one above it.
            fewest = _fewest(meets, least, most)
            if fewest is None:
                break
            least, kwh = fewest, energies_kwh(runs[fewest])["energy_off_kwh"]
            yield kwh, StaticPool(group, fewest, tp, mhz)
            if kwh > best_kwh * 1.1:
                break  # past the best clock, power only rises
            best_kwh = min(best_kwh, kwh)


def _fewest(meets: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest number from `least` to `most` that meets, given that larger ones do too; None without one."""
    low, step = least, 1  # everything below `low` fails
    high = least
    while not meets(high):
        if high == most:
            return None
        low, high, step = high + 1, min(most, high + step), step * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return high


def _meets(run: SystemRun, profile: Profile) -> bool:
    return judge(run, profile.slo, profile.scheme).meets_slo


def _parked_kwh(run: SystemRun) -> float:
    return energies_kwh(run)["energy_parked_kwh"]


# ----------------------------------------------------------------------------------------------------- k_max


@dataclass(frozen=True, slots=True)
class LargestLoad:
    """The largest load that SinglePool serves in SLO: `k`, its mean rate, and the requests it then holds at once.
    `k_overall`: the same when only 99 % of all requests together must be in SLO, whatever their class."""

    k: float
    k_overall: float
    rate_rps: float
    in_flight: float


def largest_load(physics: Physics, profile: Profile, nodes: int, load: Load, *, seed: int) -> LargestLoad:
    """Searches k to one percent, on the hour of the load's peak, by the ledger's own verdict."""
    pools = single_pool(profile, nodes, profile.full_mhz)
    verdicts: dict[float, tuple[bool, bool]] = {}
    loads: dict[float, tuple[float, float]] = {}

    def verdict(k: float) -> tuple[bool, bool]:
        if k not in verdicts:
            trace = load.at_peak(k, seed)
            run = run_static(physics, profile, nodes, trace, pools, seed=seed)
            judged = judge(run, profile.slo, profile.scheme)
            verdicts[k] = judged.meets_slo, judged.overall >= profile.slo.attainment
            busy_s = float(np.nansum(run.ttft_s + run.tbt_s * np.maximum(trace.output_tokens - 1, 0)))
            loads[k] = len(trace) / trace.duration_s, busy_s / trace.duration_s
        return verdicts[k]

    k = _largest(lambda k: verdict(k)[0])
    if k == 0:
        raise UserError(
            f"SinglePool of {nodes} nodes meets the SLO at no load of {load.name}.", "Use more nodes or another SLO."
        )
    return LargestLoad(k, _largest(lambda k: verdict(k)[1], k), *loads[k])


def _largest(meets: Callable[[float], bool], start: float = 1.0) -> float:
    """The largest k that meets, to one percent; 0 without one."""
    good, bad = 0.0, start
    while meets(bad):
        good, bad = bad, bad * 2
    while bad > 0.01 and (good == 0 or bad > good * K_PRECISION):
        middle = (good * bad) ** 0.5 if good else bad / 2
        good, bad = (middle, bad) if meets(middle) else (good, middle)
    return good


K_PRECISION = 1.01

# -------------------------------------------------------------------------------------------------- reactive

# Kubernetes' horizontal pod autoscaler with its defaults, on requests in flight per instance: a target share of what an
# instance holds when the whole fleet serves its largest load in SLO (what a load test tells an operator).
REACTIVE_TARGET = 0.7
REACTIVE_PERIOD_S = 15.0
REACTIVE_TOLERANCE = 0.1
REACTIVE_DOWN_S = 300.0  # scale down to the largest recommendation of that long
REACTIVE_MOST_UP = 4  # instances, or as many again, per period


class ReactiveCore(RecordedCore):
    """One pool of TP8 at full clock that follows the requests in flight; transitions and routing are the loop's."""

    def __init__(
        self,
        settings: LoopSettings,
        profile: Profile,
        expected_nodes: int,
        recorder: Recorder,
        load_from_s: float,
        *,
        in_flight: float,
    ) -> None:
        """`in_flight`: requests per instance at the largest load."""
        super().__init__(settings, profile, expected_nodes, recorder, load_from_s)
        self._each = REACTIVE_TARGET * in_flight
        self._next_s = load_from_s
        self._recommended: deque[tuple[float, int]] = deque()

    def handle(self, now: Instant, event: Event) -> Step:
        state = self.state
        if isinstance(event, Tick) and state.pools:
            if event.level is not Level.INSTANCE:
                return Step((), ())
            if now.monotonic_s >= self._next_s:
                self._next_s = now.monotonic_s + REACTIVE_PERIOD_S
                self._scale(now)
        return super().handle(now, event)

    def _scale(self, now: Instant) -> None:
        (name,) = ONE_POOL
        state = self.state
        seen = [instance for _, instance in state.instances().values()]
        ready = [i for i in seen if i.state is InstanceState.READY and i.instance_id not in state.draining]
        if not ready:
            return
        held = sum((i.running or 0.0) + (i.waiting or 0.0) for i in seen)
        held += sum(queue.waiting for queue in state.load.queues().values())
        most = state.usable_gpus(now.monotonic_s) // WIDEST_TP
        plan = state.pools[name]
        present = plan.counts[WIDEST_TP]
        ratio = held / len(ready) / self._each
        # What is starting does not hide what is missing: the ratio is that of instances which serve.
        wanted = present if abs(ratio - 1) <= REACTIVE_TOLERANCE else math.ceil(held / self._each)
        wanted = max(1, min(wanted, most, present + max(REACTIVE_MOST_UP, present)))
        self._recommended.append((now.monotonic_s, wanted))
        while self._recommended[0][0] < now.monotonic_s - REACTIVE_DOWN_S:
            self._recommended.popleft()
        target = wanted if wanted > present else min(present, max(count for _, count in self._recommended))
        if target != present:
            state.pools[name] = replace(plan, counts={WIDEST_TP: target}, decided_at_s=now.monotonic_s)
            state.layout_forced = True  # it scales whatever the planner would think of the load
            lay_out(state, now)


def run_reactive(
    profile: Profile,
    physics: Physics,
    nodes: int,
    trace: Trace,
    largest: LargestLoad,
    *,
    times: FleetTimes,
    seed: int,
    choices: int | None = None,
    incidents: Iterable[Incident] = (),
) -> SystemRun:
    """Begins with the instances that its target means for the first five minutes."""
    (name,) = ONE_POOL
    most = nodes * GPUS_PER_NODE // WIDEST_TP
    rate_rps = sum(expected_rps(trace, profile).values())
    instances = max(1, min(math.ceil(rate_rps / (REACTIVE_TARGET * largest.rate_rps / most)), most))
    settings = replace(settings_of(SYSTEMS["singlepool"], profile, nodes, trace, times), fixed={name: instances})
    make = partial(ReactiveCore, in_flight=largest.in_flight / most)
    return run_loop(
        make, settings, profile, physics, nodes, trace, times=times, seed=seed, choices=choices, incidents=incidents
    )
