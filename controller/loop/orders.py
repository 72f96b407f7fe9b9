"""Orders of operators to the core: the lever is pulled between two ticks, and recorded.

Who asked and why goes into the history beside the order (`orders` table); the core acts on the order alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controller.domain.reasons import Mode

CLUSTER_SCOPE = "cluster"
POOL_PREFIX, NODE_PREFIX, ROW_PREFIX = "pool:", "node:", "row:"


@dataclass(frozen=True, slots=True)
class SetMode:
    """The mode of a scope: `cluster`, `pool:NAME` or `node:ID`. The most cautious of those that apply holds."""

    scope: str
    mode: Mode


@dataclass(frozen=True, slots=True)
class PlanNow:
    """Plan at once, at cluster level."""

    why: str


@dataclass(frozen=True, slots=True)
class SetPowerBudget:
    """Watts for all GPUs and hosts of a scope, `cluster` or `row:NAME`, until a wall time; None of `watts` lifts it."""

    scope: str
    watts: float | None
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class CorrectProfile:
    """From the controller's own measurement (loop/measured.py): by (pool, tp) what the profile's power is multiplied
    with from now on, and the kinds of instance for which it no longer holds. Both are whole, not changes."""

    factors: Mapping[tuple[str, int], float]
    drifted: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class NoteEngines:
    """Engines that run and that the profile was not measured on; empty when there are none any more."""

    foreign: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NotePower:
    """A node that an earlier controller has turned off."""

    node_id: str


Order = NotePower | SetMode | PlanNow | SetPowerBudget | CorrectProfile | NoteEngines
ORDERS: dict[str, type[Order]] = {
    kind.__name__: kind for kind in (NotePower, SetMode, PlanNow, SetPowerBudget, CorrectProfile, NoteEngines)
}

_CAUTION = {Mode.ACTIVE: 0, Mode.ADVISORY: 1, Mode.PAUSED: 2}


def most_cautious(*modes: Mode) -> Mode:
    return max(modes, key=_CAUTION.__getitem__)
