"""How many tokens a prompt has, before an engine has counted: by the served model's own tokenizer where one is
configured, else by a ratio of bytes per token that the engines' counts calibrate.

A tokenizer needs about a microsecond a token, so a long prompt would take longer than the whole decision may. Beyond
`EXACT_CHARACTERS` short slices are counted and the prompt's own ratio carries the rest.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from common.errors import UserError
from controller.gateway.asked import EXACT_CHARACTERS, Asked
from controller.gateway.classify import TokenEstimator

# Of a longer one, so many slices: many short ones tell more than few long ones, because neighbouring text is alike.
SLICES = 12
SLICE_CHARACTERS = 50
# Slices begin and end at a space where there is one so near: a word cut in two has more tokens than a whole one.
SPACE_WITHIN = 20
# Share of the newest request in the running estimates.
NEWEST = 0.05


class Encoding(Protocol):
    def __len__(self) -> int: ...


class Tokenizer(Protocol):
    """What is used of `tokenizers.Tokenizer`."""

    def encode_batch_fast(self, sequences: list[str], /, *, add_special_tokens: bool) -> Sequence[Encoding]: ...


def load_tokenizers(files: Mapping[str, Path]) -> dict[str, Tokenizer]:
    """By model. UserError when a file cannot be used, or the `tokenizers` package is not installed."""
    if not files:
        return {}
    try:
        from tokenizers import Tokenizer as Loaded
    except ImportError:
        raise UserError(
            "classify.tokenizers is set, but the package tokenizers is not installed.",
            "Install the extra `tokenizers`, or leave the setting out: bytes are then counted.",
        ) from None
    # One text at a time is counted, for which the package would start as many idle threads as there are cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loaded: dict[str, Tokenizer] = {}
    for model, path in files.items():
        try:
            # A bare Exception is what the package raises for anything that is wrong with a file.
            loaded[model] = Loaded.from_file(str(path))
        except Exception as error:
            raise UserError(
                f"classify.tokenizers: {path} cannot be used: {error}.", "Name the model's tokenizer.json."
            ) from None
    return loaded


class TokenCounter:
    """Input tokens by model; learns from what engines count."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer] | None = None) -> None:
        self._tokenizers = dict(tokenizers or {})
        self._by_bytes = TokenEstimator()
        # What the engine counts beside the text: a chat template's tokens per message, a beginning-of-text token.
        self._beside: defaultdict[tuple[str, bool], float] = defaultdict(float)

    def count(self, asked: Asked) -> int:
        """At least 1."""
        tokenizer = self._tokenizers.get(asked.model)
        if tokenizer is None or not asked.texts:
            return self._by_bytes.input_tokens(asked.model, asked.prompt)
        beside = self._beside[asked.model, asked.chat] * max(1, asked.messages)
        return max(1, round(asked.prompt.tokens + beside + sum(count_text(tokenizer, text) for text in _short(asked))))

    def calibrate(self, asked: Asked, counted_tokens: int, guessed_tokens: int) -> None:
        """An engine has counted a prompt. `guessed_tokens` is what `count` had said."""
        if asked.model not in self._tokenizers:
            self._by_bytes.calibrate(asked.model, asked.prompt, counted_tokens)
        elif asked.texts and sum(map(len, asked.texts)) <= EXACT_CHARACTERS:
            key = (asked.model, asked.chat)
            missing = (counted_tokens - guessed_tokens) / max(1, asked.messages)
            # Bounded: an image's tokens are not a template's.
            self._beside[key] += NEWEST * min(50.0, max(-10.0, missing))


def _short(asked: Asked) -> tuple[str, ...]:
    """A chat of many small messages would be counted message by message; one string costs far less."""
    return asked.texts if len(asked.texts) == 1 else ("\n".join(asked.texts),)


def count_text(tokenizer: Tokenizer, text: str) -> float:
    """Tokens of a text, exact when it is short."""
    if len(text) <= EXACT_CHARACTERS:
        return _tokens(tokenizer, text)
    sample = _sample(text)
    return len(text) * _tokens(tokenizer, sample) / len(sample)


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    if not text.isascii():
        text = text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair, which no tokenizer takes
    # The fast one leaves out where each token stands in the text.
    return len(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])


def _sample(text: str) -> str:
    """Slices of a long text, evenly spread, put together."""
    step = (len(text) - SLICE_CHARACTERS) // (SLICES - 1)
    parts = []
    for start in range(0, step * SLICES, step):
        begin = _space(text, start)
        parts.append(text[begin : _space(text, begin + SLICE_CHARACTERS)])
    return "".join(parts)


def _space(text: str, start: int) -> int:
    """Where the next space is, if it is near."""
    found = text.find(" ", start, start + SPACE_WITHIN)
    return start if found < 0 else found


class CachedShare:
    """How much of a prompt the engine's prefix cache has spared it, as far as requests like it tell.

    The cautious end (mean less mean deviation) is what classification may subtract: a prompt that is wrongly taken for
    cached would go to a pool too small for it.
    """

    def __init__(self, keys: int = 4_096) -> None:
        self._keys = keys
        self._mean: dict[tuple[str, str, str], tuple[float, float]] = {}

    def uncached(self, asked: Asked, input_tokens: int) -> int:
        """Input tokens that the engine will have to compute, at the least likely to be too few."""
        mean, deviation = self._mean.get(_key(asked), (0.0, 0.0))
        return max(1, round(input_tokens * (1.0 - max(0.0, mean - deviation))))

    def observe(self, asked: Asked, input_tokens: int, cached_tokens: int) -> None:
        """The engine has said how many of a prompt's tokens were cached."""
        key = _key(asked)
        share = min(1.0, cached_tokens / max(1, input_tokens))
        known = self._mean.pop(key, None)
        if known is None:
            mean, deviation = share * NEWEST, share
        else:
            mean = known[0] + NEWEST * (share - known[0])
            deviation = known[1] + NEWEST * (abs(share - known[0]) - known[1])
        self._mean[key] = (mean, deviation)  # last in order: seen most recently
        if len(self._mean) > self._keys:
            del self._mean[next(iter(self._mean))]


def _key(asked: Asked) -> tuple[str, str, str]:
    return asked.model, asked.features.route, asked.features.tenant
