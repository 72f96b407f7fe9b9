"""Joules per request: an instance's power, shared at every moment by the requests that run on it.

One running integral per instance, of power divided by requests in flight: a request's share is what it grew by between
the request's start and its end. That costs the same for two requests as for two thousand, and the shares add up to what
the instance drew while it had work (idle power is nobody's). Power comes from the controller now and then; while it is
not known, or too old, energy is unknown and not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Power older than this is not believed.
FRESH_S = 30.0


@dataclass(slots=True)
class _Instance:
    power_w: float | None = None
    told_s: float = 0.0
    running: int = 0
    at_s: float = 0.0
    share_j: float = 0.0  # the integral
    unknown_s: float = -1.0  # when power was last unknown while something ran


class EnergyShares:
    """Time is passed in, on one monotonic clock."""

    def __init__(self) -> None:
        self._instances: dict[str, _Instance] = {}

    def powers(self, power_w: Mapping[str, float], now_s: float) -> None:
        """What instances draw now; those that are missing are not known to draw anything."""
        for name in self._instances.keys() | power_w.keys():
            instance = self._advance(name, now_s)
            if name in power_w:
                instance.power_w, instance.told_s = power_w[name], now_s
            elif not instance.running:
                del self._instances[name]  # gone from the fleet

    def begin(self, instance_id: str, now_s: float) -> float:
        """A request starts on an instance; its mark is for `end`."""
        instance = self._advance(instance_id, now_s)
        instance.running += 1
        return instance.share_j

    def end(self, instance_id: str, mark_j: float, began_s: float, now_s: float) -> float | None:
        """Joules of a request that ends; None when power was not known all the while."""
        instance = self._advance(instance_id, now_s)
        instance.running -= 1
        return None if instance.unknown_s >= began_s else instance.share_j - mark_j

    def _advance(self, name: str, now_s: float) -> _Instance:
        instance = self._instances.setdefault(name, _Instance(at_s=now_s))
        if instance.running and now_s > instance.at_s:
            if instance.power_w is None or now_s - instance.told_s > FRESH_S:
                instance.unknown_s = now_s
            else:
                instance.share_j += instance.power_w * (now_s - instance.at_s) / instance.running
        instance.at_s = now_s
        return instance
