"""What the core learns for its forecasts beyond the last minutes: the week's shape, and how far forecasts were off.

Fed with the windows of the load book; both are part of the state, so a replay finds them as they were. A restarted
controller takes the week up from the newest snapshot in the history (`week_of` in controller/loop/snapshot.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controller.domain.classes import RequestClass
from controller.loop.load import LoadWindow
from controller.policy.template import SLOT_S, SLOTS, SlotMean, known_rates, learn, slot_of

if TYPE_CHECKING:
    from controller.loop.state import Instant, State

# A longer window says how much came, not when.
LONGEST_WINDOW_S = 300.0
# Forecasts whose errors are remembered, each as much as the one before it: a day of five minutes.
REMEMBERED = 288


@dataclass(slots=True)
class Counted:
    """What one gateway has reported of the half hour that is under way."""

    seconds: float = 0.0
    arrived: dict[RequestClass, int] = field(default_factory=dict)


@dataclass(slots=True)
class WeekBook:
    """The template by slot of the week, and the counts of the slot that is under way."""

    slots: dict[int, SlotMean] = field(default_factory=dict)
    open_slot: int | None = None  # since the epoch
    counted: dict[str, Counted] = field(default_factory=dict)  # by gateway

    def add(self, now: Instant, window: LoadWindow) -> None:
        """Takes a window that the load book has closed. It belongs where its middle lies."""
        if window.seconds > LONGEST_WINDOW_S:
            return
        slot = slot_of(now.wall_s - (now.monotonic_s - window.end_s) - window.seconds / 2)
        if self.open_slot is None or slot != self.open_slot:
            if self.open_slot is not None and slot == self.open_slot - 1:
                return  # the last of the slot that is closed already
            self._close()
            self.open_slot = slot
        counted = self.counted.setdefault(window.gateway_id, Counted())
        counted.seconds += window.seconds
        for request_class, counts in window.classes.items():
            if counts.arrived:
                counted.arrived[request_class] = counted.arrived.get(request_class, 0) + counts.arrived

    def _close(self) -> None:
        if self.open_slot is not None:
            rates = known_rates(((each.seconds, each.arrived) for each in self.counted.values()), SLOT_S)
            if rates is not None:
                slot = self.open_slot % SLOTS
                self.slots[slot] = learn(self.slots.get(slot), rates)
        self.counted = {}


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What was forecast of a pool's classes for a span, in requests/s; `plain` is without the shape of the week."""

    mean_rps: float
    quantile_rps: float
    plain_mean_rps: float
    plain_quantile_rps: float
    from_s: float  # monotonic
    until_s: float


@dataclass(frozen=True, slots=True)
class Judged:
    """A forecast whose span has ended, and what came in it."""

    foreseen: Foreseen
    came_rps: float


@dataclass(frozen=True, slots=True)
class ForecastError:
    """Means over the forecasts that were held against what came, the newer ones weighing more."""

    count: int
    off_rps: float  # distance from the mean, either way
    came_rps: float
    above: float  # share of spans with more load than the quantile
    last: Judged | None = None  # the newest of them

    @property
    def ratio(self) -> float | None:
        """Off by this share of the load; None without any load."""
        return self.off_rps / self.came_rps if self.came_rps > 0 else None


def came_rps(state: State, classes: frozenset[RequestClass], now_s: float, foreseen: Foreseen) -> float | None:
    """Requests/s of the classes in the span that was foreseen; None where too little of it was reported."""
    span_s = foreseen.until_s - foreseen.from_s
    counted = []
    for windows in state.load.by_gateway(now_s, now_s - foreseen.from_s).values():
        mine = [window for window in windows if window.end_s <= foreseen.until_s and window.seconds <= span_s]
        arrived = {c: sum(w.classes[c].arrived for w in mine if c in w.classes) for c in sorted(classes)}
        counted.append((sum(window.seconds for window in mine), arrived))
    rates = known_rates(counted, span_s)
    return None if rates is None else sum(rates.values())


def judged(past: ForecastError | None, foreseen: Foreseen, came: float) -> ForecastError:
    """The error with one more forecast in it."""
    off, above, last = abs(came - foreseen.mean_rps), float(came > foreseen.quantile_rps), Judged(foreseen, came)
    if past is None:
        return ForecastError(1, off, came, above, last)
    share = max(1 / REMEMBERED, 1 / (past.count + 1))
    off_rps, came_rps, above_share = (
        (1 - share) * mean + share * new
        for mean, new in ((past.off_rps, off), (past.came_rps, came), (past.above, above))
    )
    return ForecastError(past.count + 1, off_rps, came_rps, above_share, last)


def hold_against(state: State, now_s: float) -> None:
    """Holds every forecast whose span has ended against what came. A gap in the reports judges nothing."""
    for pool, foreseen in list(state.foreseen.items()):
        plan = state.pools.get(pool)
        if plan is not None and now_s < foreseen.until_s:
            continue
        del state.foreseen[pool]
        if plan is None:
            continue
        came = came_rps(state, plan.group.classes, now_s, foreseen)
        if came is not None:
            state.forecast_errors[pool] = judged(state.forecast_errors.get(pool), foreseen, came)
