"""What the emergency ladder does: DynamoLLM on three nodes with and without it, in virtual time, chat requests.

Half the load that the nodes carry, then three minutes of 1.3 or 2 times that load, then half again. Told of the three
minutes: the share of all requests in SLO, the share refused, and the share in SLO of those admitted; of the time after
it the share in SLO; and of half an hour without a spike what the ladder changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from controller.domain.classes import Bucket
from controller.loop.core import Core
from controller.profile.fit import fit
from controller.profile.table import Profile
from simulator.bench.metric import Metric, of_repeats
from simulator.bench.twin import CACHE
from simulator.calibration import calibrate_twin
from simulator.fast.fleet import FastFleet, FastResult
from simulator.fleet import FleetTimes
from simulator.physics import Physics
from simulator.systems import SYSTEMS, settings_of
from simulator.traces import Trace, generate

NODES = 3
SEEDS = (1, 2, 3)
OVERLOADS = (1.3, 2.0)
CALM_S, SPIKE_S = 300.0, 180.0
CALM_LOAD = 0.5
LAID_OUT_S = 250.0  # starts take 180 s

Say = Callable[[str], None]


def measure(say: Say) -> list[Metric]:
    """Both fleets on the same requests."""
    physics = Physics.load()
    profile = calibrate_twin(physics, CACHE, start_s=180.0)
    most_rps = NODES * fit(profile).max_rate_rps("all", 8)
    metrics: list[Metric] = []
    for overload in OVERLOADS:
        found: dict[str, list[float]] = defaultdict(list)
        for seed in SEEDS:
            say(f"{overload:g} times the load, seed {seed}")
            rates = (CALM_LOAD * most_rps, overload * most_rps, CALM_LOAD * most_rps)
            trace = joined(seed, *zip((CALM_S, SPIKE_S, CALM_S), rates, strict=True))
            for name, ladder in (("without", False), ("with", True)):
                result = serve(physics, profile, trace, ladder)
                met, served = in_slo(profile, result), ~np.isnan(result.requests["finished_s"])
                spike = (trace.arrival_s >= CALM_S) & (trace.arrival_s < CALM_S + SPIKE_S)
                after = trace.arrival_s >= CALM_S + SPIKE_S
                found[f"in_slo.{name}"].append(float(met[spike].mean()))
                found[f"in_slo_of_admitted.{name}"].append(float(met[spike].sum() / served[spike].sum()))
                found[f"in_slo_after.{name}"].append(float(met[after].mean()))
                found[f"refused.{name}"].append(float(1 - served[spike].mean()))
                found[f"energy.{name}"].append(sum(result.energy_j.values()) / 1e6)
        metrics += [
            of_repeats(f"spike_{overload:g}.{name}", values, "MJ" if name.startswith("energy") else "ratio")
            for name, values in found.items()
        ]
    say("without a spike")
    trace = generate("conv", 1800.0, CALM_LOAD * most_rps, SEEDS[0])
    without, with_ladder = (serve(physics, profile, trace, ladder, CALM_S) for ladder in (False, True))
    change = sum(with_ladder.energy_j.values()) / sum(without.energy_j.values()) - 1
    metrics.append(Metric("no_spike.energy_change", change, "ratio"))
    for name, result in (("without", without), ("with", with_ladder)):
        window = trace.arrival_s >= CALM_S
        metrics.append(Metric(f"no_spike.in_slo.{name}", float(in_slo(profile, result)[window].mean()), "ratio"))
    return metrics


def joined(seed: int, *parts: tuple[float, float]) -> Trace:
    """Seconds at a rate, one part after the other."""
    traces = [generate("conv", seconds, rate_rps, 10 * seed + n) for n, (seconds, rate_rps) in enumerate(parts)]
    begins = np.cumsum([0.0, *(seconds for seconds, _ in parts)])
    return Trace(
        "spike",
        float(begins[-1]),
        np.concatenate([trace.arrival_s + begin for trace, begin in zip(traces, begins, strict=False)]),
        np.concatenate([trace.input_tokens for trace in traces]),
        np.concatenate([trace.output_tokens for trace in traces]),
    )


def serve(physics: Physics, profile: Profile, trace: Trace, ladder: bool, warm_up_s: float = 0.0) -> FastResult:
    times = FleetTimes()
    settings = settings_of(SYSTEMS["dynamollm"], profile, NODES, trace, times)
    settings = replace(settings, knobs=replace(settings.knobs, emergency=ladder))
    core = Core(settings, profile, term=1, expected_nodes=NODES)
    fleet = FastFleet(core, physics, NODES, trace, start_s=LAID_OUT_S, warm_up_s=warm_up_s, times=times, sparse=True)
    return fleet.run()


def in_slo(profile: Profile, result: FastResult) -> NDArray[np.bool_]:
    """By request; one that was refused is not."""
    slo, cuts = profile.slo, np.array(profile.scheme.input_cuts_tokens)
    bucket = (result.trace.input_tokens[:, None] >= cuts).sum(axis=1)
    bounds_s = np.array([slo.ttft_ms(each) / 1e3 for each in Bucket])[bucket]
    met: NDArray[np.bool_] = (result.ttft_s() <= bounds_s) & (1e3 * result.tbt_s() <= slo.tbt_ms)
    return met
