"""Joules of one GPU since its counter's zero, without the jumps.

The hardware counter is the truth. It starts again at zero when the driver is reloaded; such a reset is bridged. Where
a GPU has no counter, power is integrated instead and marked as such. Pure; the sampler feeds it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EnergyMeter:
    """Feeds on readings in order of time."""

    _total_j: float | None = None
    _counter_j: float | None = None
    _power_w: float | None = None
    _at_s: float = 0.0
    _has_counter: bool = False

    def update(self, counter_j: float | None, power_w: float | None, now_s: float) -> tuple[float | None, bool]:
        """Total in joules (None: unknown now) and whether part of the last step came from integrated power.

        A total taken straight from the counter goes on without a break when the agent restarts, because the counter
        does. It never falls.
        """
        integrated = self._integral_j(power_w, now_s)
        answer: tuple[float | None, bool]
        if counter_j is not None:
            answer = self._with_counter(counter_j, integrated)
        elif self._has_counter:
            # One failed read of a GPU that has a counter: unknown now, made good by the next difference.
            return None, False
        elif integrated is None:
            if power_w is None:
                return self._total_j, True
            self._total_j = 0.0 if self._total_j is None else self._total_j
            answer = self._total_j, True
        else:
            self._total_j = (self._total_j or 0.0) + integrated
            answer = self._total_j, True
        self._power_w, self._at_s = power_w, now_s
        return answer

    def _with_counter(self, counter_j: float, integrated_j: float | None) -> tuple[float, bool]:
        before_j, total_j = self._counter_j, self._total_j
        self._counter_j, self._has_counter = counter_j, True
        if total_j is None:
            self._total_j = counter_j
            return counter_j, False
        if before_j is None:  # the counter appears after a stretch of integration
            self._total_j = total_j + (integrated_j or 0.0)
            return self._total_j, True
        if counter_j >= before_j:
            self._total_j = total_j + (counter_j - before_j)
            return self._total_j, False
        # Reset in between: the counter has seen only what came after it.
        self._total_j = total_j + max(counter_j, integrated_j or 0.0)
        return self._total_j, True

    def _integral_j(self, power_w: float | None, now_s: float) -> float | None:
        """Trapezoid from the last reading to this one."""
        if power_w is None or self._power_w is None:
            return None
        return (power_w + self._power_w) / 2 * max(now_s - self._at_s, 0.0)
