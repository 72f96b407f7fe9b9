"""A classifier of prompts by the length of the answer they will get: hashed words into a linear model.

Numpy alone, weights in one .npz file: it decides in a twentieth of a millisecond, has no code inside (unlike a pickled
scikit-learn model) and needs nothing that the gateway does not have already. `train.py` makes it from logged requests.

It predicts a distribution over `EDGES`, bins of about equal width in the logarithm, so that one model serves any cut
points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from zipfile import BadZipFile
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from controller.domain.classes import ClassScheme
from controller.predictor.port import Features, Prediction

FORM = "dynamollm-text-predictor/2"
# Upper ends of the bins in tokens, the last one open. The default cut points are among them.
EDGES = (8, 16, 32, 64, 100, 150, 230, 350, 500, 750, 1100, 1600, 2400)
BINS = len(EDGES) + 1
HASH_BITS = 14
WORDS = 240
# What is no part of a word (a run of letters, digits and underscores): among ASCII's bytes made a space by the table,
# for a regular expression takes five times as long.
_ASCII_SPACED = bytes(code if code >= 128 or re.match(r"\w", chr(code)) else ord(" ") for code in range(256))
_OTHERS = re.compile(r"[^\x00-\x7f\w]")
_MASK = np.uint64((1 << HASH_BITS) - 1)
_FIRST_OF_PAIR = np.uint64(0x9E3779B97F4A7C15)  # odd: which word comes first must tell
_HIGH = np.uint64(24)  # the low bits of a product know only those of its factors


def bin_of(output_tokens: int) -> int:
    """Index of the bin that a length falls into."""
    return sum(output_tokens >= edge for edge in EDGES)


def hashed(features: Features) -> NDArray[np.int64]:
    """Rows of the weights that a request switches on: its words, pairs of words, and what it says of itself."""
    words = words_of(features.text)
    if len(words) > WORDS:
        words = [*words[: WORDS * 3 // 4], *words[-WORDS // 4 :]]
    count = len(words)
    marks = [
        f"\0words:{len(words).bit_length()}",
        f"\0input:{features.input_tokens.bit_length()}",
        f"\0{features.route}",
    ]
    if features.limit_tokens is not None:
        marks.append(f"\0limit:{features.limit_tokens.bit_length()}")
    if features.stops:
        marks.append("\0stop")
    if features.json_mode:
        marks.append("\0json")
    words += [mark.encode() for mark in marks]
    single = np.fromiter(map(crc32, words), np.uint64, len(words))
    # A pair is made of its words' hashes: hashing its text too would take as long again.
    pairs = (single[: count - 1] * _FIRST_OF_PAIR + single[1:count]) >> _HIGH if count > 1 else single[:0]
    rows = (np.concatenate((single, pairs)) & _MASK).astype(np.int64)
    rows.sort()
    return rows[np.concatenate(([True], rows[1:] != rows[:-1]))]  # each once; np.unique takes twice the time


def words_of(text: str) -> list[bytes]:
    """In lower case and UTF-8."""
    text = text.lower()
    if not text.isascii():
        text = _OTHERS.sub(" ", text)
    return text.encode().translate(_ASCII_SPACED).split()


@dataclass(frozen=True, slots=True)
class TextModel:
    """`weights` [2**HASH_BITS, BINS], `bias` [BINS]; `facts`: what it was trained on and how good it was."""

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    temperature: float
    facts: dict[str, float]

    def distribution(self, features: Features) -> NDArray[np.float64]:
        """Probability of each bin."""
        rows = hashed(features)
        scores = self.weights.take(rows, axis=0).sum(axis=0) / np.sqrt(len(rows)) + self.bias
        scaled = np.asarray(scores, dtype=np.float64) / self.temperature
        scaled = np.exp(scaled - scaled.max())
        return np.asarray(scaled / scaled.sum())

    def save(self, path: Path) -> None:
        head = json.dumps({"form": FORM, "temperature": self.temperature, "facts": self.facts})
        with path.open("wb") as file:
            np.savez_compressed(file, head=np.frombuffer(head.encode(), np.uint8), weights=self.weights, bias=self.bias)

    @classmethod
    def load(cls, path: Path) -> TextModel:
        """UserError says why a file is no model."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                head = json.loads(stored["head"].tobytes())
                weights, bias = stored["weights"], stored["bias"]
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror or error}.", "Name a file of `dynamollm predictor train`."
            ) from None
        except (ValueError, KeyError, BadZipFile):
            head, weights, bias = {}, np.empty(0), np.empty(0)
        if head.get("form") != FORM or weights.shape != (1 << HASH_BITS, BINS) or bias.shape != (BINS,):
            raise UserError(f"{path} holds no output-length predictor.", "Train one: dynamollm predictor train.")
        return cls(weights, bias, float(head["temperature"]), dict(head["facts"]))


class TextPredictor:
    """A `Predictor` around a model. It does not learn while it serves: train anew when its accuracy falls."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self.use_scheme(ClassScheme())

    def use_scheme(self, scheme: ClassScheme) -> None:
        self._share = bucket_shares(scheme.output_cuts_tokens)

    def predict(self, features: Features) -> Prediction:
        short, medium, long = (float(share) for share in self._model.distribution(features) @ self._share)
        return Prediction((max(0.0, short), max(0.0, medium), max(0.0, long)), "text")

    def observe(self, features: Features, output_tokens: int, said: Prediction | None = None) -> None:
        """Nothing: see the class."""


def bucket_shares(cuts: Sequence[int]) -> NDArray[np.float64]:
    """[BINS, 3]: the share of each bin in each bucket. A cut within a bin divides it by the logarithm of the length."""
    ends = [1, *EDGES, 4 * EDGES[-1]]
    shares = np.zeros((BINS, 3))
    for row, (low, high) in enumerate(pairwise(ends)):
        below = [min(1.0, max(0.0, log(max(cut, 1) / low) / log(high / low))) for cut in cuts]
        shares[row] = below[0], below[1] - below[0], 1 - below[1]
    return shares
