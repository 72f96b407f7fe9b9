"""What was saved: measured energy against what other ways to run the same fleet would have drawn for the same load.

Per window of the history: the joules of every GPU (empty ones too) on one side; on the other the profile's power of

    single_pool   one pool of the widest instances over all GPUs, full clock: how fleets are run without us
    best_clock    the same, at the one clock of least power that meets the SLO in that window
    autoscaler    the same instances at full clock, as many as 80 % utilisation needs over the last 15 minutes
    full_clock    the instances that ran, at full clock: what the clocks alone saved (also per pool)

A profile errs. How far it erred on what really ran, in the same windows, is measured (realised over predicted), the
counterfactual is corrected by it, and its spread (bootstrap over blocks of ten minutes) gives the interval. Windows
without a load row count as idle, which can only make a saving smaller.
"""

from __future__ import annotations

import csv
import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import ceil
from pathlib import Path

from sqlalchemy import Engine, case, func, select
from sqlalchemy.orm import Session

from common.errors import UserError
from controller.domain.classes import RequestClass
from controller.domain.gpu_state import GpuState
from controller.profile.fit import Curve, ProfileFit, fit
from controller.profile.table import Profile
from controller.store.engine import reading
from controller.store.models import LoadMinuteModel, ProfileModel, TelemetryMinuteModel
from controller.store.records import SavingRow

AGAINST = ("single_pool", "best_clock", "autoscaler", "full_clock")
CLUSTER = ""
_BLOCK_S = 600.0
_RESAMPLES = 400
_UTILISATION = 0.8
_SCALE_DOWN_S = 900.0
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Course:
    """A price or a carbon intensity over time: each value holds from its time on."""

    times_s: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, time_s: float) -> float:
        return self.values[max(0, bisect_right(self.times_s, time_s) - 1)]


def read_course(text: str, option: str) -> Course:
    """A number, or a CSV file of rows `time,value` (UTC, rising), with a header or without. Raises UserError."""
    try:
        return Course((0.0,), (float(text),))
    except ValueError:
        pass
    try:
        rows = [row for row in csv.reader(Path(text).read_text(encoding="utf-8-sig").splitlines()) if row]
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(f"{option} {text}: neither a number nor a CSV file that can be read.", "Check it.") from None
    times: list[float] = []
    values: list[float] = []
    for line, row in enumerate(rows, start=1):
        try:
            at = datetime.fromisoformat(row[0].strip())
            time_s, value = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp(), float(row[1])
        except (ValueError, IndexError):
            if line == 1:
                continue  # the header
            raise UserError(f"{text}:{line}: is not `time,value`.", "Write 2026-03-01T14:00,0.12.") from None
        if times and time_s <= times[-1]:
            raise UserError(f"{text}:{line}: times must rise.", "Sort the file.")
        times.append(time_s)
        values.append(value)
    if not times:
        raise UserError(f"{text}: holds no rows.", "Give rows of time,value.")
    return Course(tuple(times), tuple(values))


@dataclass(slots=True)
class _Instance:
    pool: str
    gpu_s: float = 0.0
    mhz_s: float = 0.0
    energy_j: float = 0.0
    gpus: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Window:
    """One window of the history."""

    start_s: float
    seconds: float
    energy_j: float = 0.0
    gpu_s: float = 0.0
    unmeasured_gpu_s: float = 0.0
    instances: dict[str, _Instance] = field(default_factory=dict)  # those that served or idled
    arrived: dict[RequestClass, int] = field(default_factory=dict)
    completed: dict[RequestClass, int] = field(default_factory=dict)
    tokens: dict[RequestClass, tuple[float, float]] = field(default_factory=dict)

    @property
    def gpus(self) -> float:
        return self.gpu_s / self.seconds


def savings(
    engine: Engine, since_s: float, until_s: float, usd: Course, carbon: Course, now_s: float
) -> list[SavingRow]:
    """By day, pool and counterfactual. Raises StoreUnavailable, UserError where there is nothing to count."""
    model, curves = _profile(engine, until_s)
    windows = _windows(engine, since_s, until_s, model.model)
    if not windows:
        raise UserError("no energy of that time is in the history.", "Name another time with --from and --to.")
    priced = [_Priced.of(model, curves, window) for window in windows]
    _autoscale(model, curves, priced)
    rows: list[SavingRow] = []
    for day in sorted({_day(item.window.start_s) for item in priced}):
        today = [item for item in priced if _day(item.window.start_s) == day]
        for pool in (CLUSTER, *sorted({pool for item in today for pool in item.by_pool})):
            rows += _rows(model.model, day, pool, today, usd, carbon, now_s)
    return rows


