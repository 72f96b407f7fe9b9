"""The published systems as configurations of the one loop: which knobs it may turn, and what stands still.

DynamoLLM's paper cuts the load into nine pools by true input and output class. No controller here sees an output's
length before it ends, and the gateway's guess puts nearly all requests of an input bucket into one output bucket; so
the systems with pools have the two pools by input length that profiles measure ("short" < 1024 tokens <= "long"), and
DynamoLLM itself chooses between those and one. The published scalers lose requests while they switch; here all of
them switch as the loop does, make before break.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import floor

import numpy as np

from controller.domain.classes import ALL_CLASSES, DEFAULT_PARTITIONS, RequestClass
from controller.loop.settings import Knobs, LoopSettings
from controller.profile.table import Profile
from simulator.fleet import FleetTimes
from simulator.incidents import Incident
from simulator.outcome import BOOT_S, HOST_EMPTY_W, OFF_AFTER_S, SHUTDOWN_S, WARM_UP_S, SystemRun, classes_of
from simulator.physics import Physics
from simulator.record import RecordedCore, run_loop
from simulator.traces import Trace

WIDEST_TP = 8
GPUS_PER_NODE = 8
ONE_POOL, TWO_POOLS = DEFAULT_PARTITIONS


@dataclass(frozen=True, slots=True)
class System:
    """`fixed`: each pool keeps the instances that its busiest minute needs, as an operator who knows the past sizes
    it; all GPUs are dealt out."""

    name: str
    title: str
    about: str
    knobs: Knobs
    partitions: tuple[tuple[str, ...], ...]
    fixed: bool = False


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System(
            "singlepool",
            "SinglePool",
            "one pool, TP8 on every GPU, full clock",
            Knobs(pools=False, instances=False, sharding=False, clocks=False, standby=False, emergency=False),
            (ONE_POOL,),
        ),
        System(
            "multipool",
            "MultiPool",
            "two pools by input length, sized for their peaks, TP8, full clock",
            Knobs(instances=False, sharding=False, clocks=False, standby=False, emergency=False),
            (TWO_POOLS,),
            fixed=True,
        ),
        System(
            "scaleinst",
            "ScaleInst",
            "two pools, the number of instances follows the load; TP8, full clock",
            Knobs(sharding=False, clocks=False, standby=False, emergency=False),
            (TWO_POOLS,),
        ),
        System(
            "scaleshard",
            "ScaleShard",
            "two pools, tensor parallelism follows the load, never fewer instances than at the peak; full clock",
            Knobs(instances=False, clocks=False, standby=False, emergency=False),
            (TWO_POOLS,),
            fixed=True,
        ),
        System(
            "scalefreq",
            "ScaleFreq",
            "two pools sized for their peaks, TP8; clocks follow the load",
            Knobs(instances=False, sharding=False, standby=False, emergency=False),
            (TWO_POOLS,),
            fixed=True,
        ),
        System(
            "dynamollm",
            "DynamoLLM",
            "pools, instances, tensor parallelism and clocks follow the load",
            Knobs(),
            DEFAULT_PARTITIONS,
        ),
    )
}


def settings_of(system: System, profile: Profile, nodes: int, trace: Trace, times: FleetTimes) -> LoopSettings:
    """The loop's settings for a system, with what an operator would expect of the first minutes."""
    return LoopSettings(
        model=profile.model,
        gpus_per_node=GPUS_PER_NODE,
        widest_tp=WIDEST_TP,
        start_s=times.start_s,
        # Every host loads one model at a time.
        max_starts_at_once=nodes,
        initial_rps=expected_rps(trace, profile),
        partitions=system.partitions,
        fixed=peak_shares(trace, profile, system.partitions[0], nodes) if system.fixed else {},
        knobs=system.knobs,
        host_w=HOST_EMPTY_W,
        hosts_off=True,
        host_cycle_s=OFF_AFTER_S + SHUTDOWN_S + BOOT_S,
    )


def run_system(
    system: System,
    profile: Profile,
    physics: Physics,
    nodes: int,
    trace: Trace,
    *,
    times: FleetTimes,
    seed: int,
    choices: int | None = None,
    accuracy: float | None = None,
    incidents: Iterable[Incident] = (),
) -> SystemRun:
    settings = settings_of(system, profile, nodes, trace, times)
    return run_loop(
        RecordedCore,
        settings,
        profile,
        physics,
        nodes,
        trace,
        times=times,
        seed=seed,
        choices=choices,
        accuracy=accuracy,
        incidents=incidents,
    )


def expected_rps(trace: Trace, profile: Profile) -> dict[RequestClass, float]:
    """Mean rates of the first five minutes, by class: what every system's first layout is planned for."""
    first = trace.arrival_s < WARM_UP_S
    counts = np.bincount(classes_of(trace, profile.scheme)[first], minlength=len(ALL_CLASSES))
    return {c: int(n) / WARM_UP_S for c, n in zip(ALL_CLASSES, counts, strict=True) if n}


def peak_shares(trace: Trace, profile: Profile, pools: tuple[str, ...], nodes: int) -> Mapping[str, int]:
    """Instances of the widest TP by pool: all that the nodes hold, shared out by the pools' busiest minutes (in tokens'
    work), at least one each."""
    instances = nodes * GPUS_PER_NODE // WIDEST_TP
    classes = classes_of(trace, profile.scheme)
    work_s = profile.work.input_s * trace.input_tokens + profile.work.output_s * trace.output_tokens
    minute = (trace.arrival_s // 60).astype(int)
    peaks = {}
    for pool in pools:
        mine = [number for number, c in enumerate(ALL_CLASSES) if c in profile.group(pool).classes]
        peaks[pool] = float(np.bincount(minute, weights=work_s * np.isin(classes, mine)).max())
    total = sum(peaks.values())
    wanted = {pool: max(1.0, instances * peak / total) for pool, peak in peaks.items()}
    shares = {pool: floor(share) for pool, share in wanted.items()}
    # The largest remainders get what is left; where the least of one took too much, the largest gives it.
    for pool in sorted(pools, key=lambda pool: shares[pool] - wanted[pool])[: max(0, instances - sum(shares.values()))]:
        shares[pool] += 1
    while sum(shares.values()) > instances:
        shares[max(pools, key=lambda pool: shares[pool])] -= 1
    return shares
