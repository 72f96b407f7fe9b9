"""Routing: weights and limits of instances from the profile, and the pick of an instance for one request.

`routed_pools` makes the table that gateways route by; `pick` is what a dispatcher does with it (the gateway and the
virtual fleet call the same function): filter (ready, room) -> score (weighted in-flight) -> pick, ties by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controller.domain.classes import ClassGroup, RequestClass
from controller.fleet.port import RoutedInstance, RoutedPool
from controller.profile.fit import ProfileFit


@dataclass(frozen=True, slots=True)
class RoutableInstance:
    """One instance that may be routed to. `accepts_new` is False while it drains or warms."""

    instance_id: str
    pool: str
    endpoint: str
    tp: int
    accepts_new: bool


def routed_pools(
    fit: ProfileFit, model: str, groups: Iterable[ClassGroup], instances: Iterable[RoutableInstance]
) -> tuple[RoutedPool, ...]:
    """The pools of a routing table, by name; instances by id. A group without instances is still listed."""
    raise NotImplementedError


def pools_for(pools: Iterable[RoutedPool], request_class: RequestClass) -> tuple[RoutedPool, ...]:
    """The pools that may serve a class, in order of preference: its own first (the most specific one), then those
    that dominate it, the smallest first. Never a pool that does not dominate it."""
    raise NotImplementedError


def pick(pool: RoutedPool, in_flight: Mapping[str, int]) -> RoutedInstance | None:
    """The instance with the least in-flight requests per weight that accepts new ones and has room; None when there
    is none."""
    raise NotImplementedError


def route(
    pools: Iterable[RoutedPool], request_class: RequestClass, in_flight: Mapping[str, int]
) -> tuple[RoutedPool, RoutedInstance] | None:
    """Pool and instance for one request now; None when it must wait."""
    raise NotImplementedError