# ------------------------------------------------------------------------------------------------- one window


@dataclass(slots=True)
class _Priced:
    """A window with what each way to run it would have drawn, by the profile."""

    window: _Window
    rate: float  # equivalent requests/s of the whole load
    against_w: dict[str, float]
    own_j: float  # what the profile says of the instances that ran
    real_j: float  # and what they drew
    by_pool: dict[str, tuple[float, float, float]]  # measured J, predicted J, predicted J at full clock

    @staticmethod
    def of(profile: Profile, curves: ProfileFit, window: _Window) -> _Priced:
        rates = {c: n / window.seconds for c, n in window.arrived.items()}
        widest = max(profile.tps)
        group = profile.groups[0].name
        rate = profile.equivalent_rate(group, rates, window.tokens)
        instances = max(1, int(window.gpus / widest + 1e-6))
        clocks = curves.clocks(group, widest)
        full = clocks[-1]
        rest_w = profile.parked_w * max(0.0, window.gpus - instances * widest)
        single_w = instances * _power_w(full, rate / instances) + rest_w
        fitting = [c for c in clocks if c.max_rate_rps >= rate / instances and c.max_rate_rps > 0] or [full]
        best_w = min(instances * _power_w(curve, rate / instances) for curve in fitting) + rest_w
        by_pool = _by_pool(profile, curves, window, rates)
        own_j = sum(predicted for _, predicted, _ in by_pool.values())
        real_j = sum(measured for measured, _, _ in by_pool.values())
        full_w = (window.energy_j + sum(at_full - p for _, p, at_full in by_pool.values())) / window.seconds
        against = {"single_pool": single_w, "best_clock": best_w, "autoscaler": single_w, "full_clock": full_w}
        return _Priced(window, rate, against, own_j, real_j, by_pool)


def _by_pool(
    profile: Profile, curves: ProfileFit, window: _Window, rates: Mapping[RequestClass, float]
) -> dict[str, tuple[float, float, float]]:
    """Measured and predicted joules of each pool's working instances, which share their pool's load by capacity."""
    found: dict[str, tuple[float, float, float]] = {}
    known = {group.name: group for group in profile.groups}
    for pool in sorted({i.pool for i in window.instances.values()} & set(known)):
        mine = [i for i in window.instances.values() if i.pool == pool]
        own = {c: rate for c, rate in rates.items() if c in known[pool].classes}
        rate = profile.equivalent_rate(pool, own, window.tokens)
        carried = sum(curves.max_rate_rps(pool, len(i.gpus)) * i.gpu_s / len(i.gpus) for i in mine) / window.seconds
        measured = predicted = at_full = 0.0
        for item in mine:
            tp = len(item.gpus)
            clocks = curves.clocks(pool, tp)
            if not clocks:
                continue
            share = rate * curves.max_rate_rps(pool, tp) / carried if carried > 0 else 0.0
            mhz = item.mhz_s / item.gpu_s if item.gpu_s else profile.full_mhz
            seconds = item.gpu_s / tp
            measured += item.energy_j
            predicted += seconds * _between(clocks, mhz, share)
            at_full += seconds * _power_w(clocks[-1], share)
        found[pool] = (measured, predicted, at_full)
    return found


def _between(clocks: Sequence[Curve], mhz: float, rate: float) -> float:
    """Power at a mean clock, between the two measured ones around it."""
    above = next((i for i, curve in enumerate(clocks) if curve.mhz >= mhz), len(clocks) - 1)
    if above == 0 or clocks[above].mhz <= mhz:
        return _power_w(clocks[above], rate)
    low, high = clocks[above - 1], clocks[above]
    part = (mhz - low.mhz) / (high.mhz - low.mhz)
    return (1 - part) * _power_w(low, rate) + part * _power_w(high, rate)


def _power_w(curve: Curve, rate: float) -> float:
    """Beyond the measured range as much as was measured at its end: not more than is known."""
    found = curve.power_w(min(rate, curve.rates_rps[-1]))
    return curve.powers_w[-1] if found is None else found


def _autoscale(profile: Profile, curves: ProfileFit, priced: Sequence[_Priced]) -> None:
    """As many full-clock instances as the last quarter of an hour needed; the rest of the GPUs parked."""
    widest, group = max(profile.tps), profile.groups[0].name
    full = curves.clocks(group, widest)[-1]
    if full.max_rate_rps <= 0:
        return
    for index, item in enumerate(priced):
        since_s = item.window.start_s - _SCALE_DOWN_S
        recent = [p.rate for p in priced[max(0, index - 60) : index + 1] if p.window.start_s >= since_s]
        most = max(1, int(item.window.gpus / widest + 1e-6))
        n = min(most, max(1, ceil(max(recent) / (_UTILISATION * full.max_rate_rps))))
        rest_w = profile.parked_w * max(0.0, item.window.gpus - n * widest)
        item.against_w["autoscaler"] = n * _power_w(full, item.rate / n) + rest_w


