"""Predictors that know the answer, for studies: what would perfect prediction save, and what does each error cost?"""

from __future__ import annotations

from zlib import crc32

from controller.domain.classes import Bucket, ClassScheme
from controller.predictor.port import Features, Prediction, Weights

BUCKETS = len(Bucket)


class Oracle:
    """Right in the stated share of requests (`accuracy`), sure of itself always.

    A wrong answer is one of the other two buckets with equal chance. Which requests it gets wrong depends on `seed` and
    the requests' order only, so that two systems under comparison are told the same.
    """

    def __init__(self, accuracy: float = 1.0, seed: int = 0) -> None:
        if not 0 <= accuracy <= 1:
            raise ValueError("the accuracy must lie between 0 and 1")
        self._accuracy = accuracy
        self._seed = seed
        self._asked = 0
        self._scheme = ClassScheme()

    def use_scheme(self, scheme: ClassScheme) -> None:
        self._scheme = scheme

    def predict(self, features: Features) -> Prediction:
        """ValueError for a request of which the truth is not known: there is no oracle outside of studies."""
        if features.truth_tokens is None:
            raise ValueError("an oracle needs the true output length")
        rank = self._scheme.output_bucket(features.truth_tokens).rank
        self._asked += 1
        draw = crc32(f"{self._seed}/{self._asked}".encode()) / 2**32
        if draw >= self._accuracy:
            # The draw's place within the wrong share says which of the others.
            second_half = (draw - self._accuracy) / (1 - self._accuracy) >= 0.5
            rank = (rank + 1 + second_half) % BUCKETS
        return Prediction(_certain(rank), "oracle")

    def observe(self, features: Features, output_tokens: int, said: Prediction | None = None) -> None:
        """Nothing to learn."""


def _certain(rank: int) -> Weights:
    short, medium, long = (float(rank == other) for other in range(BUCKETS))
    return short, medium, long
