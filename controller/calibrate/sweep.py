"""Calibration sweep: which operating points to measure, and in which order. calibrate/assembly.py makes a profile.

Works on any fleet behind `MeasureBackend`: the twin (simulator/calibration.py) or an idle node. Coarse first: at full
clock the load doubles until the SLO breaks; points are then added where the knee is estimated, and every lower clock
starts from the knee of the one above. The gate is on the tails: attainment of the worst input bucket, P99 of gaps.
Measured points are kept in a `PointCache`, so that an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count
from pathlib import Path
from statistics import fmean, median_high, stdev
from typing import Protocol

from common.clock import Clock, SystemClock
from controller.domain.classes import DEFAULT_GROUPS, ClassGroup, ClassScheme
from controller.domain.decision import canonical_json
from controller.domain.slo import Slo
from controller.profile.fit import knee_rps
from controller.profile.table import OperatingPoint

Tokens = tuple[int, int]  # of one request: input, output


@dataclass(frozen=True, slots=True)
class PointRequest:
    """One point to measure: `rate_rps` is the load of one instance, `requests` how many of them to send to each."""

    group: str
    tp: int
    mhz: int
    rate_rps: float
    requests: int
    seed: int
    cap_w: float | None = None  # power limit of each GPU, with the clock free up to `mhz`; None: locked at it

    @property
    def key(self) -> str:
        values = [self.group, self.tp, self.mhz, self.rate_rps, self.requests, self.seed]
        return canonical_json(values if self.cap_w is None else [*values, self.cap_w])


class Phase(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class MeasureBackend(Protocol):
    """A fleet that can be measured. Every call blocks until it has its answer."""

    def measure(self, request: PointRequest) -> OperatingPoint:
        """Serves the load and says how it went. A load beyond what can be served comes back as out of SLO."""
        ...

    def idle_w(self, tp: int, mhz: int) -> float:
        """Power of a loaded instance (all its GPUs) that serves nothing, its clock locked."""
        ...

    def parked_w(self) -> float:
        """Power of one GPU without a context."""
        ...

    def saturated(
        self, phase: Phase, tp: int, mhz: int, mean_tokens: tuple[float, float], cap_w: float | None = None
    ) -> tuple[float, float]:
        """Seconds per token, and watts, of an instance that does one phase only, saturated, with requests of the mean
        size."""
        ...


@dataclass(frozen=True, slots=True)
class SweepSettings:
    gate_requests: int = 700  # of the rarest input bucket, per instance and point near the knee: 1 % of them decide
    least_share: float = 0.2  # a bucket rarer than this is judged by fewer requests
    least_requests: int = 1200  # of all, there: a queue needs time to show that it grows
    curve_requests: int = 500  # per instance and point below the knee: only means are read
    first_rate_rps: float = 0.1  # the lightest load; a kind that misses the SLO there is not used
    growth: float = 2.0  # steps of the first search, upwards
    shrink: float = 0.75  # steps of the search at lower clocks, downwards from the knee above
    refinements: int = 6  # at most
    precision: float = 0.05  # of the knee, relative
    # Of the knee; power bends at the low end.
    curve_shares: tuple[float, ...] = (0.02, 0.04, 0.06, 0.1, 0.15, 0.3, 0.5, 0.75)
    seed: int = 1
    repeats: int = 1  # of every point that goes into the profile; more than one tell how sure it is
    cap_shares: tuple[float, ...] = (
        0.25,
        0.5,
        0.75,
        0.95,
    )  # of the knee at full clock: loads that caps are measured at


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What to measure. `clocks_mhz` ascends, ends with the full clock and lies on the GPU's own grid (15 MHz on an
    H100), so that what is asked for is what is enforced."""

    groups: tuple[ClassGroup, ...] = DEFAULT_GROUPS
    tps: tuple[int, ...] = (2, 4, 8)
    clocks_mhz: tuple[int, ...] = (600, 795, 1005, 1200, 1305, 1395, 1695, 1980)
    # Clock at which instances stand by: the lowest that can be locked. Measured idle only.
    standby_mhz: int = 210
    slo: Slo = field(default_factory=Slo)
    scheme: ClassScheme = field(default_factory=ClassScheme)
    settings: SweepSettings = field(default_factory=SweepSettings)
    # Share of the rarest input bucket in the requests of each group (`rarest_share`); 1 where it is not given.
    rarest: Mapping[str, float] = field(default_factory=dict)
    # Power limits of each GPU to measure beside the clocks; none: only clocks are compared.
    caps_w: tuple[float, ...] = ()

    def gate_requests(self, group: str) -> int:
        """Requests per instance that the gate needs to judge the rarest bucket, within reason."""
        share = max(self.rarest.get(group, 1.0), self.settings.least_share)
        return max(self.settings.least_requests, round(self.settings.gate_requests / share))

    def points_estimate(self) -> int:
        """Measurements of one kind, roughly: to tell the time that is left before the first kind is done."""
        settings = self.settings
        each = len(settings.curve_shares) + settings.refinements
        return (len(self.clocks_mhz) * each + len(self.caps_w) * len(settings.cap_shares)) * settings.repeats

    def kinds(self) -> tuple[tuple[str, int], ...]:
        """(group, tp): the parts of a sweep that may be measured side by side."""
        return tuple((group.name, tp) for group in self.groups for tp in self.tps)


