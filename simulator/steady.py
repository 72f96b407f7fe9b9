"""A few equal instances under an open-loop load at one clock, in virtual time, and how they fared.

Calibration measures operating points with it and the ledger searches the largest load of a static fleet. Requests go
to the instance of the least load, as gateways send them; nothing else of a fleet is modelled here (no gateway queue,
no controller).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from controller.policy.routing import load_of
from simulator.engine import Engine
from simulator.iteration import EngineRequest, Iteration
from simulator.physics import Physics
from simulator.traces import Request

# So many requests waiting per instance are no steady state any more: the rest would only wait longer.
GIVE_UP_WAITING = 200
ENDLESS = 1 << 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request of the measured window. Times of one that was not served are lower bounds."""

    input_tokens: int
    ttft_ms: float
    tbt_ms: float  # 0 for an answer of one token
    served: bool


@dataclass(frozen=True, slots=True)
class Steady:
    """What was measured between the end of the warm-up and the last arrival."""

    outcomes: tuple[Outcome, ...]
    power_w: float  # mean of one instance, all its GPUs
    running_seconds: Mapping[int, float]  # instance-seconds by requests in the batch
    gaps: Mapping[float, int]  # token gaps in seconds, counted
    gave_up: bool

    def gap_quantile_ms(self, quantile: float) -> float:
        return weighted_quantile(self.gaps.items(), quantile) * 1e3

    def running_quantile(self, quantile: float) -> float:
        return weighted_quantile(self.running_seconds.items(), quantile)

    @property
    def running_mean(self) -> float:
        seconds = sum(self.running_seconds.values())
        return sum(n * s for n, s in self.running_seconds.items()) / seconds if seconds else 0.0


def weighted_quantile(weighted: Iterable[tuple[float, float]], quantile: float) -> float:
    """The smallest value that at least `quantile` of the weight does not exceed; 0 without any weight."""
    rows = sorted(weighted)
    bound = quantile * sum(weight for _, weight in rows)
    for value, weight in rows:
        bound -= weight
        if bound <= 0:
            return value
    return rows[-1][0] if rows else 0.0


def serve_steadily(
    physics: Physics,
    tp: int,
    mhz: int,
    instances: int,
    requests: Sequence[Request],
    warm_up_share: float = 0.1,
    cap_w: float | None = None,
) -> Steady:
    """Serves `requests` (in order of arrival) and measures those after the warm-up. With `cap_w` each GPU keeps that
    power limit, at any clock up to `mhz`.

    A request that no instance could ever hold is a miss. The run ends early when the queues only grow.
    """
    fleet = [_Instance(physics, tp, mhz, cap_w) for _ in range(instances)]
    first = int(len(requests) * warm_up_share)
    window_s = requests[first].arrival_s
    tracked: list[tuple[Request, EngineRequest | None]] = []
    gave_up = False
    for number, request in enumerate(requests):
        now_s = request.arrival_s
        for instance in fleet:
            instance.advance(now_s)
        if number == first:
            for instance in fleet:
                instance.meter = _Meter()
        target = min(fleet, key=_load)
        tracked.append((request, target.add(str(number), request)))
        if target.engine.waiting > GIVE_UP_WAITING:
            gave_up = True
            break
    end_s = tracked[-1][0].arrival_s
    meters = [instance.meter for instance in fleet]
    for instance in fleet:
        # What is left is finished so that its latency is known; its energy is not part of the window.
        instance.meter = _Meter()
        if not gave_up:
            instance.advance(inf)
    measured = tracked[first:] if len(tracked) > first else tracked
    joules = sum(meter.joules for meter in meters)
    running: dict[int, float] = defaultdict(float)
    gaps: Counter[float] = Counter()
    for meter in meters:
        for batch, seconds in meter.running_seconds.items():
            running[batch] += seconds
        gaps.update(meter.gaps)
    busy_s = sum(running.values())
    return Steady(
        outcomes=tuple(_outcome(request, engine_request, end_s) for request, engine_request in measured),
        # Iterations overlap the window's ends a little: joules and seconds are counted over the same span.
        power_w=joules / busy_s if busy_s else 0.0,
        running_seconds=running,
        gaps=gaps,
        gave_up=gave_up or window_s >= end_s,
    )


