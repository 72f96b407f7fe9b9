"""Trains the text classifier on logged requests: (request, tokens it was answered with) pairs, one JSON object a line.

A multinomial logistic regression over hashed words, fitted by L-BFGS on sparse rows (deterministic: the same log gives
the same model), calibrated by one temperature on requests it has not seen, and judged on later ones still.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize, minimize_scalar

from common.errors import UserError
from controller.domain.classes import ClassScheme
from controller.predictor.features import prompt_texts, request_features
from controller.predictor.port import Features
from controller.predictor.text import BINS, EDGES, HASH_BITS, TextModel, bin_of, bucket_shares, hashed

FEWEST_PAIRS = 200
# Shares of the log, in its own order: what comes later must be predicted from what came before.
TRAINED, CALIBRATED = 0.7, 0.15
# Weight of the squared weights in the loss, per pair.
REGULARISATION = 0.1
ITERATIONS = 100
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Pair:
    features: Features
    output_tokens: int


def read_pairs(path: Path) -> list[Pair]:
    """From a file of lines like {"prompt": …, "output_tokens": 120} or {"messages": […], "max_tokens": 500,
    "output_tokens": 120}: a request's body and what it was answered with. UserError names the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Name a file of JSON lines.") from None
    return [_pair(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _pair(path: Path, number: int, line: str) -> Pair:
    hint = 'A line is a request and its length: {"prompt": "…", "output_tokens": 120}.'
    try:
        body: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{path}, line {number}: not JSON.", hint) from None
    if not isinstance(body, dict) or not ({"prompt", "messages"} & body.keys()):
        raise UserError(f"{path}, line {number}: neither prompt nor messages.", hint)
    tokens = body.get("output_tokens")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise UserError(f"{path}, line {number}: output_tokens must be a whole number above zero.", hint)
    texts = prompt_texts(body)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    counted = body.get("input_tokens")
    input_tokens = counted if isinstance(counted, int) else sum(map(len, texts)) // BYTES_PER_TOKEN
    return Pair(request_features(body, input_tokens, limit if isinstance(limit, int) else None, texts), tokens)


def train(pairs: Sequence[Pair], scheme: ClassScheme | None = None) -> TextModel:
    """The model, its accuracy among its facts. UserError when there are too few pairs to learn from."""
    if len(pairs) < FEWEST_PAIRS:
        raise UserError(
            f"{len(pairs)} pairs are too few to learn from.", f"Log at least {FEWEST_PAIRS}, better ten thousand."
        )
    ends = [round(len(pairs) * TRAINED), round(len(pairs) * (TRAINED + CALIBRATED))]
    rows = _rows(pair.features for pair in pairs)
    bins = np.array([bin_of(pair.output_tokens) for pair in pairs])
    weights, bias = _fit(rows[: ends[0]], bins[: ends[0]])
    scores = np.asarray(rows @ weights) + bias
    temperature = _temperature(scores[ends[0] : ends[1]], bins[ends[0] : ends[1]])
    facts = _judge(
        scores[ends[1] :] / temperature, [pair.output_tokens for pair in pairs[ends[1] :]], scheme or ClassScheme()
    )
    facts |= {"pairs": float(len(pairs)), "trained_on": float(ends[0])}
    return TextModel(weights.astype(np.float32), bias.astype(np.float32), temperature, facts)


def _rows(features: Iterable[Features]) -> sparse.csr_array:
    """One row of unit length a request, as `TextModel.distribution` scales them."""
    columns = [hashed(each) for each in features]
    ends = np.cumsum([0, *map(len, columns)])
    values = np.concatenate([np.full(len(each), 1 / np.sqrt(len(each))) for each in columns])
    return sparse.csr_array((values, np.concatenate(columns), ends), shape=(len(columns), 1 << HASH_BITS))


def _fit(rows: sparse.csr_array, bins: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights [columns of `rows`, BINS] and bias [BINS]."""
    used = np.unique(rows.indices)  # the rest stays zero and need not be searched
    known = rows[:, used].tocsr()
    count = known.shape[0]
    truth = np.zeros((count, BINS))
    truth[np.arange(count), bins] = 1.0
    transposed = known.T.tocsr()

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        matrix = flat.reshape(len(used) + 1, BINS)
        logs = _log_softmax(np.asarray(known @ matrix[:-1]) + matrix[-1])
        error = (np.exp(logs) - truth) / count
        gradient = np.empty_like(matrix)
        gradient[:-1] = np.asarray(transposed @ error) + 2 * REGULARISATION / count * matrix[:-1]
        gradient[-1] = error.sum(axis=0)
        value = -float((logs * truth).sum()) / count + REGULARISATION / count * float((matrix[:-1] ** 2).sum())
        return value, gradient.ravel()

    start = np.zeros((len(used) + 1, BINS))
    start[-1] = np.log((truth.sum(axis=0) + 1) / (count + BINS))  # never seen is not impossible
    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    matrix = np.asarray(found.x).reshape(len(used) + 1, BINS)
    weights = np.zeros((rows.shape[1], BINS))
    weights[used] = matrix[:-1]
    return weights, matrix[-1]


def _log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _temperature(scores: NDArray[np.float64], bins: NDArray[np.int64]) -> float:
    """What to divide scores by so that stated confidence is accuracy (Guo et al., ICML 2017, section 4.2)."""
    picked = np.arange(len(bins))
    found = minimize_scalar(
        lambda log_t: -float(_log_softmax(scores / np.exp(log_t))[picked, bins].mean()),
        bounds=(-2, 3),
        method="bounded",
    )
    return float(np.exp(found.x))


def _judge(scores: NDArray[np.float64], lengths: Sequence[int], scheme: ClassScheme) -> dict[str, float]:
    """Accuracy on requests that came after all it learnt from."""
    shares = np.exp(_log_softmax(scores)) @ bucket_shares(scheme.output_cuts_tokens)
    truth = np.array([scheme.output_bucket(tokens).rank for tokens in lengths])
    guess, confidence = shares.argmax(axis=1), shares.max(axis=1)
    right = guess == truth
    return {
        "judged_on": float(len(truth)),
        "accuracy": float(right.mean()),
        "accuracy_of_always_the_commonest": float(np.bincount(truth, minlength=3).max() / len(truth)),
        "too_short": float((guess < truth).mean()),
        "stated_confidence": float(confidence.mean()),
        "largest_bin_tokens": float(EDGES[-1]),
    }
