"""Time, injected.

Two readings, never mixed: `wall_s` (UTC, for people and the database; it may step) and `monotonic_s`
(for every duration, lease and deadline). Production uses `SystemClock`, the simulator and tests `VirtualClock`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Source of time."""

    def wall_s(self) -> float:
        """Seconds since the Unix epoch, UTC."""
        ...

    def monotonic_s(self) -> float:
        """Seconds on a clock that never steps; its zero has no meaning."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def wall_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()


@dataclass(slots=True)
class VirtualClock:
    """A clock that stands still until `advance_to` or `advance` moves it."""

    now_s: float = 0.0
    wall_at_zero_s: float = 1_700_000_000.0

    def wall_s(self) -> float:
        return self.wall_at_zero_s + self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Moves forward; raises ValueError for a negative step."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {-seconds} s")
        self.now_s += seconds

    def advance_to(self, monotonic_s: float) -> None:
        """Moves forward to an instant; an instant already passed is no move."""
        self.now_s = max(self.now_s, monotonic_s)


def utc(wall_s: float) -> datetime:
    """The aware UTC datetime of an epoch second."""
    return datetime.fromtimestamp(wall_s, tz=UTC)
