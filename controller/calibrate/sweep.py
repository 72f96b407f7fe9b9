"""Calibration sweep: which operating points to measure, in which order, and the profile made of them.

Works on any fleet behind `MeasureBackend`: the twin (simulator/calibration.py) or an idle node. Coarse first: at full
clock the load doubles until the SLO breaks; the knee is then bisected, and every lower clock starts from the knee of
the one above. A gate on the tails (attainment of the worst input bucket, P99 of token gaps) tells in from out.
Measured points are kept in a `PointCache`, so that an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from controller.domain.classes import DEFAULT_GROUPS, ClassGroup, ClassScheme, RequestClass
from controller.domain.decision import canonical_json
from controller.domain.slo import Slo
from controller.profile.table import ClassMix, IdlePoint, OperatingPoint, Profile, StartCost, TokenWork

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

    @property
    def key(self) -> str:
        return canonical_json([self.group, self.tp, self.mhz, self.rate_rps, self.requests, self.seed])


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

    def saturated_s_per_token(self, phase: Phase, tp: int, mhz: int, mean_tokens: tuple[float, float]) -> float:
        """Seconds per token of an instance that does one phase only, saturated, with requests of the mean size."""
        ...


@dataclass(frozen=True, slots=True)
class SweepSettings:
    gate_requests: int = 700  # of the rarest input bucket, per instance and point near the knee: 1 % of them decide
    least_requests: int = 1200  # of all, there: a queue needs time to show that it grows
    curve_requests: int = 500  # per instance and point below the knee: only means are read
    first_rate_rps: float = 0.1  # the lightest load; a kind that misses the SLO there is not used
    growth: float = 2.0  # of the first search
    precision: float = 0.05  # of the knee, relative
    curve_shares: tuple[float, ...] = (0.02, 0.06, 0.15, 0.3, 0.5, 0.75)  # of the knee; power bends at the low end
    seed: int = 1


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What to measure. `clocks_mhz` ascends and ends with the full clock."""

    groups: tuple[ClassGroup, ...] = DEFAULT_GROUPS
    tps: tuple[int, ...] = (2, 4, 8)
    clocks_mhz: tuple[int, ...] = (800, 1000, 1200, 1400, 1600, 1800, 1980)
    slo: Slo = field(default_factory=Slo)
    scheme: ClassScheme = field(default_factory=ClassScheme)
    settings: SweepSettings = field(default_factory=SweepSettings)
    # Share of the rarest input bucket in the requests of each group (`rarest_share`); 1 where it is not given.
    rarest: Mapping[str, float] = field(default_factory=dict)

    def gate_requests(self, group: str) -> int:
        """Requests per instance that the gate needs to judge the rarest bucket; a share below 5 % is not waited for."""
        share = max(self.rarest.get(group, 1.0), 0.05)
        return max(self.settings.least_requests, round(self.settings.gate_requests / share))

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
    """`done` of an estimated `total` kinds, points so far, and what was measured last."""

    done: int
    total: int
    points: int
    sentence: str


OnPoint = Callable[[OperatingPoint], None]


def sweep_kind(
    backend: MeasureBackend,
    plan: SweepPlan,
    group: str,
    tp: int,
    cache: PointCache,
    on_point: OnPoint | None = None,
) -> list[OperatingPoint]:
    """Measures one kind of instance at every clock, from the full one downwards."""
    gauge = _Gauge(backend, plan, group, tp, cache, on_point)
    points: list[OperatingPoint] = []
    above: _Knee | None = None
    for mhz in reversed(plan.clocks_mhz):
        knee = _first_knee(gauge, mhz) if above is None else _next_knee(gauge, mhz, above)
        points += _curve(gauge, mhz, knee)
        if knee.good_rps == 0:
            break  # a clock that misses the SLO at the lightest load: lower ones miss it too
        above = knee
    return points


def sweep(
    backend: MeasureBackend,
    plan: SweepPlan,
    cache: PointCache,
    progress: Callable[[Progress], None] | None = None,
) -> list[OperatingPoint]:
    """Measures all kinds one after the other."""
    points: list[OperatingPoint] = []
    kinds = plan.kinds()
    for done, (group, tp) in enumerate(kinds, start=1):
        points += sweep_kind(backend, plan, group, tp, cache)
        if progress is not None:
            progress(Progress(done, len(kinds), len(points), f"{group} TP{tp}"))
    return points


@dataclass(frozen=True, slots=True)
class _Knee:
    """Largest load found in SLO (0: not even the lightest) and the smallest found out of it."""

    good_rps: float
    bad_rps: float


@dataclass(frozen=True, slots=True)
class _Gauge:
    """Measures points of one kind, through the cache."""

    backend: MeasureBackend
    plan: SweepPlan
    group: str
    tp: int
    cache: PointCache
    on_point: OnPoint | None

    def __call__(self, mhz: int, rate_rps: float, requests: int) -> OperatingPoint:
        # The same seed everywhere: all points see the same requests in the same order, so that the differences
        # between clocks are not differences between samples.
        request = PointRequest(self.group, self.tp, mhz, round(rate_rps, 6), requests, self.plan.settings.seed)
        point = self.cache.get(request.key)
        if point is None:
            point = self.backend.measure(request)
            self.cache.put(request.key, point)
        if self.on_point is not None:
            self.on_point(point)
        return point

    def in_slo(self, mhz: int, rate_rps: float) -> bool:
        """The tail gate."""
        return self(mhz, rate_rps, self.plan.gate_requests(self.group)).in_slo(self.plan.slo)


