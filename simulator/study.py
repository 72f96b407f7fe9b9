"""A study's options as one value, checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from common.errors import UserError
from simulator.cuts import PARTITIONS_BY_POOLS
from simulator.logs import LogColumns
from simulator.physics import Physics
from simulator.prices import Steps
from simulator.references import REACTIVE_TARGET
from simulator.systems import SYSTEMS

BASELINE = "singlepool"
REFERENCES: dict[str, tuple[str, str]] = {
    "best_clock": ("Best clock", "SinglePool at the one clock that costs least in SLO, in hindsight"),
    "reactive": (
        "Reactive",
        f"one pool of TP8 at full clock, scaled every 15 s to {REACTIVE_TARGET:.0%} of the requests in flight that an"
        " instance holds at the largest load",
    ),
    "best_static": ("Best static", "the cheapest pools, TP, clock and instances that meet the SLO, in hindsight"),
}
ALL_SYSTEMS: tuple[str, ...] = (*SYSTEMS, *REFERENCES)
# World average of the grid and an industrial price, as round figures: give your own.
CARBON_G_PER_KWH = 450.0
PRICE_PER_KWH = 0.12
MOST_MISMATCH = 0.5
MOST_CRASHES = 100_000


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared. `systems` may be any of ALL_SYSTEMS; SinglePool runs in any case. `physics` as in
    `Physics.from_text`; `columns` says how to read a log that is no Azure trace; `pools` holds the systems with pools
    to that many; `predictor_accuracy` gives routing a predictor that knows the output bucket of so many requests;
    `ray` is the address of a cluster."""

    source: str
    nodes: int = 12
    u: float = 0.6
    systems: tuple[str, ...] = ALL_SYSTEMS
    bound: bool = True
    seed: int = 1
    seeds: int = 3
    physics: str = "base"
    mismatch: float = 0.0
    start_s: float = 180.0
    pools: int | None = None
    predictor_accuracy: float | None = None
    crashes_per_day: float = 0.0
    columns: LogColumns | None = None
    energy_table: bool = True
    cache: Path = Path(".cache")
    workers: int = 2
    ray: str | None = None
    carbon: Steps = field(default_factory=lambda: Steps((0.0,), (CARBON_G_PER_KWH,)))
    price: Steps = field(default_factory=lambda: Steps((0.0,), (PRICE_PER_KWH,)))
    command: str = ""

    def __post_init__(self) -> None:
        unknown = [name for name in self.systems if name not in ALL_SYSTEMS]
        if unknown:
            raise UserError(f"There is no system {unknown[0]!r}.", f"Use all, or some of {', '.join(ALL_SYSTEMS)}.")
        if self.nodes < 1 or self.seeds < 1 or self.workers < 1 or not self.u > 0 or not self.start_s >= 0:
            raise UserError("Nodes, seeds, workers and u must be positive, no start negative.", "Correct the options.")
        if abs(self.mismatch) > MOST_MISMATCH:
            raise UserError(
                f"A mismatch of {self.mismatch:g} is beyond reason.", f"Use at most {MOST_MISMATCH:g}, either way."
            )
        if not 0 <= self.crashes_per_day <= MOST_CRASHES:
            raise UserError(f"{self.crashes_per_day:g} crashes a day are beyond reason.", f"Use 0 to {MOST_CRASHES:,}.")
        if self.predictor_accuracy is not None and not 0 <= self.predictor_accuracy <= 1:
            raise UserError("The accuracy of a predictor is a share.", "Use a number from 0 to 1, or none.")
        if self.pools is not None and self.pools not in PARTITIONS_BY_POOLS:
            known = ", ".join(str(number) for number in PARTITIONS_BY_POOLS)
            raise UserError(
                f"There is no way to cut the load into {self.pools} pools.", f"Use one of {known}, or auto."
            )

    @property
    def world(self) -> Physics:
        """The physics that the fleet runs on; the profile is measured on the same without the mismatch."""
        return world(self.physics, self.mismatch)


@cache
def world(physics: str, mismatch: float) -> Physics:
    """Physics by name, off by a share from what its profile is measured on."""
    return Physics.from_text(physics).off_by(mismatch)
