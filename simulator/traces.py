"""Where load comes from: readers of public traces, generators matched to their published statistics, scaling.

A `Trace` is struct-of-arrays (a week holds tens of millions of requests) and iterates as `Request` values. It is
what the load generator replays, what the virtual-time fleet serves, and what calibration takes its token mix from.
Everything random takes a seed: the same arguments give the same trace.
"""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

Kind = Literal["conv", "code"]
KINDS: tuple[Kind, ...] = get_args(Kind)

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
# Beyond any context window in use: a larger figure is a broken file, not a request.
MAX_TOKENS = 10_000_000
# Copies of a trace are shifted against each other by up to this, so that their bursts do not coincide.
JITTER_S = 30.0
# Peak / trough 3 and a peak minute of 1.5 times the mean: the chat hour's own figures.
DEFAULT_SWING = 0.5
# Coefficient of variation of the inter-arrival time of the chat hour, its slow swing included.
CONV_ARRIVAL_CV = 1.1


_Floats = Sequence[float] | NDArray[np.float64]
_Integers = Sequence[int] | NDArray[np.int64]


class Request(NamedTuple):
    """One request. `arrival_s` counts from the start of its trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival, within [0, duration_s)."""

    name: str
    duration_s: float
    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __iter__(self) -> Iterator[Request]:
        columns = (self.arrival_s.tolist(), self.input_tokens.tolist(), self.output_tokens.tolist())
        return (Request(*row) for row in zip(*columns, strict=True))

    @property
    def mean_rate_rps(self) -> float:
        return len(self) / self.duration_s


# -------------------------------------------------------------------------------------------------- reading


def read_azure(path: Path) -> Trace:
    """Reads a file of the public Azure LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

    Timestamps may carry a fraction of any length and a UTC offset. Nothing is skipped or repaired: the first row
    that cannot be a request raises UserError with file, line and what is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            times, inputs, outputs = _read_rows(path, csv.reader(file, quoting=csv.QUOTE_NONE))
    except FileNotFoundError:
        raise UserError(f"{path}: no such trace file.", "Check the path given with --trace.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a trace file.", "Name a CSV file.") from None
    except PermissionError:
        raise UserError(f"{path}: cannot be read by this user.", "Check its owner and mode.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV text file: {error}.", "Name a file of the Azure trace format.") from None
    return trace_of_rows(path.stem, times, inputs, outputs)


def trace_of_rows(name: str, times: _Floats, inputs: _Integers, outputs: _Integers) -> Trace:
    """From columns in order of time; arrivals count from the first row."""
    at_s = np.asarray(times, np.float64)
    arrival_s = at_s - at_s[0]
    span_s = float(arrival_s[-1])
    # The window ends one mean gap after the last arrival, so that n requests span n gaps. A single row has no gap.
    duration_s = span_s + span_s / max(len(times) - 1, 1) or 1.0
    return Trace(name, duration_s, arrival_s, np.asarray(inputs, np.int64), np.asarray(outputs, np.int64))


def _read_rows(path: Path, rows: Iterator[list[str]]) -> tuple[array[float], array[int], array[int]]:
    expected = ",".join(AZURE_COLUMNS)
    header = [name.strip() for name in next(rows, [])]
    if tuple(header) != AZURE_COLUMNS:
        raise UserError(f"{path}:1: the header is {','.join(header)[:80]!r}, not {expected}.", "Use that format.")
    # Arrays, not lists: the public week has tens of millions of rows.
    times, inputs, outputs = array("d"), array("q"), array("q")
    for line, row in enumerate(rows, start=2):
        if not row:
            continue  # an empty line holds no request
        try:
            if len(row) != len(AZURE_COLUMNS):
                raise ValueError(f"{len(row)} fields where {len(AZURE_COLUMNS)} are needed")
            second = _timestamp(row[0])
            if times and second < times[-1]:
                raise ValueError(f"TIMESTAMP {row[0]} is earlier than the row before; rows must be in order")
            inputs.append(whole_tokens(AZURE_COLUMNS[1], row[1]))
            outputs.append(whole_tokens(AZURE_COLUMNS[2], row[2]))
            times.append(second)
        except ValueError as error:
            raise UserError(f"{path}:{line}: {error}.", "Correct or remove that row.") from None
    if not times:
        raise UserError(f"{path}: holds no requests.", "Name a trace with at least one row.")
    return times, inputs, outputs


def _timestamp(text: str) -> float:
    """Epoch seconds; without an offset the time is UTC."""
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"TIMESTAMP {text[:40]!r} is no date and time like 2023-11-16 18:15:46.680") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def whole_tokens(column: str, text: str) -> int:
    """A number of tokens as it stands in a file. Raises ValueError that names the column."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or not 1 <= int(digits[:12]) <= MAX_TOKENS:
        raise ValueError(f"{column} {text[:40]!r} is no whole number of tokens from 1 to {MAX_TOKENS:,}")
    return int(digits)


