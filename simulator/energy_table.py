"""What one request costs by class, tensor parallelism and clock: one instance on its own, one class at a time.

As the paper's tables of energy: the same tokens/s are put on every kind of instance, and cells that miss the SLO are
marked. It is measured on the physics, like the bound, and nothing plans with it: it shows people why the knobs matter.

The value: {loads_tokens_per_s, tps, clocks_mhz, classes: {SS: {input_tokens, output_tokens}}, cells: [{class, tp, mhz,
load_tokens_per_s, wh, attainment, meets_slo}]}; wh per request, of the whole instance, idle time included; `classes`
holds mean lengths, and only classes that the mix has. A load beyond what the instance finishes has no wh (null).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.calibrate.sweep import SweepPlan
from controller.domain.classes import ALL_CLASSES
from controller.domain.slo import Slo
from simulator.bound import samples_of
from simulator.calibration import MIX_SEED, arrivals
from simulator.fast.static import gap_quantile_s, static_engines
from simulator.outcome import classes_of
from simulator.physics import Physics
from simulator.traces import Kind, Trace

# Low, medium and high load of the paper's characterisation, prompt and answer together.
LOADS_TOKENS_PER_S = (650, 2000, 4000)
CLOCKS_MHZ = (795, 1005, 1200, 1395, 1605, 1800, 1980)
REQUESTS = 1200
LEAST_SAMPLES = 3
# Longer than this behind the last arrival, and the load was more than the instance finishes.
MOST_BEHIND_S = 60.0


def energy_table(physics: Physics, mix: Kind | Trace, slo: Slo) -> dict[str, Any]:
    """All cells; a few seconds."""
    tokens = samples_of(mix)
    whole = Trace("mix", 1.0, np.zeros(len(tokens)), tokens[:, 0], tokens[:, 1])
    numbers = classes_of(whole, SweepPlan().scheme)
    cells, classes = [], {}
    for number, name in enumerate(str(c) for c in ALL_CLASSES):
        mine = tokens[numbers == number]
        if len(mine) < LEAST_SAMPLES:
            continue
        classes[name] = {"input_tokens": float(mine[:, 0].mean()), "output_tokens": float(mine[:, 1].mean())}
        for load in LOADS_TOKENS_PER_S:
            trace = _one_class(mine, load)
            for tp in physics.tps:
                cells += [
                    {"class": name, "load_tokens_per_s": load, **_cell(physics, trace, tp, mhz, number // 3, slo)}
                    for mhz in CLOCKS_MHZ
                ]
    return {
        "loads_tokens_per_s": list(LOADS_TOKENS_PER_S),
        "tps": list(physics.tps),
        "clocks_mhz": list(CLOCKS_MHZ),
        "classes": classes,
        "cells": cells,
    }


def _one_class(mine: NDArray[np.int64], load_tokens_per_s: float) -> Trace:
    rate_rps = load_tokens_per_s / float(mine.sum(axis=1).mean())
    requests = arrivals([(int(i), int(o)) for i, o in mine], rate_rps, REQUESTS, MIX_SEED)
    at_s, inputs, outputs = (np.array(column) for column in zip(*requests, strict=True))
    return Trace("one class", float(at_s[-1]), at_s, inputs, outputs)


def _cell(physics: Physics, trace: Trace, tp: int, mhz: int, bucket: int, slo: Slo) -> dict[str, Any]:
    engines = static_engines(physics, trace, 1, tp, mhz)
    at_s = trace.arrival_s
    first = len(at_s) // 10
    open_s, close_s = float(at_s[first]), float(at_s[-1])
    engines.advance(open_s)
    before_j = engines.energy_j().sum()
    engines.advance(close_s)
    joules = float(engines.energy_j().sum() - before_j)
    ended_s = engines.finish()
    first_s, finished_s = engines.results["first_s"], engines.results["finished_s"]
    bound_s = (slo.ttft_s_ms, slo.ttft_m_ms, slo.ttft_l_ms)[bucket] / 1e3
    with np.errstate(invalid="ignore"):
        good = (first_s - at_s <= bound_s) & (
            finished_s - first_s <= slo.tbt_ms / 1e3 * np.maximum(trace.output_tokens - 1, 1)
        )
    attainment = float(good[first:].mean())
    served = not engines.refused and ended_s - close_s <= MOST_BEHIND_S
    in_slo = served and attainment >= slo.attainment
    return {
        "tp": tp,
        "mhz": mhz,
        "wh": joules / (len(at_s) - 1 - first) / 3600 if served else None,
        "attainment": attainment,
        "meets_slo": bool(in_slo and gap_quantile_s(engines.gaps, 0.99) * 1e3 <= slo.token_gap_p99_ms),
    }
