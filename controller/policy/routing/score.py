"""Score: how good a place each instance that may take a request is. Smaller is better.

Four terms between 0 and 1, compared within a pool only: load per weight (requests in flight, prompts unread), marginal
energy under the profile, use of the KV cache, and whether the instance has just read the same beginning of a prompt.
`Weights` says what each counts; a term that is not known of every candidate counts for none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from controller.fleet.port import RoutedInstance
from controller.policy.routing.load import load_of


class Term(StrEnum):
    """What a choice was decided by. Also why the others lost."""

    LOAD = "load"
    ENERGY = "energy"
    KV = "kv_use"
    PREFIX = "prefix"


@dataclass(frozen=True, slots=True)
class Weights:
    """What each term counts. By load alone is the default: see docs/gateway.md for what the others cost and bring.
    `fill`: up to this share of its limit an instance may be preferred for its energy, KV use or prefix."""

    load: float = 1.0
    energy: float = 0.0
    kv_use: float = 0.0
    prefix: float = 0.0
    fill: float = 0.8

    @property
    def load_only(self) -> bool:
        return not (self.energy or self.kv_use or self.prefix)


@dataclass(frozen=True, slots=True)
class Seen:
    """The instances at the moment of a choice, by id. `pending_tokens`: prompt tokens of requests that have had no
    token yet; a prompt behind others waits for them. `kv_use`: shares, None unknown. `prefix_at`: the instance that
    last read a prompt with this request's beginning."""

    in_flight: Mapping[str, int] = field(default_factory=dict)
    pending_tokens: Mapping[str, int] = field(default_factory=dict)
    kv_use: Mapping[str, float] = field(default_factory=dict)
    prefix_at: str = ""

    def load_per_weight(self, instance: RoutedInstance) -> float:
        name = instance.instance_id
        load = load_of(self.in_flight.get(name, 0), self.pending_tokens.get(name, 0))
        return (load + instance.standby_load + instance.rank_load) / instance.weight


def marginal_j(instance: RoutedInstance, held: int) -> float | None:
    """Joules that one request more costs at an instance that holds so many; None where no profile tells."""
    known = instance.marginal_j
    if not known:
        return None
    place = min(1.0, held / instance.max_in_flight) * (len(known) - 1)
    low = min(int(place), len(known) - 2)
    return known[low] + (known[low + 1] - known[low]) * (place - low)


def scored(candidates: Sequence[RoutedInstance], seen: Seen, weights: Weights) -> list[dict[Term, float]]:
    """Each candidate's weighted terms; their sum is its score."""
    terms: list[dict[Term, float]] = [{} for _ in candidates]
    _add(terms, Term.LOAD, weights.load, [seen.load_per_weight(each) for each in candidates])
    if weights.energy:
        held = [seen.in_flight.get(each.instance_id, 0) for each in candidates]
        _add(
            terms, Term.ENERGY, weights.energy, [marginal_j(each, n) for each, n in zip(candidates, held, strict=True)]
        )
    if weights.kv_use:
        kv = [seen.kv_use.get(each.instance_id) for each in candidates]
        _add(terms, Term.KV, weights.kv_use, kv, largest=1.0)
    if weights.prefix:
        away = [float(each.instance_id != seen.prefix_at) for each in candidates]
        _add(terms, Term.PREFIX, weights.prefix, away, largest=1.0)
    return terms


def _add(
    terms: list[dict[Term, float]], term: Term, weight: float, values: Sequence[float | None], largest: float = 0.0
) -> None:
    """`largest`: what counts as 1; 0: the largest of the values."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return
    unit = largest or max(known)
    for found, value in zip(terms, known, strict=True):
        found[term] = weight * value / unit if unit > 0 else 0.0