def _load(instance: _Instance) -> float:
    return load_of(instance.engine.running + instance.engine.waiting, instance.pending_tokens)


def _outcome(request: Request, served: EngineRequest | None, now_s: float) -> Outcome:
    waited_ms = (now_s - request.arrival_s) * 1e3
    if served is None or served.first_token_s is None:
        return Outcome(request.input_tokens, waited_ms, 0.0, served=False)
    ttft_ms = (served.first_token_s - request.arrival_s) * 1e3
    if served.finished_s is None:
        return Outcome(request.input_tokens, ttft_ms, 0.0, served=False)
    gaps = served.output_tokens - 1
    tbt_ms = (served.finished_s - served.first_token_s) * 1e3 / gaps if gaps else 0.0
    return Outcome(request.input_tokens, ttft_ms, tbt_ms, served=True)


@dataclass(slots=True)
class _Meter:
    joules: float = 0.0
    running_seconds: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    gaps: Counter[float] = field(default_factory=Counter)


class _Instance:
    """One engine and the iteration that is under way in it."""

    __slots__ = ("_cap_w", "_flight", "_idle_w", "_mhz", "_now_s", "_tp", "engine", "meter", "pending_tokens")

    def __init__(self, physics: Physics, tp: int, mhz: int, cap_w: float | None) -> None:
        self.engine = Engine(physics, tp)
        self.meter = _Meter()
        self.pending_tokens = 0  # prompts without a token yet
        self._idle_w = physics.idle_w(mhz, context=True) * tp
        self._mhz = mhz
        self._cap_w = cap_w
        self._tp = tp
        self._now_s = 0.0
        self._flight: Iteration | None = None

    def advance(self, until_s: float) -> None:
        """Runs every iteration that ends by `until_s`; idles up to it when nothing is left."""
        engine = self.engine
        while True:
            flight = self._flight
            if flight is None:
                flight = self._flight = engine.begin_iteration(self._now_s, self._mhz, self._cap_w, ENDLESS)
                if flight is None:
                    if until_s != inf:
                        self._idle(until_s)
                    return
            if flight.end_s > until_s:
                return
            self._finish(flight)

    def add(self, name: str, request: Request) -> EngineRequest | None:
        """Queues a request that arrives now (after `advance` to its arrival); None when it can never be held."""
        if request.input_tokens + request.output_tokens > self.engine.kv_capacity_tokens:
            return None
        if self._flight is not None:
            self._flight = self.engine.cut(request.arrival_s)
        self.pending_tokens += request.input_tokens
        return self.engine.add(name, request.input_tokens, request.output_tokens, request.arrival_s)

    def _idle(self, until_s: float) -> None:
        seconds = until_s - self._now_s
        if seconds > 0:
            self.meter.joules += seconds * self._idle_w
            self.meter.running_seconds[0] += seconds
            self._now_s = until_s

    def _finish(self, flight: Iteration) -> None:
        meter = self.meter
        meter.joules += flight.joules_per_gpu * self._tp
        meter.running_seconds[self.engine.running] += flight.seconds
        for gap_s, count in flight.gaps:
            meter.gaps[gap_s] += count
        for event in self.engine.finish_iteration(flight, every_token=False):
            if event.first:
                self.pending_tokens -= event.request.input_tokens
            # The pause of a preempted request is a gap that no iteration's own length shows.
            if event.gap_s is not None and event.gap_s > flight.seconds:
                meter.gaps[event.gap_s] += 1
        self._now_s = flight.end_s
        self._flight = None
