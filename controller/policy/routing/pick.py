"""Pick: the instance for one request, and what decided it. The gateway and the virtual fleet call the same function.

filter (filter.py: ready, room) -> score (score.py) -> pick (the least, ties by id). `explain` tells for a sample of
choices why every other instance lost; it is made with the same scores.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from heapq import nsmallest

from controller.domain.classes import RequestClass
from controller.fleet.port import RoutedInstance, RoutedPool
from controller.policy.routing.filter import Barred, barred, pools_for
from controller.policy.routing.load import load_of
from controller.policy.routing.score import Seen, Term, Weights, scored

BY_LOAD = Weights()
# Of the instances that were not chosen, the most that an explanation names.
MOST_ALTERNATIVES = 12


class Decided(StrEnum):
    """What a choice was made by. Metric label."""

    ONLY_ONE = "only_one"  # of its own pool no other had room
    ON_CALL = "on_call"  # those that serve had their hands full: one that stands by for bursts takes it
    LOAD = "load"
    ENERGY = "energy"
    KV = "kv_use"
    PREFIX = "prefix"
    SPILLED = "spilled"  # its own pool had no room: one that dominates it serves
    OVERFLOW = "overflow"  # all were full: sent on beyond the limits, to wait inside an engine (Envoy, Route)


@dataclass(frozen=True, slots=True)
class Alternative:
    """An instance that was not chosen. `lost_by`: what bars it (filter.py), or the term that it is worst by."""

    instance_id: str
    pool: str
    lost_by: str
    in_flight: int
    pending_tokens: int
    score: float | None = None  # None: it was not scored


def pick(
    pool: RoutedPool, in_flight: Mapping[str, int], pending_tokens: Mapping[str, int] | None = None
) -> RoutedInstance | None:
    """The instance with the least load per weight that accepts new requests and has room; None when there is none.

    `pending_tokens`: prompt tokens at each instance of requests that have had no token yet. A prompt behind others
    waits for them, so an instance that decodes many is a better place than one that has prompts to read.
    """
    found = choose(pool, Seen(in_flight, pending_tokens or {}))
    return None if found is None else found[0]


def choose(pool: RoutedPool, seen: Seen, weights: Weights = BY_LOAD) -> tuple[RoutedInstance, Decided] | None:
    """The instance of a pool for one request and what decided it; None when none has room."""
    if not weights.load_only:
        return _by_all_terms(pool, seen, weights)
    # The same as below with one term, for the path that every request takes.
    in_flight, pending_tokens = seen.in_flight, seen.pending_tokens
    best: RoutedInstance | None = None
    best_score, candidates = 0.0, 0
    for instance in pool.instances:
        name = instance.instance_id
        held = in_flight.get(name, 0)
        if not instance.accepts_new or held >= instance.max_in_flight:
            continue
        candidates += 1
        load = load_of(held, pending_tokens.get(name, 0)) + instance.standby_load + instance.rank_load
        score = load / instance.weight
        if best is None or score < best_score or (score == best_score and name < best.instance_id):
            best, best_score = instance, score
    if best is None:
        return None
    return best, _by_load(best, candidates)


def _by_load(best: RoutedInstance, candidates: int) -> Decided:
    if candidates == 1:
        return Decided.ONLY_ONE
    return Decided.ON_CALL if best.standby_load else Decided.LOAD


def runners_up(pool: RoutedPool, seen: Seen, most: int, without: str = "") -> list[RoutedInstance]:
    """The `most` least loaded instances that may take a request now, the best first; `without`: not this one."""
    free = [
        (seen.load_per_weight(each), each.instance_id, each)
        for each in pool.instances
        if each.instance_id != without and barred(each, seen.in_flight.get(each.instance_id, 0)) is None
    ]
    return [each for _, _, each in nsmallest(most, free)]


def _by_all_terms(pool: RoutedPool, seen: Seen, weights: Weights) -> tuple[RoutedInstance, Decided] | None:
    ranked = _ranked(pool, seen, weights)
    if len(ranked) < 2:
        return (ranked[0][0], Decided.ONLY_ONE) if ranked else None
    (best, terms), (_, second) = ranked[:2]
    return best, Decided.ON_CALL if best.standby_load else Decided(_widest(terms, second).value)


Ranked = list[tuple[RoutedInstance, Mapping[Term, float]]]


def _ranked(pool: RoutedPool, seen: Seen, weights: Weights) -> Ranked:
    """Those that may take the request, the best first. With more than load to weigh, instances that are nearly full
    or on standby come after all others: what saves energy must leave head-room for the next request."""
    free = [each for each in pool.instances if barred(each, seen.in_flight.get(each.instance_id, 0)) is None]
    if not free:
        return []
    roomy = free if weights.load_only else [each for each in free if _roomy(each, seen, weights)]
    first = _sorted(roomy, seen, weights)
    if len(roomy) == len(free):
        return first
    return first + _sorted([each for each in free if each not in roomy], seen, BY_LOAD)


def _roomy(instance: RoutedInstance, seen: Seen, weights: Weights) -> bool:
    """False on standby, and where the next request takes more than a share of the limit, unread prompts weighed."""
    name = instance.instance_id
    load = load_of(seen.in_flight.get(name, 0), seen.pending_tokens.get(name, 0))
    return not instance.standby_load and load <= weights.fill * instance.max_in_flight


def _sorted(candidates: Sequence[RoutedInstance], seen: Seen, weights: Weights) -> Ranked:
    if not candidates:
        return []
    rows = zip(candidates, scored(candidates, seen, weights), strict=True)
    return sorted(rows, key=lambda row: (sum(row[1].values()), row[0].instance_id))


def _widest(better: Mapping[Term, float], worse: Mapping[Term, float]) -> Term:
    """The term by which one scores better than the other the most."""
    return max(better, key=lambda term: worse.get(term, 0.0) - better[term])


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


def explain(
    pools: Sequence[RoutedPool],
    request_class: RequestClass,
    chosen: str,
    seen: Seen,
    weights: Weights = BY_LOAD,
    suspects: Collection[str] = (),
) -> tuple[Alternative, ...]:
    """Why the other instances were not chosen, those first that came nearest. `pools` of one model, as published;
    `seen` as it was just before the choice."""
    preferred = pools_for(pools, request_class)
    served = next((n for n, pool in enumerate(preferred) if any(i.instance_id == chosen for i in pool.instances)), 0)
    found: list[Alternative] = []
    for number, pool in enumerate(preferred):
        healthy = RoutedPool(
            pool.name,
            pool.model,
            pool.classes,
            tuple(each for each in pool.instances if each.instance_id not in suspects),
        )
        ranked = _ranked(healthy, seen, weights)
        winner = next((terms for each, terms in ranked if each.instance_id == chosen), {})
        for instance, terms in ranked:
            if instance.instance_id != chosen:
                lost_by = str(Barred.NOT_NEEDED if number > served else _lost(winner, terms))
                found.append(_alternative(instance, pool, lost_by, seen, sum(terms.values())))
        names = {each.instance_id for each, _ in ranked} | {chosen}
        for instance in pool.instances:
            if instance.instance_id not in names:
                held = seen.in_flight.get(instance.instance_id, 0)
                why = Barred.SUSPECT if instance.instance_id in suspects else barred(instance, held)
                found.append(_alternative(instance, pool, str(why), seen))
    smaller = [pool for pool in pools if pool not in preferred]
    found += [_alternative(each, pool, str(Barred.SMALLER_POOL), seen) for pool in smaller for each in pool.instances]
    return tuple(found[:MOST_ALTERNATIVES])


def _lost(winner: Mapping[Term, float], terms: Mapping[Term, float]) -> Term:
    return _widest(winner, terms) if winner else Term.LOAD


def _alternative(
    instance: RoutedInstance, pool: RoutedPool, lost_by: str, seen: Seen, score: float | None = None
) -> Alternative:
    name = instance.instance_id
    return Alternative(name, pool.name, lost_by, seen.in_flight.get(name, 0), seen.pending_tokens.get(name, 0), score)
