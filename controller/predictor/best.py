"""Of two predictors the one that has lately been right more often: a trained model ages, experience does not.

Both are scored on every finished request by the probability they gave to what came true (logarithmic score, which no
predictor can better by pretending), so the first one must go on earning its place.
"""

from __future__ import annotations

from math import log

from controller.domain.classes import ClassScheme
from controller.predictor.port import Features, Prediction, Predictor

# Weight of the newest request in the running scores: about the last five hundred count.
NEWEST = 1 / 500
# No single surprise may cost more than this.
LEAST_PROBABILITY = 0.01


class Best:
    """`first` is preferred until `second` has scored better. `scores`: mean logarithmic losses, smaller is better."""

    def __init__(self, first: Predictor, second: Predictor) -> None:
        self._both = (first, second)
        self.scores = [0.0, 0.0]
        self.use_scheme(ClassScheme())

    def use_scheme(self, scheme: ClassScheme) -> None:
        self._scheme = scheme
        self.scores = [0.0, 0.0]
        for predictor in self._both:
            predictor.use_scheme(scheme)

    def predict(self, features: Features) -> Prediction:
        # Without text there is nothing to read for a classifier of text.
        second = self.scores[1] < self.scores[0] or not features.text
        found = self._both[second].predict(features)
        return Prediction(found.weights, found.source, int(second))

    def observe(self, features: Features, output_tokens: int, said: Prediction | None = None) -> None:
        rank = self._scheme.output_bucket(output_tokens).rank
        for index, predictor in enumerate(self._both):
            if features.text:
                # What was said when the request came need not be worked out again.
                known = said if said is not None and said.by == index else predictor.predict(features)
                weights = known.weights
                loss = -log(max(LEAST_PROBABILITY, weights[rank] / sum(weights)))
                self.scores[index] += NEWEST * (loss - self.scores[index])
            predictor.observe(features, output_tokens)