# ----------------------------------------------------------------------------------------------- generating


def generate(kind: Kind, duration_s: float, mean_rate_rps: float, seed: int, swing: float = DEFAULT_SWING) -> Trace:
    """A trace with the token mix and the arrival pattern of a public one, at exactly `mean_rate_rps` on average.

    Over the duration the rate follows  1 + swing * cos(2 pi t / duration):  it starts at its peak, falls to its
    trough in the middle and rises again. `conv` then has an inter-arrival CV of 1.1; `code` comes in bursts with
    silence between them, as many independent sources as `mean_rate_rps` holds of the recorded hour's rate.
    """
    if duration_s <= 0 or mean_rate_rps <= 0 or not 0 <= swing < 1:
        raise ValueError("duration and rate must be positive, swing in [0, 1)")
    rng = np.random.default_rng(seed)
    count = max(1, round(mean_rate_rps * duration_s))
    edges_s = np.linspace(0.0, duration_s, max(2, math.ceil(duration_s / 0.1) + 1))
    middle_s = (edges_s[:-1] + edges_s[1:]) / 2
    rate = 1.0 + swing * np.cos(2 * np.pi * middle_s / duration_s)
    if kind == "conv":
        # Of a renewal process whose rate swings, the gaps have CV^2 = (1 + c^2) * E[rate] * E[1/rate] - 1, and
        # the mean of 1 / (1 + a cos) is 1 / sqrt(1 - a^2): solved for c, the gaps' own CV.
        gap_cv2 = (1 + CONV_ARRIVAL_CV**2) * math.sqrt(1 - swing**2) - 1
    else:
        rate *= _bursts(middle_s, duration_s, sources=max(1, round(mean_rate_rps / native_rate_rps(kind))), rng=rng)
        gap_cv2 = CODE_GAP_CV_IN_BURST**2
    cumulative = np.concatenate(([0.0], np.cumsum(rate)))
    # Gamma gaps in the clock that runs with the rate; count + 1 of them fill the window exactly.
    shape = 1 / max(gap_cv2, 0.05)
    steps = np.cumsum(rng.gamma(shape, size=count + 1))
    arrival_s = np.interp(steps[:-1] / steps[-1] * cumulative[-1], cumulative, edges_s)
    inputs, outputs = _draw_tokens(kind, count, rng)
    return Trace(f"generated-{kind}", duration_s, np.minimum(arrival_s, np.nextafter(duration_s, 0)), inputs, outputs)


# The code hour, cut where more than 5 s pass without a request: 58 bursts of 16 s (10 % under 6 s, 10 % over 27 s)
# with silences of 26 s in the geometric mean (standard deviation of the logarithm 1.0), the longest 217 s. Within a
# burst the rate has spikes of a few seconds (5-s windows up to 21 times the hour's mean), and gaps have CV 2.2.
CODE_BURST_MEAN_S = 16.0
CODE_BURST_SHAPE = 3.0
CODE_SILENCE_MEDIAN_S = 26.0
CODE_SILENCE_SIGMA = 1.0
CODE_SPIKE_S = 3.0
CODE_SPIKE_SIGMA = 0.8
CODE_GAP_CV_IN_BURST = 2.2