# ------------------------------------------------------------------------------------------------------ a day


def _rows(
    model: str, day: str, pool: str, today: Sequence[_Priced], usd: Course, carbon: Course, now_s: float
) -> Iterable[SavingRow]:
    names = AGAINST if pool == CLUSTER else ("full_clock",)
    energy_j = sum(_energy_j(item, pool) for item in today)
    low, mid, high = _bias(today)
    weight = energy_j or 1.0
    price = sum(_energy_j(item, pool) * usd.at(item.window.start_s) for item in today) / weight
    grams = sum(_energy_j(item, pool) * carbon.at(item.window.start_s) for item in today) / weight
    covered_s = sum(item.window.seconds for item in today)
    for against in names:
        predicted_j, measured_j = _against_j(today, pool, against)
        yield SavingRow(
            day=day,
            model=model,
            pool=pool,
            against=against,
            covered_s=covered_s,
            energy_j=energy_j,
            against_j=measured_j + predicted_j * mid,
            against_low_j=measured_j + predicted_j * low,
            against_high_j=measured_j + predicted_j * high,
            usd_per_kwh=price,
            g_per_kwh=grams,
            computed_at_s=now_s,
        )


def _energy_j(item: _Priced, pool: str) -> float:
    return item.window.energy_j if pool == CLUSTER else item.by_pool.get(pool, (0.0, 0.0, 0.0))[0]


def _against_j(today: Sequence[_Priced], pool: str, against: str) -> tuple[float, float]:
    """Joules by the profile, which its error applies to, and joules that were measured."""
    if against != "full_clock":
        return sum(item.against_w[against] * item.window.seconds for item in today), 0.0
    predicted = measured = 0.0
    for item in today:
        pools = item.by_pool if pool == CLUSTER else {pool: item.by_pool.get(pool, (0.0, 0.0, 0.0))}
        predicted += sum(at_full - own for _, own, at_full in pools.values())
        measured += _energy_j(item, pool)
    return predicted, measured


