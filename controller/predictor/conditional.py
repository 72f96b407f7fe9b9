"""Running distributions of output buckets, learnt online from finished requests.

`ByInput` knows the input bucket only. `Conditional` refines it along what a request says of itself, from the general to
the specific: each level is shrunk towards the one before it, so that a key seen twice says little and one seen a
thousand times says all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from controller.domain.classes import Bucket, ClassScheme
from controller.predictor.port import Features, Prediction, Weights

BUCKETS = tuple(Bucket)
# Requests that the prior counts as, spread evenly over the output buckets.
PRIOR_REQUESTS = 3.0
# Counts are halved beyond this many, so that the distribution follows a drifting mix.
REMEMBERED_REQUESTS = 4_000
# Requests after which a key's own experience weighs as much as that of the level above it.
SHRINKAGE_REQUESTS = 20.0
# Keys remembered per level; the ones not seen for longest are forgotten first. Tenants are chosen by clients.
KEYS_PER_LEVEL = 4_096

Key = tuple[object, ...]


class ByInput:
    """The distribution per input bucket."""

    def __init__(self) -> None:
        self.use_scheme(ClassScheme())

    def use_scheme(self, scheme: ClassScheme) -> None:
        """Takes new cut points; experience under the old ones is worthless and forgotten."""
        self._scheme = scheme
        prior = PRIOR_REQUESTS / len(BUCKETS)
        self._seen = {bucket: [prior] * len(BUCKETS) for bucket in BUCKETS}

    def predict(self, features: Features) -> Prediction:
        short, medium, long = self._seen[self._scheme.input_bucket(features.input_tokens)]
        return Prediction((short, medium, long), "input")

    def observe(self, features: Features, output_tokens: int, said: Prediction | None = None) -> None:
        seen = self._seen[self._scheme.input_bucket(features.input_tokens)]
        _count(seen, self._scheme.output_bucket(output_tokens).rank)


class Conditional:
    """The distribution per input bucket, then per model and route, per stated limits, per tenant."""

    def __init__(self, keys_per_level: int = KEYS_PER_LEVEL) -> None:
        self._keys_per_level = keys_per_level
        self.use_scheme(ClassScheme())

    def use_scheme(self, scheme: ClassScheme) -> None:
        self._scheme = scheme
        self._root = ByInput()
        self._root.use_scheme(scheme)
        self._levels: tuple[OrderedDict[Key, list[float]], ...] = (OrderedDict(), OrderedDict(), OrderedDict())

    def predict(self, features: Features) -> Prediction:
        weights = self._root.predict(features).weights
        total = sum(weights)
        shares = [weight / total for weight in weights]
        for level, key in zip(self._levels, self._keys(features), strict=True):
            counts = level.get(key)
            if counts is None:
                break  # what is below it was not seen either
            total = sum(counts) + SHRINKAGE_REQUESTS
            shares = [(count + SHRINKAGE_REQUESTS * share) / total for count, share in zip(counts, shares, strict=True)]
        return Prediction(_weights(shares), "conditional")

    def observe(self, features: Features, output_tokens: int, said: Prediction | None = None) -> None:
        self._root.observe(features, output_tokens)
        rank = self._scheme.output_bucket(output_tokens).rank
        for level, key in zip(self._levels, self._keys(features), strict=True):
            counts = level.get(key)
            if counts is None:
                counts = level[key] = [0.0] * len(BUCKETS)
                if len(level) > self._keys_per_level:
                    level.popitem(last=False)
            level.move_to_end(key)
            _count(counts, rank)

    def _keys(self, features: Features) -> Iterator[Key]:
        """From the general to the specific. Limits count by their power of two: 1000 and 1024 are the same wish."""
        key: Key = (self._scheme.input_bucket(features.input_tokens), features.model, features.route)
        yield key
        limit = 0 if features.limit_tokens is None else features.limit_tokens.bit_length()
        key = (*key, limit, features.stops, features.json_mode)
        yield key
        yield (*key, features.tenant)


def _count(seen: list[float], rank: int) -> None:
    seen[rank] += 1
    if sum(seen) > REMEMBERED_REQUESTS:
        seen[:] = [count / 2 for count in seen]


def _weights(shares: list[float]) -> Weights:
    short, medium, long = shares
    return short, medium, long
