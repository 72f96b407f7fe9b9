"""Which class a request belongs to, before it has run: input tokens from the prompt, output bucket by prediction.

Input: a prompt of token ids is exact; text is counted or estimated (tokens.py). Output: a predictor
(controller/predictor) weighs the output buckets, of which routing takes a quantile, so that a wrong guess errs towards
the pool that can carry more; when the predictor is unsure, routing takes the longest bucket the request can reach.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controller.domain.classes import Bucket, ClassScheme, RequestClass
from controller.predictor.conditional import PRIOR_REQUESTS, REMEMBERED_REQUESTS, ByInput
from controller.predictor.port import Features, Prediction, Predictor

__all__ = ["PRIOR_REQUESTS", "REMEMBERED_REQUESTS", "Classified", "Classifier", "PromptSize", "TokenEstimator"]

BUCKETS = tuple(Bucket)
CLASSES = {row: tuple(RequestClass(row, column) for column in BUCKETS) for row in BUCKETS}  # by output rank
# English prose and code in the vocabularies of current models; replaced by what the engines count.
DEFAULT_BYTES_PER_TOKEN = 4.0
# What a chat template adds per message (role, separators), about.
TOKENS_PER_MESSAGE = 4


@dataclass(frozen=True, slots=True)
class Classified:
    """`routing` decides the pool; `load` is the class that load reports count the arrival under; `likely` the bucket
    the predictor holds most likely, with its `confidence` in it."""

    input_tokens: int
    routing: RequestClass
    load: RequestClass
    likely: Bucket
    confidence: float
    prediction: Prediction

    @property
    def source(self) -> str:
        return self.prediction.source


class Classifier:
    """Deterministic: the same requests in the same order are classified alike.

    `quantile`: routing assumes an output at least as long as this share of requests like it have, by the predictor.
    `min_confidence`: below it the prediction is not used, and the longest output possible is assumed.
    """

    def __init__(
        self,
        scheme: ClassScheme | None = None,
        quantile: float = 0.8,
        predictor: Predictor | None = None,
        min_confidence: float = 0.0,
    ) -> None:
        if not 0 < quantile < 1:
            raise ValueError("the quantile must lie between 0 and 1")
        self._quantile = quantile
        self._min_confidence = min_confidence
        self._predictor: Predictor = predictor or ByInput()
        self.use_scheme(scheme or ClassScheme())

    @property
    def scheme(self) -> ClassScheme:
        return self._scheme

    def use_scheme(self, scheme: ClassScheme) -> None:
        """Takes new cut points; experience under the old ones is worthless and forgotten."""
        self._scheme = scheme
        self._predictor.use_scheme(scheme)
        self._owed = {bucket: [0.0] * len(BUCKETS) for bucket in BUCKETS}

    def classify(
        self, input_tokens: int, output_limit_tokens: int | None = None, features: Features | None = None
    ) -> Classified:
        """`output_limit_tokens` is an upper bound the request states itself (`output_limit`)."""
        row = self._scheme.input_bucket(input_tokens)
        highest = len(BUCKETS) - 1
        if output_limit_tokens is not None:
            highest = self._scheme.output_bucket(output_limit_tokens).rank
        prediction = self._predictor.predict(features or Features(input_tokens))
        seen = prediction.weights[: highest + 1]
        total = sum(seen)
        if total <= 0:  # all that the predictor holds possible lies beyond the stated limit
            seen, total = (0.0,) * highest + (1.0,), 1.0
        confidence = max(seen) / total
        below, routing = 0.0, highest
        for rank, count in enumerate(seen):
            below += count
            if below >= self._quantile * total:
                routing = rank
                break
        if confidence < self._min_confidence:
            routing = highest
        # A quantile would report nearly every request as long. Arrivals are dealt out in proportion instead: each
        # bucket is owed its share of every arrival, and the one owed most gets it.
        owed = self._owed[row]
        for rank, count in enumerate(seen):
            owed[rank] += count / total
        load = max(range(highest + 1), key=lambda rank: owed[rank])
        owed[load] -= 1.0
        return Classified(
            input_tokens,
            CLASSES[row][routing],
            CLASSES[row][load],
            BUCKETS[seen.index(max(seen))],
            confidence,
            prediction,
        )

    def observe(
        self,
        input_tokens: int,
        output_tokens: int,
        features: Features | None = None,
        said: Prediction | None = None,
    ) -> None:
        """A request finished with this many tokens. `features` as they were at `classify`, `said` as it answered."""
        self._predictor.observe(features or Features(input_tokens), output_tokens, said)


class TokenEstimator:
    """Input tokens of a request body, by model."""

    def __init__(self) -> None:
        self._ratio: defaultdict[str, float] = defaultdict(lambda: DEFAULT_BYTES_PER_TOKEN)

    def input_tokens(self, model: str, prompt: PromptSize) -> int:
        return max(1, prompt.tokens + round(prompt.text_bytes / self._ratio[model]))

    def calibrate(self, model: str, prompt: PromptSize, counted_tokens: int) -> None:
        """Learns from what an engine counted for a prompt of text; others teach nothing."""
        of_text = counted_tokens - prompt.tokens
        if prompt.text_bytes < 64 or of_text <= 0:
            return
        # Bounded, so that one odd prompt (base64, one long run of spaces) cannot spoil the estimate.
        ratio = min(16.0, max(0.5, prompt.text_bytes / of_text))
        self._ratio[model] += 0.05 * (ratio - self._ratio[model])


@dataclass(frozen=True, slots=True)
class PromptSize:
    """A prompt's token ids (exact) and bytes of text (to be estimated)."""

    tokens: int = 0
    text_bytes: int = 0


def prompt_size(body: Mapping[str, Any]) -> PromptSize:
    """Size of `prompt` (completions) or `messages` (chat). ValueError says what is wrong with them."""
    if "messages" in body:
        return _messages_size(body["messages"])
    prompt = body.get("prompt")
    match prompt:
        case str():
            return PromptSize(text_bytes=len(prompt.encode(errors="replace")))
        case [int(), *_]:
            return PromptSize(tokens=len(prompt))
        case [str(), *_] | [list(), *_]:
            sizes = [prompt_size({"prompt": item}) for item in prompt]
            return PromptSize(sum(size.tokens for size in sizes), sum(size.text_bytes for size in sizes))
        case _:
            raise ValueError("prompt must be a string, a list of token ids, or a list of either, and not empty")


def _messages_size(messages: Any) -> PromptSize:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    text_bytes = 0
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("each of messages must be an object with role and content")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                text_bytes += len(text.encode(errors="replace"))
    return PromptSize(TOKENS_PER_MESSAGE * len(messages), text_bytes)


def output_limit(body: Mapping[str, Any]) -> int | None:
    """The most tokens a request says it can get. ValueError for a limit that is no whole number above zero.

    Not with `ignore_eos`: benchmarks set it to get exactly `max_tokens`, so there the limit is the true length,
    which no real request would tell.
    """
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    for limit in limits:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError("max_tokens must be a whole number above zero")
    return None if body.get("ignore_eos") else min(limits, default=None)