class PointCache(Protocol):
    def get(self, key: str) -> OperatingPoint | None: ...

    def put(self, key: str, point: OperatingPoint) -> None: ...


class MemoryCache:
    """Keeps points for one run."""

    def __init__(self) -> None:
        self._points: dict[str, OperatingPoint] = {}

    def get(self, key: str) -> OperatingPoint | None:
        return self._points.get(key)

    def put(self, key: str, point: OperatingPoint) -> None:
        self._points[key] = point


class FileCache(MemoryCache):
    """Keeps points in a file of JSON lines; one writer. A torn last line (a crash while writing) is measured anew."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        for line in whole.splitlines():
            row = json.loads(line)
            super().put(row["key"], OperatingPoint.from_json_value(row["point"]))
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def put(self, key: str, point: OperatingPoint) -> None:
        super().put(key, point)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(canonical_json({"key": key, "point": point.to_json_value()}) + "\n")


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` kinds, points so far, what was measured last, and an estimate of the time that is left."""

    done: int
    total: int
    points: int
    sentence: str
    remaining_s: float


def remaining_s(elapsed_s: float, done: float, total: int) -> float:
    """As if what is left took as long as what is done."""
    return elapsed_s / done * (total - done) if done > 0 else 0.0


OnPoint = Callable[[OperatingPoint], None]


def sweep_kind(
    backend: MeasureBackend,
    plan: SweepPlan,
    group: str,
    tp: int,
    cache: PointCache,
    on_point: OnPoint | None = None,
) -> list[OperatingPoint]:
    """Measures one kind of instance at every clock, from the full one downwards, and under the plan's caps."""
    gauge = Gauge(backend, plan, group, tp, cache, on_point)
    points: list[OperatingPoint] = []
    above_rps: float | None = None
    for mhz in reversed(plan.clocks_mhz):
        near = _search(gauge, mhz, above_rps)
        knee = knee_rps(near, plan.slo)
        points += _curve(gauge, mhz, near, knee)
        if knee == 0:
            break  # a clock that misses the SLO at the lightest load: lower ones miss it too
        above_rps = knee
        if mhz == plan.clocks_mhz[-1]:
            points += under_caps(gauge, mhz, knee)
    return repeated(gauge, set_of(points))


def sweep(
    backend: MeasureBackend,
    plan: SweepPlan,
    cache: PointCache,
    progress: Callable[[Progress], None] | None = None,
    clock: Clock | None = None,
) -> list[OperatingPoint]:
    """Measures all kinds one after the other."""
    clock = clock or SystemClock()
    began_s = clock.monotonic_s()
    points: list[OperatingPoint] = []
    kinds = plan.kinds()
    for done, (group, tp) in enumerate(kinds):
        tell = None if progress is None else _teller(progress, plan, clock, began_s, done, len(points))
        points += sweep_kind(backend, plan, group, tp, cache, tell)
        if progress is not None:
            left_s = remaining_s(clock.monotonic_s() - began_s, done + 1, len(kinds))
            progress(Progress(done + 1, len(kinds), len(points), f"{group} TP{tp}", left_s))
    return points


