"""Filter: which pools may serve a class, which instances of a pool may take a request now, and why others may not."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache

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
    listed = tuple(pools)
    order = _preference(tuple((pool.name, pool.classes) for pool in listed), request_class)
    return tuple(listed[position] for position in order)


@lru_cache(maxsize=256)
def _preference(pools: tuple[tuple[str, frozenset[RequestClass]], ...], request_class: RequestClass) -> tuple[int, ...]:
    """That order as positions. It follows from names and classes alone, which hardly ever change, and is asked for at
    every look at the load."""
    ranked = []
    for position, (name, classes) in enumerate(pools):
        larger = [_size(c) for c in classes if c.dominates(request_class)]
        if larger:
            ranked.append((request_class not in classes, min(larger), len(classes), name, position))
    return tuple(position for *_, position in sorted(ranked))


def _size(request_class: RequestClass) -> int:
    return request_class.input.rank + request_class.output.rank


def barred(instance: RoutedInstance, held: int) -> Barred | None:
    """Why an instance may take nothing now; None when it may: it is ready and has head-room in the SLO."""
    if not instance.accepts_new:
        return Barred.NOT_READY
    return Barred.FULL if held >= instance.max_in_flight else None
