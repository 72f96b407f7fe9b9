"""The sweep over a made-up instance whose surface is known: finds the knees, resumes, gives up where nothing helps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from common.clock import VirtualClock
from controller.calibrate.assembly import ProfileIdentity, build_profile, class_mix, rarest_share, samples_by_group
from controller.calibrate.sweep import (
    FileCache,
    MemoryCache,
    Phase,
    PointRequest,
    Progress,
    SweepPlan,
    SweepSettings,
    mean_of,
    set_of,
    sweep,
    sweep_kind,
)
from controller.domain.classes import DEFAULT_GROUPS, Bucket, ClassScheme, RequestClass, by_input
from controller.profile.actuator import cap_for, caps_by_kind
from controller.profile.fit import fit
from controller.profile.table import SERVING, Actuator, OperatingPoint, Profile

CLOCKS = (800, 1400, 1980)
SHORT = by_input("short", "SM")
SAMPLES = {"short": ((100, 50), (200, 80), (600, 200), (900, 400))}


class StoppedError(Exception):
    pass


@dataclass
class MadeUp:
    """Attainment 1 up to half the knee, 0.99 at it, falling on; `noise` shakes it as a sample of that size would.
    Below 1000 MHz token gaps break the SLO at a fifth of the knee."""

    noise: float = 0.0
    knee_per_gpu: float = 1.0
    hopeless_below_mhz: int = 0
    stop_after: int = 10_000
    cap_extra: float = 0.0  # power under a cap beyond that of the lock that is as fast
    jitter: float = 0.0  # spread of the power from repeat to repeat
    asked: list[PointRequest] = field(default_factory=list)

    def knee_rps(self, tp: int, mhz: int) -> float:
        return float(self.knee_per_gpu * tp * (mhz / 1980) ** 0.5)

    def measure(self, request: PointRequest) -> OperatingPoint:
        if len(self.asked) >= self.stop_after:
            raise StoppedError
        self.asked.append(request)
        mhz = request.mhz if request.cap_w is None else min(request.mhz, round(1980 * (request.cap_w - 100) / 500))
        x = request.rate_rps / self.knee_rps(request.tp, mhz)
        watts = request.tp * (100 + 300 * x * mhz / 1980) * (1 + (self.cap_extra if request.cap_w else 0.0))
        watts *= 1 + self.jitter * np.random.default_rng([request.seed, request.mhz]).standard_normal()
        miss = 0.01 * max(0.0, 2 * x - 1) ** 2 if request.mhz >= self.hopeless_below_mhz else 0.5
        if self.noise:
            rng = np.random.default_rng([round(request.rate_rps * 1e6), request.mhz, request.requests])
            miss = rng.binomial(request.requests, min(1.0, miss)) / request.requests
        gap = 120.0 if request.mhz < 1000 and x > 0.2 else 60.0
        return OperatingPoint(
            group=request.group,
            tp=request.tp,
            mhz=request.mhz,
            rate_rps=request.rate_rps,
            power_w=watts,
            attainment=1 - min(1.0, miss),
            attainment_worst=1 - min(1.0, miss),
            ttft_p50_ms={Bucket.S: 50.0},
            ttft_p99_ms={Bucket.S: 50.0 + 100 * x},
            tbt_p99_ms=30.0,
            gap_p99_ms=gap,
            running_mean=10 * x,
            running_p99=20 * x,
            requests=request.requests,
            cap_w=request.cap_w,
        )

    def idle_w(self, tp: int, mhz: int) -> float:
        return tp * (72 + 50 * mhz / 1980)

    def parked_w(self) -> float:
        return 72.0

    def saturated(
        self, phase: Phase, tp: int, mhz: int, mean_tokens: tuple[float, float], cap_w: float | None = None
    ) -> tuple[float, float]:
        """Under a cap as fast as under a lock of as many watts, but `cap_extra` hungrier."""
        watts = cap_w if cap_w is not None else 100.0 + 500.0 * mhz / 1980
        speed = (watts - 100.0) / 500.0
        cost = {Phase.PREFILL: 1e-4, Phase.DECODE: 3e-4}[phase] / tp / speed
        return cost, tp * watts * (1 + (self.cap_extra if cap_w is not None else 0.0))


def plan(tps: tuple[int, ...] = (4,), clocks: tuple[int, ...] = CLOCKS) -> SweepPlan:
    return SweepPlan(groups=(SHORT,), tps=tps, clocks_mhz=clocks, settings=SweepSettings(gate_requests=4000))


def profile_of(backend: MadeUp, wanted: SweepPlan, points: Iterable[OperatingPoint]) -> Profile:
    return build_profile(backend, wanted, ProfileIdentity("m", "g", "e", "test"), points, SAMPLES, {})


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["exact", "sampled"])
def test_finds_the_knee_of_every_clock(noise: float) -> None:
    backend = MadeUp(noise)
    wanted = plan(tps=(2, 8), clocks=(1200, 1400, 1980))
    fitted = fit(profile_of(backend, wanted, sweep(backend, wanted, MemoryCache())), safety_margin=0.0)
    for tp in wanted.tps:
        for curve in fitted.clocks("short", tp):
            assert curve.max_rate_rps == pytest.approx(backend.knee_rps(tp, curve.mhz), rel=0.15 if noise else 0.06)
    assert len(backend.asked) < 25 * 2 * 3


def test_the_gate_is_on_token_gaps_too() -> None:
    backend = MadeUp()
    fitted = fit(profile_of(backend, plan(), sweep(backend, plan(), MemoryCache())), safety_margin=0.0)
    slow = fitted.curve("short", 4, 800)
    assert slow is not None
    assert slow.max_rate_rps == pytest.approx(0.2 * backend.knee_rps(4, 800), rel=0.1)


def test_the_measured_range_goes_beyond_the_knee() -> None:
    points = sweep_kind(MadeUp(), plan(), "short", 4, MemoryCache())
    for mhz in CLOCKS:
        rates = [p.rate_rps for p in points if p.mhz == mhz]
        knee = max(r for r, p in zip(rates, (p for p in points if p.mhz == mhz), strict=True) if p.in_slo(plan().slo))
        assert max(rates) > knee
        assert min(rates) < 0.05 * knee


def test_a_clock_that_is_hopeless_ends_the_search_downwards() -> None:
    backend = MadeUp(hopeless_below_mhz=1900)
    wanted = plan(clocks=(800, 1200, 1400, 1980))
    points = sweep_kind(backend, wanted, "short", 4, MemoryCache())
    assert {p.mhz for p in points} == {1980, 1400}
    assert [p.in_slo(wanted.slo) for p in points if p.mhz == 1400] == [False]
    fitted = fit(profile_of(backend, wanted, points))
    assert [c.max_rate_rps > 0 for c in fitted.clocks("short", 4)] == [False, True]


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = MadeUp()
    expected = sweep_kind(whole, plan(), "short", 4, MemoryCache())
    first = MadeUp(stop_after=9)
    with pytest.raises(StoppedError):
        sweep_kind(first, plan(), "short", 4, FileCache(tmp_path / "points.jsonl"))
    second = MadeUp()
    points = sweep_kind(second, plan(), "short", 4, FileCache(tmp_path / "points.jsonl"))
    assert points == expected
    assert len(first.asked) + len(second.asked) == len({r.key for r in whole.asked})
    third = MadeUp(stop_after=0)
    assert sweep_kind(third, plan(), "short", 4, FileCache(tmp_path / "points.jsonl")) == expected


def test_a_line_torn_by_a_crash_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    expected = sweep_kind(MadeUp(), plan(), "short", 4, FileCache(file))
    whole = file.read_text()
    file.write_text(whole[:-40])
    backend = MadeUp()
    assert sweep_kind(backend, plan(), "short", 4, FileCache(file)) == expected
    assert len(backend.asked) == 1
    assert file.read_text() == whole


def test_progress_estimates_what_is_left() -> None:
    clock = VirtualClock()
    seen: list[Progress] = []

    class Slow(MadeUp):
        def measure(self, request: PointRequest) -> OperatingPoint:
            clock.advance(1.0)
            return super().measure(request)

    sweep(Slow(), plan(tps=(2, 4, 8)), MemoryCache(), seen.append, clock)
    kinds = [p for p in seen if p.sentence == f"short TP{(2, 4, 8)[p.done - 1]}"]
    assert [(p.done, p.total) for p in kinds] == [(1, 3), (2, 3), (3, 3)]
    assert kinds[0].remaining_s == pytest.approx(2 * clock.now_s / 3, rel=0.3)
    assert kinds[-1].remaining_s == 0
    # Long before the first kind is done, and within a factor of two.
    early = seen[len(seen) // 9]
    assert early.done == 0
    assert clock.now_s / 2 < early.remaining_s < 2 * clock.now_s
    assert "requests/s" in early.sentence
    assert seen[-1].points == sum(
        len(sweep_kind(MadeUp(), plan((tp,)), "short", tp, MemoryCache())) for tp in (2, 4, 8)
    )


def test_the_gate_sees_enough_of_the_rarest_bucket() -> None:
    scheme = ClassScheme()
    rare = rarest_share({"short": [(100, 10)] * 25 + [(500, 10)] * 75, "all": [(100, 10)] + [(500, 10)] * 999}, scheme)
    assert rare == {"short": 0.25, "all": 0.001}
    wanted = SweepPlan(groups=(SHORT,), rarest=rare)
    assert wanted.gate_requests("short") == wanted.settings.gate_requests / 0.25
    assert wanted.gate_requests("all") == wanted.settings.gate_requests / wanted.settings.least_share


def test_profile_parts_come_from_the_samples() -> None:
    scheme = ClassScheme()
    groups = samples_by_group([(100, 10), (500, 400), (3000, 10), (3000, 20)], DEFAULT_GROUPS, scheme)
    assert {name: len(mine) for name, mine in groups.items()} == {"all": 4, "short": 2, "long": 2}
    mix = class_mix(groups["long"], scheme)
    assert mix[RequestClass.parse("LS")].share == 1.0
    assert mix[RequestClass.parse("LS")].output_tokens == 15.0
    backend = MadeUp()
    profile = profile_of(backend, plan(), sweep(backend, plan(), MemoryCache()))
    assert profile.work.output_s == pytest.approx(3 * profile.work.input_s)
    assert profile.idle_power_w(4, 800) == backend.idle_w(4, 800)
    assert Profile.from_json(profile.to_json()) == profile


def test_of_two_points_at_one_load_the_better_measured_counts() -> None:
    backend = MadeUp()
    few = backend.measure(PointRequest("short", 4, 1980, 1.0, 100, 1))
    many = backend.measure(PointRequest("short", 4, 1980, 1.0, 5000, 1))
    assert set_of([few, many]) == set_of([many, few]) == [many]


# ----------------------------------------------------------------------------------------- repeats, caps, actuators


def test_repeats_tell_how_sure_a_point_is_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    wanted = replace(plan(), settings=replace(plan().settings, repeats=3))
    backend = MadeUp(jitter=0.02)
    points = sweep_kind(backend, wanted, "short", 4, MemoryCache())
    assert {p.repeats for p in points} == {3}
    errors = [p.power_error_ratio for p in points]
    assert 0 < max(errors) < 0.03
    # Pass by pass: the last repeat of every point comes after the first of every other.
    seeds = [request.seed for request in backend.asked]
    assert seeds == sorted(seeds)
    assert len(set(seeds)) == 3
    again = MadeUp(jitter=0.02, stop_after=len(seeds) - 5)
    with pytest.raises(StoppedError):
        sweep_kind(again, wanted, "short", 4, FileCache(tmp_path / "points.jsonl"))
    rest = MadeUp(jitter=0.02)
    assert sweep_kind(rest, wanted, "short", 4, FileCache(tmp_path / "points.jsonl")) == points
    assert len(rest.asked) == 5
    profile = profile_of(rest, wanted, points)
    assert profile.schema == 2
    assert Profile.from_json(profile.to_json()) == profile


def test_one_bad_run_of_two_is_not_averaged_away() -> None:
    good = MadeUp().measure(PointRequest("short", 4, 1980, 1.0, 500, 1))
    bad = replace(good, gap_p99_ms=300.0, ttft_p99_ms={Bucket.S: 900.0}, attainment_worst=0.95)
    mean = mean_of([good, bad])
    assert (mean.gap_p99_ms, mean.ttft_p99_ms[Bucket.S]) == (300.0, 900.0)
    assert not mean.in_slo(plan().slo)
    assert mean.attainment_sd > 0


@pytest.mark.parametrize(("extra", "better"), [(0.2, Actuator.CLOCK), (-0.2, Actuator.CAP), (0.0, Actuator.EITHER)])
def test_the_better_actuator_is_found_by_measurement(extra: float, better: Actuator) -> None:
    backend = MadeUp(cap_extra=extra)
    # As fast as the clocks 1390, 1693 and 1980 MHz are.
    wanted = replace(plan(clocks=(1390, 1690, 1980)), caps_w=(451.0, 527.0, 600.0))
    profile = profile_of(backend, wanted, sweep_kind(backend, wanted, "short", 4, MemoryCache()))
    serving = [row for row in profile.actuators if row.phase == SERVING and row.load < 0.8 * backend.knee_rps(4, 1390)]
    assert serving
    assert {row.better for row in serving} == {better}
    alone = [row for row in profile.actuators if row.phase in set(Phase)]
    assert {row.phase for row in alone} == set(Phase)
    assert {row.better for row in alone} == {better}
    assert all(point.cap_w is None for point in profile.points)
    rows = caps_by_kind(profile.actuators)
    assert bool(rows) is (better is Actuator.CAP)
    if rows:
        chosen = cap_for(rows["short", 4], serving[0].load)
        assert chosen is not None
        assert chosen.cap_w == 451.0
        assert cap_for(rows["short", 4], 100.0) is None  # beyond what was measured


def test_what_scatters_as_much_as_it_differs_is_not_called_better() -> None:
    backend = MadeUp(cap_extra=-0.02, jitter=0.05)
    settings = replace(plan().settings, repeats=2)
    wanted = replace(plan(clocks=(1390, 1690, 1980)), caps_w=(451.0, 527.0, 600.0), settings=settings)
    profile = profile_of(backend, wanted, sweep_kind(backend, wanted, "short", 4, MemoryCache()))
    serving = [row for row in profile.actuators if row.phase == SERVING and row.mhz and row.cap_w]
    unsure = [row for row in serving if 2 * row.error_ratio > abs(1 - row.cap_power_w / row.clock_power_w)]
    assert unsure
    assert {row.better for row in unsure} == {Actuator.EITHER}


def test_lower_caps_are_left_out_once_the_slo_breaks() -> None:
    backend = MadeUp()
    wanted = replace(plan(clocks=(1980,)), caps_w=(150.0, 200.0, 300.0, 600.0))
    points = sweep_kind(backend, wanted, "short", 4, MemoryCache())
    capped = [p for p in points if p.cap_w is not None]
    light, heavy = (p.rate_rps for p in (min(capped, key=by_load), max(capped, key=by_load)))
    assert {p.cap_w for p in capped if p.rate_rps == light} == set(wanted.caps_w)
    assert {p.cap_w for p in capped if p.rate_rps == heavy} < set(wanted.caps_w) - {150.0}


def by_load(point: OperatingPoint) -> float:
    return point.rate_rps
