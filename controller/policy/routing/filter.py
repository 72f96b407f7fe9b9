"""Filter: which pools may serve a class, which instances of a pool may take a request now, and why others may not."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from controller.domain.classes import RequestClass
from controller.fleet.port import RoutedInstance, RoutedPool


class Barred(StrEnum):
    """Why an instance could not be chosen at all."""

    NOT_READY = "not_ready"  # it drains, warms or stands by
    SUSPECT = "suspect"  # it failed a request a moment ago
    FULL = "full"  # it holds as much as it answers within the SLO
    SMALLER_POOL = "smaller_pool"  # its pool does not dominate the request's class
    NOT_NEEDED = "pool_not_needed"  # its pool would do, but one before it had room


def pools_for(pools: Iterable[RoutedPool], request_class: RequestClass) -> tuple[RoutedPool, ...]:
    """The pools that may serve a class, in order of preference: its own first (the most specific one), then those
    that dominate it, the smallest first. Never a pool that does not dominate it."""
    ranked = []
    for pool in pools:
        larger = [_size(c) for c in pool.classes if c.dominates(request_class)]
        if larger:
            own = request_class in pool.classes
            ranked.append(((not own, min(larger), len(pool.classes), pool.name), pool))
    return tuple(pool for _, pool in sorted(ranked, key=lambda item: item[0]))


def _size(request_class: RequestClass) -> int:
    return request_class.input.rank + request_class.output.rank


def barred(instance: RoutedInstance, held: int) -> Barred | None:
    """Why an instance may take nothing now; None when it may: it is ready and has head-room in the SLO."""
    if not instance.accepts_new:
        return Barred.NOT_READY
    return Barred.FULL if held >= instance.max_in_flight else None
