"""When a node's sample was taken, on the controller's own clock: one that came late must not look fresh.

Samples lie in sockets while a network stalls or the controller is busy. Each carries the agent's wall clock, which may
go wrong by anything: so only how much later a sample comes than the promptest one of its stream is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

# What two clocks may drift apart, and so what is forgotten of the promptest sample: seconds per second.
_DRIFT = 0.001


@dataclass(slots=True)
class Arrivals:
    """Of one stream. None counts as older than `most_late_s`: where samples come, however late, there is a node."""

    most_late_s: float
    _promptest_s: float = inf  # of the time it came less the time that it says
    _said_s: float = -inf
    _came_s: float = -inf

    def taken_s(self, came_s: float, said_s: float) -> float:
        """`came_s` is monotonic, `said_s` the agent's wall clock."""
        if said_s < self._said_s:  # it was set back: what is known of it holds no more
            self._promptest_s = inf
        took_s = came_s - said_s
        self._promptest_s = min(took_s, self._promptest_s + _DRIFT * (came_s - self._came_s))
        self._said_s, self._came_s = said_s, came_s
        return came_s - min(took_s - self._promptest_s, self.most_late_s)
