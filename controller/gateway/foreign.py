"""Work on the instances that this gateway did not send: of another gateway, or of its own earlier life.

An engine's own count of requests is the truth about its load, but it is seconds old, while ours is of this moment. So
only what exceeds the most that we had there lately is somebody else's: a burst of our own that has just ended is never
taken for foreign work, and work that outlasted a restart is.
"""

from __future__ import annotations

from collections.abc import Mapping


class ForeignLoad:
    """Two windows of our own peaks per instance: the one that the engines' figures fall into, and the one before it."""

    def __init__(self) -> None:
        self._now: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def ours(self, in_flight: Mapping[str, int]) -> None:
        """What we have in flight; to be called several times between two looks at the engines."""
        for name, count in in_flight.items():
            self._now[name] = max(count, self._now.get(name, 0))

    def seen(self, at_engines: Mapping[str, float]) -> dict[str, int]:
        """Requests at each engine, running or waiting, as it counts them; returns the foreign ones among them."""
        foreign = {
            name: excess
            for name, count in at_engines.items()
            if (excess := round(count) - max(self._now.get(name, 0), self._before.get(name, 0))) > 0
        }
        self._before, self._now = self._now, {}
        return foreign
