"""What happens to instances that no controller asked for: crashes, and sleep that an operator puts them to.

An incident hits whichever instance holds a GPU at that instant, and nothing where none does, so that the same list of
incidents hits any layout. Both fleets (`simulator/fleet.py`, `simulator/fast/fleet.py`) take them.

    crash   the process dies: answers under way are lost, requests without a first token wait again at the gateway; its
            GPUs are free once that is proven (`FleetTimes.stop_s`), and the instance has failed
    sleep   it drains; empty, its weights are copied to host memory (`sleep_s`), and it holds its GPUs asleep
    wake    an instance that sleeps copies its weights back (`wake_s`), and is ready
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

SECONDS_PER_DAY = 86_400.0


class IncidentKind(StrEnum):
    CRASH = "crash"
    SLEEP = "sleep"
    WAKE = "wake"


@dataclass(frozen=True, slots=True)
class Incident:
    """`node` and `gpu` count from 0."""

    at_s: float
    kind: IncidentKind
    node: int
    gpu: int


def crashes(per_day: float, nodes: int, gpus_per_node: int, until_s: float, seed: int) -> tuple[Incident, ...]:
    """Crashes at random instants and GPUs, so many a day on average where every GPU is held: a GPU that is parked has
    nothing that could crash."""
    rng = np.random.default_rng([seed, 2])
    count = int(rng.poisson(per_day * until_s / SECONDS_PER_DAY))
    at_s = np.sort(rng.uniform(0.0, until_s, count)).tolist()
    nodes_hit, gpus_hit = rng.integers(nodes, size=count).tolist(), rng.integers(gpus_per_node, size=count).tolist()
    return tuple(
        Incident(t, IncidentKind.CRASH, node, gpu) for t, node, gpu in zip(at_s, nodes_hit, gpus_hit, strict=True)
    )