def _first_knee(gauge: _Gauge, mhz: int) -> _Knee:
    settings = gauge.plan.settings
    good, bad = 0.0, settings.first_rate_rps
    while gauge.in_slo(mhz, bad):
        good, bad = bad, bad * settings.growth
    return _bisect(gauge, mhz, good, bad)


def _next_knee(gauge: _Gauge, mhz: int, above: _Knee) -> _Knee:
    """A lower clock carries no more: search downwards from the knee above it."""
    settings = gauge.plan.settings
    rate = above.good_rps
    if gauge.in_slo(mhz, rate):
        return above
    bad = rate
    while (rate := bad * 0.8) >= settings.first_rate_rps:
        if gauge.in_slo(mhz, rate):
            return _bisect(gauge, mhz, rate, bad)
        bad = rate
    return _Knee(0.0, bad)


def _bisect(gauge: _Gauge, mhz: int, good: float, bad: float) -> _Knee:
    while 0 < good * (1 + gauge.plan.settings.precision) < bad:
        middle = (good * bad) ** 0.5
        good, bad = (middle, bad) if gauge.in_slo(mhz, middle) else (good, middle)
    return _Knee(good, bad)


def _curve(gauge: _Gauge, mhz: int, knee: _Knee) -> list[OperatingPoint]:
    """The points of one clock that go into the profile: below the knee, at it, and the first beyond it."""
    settings, gate = gauge.plan.settings, gauge.plan.gate_requests(gauge.group)
    if knee.good_rps == 0:
        return [gauge(mhz, knee.bad_rps, gate)]
    low = [gauge(mhz, share * knee.good_rps, settings.curve_requests) for share in settings.curve_shares]
    edge = [gauge(mhz, rate, gate) for rate in (knee.good_rps, knee.bad_rps)]
    return low + edge


# ------------------------------------------------------------------------------------------------- assembly


@dataclass(frozen=True, slots=True)
class ProfileIdentity:
    """What the points belong to."""

    model: str
    gpu: str
    engine: str
    provenance: str


def build_profile(
    backend: MeasureBackend,
    plan: SweepPlan,
    identity: ProfileIdentity,
    points: Iterable[OperatingPoint],
    samples: Mapping[str, Sequence[Tokens]],
    starts: Mapping[int, StartCost],
) -> Profile:
    """The profile of a finished sweep. `samples` are the requests that each group was measured with."""
    full, widest = plan.clocks_mhz[-1], max(plan.tps)
    every = [tokens for group in plan.groups for tokens in samples[group.name]]
    mean = (sum(i for i, _ in every) / len(every), sum(o for _, o in every) / len(every))
    return Profile(
        model=identity.model,
        gpu=identity.gpu,
        engine=identity.engine,
        scheme=plan.scheme,
        slo=plan.slo,
        groups=plan.groups,
        tps=plan.tps,
        clocks_mhz=plan.clocks_mhz,
        points=tuple(sorted(set_of(points), key=lambda p: (p.group, p.tp, p.mhz, p.rate_rps))),
        idle=tuple(IdlePoint(tp, mhz, backend.idle_w(tp, mhz)) for tp in plan.tps for mhz in plan.clocks_mhz),
        parked_w=backend.parked_w(),
        mixes={group.name: class_mix(samples[group.name], plan.scheme) for group in plan.groups},
        work=TokenWork(
            backend.saturated_s_per_token(Phase.PREFILL, widest, full, mean),
            backend.saturated_s_per_token(Phase.DECODE, widest, full, mean),
        ),
        starts=dict(starts),
        provenance=identity.provenance,
    )


def set_of(points: Iterable[OperatingPoint]) -> list[OperatingPoint]:
    """Points without repeats of one load: of two, that with more requests."""
    best: dict[tuple[str, int, int, float], OperatingPoint] = {}
    for point in points:
        key = point.group, point.tp, point.mhz, point.rate_rps
        if key not in best or best[key].requests < point.requests:
            best[key] = point
    return list(best.values())


def class_mix(samples: Sequence[Tokens], scheme: ClassScheme) -> dict[RequestClass, ClassMix]:
    """Shares and mean tokens of the classes in a sample."""
    by_class: dict[RequestClass, list[Tokens]] = defaultdict(list)
    for tokens in samples:
        by_class[scheme.classify(*tokens)].append(tokens)
    return {
        request_class: ClassMix(
            share=len(mine) / len(samples),
            input_tokens=sum(i for i, _ in mine) / len(mine),
            output_tokens=sum(o for _, o in mine) / len(mine),
        )
        for request_class, mine in sorted(by_class.items())
    }


def samples_by_group(
    samples: Sequence[Tokens], groups: Iterable[ClassGroup], scheme: ClassScheme
) -> dict[str, tuple[Tokens, ...]]:
    """The part of a sample that belongs to each group; in the sample's order."""
    return {
        group.name: tuple(tokens for tokens in samples if scheme.classify(*tokens) in group.classes) for group in groups
    }


def rarest_share(samples: Mapping[str, Sequence[Tokens]], scheme: ClassScheme) -> dict[str, float]:
    """Share of the rarest input bucket in each group's sample."""
    return {
        group: min(Counter(scheme.input_bucket(i) for i, _ in mine).values()) / len(mine)
        for group, mine in samples.items()
    }