def _bursts(
    at_s: NDArray[np.float64], duration_s: float, sources: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The sum of all sources' intensity at each instant; never silent over the whole window."""
    active = np.zeros_like(at_s)
    for _ in range(sources):
        # Starts well before the window, so that the first burst does not stand at its beginning.
        now_s = -10 * (CODE_BURST_MEAN_S + CODE_SILENCE_MEDIAN_S) * (1 + float(rng.random()))
        while now_s < duration_s:
            length_s = float(rng.gamma(CODE_BURST_SHAPE, CODE_BURST_MEAN_S / CODE_BURST_SHAPE))
            inside = (at_s >= now_s) & (at_s < now_s + length_s)
            pieces = rng.lognormal(sigma=CODE_SPIKE_SIGMA, size=math.ceil(length_s / CODE_SPIKE_S) + 1)
            active[inside] += pieces[((at_s[inside] - now_s) / CODE_SPIKE_S).astype(int)]
            now_s += length_s + float(rng.lognormal(math.log(CODE_SILENCE_MEDIAN_S), CODE_SILENCE_SIGMA))
    if not active.any():
        active[at_s < CODE_BURST_MEAN_S] = 1
    return active


@cache
def _mix() -> dict[str, Any]:
    text = resources.files("simulator").joinpath("data/azure2023_token_mix.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def native_rate_rps(kind: Kind) -> float:
    """Mean rate of the recorded hour: k = 1."""
    return float(_mix()[kind]["native_rate_rps"])


def class_shares(kind: Kind) -> dict[str, float]:
    """Share of each request class ("SS" ... "LL") in the recorded hour."""
    return {name: float(entry["share"]) for name, entry in _mix()[kind]["classes"].items()}


def _draw_tokens(kind: Kind, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class by share, then input and output independently by the quantiles within the class."""
    shares = class_shares(kind)
    weights = np.array(list(shares.values()))
    drawn = rng.choice(len(weights), size=count, p=weights / weights.sum())
    at = rng.random((2, count))
    tokens = np.empty((2, count), dtype=np.int64)
    for number, name in enumerate(shares):
        mine = drawn == number
        for row, column in enumerate(("input_tokens", "output_tokens")):
            quantiles = _mix()[kind]["classes"][name][column]
            # Rounding down keeps a value within its bucket.
            tokens[row, mine] = np.interp(at[row, mine], _mix()["probabilities"], quantiles).astype(np.int64)
    return tokens[0], tokens[1]


def token_mix(source: Kind | Trace, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` pairs of (input tokens, output tokens) from a public mix or, with repetition, from a trace."""
    rng = np.random.default_rng(seed)
    if isinstance(source, Trace):
        chosen = rng.integers(len(source), size=count)
        inputs, outputs = source.input_tokens[chosen], source.output_tokens[chosen]
    else:
        inputs, outputs = _draw_tokens(source, count, rng)
    return list(zip(inputs.tolist(), outputs.tolist(), strict=True))


# -------------------------------------------------------------------------------------------------- scaling


def window(trace: Trace, start_s: float, duration_s: float) -> Trace:
    """The part of a trace from `start_s`, its clock set to zero there. UserError when it holds no requests."""
    first, last = np.searchsorted(trace.arrival_s, (start_s, start_s + duration_s))
    if first == last:
        raise UserError(
            f"Trace {trace.name} holds no requests from {start_s:g} s to {start_s + duration_s:g} s"
            f" (it lasts {trace.duration_s:.0f} s).",
            "Choose another window.",
        )
    return Trace(
        trace.name,
        min(duration_s, trace.duration_s - start_s),
        trace.arrival_s[first:last] - start_s,
        trace.input_tokens[first:last],
        trace.output_tokens[first:last],
    )


def scale(trace: Trace, copies: float, seed: int, jitter_s: float = JITTER_S) -> Trace:
    """`copies` superposed copies, each shifted by up to +-`jitter_s` (around the ends of the window); a fraction of
    a copy is a copy with requests left out at random. Below 1 this only thins."""
    if copies <= 0:
        raise ValueError("copies must be positive")
    rng = np.random.default_rng(seed)
    whole = math.floor(copies)
    keep = [np.arange(len(trace))] * whole
    if copies > whole:
        chosen = rng.permutation(len(trace))[: round((copies - whole) * len(trace))]
        keep.append(np.sort(chosen))
    # The first copy stays in place: one copy is the trace itself.
    shifts_s = np.concatenate(([0.0], rng.uniform(-jitter_s, jitter_s, size=len(keep) - 1)))
    arrival_s = np.concatenate(
        [(trace.arrival_s[rows] + shift) % trace.duration_s for rows, shift in zip(keep, shifts_s, strict=True)]
    )
    rows = np.concatenate(keep)
    order = np.argsort(arrival_s, kind="stable")
    rows = rows[order]
    return Trace(trace.name, trace.duration_s, arrival_s[order], trace.input_tokens[rows], trace.output_tokens[rows])


def scale_to_rate(trace: Trace, mean_rate_rps: float, seed: int) -> Trace:
    """Superposes or thins to a target mean rate."""
    return scale(trace, mean_rate_rps / trace.mean_rate_rps, seed)
