"""Which requests the demonstration sends, and what the controller may know of them beforehand.

The load is a trace, or the built-in generator, scaled so that its mean is the share `u` of what a static fleet of the
same hosts could serve within the SLO (`u = k / k_max`). The first seconds are warm-up: served, not measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.loadgen import Arrival
from controller.domain.classes import ClassScheme
from simulator.traces import KINDS, Kind, Trace, class_shares, generate, read_azure, scale_to_rate, window

BUILT_IN: Kind = "conv"
LEAST_REQUESTS = 20


@dataclass(frozen=True, slots=True)
class Load:
    """Arrivals of one phase, the same for both. Times in seconds from the start of the load."""

    source: str  # what it is, for people
    arrivals: Sequence[Arrival]
    warm_up_s: float
    duration_s: float  # warm-up included
    max_rps: float  # what the static fleet serves within the SLO
    initial_rps: Mapping[str, float]  # by request class, of the warm-up: what the first plan is made for

    @property
    def window_open_s(self) -> float:
        return self.warm_up_s

    @property
    def window_close_s(self) -> float:
        """The last arrival."""
        return self.arrivals[-1][0]

    def in_window(self, arrival_s: float) -> bool:
        return arrival_s >= self.warm_up_s

    @property
    def u(self) -> float:
        """Of the measured window, as it came out."""
        inside = sum(self.in_window(arrival_s) for arrival_s, _, _ in self.arrivals)
        return inside / (self.duration_s - self.warm_up_s) / self.max_rps


def nearest_kind(trace: Trace) -> Kind:
    """The built-in mix whose request classes are most like the trace's: profiles are measured for those."""
    scheme = ClassScheme()
    counts = Counter(str(scheme.classify(request.input_tokens, request.output_tokens)) for request in trace)

    def distance(kind: Kind) -> float:
        shares = class_shares(kind)
        return sum(abs(counts[name] / len(trace) - shares.get(name, 0.0)) for name in counts.keys() | shares.keys())

    return min(KINDS, key=distance)


def read_trace(path: Path) -> Trace:
    """Raises UserError for a file that is none, or holds too little to measure anything."""
    trace = read_azure(path)
    if len(trace) < LEAST_REQUESTS:
        raise UserError(
            f"{path}: holds {len(trace)} requests, too few to measure anything.",
            f"Name a trace of at least {LEAST_REQUESTS}.",
        )
    return trace


def make_load(trace: Trace | None, u: float, max_rps: float, duration_s: float, warm_up_s: float, seed: int) -> Load:
    """The first `duration_s` of the trace, or a generated load that falls and rises, at a mean of `u * max_rps`."""
    rate_rps = u * max_rps
    if trace is None:
        scaled = generate(BUILT_IN, duration_s, rate_rps, seed)
        source = f"built-in generator ({BUILT_IN} mix, falls to a third and rises again)"
    else:
        # A trace shorter than the demonstration is used whole; its load must still hold a warm-up.
        part = window(trace, 0.0, min(duration_s, trace.duration_s))
        scaled = scale_to_rate(part, rate_rps, seed)
        source = (
            f"trace {trace.name}, its first {part.duration_s:.0f} s, {scaled.mean_rate_rps / part.mean_rate_rps:.2f}x"
        )
    warm_up_s = min(warm_up_s, scaled.duration_s / 4)  # of a trace shorter than the demonstration
    arrivals = [(request.arrival_s, request.input_tokens, request.output_tokens) for request in scaled]
    early = [arrival for arrival in arrivals if arrival[0] < warm_up_s]
    if len(arrivals) - len(early) < LEAST_REQUESTS:
        raise UserError(
            f"u = {u:g} gives {len(arrivals) - len(early)} requests in {scaled.duration_s - warm_up_s:.0f} s, "
            "too few to measure anything.",
            "Raise --u or --minutes.",
        )
    scheme = ClassScheme()
    counts = Counter(str(scheme.classify(inputs, outputs)) for _, inputs, outputs in early)
    initial_rps = {name: count / warm_up_s for name, count in sorted(counts.items())}
    return Load(source, arrivals, warm_up_s, scaled.duration_s, max_rps, initial_rps)
