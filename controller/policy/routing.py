"""Routing: weights and limits of instances from the profile, and the pick of an instance for one request.

`routed_pools` makes the table that gateways route by; `pick` is what a dispatcher does with it (the gateway and the
virtual fleet call the same function): filter (ready, room) -> score (load per weight) -> pick, ties by id.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

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


# In-flight requests that an instance takes beyond its largest batch in SLO: the gateway holds the rest, where it can
# still go elsewhere.
IN_FLIGHT_HEADROOM = 1.25
# Of an instance that no profile knows: room for one batch of a small kernel size per GPU.
UNPROFILED_IN_FLIGHT_PER_GPU = 8


# Prompt tokens that still wait for their first answer weigh as requests in flight do where both use up the SLO alike:
# about 5,000 of them (50 us each on a TP8 instance of a 70B model) are the 250 ms of a short prompt's first token, and
# about 50 requests in the batch are the knee at which the time between tokens ends the capacity.
PROMPT_TOKENS_PER_REQUEST = 100.0


def routed_pools(
    fit: ProfileFit | None, model: str, groups: Iterable[ClassGroup], instances: Iterable[RoutableInstance]
) -> tuple[RoutedPool, ...]:
    """The pools of a routing table, by name; instances by id. A group without instances is still listed. Without a
    profile instances weigh by their GPUs."""
    members: dict[str, list[RoutableInstance]] = defaultdict(list)
    for instance in instances:
        members[instance.pool].append(instance)
    return tuple(
        RoutedPool(
            name=group.name,
            model=model,
            classes=group.classes,
            instances=tuple(_routed(fit, i) for i in sorted(members[group.name], key=lambda i: i.instance_id)),
        )
        for group in sorted(groups, key=lambda g: g.name)
    )


def _routed(fit: ProfileFit | None, instance: RoutableInstance) -> RoutedInstance:
    return RoutedInstance(
        instance_id=instance.instance_id,
        endpoint=instance.endpoint,
        tp=instance.tp,
        max_in_flight=max_in_flight(fit, instance.pool, instance.tp),
        weight=weight(fit, instance.pool, instance.tp),
        accepts_new=instance.accepts_new,
    )


def weight(fit: ProfileFit | None, pool: str, tp: int) -> float:
    """Share of a pool's load that an instance takes: its largest load in SLO. What is not profiled weighs its GPUs,
    what is never in SLO next to nothing, since a pool may consist of it alone."""
    if fit is None or not fit.clocks(pool, tp):
        return float(tp)
    return max(fit.max_rate_rps(pool, tp), 1e-3)


def max_in_flight(fit: ProfileFit | None, pool: str, tp: int) -> int:
    """Requests that an instance may hold at once: what it still decodes in time, and no less than the P99 of its batch
    at its largest load in SLO. Late first tokens end a load too, but sooner in a pool of few instances than of many,
    and a limit taken from them would throttle the large one."""
    curves = fit.clocks(pool, tp) if fit is not None else ()
    if not curves:
        return UNPROFILED_IN_FLIGHT_PER_GPU * tp
    curve = curves[-1]
    running = curve.running_p99(curve.max_rate_rps) or 0.0
    return max(1, ceil(max(running, curve.largest_batch) * IN_FLIGHT_HEADROOM))


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


def pick(
    pool: RoutedPool, in_flight: Mapping[str, int], pending_tokens: Mapping[str, int] | None = None
) -> RoutedInstance | None:
    """The instance with the least load per weight that accepts new requests and has room; None when there is none.

    `pending_tokens`: prompt tokens at each instance of requests that have had no token yet. A prompt behind others
    waits for them, so an instance that decodes many is a better place than one that has prompts to read.
    """
    best: RoutedInstance | None = None
    best_score = 0.0
    for instance in pool.instances:
        held = in_flight.get(instance.instance_id, 0)
        if not instance.accepts_new or held >= instance.max_in_flight:
            continue
        score = load_of(held, (pending_tokens or {}).get(instance.instance_id, 0)) / instance.weight
        if best is None or (score, instance.instance_id) < (best_score, best.instance_id):
            best, best_score = instance, score
    return best


def load_of(held: int, pending_tokens: int) -> float:
    """Load of an instance in requests, with the next one counted, so that of two empty ones the larger is taken."""
    return held + 1 + pending_tokens / PROMPT_TOKENS_PER_REQUEST


def route(
    pools: Iterable[RoutedPool],
    request_class: RequestClass,
    in_flight: Mapping[str, int],
    pending_tokens: Mapping[str, int] | None = None,
) -> tuple[RoutedPool, RoutedInstance] | None:
    """Pool and instance for one request now; None when it must wait."""
    for pool in pools_for(pools, request_class):
        instance = pick(pool, in_flight, pending_tokens)
        if instance is not None:
            return pool, instance
    return None