def _teller(
    progress: Callable[[Progress], None], plan: SweepPlan, clock: Clock, began_s: float, done: int, before: int
) -> OnPoint:
    """Tells of every point of one kind. As much of it is done as it has points, of about as many as kinds take."""
    told = count(1)

    def tell(point: OperatingPoint) -> None:
        number = next(told)
        share = done + min(0.99, number / plan.points_estimate())
        left_s = remaining_s(clock.monotonic_s() - began_s, share, len(plan.kinds()))
        progress(Progress(done, len(plan.kinds()), before + number, say_point(point), left_s))

    return tell


def say_point(point: OperatingPoint) -> str:
    """For people: what was measured last."""
    held = f"{point.mhz} MHz" if point.cap_w is None else f"cap {point.cap_w:.0f} W"
    return f"{point.group} TP{point.tp}, {held}, {point.rate_rps:.2f} requests/s: {point.power_w:.0f} W"


@dataclass(frozen=True, slots=True)
class Gauge:
    """Measures points of one kind, through the cache."""

    backend: MeasureBackend
    plan: SweepPlan
    group: str
    tp: int
    cache: PointCache
    on_point: OnPoint | None
    # Requests per instance that a point was measured with at most, by clock, load and cap.
    asked: dict[tuple[int, float, float | None], int] = field(default_factory=dict)

    def __call__(
        self, mhz: int, rate_rps: float, requests: int, cap_w: float | None = None, repeat: int = 0
    ) -> OperatingPoint:
        # The same seed everywhere: all points see the same requests in the same order, so that the differences
        # between clocks are not differences between samples. Repeats see others.
        seed = self.plan.settings.seed + 1000 * repeat
        request = PointRequest(self.group, self.tp, mhz, round(rate_rps, 6), requests, seed, cap_w)
        key = mhz, request.rate_rps, cap_w
        self.asked[key] = max(requests, self.asked.get(key, 0))
        point = self.cache.get(request.key)
        if point is None:
            point = self.backend.measure(request)
            self.cache.put(request.key, point)
        if self.on_point is not None:
            self.on_point(point)
        return point

    def near_knee(self, mhz: int, rate_rps: float) -> OperatingPoint:
        """With as many requests as the verdict needs: few where a quarter of them leaves no doubt."""
        requests = self.plan.gate_requests(self.group)
        point = self(mhz, rate_rps, max(self.plan.settings.least_requests, requests // 4))
        if point.attainment_worst == 1 or self.clearly_out(point):
            return point
        return self(mhz, rate_rps, requests)

    def clearly_in(self, point: OperatingPoint) -> bool:
        """At most half the misses that the SLO allows."""
        slo = self.plan.slo
        return 1 - point.attainment_worst <= (1 - slo.attainment) / 2 and point.gap_p99_ms <= slo.token_gap_p99_ms

    def clearly_out(self, point: OperatingPoint) -> bool:
        """At least twice the misses, or a tenth more of the token gap."""
        slo = self.plan.slo
        return 1 - point.attainment_worst >= (1 - slo.attainment) * 2 or point.gap_p99_ms > slo.token_gap_p99_ms * 1.1


def _search(gauge: Gauge, mhz: int, above_rps: float | None) -> list[OperatingPoint]:
    """Points around the knee, by rising load. Attainment is a noisy sample and often flat: the knee is not where one
    point fails, but where the monotone curve through all of them crosses the bound."""
    settings = gauge.plan.settings
    found: dict[float, OperatingPoint] = {}
    if above_rps is None:
        rate = settings.first_rate_rps
        while not gauge.clearly_out(found.setdefault(rate, gauge.near_knee(mhz, rate))):
            rate *= settings.growth
    else:
        # A lower clock carries no more than the one above it.
        rate = above_rps
        while not gauge.clearly_in(found.setdefault(rate, gauge.near_knee(mhz, rate))):
            rate *= settings.shrink
            if rate < settings.first_rate_rps:
                break
    for _ in range(settings.refinements):
        rates = sorted(found)
        knee = knee_rps([found[r] for r in rates], gauge.plan.slo)
        low = max((r for r in rates if r <= knee), default=0.0)
        high = min((r for r in rates if r > knee), default=0.0)
        if low == 0 or high <= low * (1 + settings.precision):
            break
        # The estimate is of use once its neighbours are near and it is not at one of them; else the gap is halved.
        near = high <= low * settings.growth**0.5
        apart = min(knee / low, high / knee) >= 1 + settings.precision / 2
        rate = knee if near and apart else (low * high) ** 0.5
        found[rate] = gauge.near_knee(mhz, rate)
    return [found[rate] for rate in sorted(found)]


def _curve(gauge: Gauge, mhz: int, near: list[OperatingPoint], knee: float) -> list[OperatingPoint]:
    """The points of one clock that go into the profile: those below the knee, and the first two beyond it."""
    if knee == 0:
        return near[:1]
    settings = gauge.plan.settings
    measured = [point.rate_rps for point in near]
    low = [
        gauge(mhz, share * knee, settings.curve_requests)
        for share in settings.curve_shares
        if not any(abs(rate / (share * knee) - 1) < settings.precision for rate in measured)
    ]
    beyond = [point for point in near if point.rate_rps > knee]
    return low + [point for point in near if point.rate_rps <= knee] + beyond[:2]


def under_caps(gauge: Gauge, full_mhz: int, knee_rps: float) -> list[OperatingPoint]:
    """Points under power caps at shares of the largest load at full clock, from the highest cap downwards, each load
    until the SLO breaks: lower caps break it too, and so do heavier loads under the same cap."""
    settings, found = gauge.plan.settings, []
    lowest_w = 0.0
    for share in sorted(settings.cap_shares):
        for cap_w in sorted(gauge.plan.caps_w, reverse=True):
            if cap_w < lowest_w:
                break
            found.append(point := gauge(full_mhz, share * knee_rps, settings.curve_requests, cap_w))
            if gauge.clearly_out(point):
                lowest_w = cap_w  # at heavier loads it is looked at once more, and no cap below it
                break
    return found


def repeated(gauge: Gauge, points: list[OperatingPoint]) -> list[OperatingPoint]:
    """The points as means over the plan's repeats. Each pass goes over all of them before the next begins, so that a
    drift of the machine shows as spread and not as a difference between clocks."""
    passes = [points]
    for repeat in range(1, gauge.plan.settings.repeats):
        passes.append(
            [gauge(p.mhz, p.rate_rps, gauge.asked[p.mhz, p.rate_rps, p.cap_w], p.cap_w, repeat) for p in points]
        )
    return points if len(passes) == 1 else [mean_of(each) for each in zip(*passes, strict=True)]


def mean_of(points: Sequence[OperatingPoint]) -> OperatingPoint:
    """One load measured several times: means, and how far the power and the attainment scatter. Its latencies are
    those of the worse half: the gate is on tails, and a mean would hide one bad run in two."""
    first = points[0]
    buckets = [b for b in first.ttft_p99_ms if all(b in p.ttft_p99_ms for p in points)]
    return replace(
        first,
        power_w=fmean(p.power_w for p in points),
        attainment=fmean(p.attainment for p in points),
        attainment_worst=fmean(p.attainment_worst for p in points),
        ttft_p50_ms={b: median_high(p.ttft_p50_ms[b] for p in points) for b in buckets},
        ttft_p99_ms={b: median_high(p.ttft_p99_ms[b] for p in points) for b in buckets},
        tbt_p99_ms=median_high(p.tbt_p99_ms for p in points),
        gap_p99_ms=median_high(p.gap_p99_ms for p in points),
        running_mean=fmean(p.running_mean for p in points),
        running_p99=median_high(p.running_p99 for p in points),
        requests=sum(p.requests for p in points),
        repeats=len(points),
        power_sd_w=stdev(p.power_w for p in points),
        attainment_sd=stdev(p.attainment_worst for p in points),
    )


def set_of(points: Iterable[OperatingPoint]) -> list[OperatingPoint]:
    """Points without repeats of one load: of two, that with more requests."""
    best: dict[tuple[str, int, int, float, float | None], OperatingPoint] = {}
    for point in points:
        key = point.group, point.tp, point.mhz, point.rate_rps, point.cap_w
        if key not in best or best[key].requests < point.requests:
            best[key] = point
    return list(best.values())