def _bias(today: Sequence[_Priced]) -> tuple[float, float, float]:
    """Realised over predicted, with the 95 % interval of a bootstrap over blocks; (0.8, 1, 1.25) where nothing ran."""
    blocks: dict[int, list[float]] = {}
    for item in today:
        block = blocks.setdefault(int(item.window.start_s // _BLOCK_S), [0.0, 0.0])
        block[0] += item.real_j
        block[1] += item.own_j
    pairs = [(real, own) for real, own in blocks.values() if own > 0 and real > 0]
    if not pairs:
        return 0.8, 1.0, 1.25
    mid = sum(real for real, _ in pairs) / sum(own for _, own in pairs)
    if len(pairs) < 3:
        return 0.8 * mid, mid, 1.25 * mid
    chance = random.Random(0)
    ratios = []
    for _ in range(_RESAMPLES):
        drawn = chance.choices(pairs, k=len(pairs))
        ratios.append(sum(real for real, _ in drawn) / sum(own for _, own in drawn))
    ratios.sort()
    return ratios[int(0.025 * _RESAMPLES)], mid, ratios[int(0.975 * _RESAMPLES) - 1]


# ------------------------------------------------------------------------------------------ energy and requests


@dataclass(frozen=True, slots=True)
class Served:
    """One row's time of the history: the energy of all GPUs, and what was served with it. Of `seconds` only `covered_s`
    may be there: nobody led for a while."""

    start_s: float
    seconds: float
    energy_j: float
    requests: float  # equivalent ones
    covered_s: float


def served_minutes(engine: Engine, since_s: float, until_s: float) -> list[Served]:
    """Oldest first; those of which much was not measured are left out. Summed by the database: a day of a large fleet
    is millions of rows. Raises StoreUnavailable, UserError where there is no profile."""
    profile, _ = _profile(engine, until_s)
    group, row = profile.groups[0].name, TelemetryMinuteModel
    unmeasured = func.sum(case((row.energy_j.is_(None), row.seconds), else_=0.0))
    gpu = (
        select(
            row.window_start.label("start_s"),
            row.window_s.label("long_s"),
            func.sum(row.seconds).label("seconds"),
            func.coalesce(func.sum(row.energy_j), 0.0).label("energy_j"),
            unmeasured.label("unmeasured_s"),
        )
        .where(row.window_start >= since_s, row.window_start < until_s)
        .group_by(row.window_start, row.window_s, row.gpu_uuid)
        .subquery()
        .c
    )
    sums = select(
        gpu.start_s,
        gpu.long_s,
        func.sum(gpu.seconds),
        func.sum(gpu.energy_j),
        func.sum(gpu.unmeasured_s),
        func.max(gpu.seconds),
    )
    windows: dict[float, _Window] = {}
    covered: dict[float, float] = {}
    with reading(engine) as session:
        for start_s, long_s, gpu_s, energy_j, unmeasured_s, most_s in session.execute(
            sums.group_by(gpu.start_s, gpu.long_s).order_by(gpu.start_s)
        ):
            if unmeasured_s < _UNMEASURED * gpu_s:
                windows[start_s] = _Window(start_s, long_s, energy_j)
                covered[start_s] = most_s
        _add_load(session, windows, since_s, until_s, profile.model)
    return [
        Served(
            window.start_s,
            window.seconds,
            window.energy_j,
            profile.equivalent_rate(group, {c: float(n) for c, n in window.completed.items()}, window.tokens),
            covered[window.start_s],
        )
        for window in windows.values()
    ]


# ---------------------------------------------------------------------------------------------------- the history


def _profile(engine: Engine, until_s: float) -> tuple[Profile, ProfileFit]:
    query = select(ProfileModel.body).where(ProfileModel.saved_at < until_s).order_by(ProfileModel.saved_at.desc())
    with reading(engine) as session:
        body = session.scalar(query.limit(1))
    if body is None:
        raise UserError("no profile is in the history.", "A controller that has run puts its own there.")
    profile = Profile.from_json(body)
    return profile, fit(profile)


# Share of a window's GPU time whose energy may be unknown.
_UNMEASURED = 0.05
_WORKING = (GpuState.SERVING.value, GpuState.IDLE.value)


def _windows(engine: Engine, since_s: float, until_s: float, model: str) -> list[_Window]:
    """Windows with measured energy, oldest first. A window of which much was not measured is left out."""
    found: dict[float, _Window] = {}
    row = TelemetryMinuteModel
    with reading(engine) as session:
        for item in session.execute(
            select(
                row.window_start, row.window_s, row.gpu_uuid, row.state, row.pool, row.instance_id, row.seconds,
                row.energy_j, row.mean_sm_mhz,
            ).where(row.window_start >= since_s, row.window_start < until_s)
        ):  # fmt: skip
            start_s, window_s, gpu, state, pool, instance_id, seconds, energy_j, mhz = item
            at_s = start_s - start_s % window_s
            window = found.setdefault(at_s, _Window(at_s, window_s))
            window.gpu_s += seconds
            if energy_j is None:
                window.unmeasured_gpu_s += seconds
                continue
            window.energy_j += energy_j
            if state in _WORKING and instance_id and mhz is not None:
                instance = window.instances.setdefault(f"{instance_id}/{pool}", _Instance(pool))
                instance.gpu_s += seconds
                instance.mhz_s += mhz * seconds
                instance.energy_j += energy_j
                instance.gpus.add(gpu)
        _add_load(session, found, since_s, until_s, model)
    whole = (window for _, window in sorted(found.items()))
    return [window for window in whole if window.unmeasured_gpu_s < _UNMEASURED * window.gpu_s]


def _add_load(session: Session, windows: Mapping[float, _Window], since_s: float, until_s: float, model: str) -> None:
    """Puts into each window, by its start, what came and ended in it."""
    load = LoadMinuteModel
    sums: dict[tuple[float, RequestClass], list[int]] = {}
    for start_s, window_s, name, arrived, done, tokens_in, tokens_out in session.execute(
        select(
            load.window_start, load.window_s, load.request_class, load.arrived, load.completed,
            load.input_tokens, load.output_tokens,
        ).where(load.window_start >= since_s, load.window_start < until_s, load.model == model)
    ):  # fmt: skip
        at = sums.setdefault((start_s - start_s % window_s, RequestClass.parse(name)), [0, 0, 0, 0])
        for index, value in enumerate((arrived, tokens_in, done, tokens_out)):
            at[index] += value
    for (start_s, request_class), (arrived, tokens_in, done, tokens_out) in sorted(sums.items()):
        served = windows.get(start_s)
        if served is None:
            continue
        served.arrived[request_class] = arrived
        served.completed[request_class] = done
        if arrived and done:
            served.tokens[request_class] = (tokens_in / arrived, tokens_out / done)


def _day(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, tz=UTC).strftime("%Y-%m-%d")
