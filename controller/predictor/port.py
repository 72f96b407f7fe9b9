"""What a predictor of output lengths knows and says. Values only; the classifier (gateway/classify.py) draws the class.

A prediction is a weight per output bucket (S, M, L) rather than one bucket, so that whoever decides can err on the safe
side and see how sure it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from controller.domain.classes import ClassScheme

Weights = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Features:
    """What is known of a request before it runs. `text`: an excerpt of the prompt (features.py), empty for token ids.
    `truth_tokens` is set in studies only, for the oracles."""

    input_tokens: int
    model: str = ""
    route: str = ""  # "chat" or "completions"
    tenant: str = ""
    limit_tokens: int | None = None
    stops: bool = False
    json_mode: bool = False
    text: str = ""
    truth_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """Weights of the output buckets, not below zero and not all zero; they need not sum to one. `by`: which one said
    it, of a predictor that is made of several."""

    weights: Weights
    source: str
    by: int = 0


class Predictor(Protocol):
    def use_scheme(self, scheme: ClassScheme) -> None:
        """Cut points to predict for from now on."""

    def predict(self, features: Features) -> Prediction: ...

    def observe(self, features: Features, output_tokens: int, said: Prediction | None = None) -> None:
        """A request with these features has finished. `said`: what was predicted for it, where that is still known."""
