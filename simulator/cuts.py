"""How the load may be cut into pools when their number is given: for the sweep over it."""

from __future__ import annotations

from dataclasses import replace

from controller.calibrate.sweep import SweepPlan
from controller.domain.classes import DEFAULT_GROUPS, ClassGroup, by_input
from simulator.systems import System

_THIRDS: tuple[ClassGroup, ...] = (by_input("input-S", "S"), by_input("input-M", "M"))

# Pools are cut by input length, which is known at arrival (docs/architecture.md).
PARTITIONS_BY_POOLS: dict[int, tuple[str, ...]] = {
    1: ("all",),
    2: ("short", "long"),
    3: ("input-S", "input-M", "long"),
}


def plan_for(pools: int | None) -> SweepPlan | None:
    """A profile that has these pools; three need groups that are not measured otherwise. None: the default."""
    return SweepPlan(groups=(*DEFAULT_GROUPS, *_THIRDS)) if pools == 3 else None


def with_pools(system: System, pools: int) -> System:
    """The system held to that many pools; one that has no pools stays as it is."""
    return replace(system, partitions=(PARTITIONS_BY_POOLS[pools],)) if system.knobs.pools else system
