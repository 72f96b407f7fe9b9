"""Puts a finished demonstration into virtual time: same configuration, profile, arrivals, code; another world.

Reads what the demonstration left in its folder (configuration, profile, the client's job and results) and serves the
same requests with the virtual fleet, so that the two can be compared figure by figure.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import load_config
from controller.config import ControllerConfig
from controller.domain.classes import Bucket
from controller.domain.decision import Decision
from controller.loop.accounting import EnergyBook
from controller.loop.core import Core
from controller.profile.table import Profile
from controller.store.engine import open_engine
from controller.store.repositories import list_decisions
from simulator.demo.client import Job
from simulator.demo.fleet import HOSTS
from simulator.demo.watch import summarise
from simulator.fleet import FleetTimes, VirtualFleet
from simulator.physics import Physics
from simulator.traces import Request

# From a start effect to READY in the demonstration: the emulated 3 s, the process before them, health polls and the
# warm-up request after them. Measured there; a real fleet's is measured by its agents in the same way.
START_S = 4.0
# The virtual load begins when the layout stands, as the demonstration waits for it.
LAID_OUT_S = 8.0
# The median of fewer requests hangs on which of them happened to meet: some milliseconds decide that.
LEAST_REQUESTS = 25


@dataclass(frozen=True)
class World:
    """The figures of one fleet in one world, of the measured window."""

    energy_j: float
    mean_sm_mhz: float
    ttft_p50_ms: dict[Bucket, float]
    tbt_p50_ms: float
    in_slo: float
    first_layout: dict[str, int]
    decisions: Counter[str]


def virtual(folder: Path, warm_up_s: float) -> World:
    """Serves the demonstration's load in virtual time; `folder` is that of one of its fleets."""
    config = load_config(ControllerConfig, "controller", folder / "controller.toml", environment={})
    profile = Profile.from_json(config.profile.read_text(encoding="utf-8"))
    arrivals = Job.read(folder / "load.json").arrivals
    core = Core(config.loop_settings(), profile, term=1, expected_nodes=HOSTS)
    fleet = VirtualFleet(core, Physics.load(), HOSTS, FleetTimes(start_s=START_S, telemetry_s=0.5))
    result = fleet.run([Request(*arrival) for arrival in arrivals], start_s=LAID_OUT_S)
    book = EnergyBook()
    entries = [entry for observation in result.observations for entry in book.add(observation)]
    open_s, close_s = LAID_OUT_S + warm_up_s, LAID_OUT_S + arrivals[-1][0]
    energy = summarise(entries, open_s, close_s, HOSTS * 8)
    served = [request for request in result.requests if request.arrival_s >= open_s]
    assert all(request.finished_s is not None for request in served)
    assert energy.mean_sm_mhz is not None
    latencies = [(request.bucket, 1e3 * (request.ttft_s or 0.0), 1e3 * (request.tbt_s or 0.0)) for request in served]
    return World(
        energy_j=energy.total_j,
        mean_sm_mhz=energy.mean_sm_mhz,
        first_layout=_first_layout(result.decisions),
        decisions=Counter(decision.level.value for decision in result.decisions),
        **_latencies(latencies, profile),
    )


def real(folder: Path, figures: dict[str, object], warm_up_s: float) -> World:
    """What the demonstration itself measured; `figures` is the fleet's part of its JSON."""
    config = load_config(ControllerConfig, "controller", folder / "controller.toml", environment={})
    profile = Profile.from_json(config.profile.read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
    latencies = [
        (
            profile.scheme.input_bucket(line["input_tokens"]),
            1e3 * line["ttft_s"],
            1e3 * sum(line["gaps_s"]) / max(1, len(line["gaps_s"])),
        )
        for line in lines
        if line["arrival_s"] >= warm_up_s and line["status"] == "served"
    ]
    engine = open_engine(config.database_url)
    decisions = [stored.decision for stored in reversed(list_decisions(engine, limit=10_000))]
    engine.dispose()
    energy = figures["energy"]
    assert isinstance(energy, dict)
    return World(
        energy_j=energy["total_j"],
        mean_sm_mhz=energy["mean_sm_mhz"],
        first_layout=_first_layout(decisions),
        decisions=Counter(decision.level.value for decision in decisions),
        **_latencies(latencies, profile),
    )


def _first_layout(decisions: list[Decision]) -> dict[str, int]:
    plan = next(decision.outcome["plan"] for decision in decisions if "plan" in decision.outcome)
    return dict(Counter(f"{item['pool']}/tp{len(item['gpu_uuids'])}" for item in plan["instances"]))


def _latencies(rows: list[tuple[Bucket, float, float]], profile: Profile) -> dict[str, object]:
    by_bucket = {bucket: [ttft for b, ttft, _ in rows if b == bucket] for bucket in Bucket}
    return {
        "ttft_p50_ms": {
            b: float(np.median(values)) for b, values in by_bucket.items() if len(values) >= LEAST_REQUESTS
        },
        "tbt_p50_ms": float(np.median([tbt for _, _, tbt in rows])),
        "in_slo": float(np.mean([profile.slo.met(bucket, ttft, tbt) for bucket, ttft, tbt in rows])),
    }
