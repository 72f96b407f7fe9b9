"""Orders of operators to the core: the lever is pulled between two ticks, and recorded.

Who asked and why goes into the history beside the order (`orders` table); the core acts on the order alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from controller.domain.reasons import Mode

CLUSTER_SCOPE = "cluster"
POOL_PREFIX, NODE_PREFIX = "pool:", "node:"


@dataclass(frozen=True, slots=True)
class SetMode:
    """The mode of a scope: `cluster`, `pool:NAME` or `node:ID`. The most cautious of those that apply holds."""

    scope: str
    mode: Mode


@dataclass(frozen=True, slots=True)
class PlanNow:
    """Plan at once, at cluster level."""

    why: str


Order = SetMode | PlanNow
ORDERS: dict[str, type[Order]] = {kind.__name__: kind for kind in (SetMode, PlanNow)}

_CAUTION = {Mode.ACTIVE: 0, Mode.ADVISORY: 1, Mode.PAUSED: 2}


def most_cautious(*modes: Mode) -> Mode:
    return max(modes, key=_CAUTION.__getitem__)
