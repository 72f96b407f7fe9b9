"""The clairvoyant bound: what a controller that knows every request, switches for nothing and at once could reach.

For every epoch of 60 s, and for each way to cut the load into pools by input length, a MILP over what really arrived
chooses whole instances under the same GPU cap and any mix of operating points for them. Its columns are measured here
on the physics, with more clocks than the planner's profile and without its margins, so that a bad profile cannot lower
the bar. A mix of points is cheaper than any single one, and whatever arrives in an epoch is served within it: both
only make the bound lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from controller.calibrate.sweep import Phase, SweepPlan
from controller.domain.classes import ALL_CLASSES, ClassGroup, by_input
from controller.domain.slo import Slo
from simulator.calibration import MIX_SEED, TwinBackend, arrivals
from simulator.fast.static import gap_quantile_s, static_engines
from simulator.outcome import WARM_UP_S, classes_of
from simulator.physics import Physics
from simulator.traces import Kind, Trace, token_mix

EPOCH_S = 60.0
GROUPS: tuple[ClassGroup, ...] = (
    by_input("all", "SML"),
    by_input("short", "SM"),
    by_input("long", "L"),
    by_input("input S", "S"),
    by_input("input M", "M"),
)
PARTITIONS = (("all",), ("short", "long"), ("input S", "input M", "long"))
CLOCKS_MHZ = (600, 795, 900, 1005, 1200, 1395, 1695, 1980)
# Loads are shared by that many instances while a column is measured: the more, the more the router evens out.
INSTANCES = 8
REQUESTS = 8_000
SAMPLES = 20_000
KNEE_PRECISION = 1.02
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # of the knee, beside idle


class BoundColumn(NamedTuple):
    """One instance at one operating point; `rate_rps` in mean requests of its group."""

    group: str
    tp: int
    mhz: int
    rate_rps: float
    power_w: float


@dataclass(frozen=True, slots=True)
class BoundTable:
    """Columns, and the work of tokens (only its ratio to a group's mean request matters)."""

    columns: tuple[BoundColumn, ...]
    input_s: float
    output_s: float
    mean_work_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Bound:
    """Energy of the window at least, and its course by epoch."""

    energy_off_kwh: float
    energy_parked_kwh: float
    power_off_w: list[float]
    power_parked_w: list[float]
    overloaded_epochs: int  # with more load than all GPUs carry in SLO: counted at what they carry


# ------------------------------------------------------------------------------------------------- measuring


def samples_of(mix: Kind | Trace) -> NDArray[np.int64]:
    return np.array(token_mix(mix, SAMPLES, MIX_SEED))


def measure_kind(physics: Physics, mix: Kind | Trace, group: ClassGroup, tp: int, slo: Slo) -> list[BoundColumn]:
    """All operating points of one kind of instance that meet the SLO. Empty for a group without requests."""
    tokens = samples_of(mix)
    numbers = [number for number, c in enumerate(ALL_CLASSES) if c in group.classes]
    whole = Trace("mix", 1.0, np.zeros(len(tokens)), tokens[:, 0], tokens[:, 1])
    mine = tokens[np.isin(classes_of(whole, SweepPlan().scheme), numbers)]
    if not len(mine):
        return []
    columns = [BoundColumn(group.name, tp, mhz, 0.0, physics.idle_w(mhz, context=True) * tp) for mhz in CLOCKS_MHZ]
    above_rps: float | None = None
    for mhz in reversed(CLOCKS_MHZ):
        knee_rps = _knee(physics, mine, tp, mhz, slo, above_rps)
        if knee_rps == 0:
            break
        above_rps = knee_rps
        for share in SHARES:
            power_w, _ = _measure(physics, mine, tp, mhz, knee_rps * share, slo)
            columns.append(BoundColumn(group.name, tp, mhz, knee_rps * share, power_w))
    return _useful(columns)


def _useful(columns: Sequence[BoundColumn]) -> list[BoundColumn]:
    """Without what another column beats in both load and power."""
    useful: list[BoundColumn] = []
    for column in sorted(columns, key=lambda c: (c.power_w, -c.rate_rps)):
        if not useful or column.rate_rps > useful[-1].rate_rps:
            useful.append(column)
    return useful


def _knee(physics: Physics, mine: NDArray[np.int64], tp: int, mhz: int, slo: Slo, above_rps: float | None) -> float:
    """Largest rate of one instance in SLO; no more than at the clock above."""
    good, bad = 0.0, above_rps * 1.05 if above_rps is not None else 0.5
    while above_rps is None and _measure(physics, mine, tp, mhz, bad, slo)[1]:
        good, bad = bad, bad * 2
    while bad > 0.05 and (good == 0 or bad > good * KNEE_PRECISION):
        middle = (good * bad) ** 0.5 if good else bad / 2
        good, bad = (middle, bad) if _measure(physics, mine, tp, mhz, middle, slo)[1] else (good, middle)
    return good


def _measure(
    physics: Physics, mine: NDArray[np.int64], tp: int, mhz: int, rate_rps: float, slo: Slo
) -> tuple[float, bool]:
    """Mean power of one instance in W, and whether every input bucket is in SLO."""
    samples = [(int(i), int(o)) for i, o in mine]
    requests = arrivals(samples, rate_rps * INSTANCES, REQUESTS, MIX_SEED)
    at_s, inputs, outputs = (np.array(column) for column in zip(*requests, strict=True))
    trace = Trace("column", float(at_s[-1]), at_s, inputs, outputs)
    engines = static_engines(physics, trace, INSTANCES, tp, mhz)
    open_s = float(at_s[len(at_s) // 10])
    engines.advance(open_s)
    before_j = engines.energy_j().sum()
    engines.advance(float(at_s[-1]))
    joules = engines.energy_j().sum() - before_j
    engines.finish()
    inside = at_s >= open_s
    first_s, finished_s = engines.results["first_s"], engines.results["finished_s"]
    buckets = classes_of(trace, SweepPlan().scheme) // 3
    bounds_s = np.array([slo.ttft_s_ms, slo.ttft_m_ms, slo.ttft_l_ms])[buckets] / 1e3
    with np.errstate(invalid="ignore"):
        good = (first_s - at_s <= bounds_s) & (finished_s - first_s <= slo.tbt_ms / 1e3 * np.maximum(outputs - 1, 1))
    in_slo = gap_quantile_s(engines.gaps, 0.99) * 1e3 <= slo.token_gap_p99_ms and all(
        good[inside & (buckets == bucket)].mean() >= slo.attainment for bucket in np.unique(buckets[inside])
    )
    return float(joules / (at_s[-1] - open_s) / INSTANCES), bool(in_slo)


def table_of(physics: Physics, mix: Kind | Trace, columns: Sequence[BoundColumn]) -> BoundTable:
    tokens = samples_of(mix)
    mean = (float(tokens[:, 0].mean()), float(tokens[:, 1].mean()))
    backend = TwinBackend(physics, SweepPlan(), {})
    tp, mhz = max(physics.tps), physics.clocks_mhz[-1]
    input_s, _ = backend.saturated(Phase.PREFILL, tp, mhz, mean)
    output_s, _ = backend.saturated(Phase.DECODE, tp, mhz, mean)
    work_s = input_s * tokens[:, 0] + output_s * tokens[:, 1]
    whole = Trace("mix", 1.0, np.zeros(len(tokens)), tokens[:, 0], tokens[:, 1])
    classes = classes_of(whole, SweepPlan().scheme)
    means = {}
    for group in GROUPS:
        mine = np.isin(classes, [number for number, c in enumerate(ALL_CLASSES) if c in group.classes])
        if mine.any():
            means[group.name] = float(work_s[mine].mean())
    return BoundTable(tuple(columns), input_s, output_s, means)


# --------------------------------------------------------------------------------------------------- bounding


def clairvoyant(table: BoundTable, trace: Trace, gpus: int, parked_w: float) -> Bound:
    """The bound over the ledger's window of a trace."""
    close_s = float(trace.arrival_s[-1])
    epochs = max(1, int(np.ceil((close_s - WARM_UP_S) / EPOCH_S - 1e-9)))
    seconds = np.diff(np.append(WARM_UP_S + EPOCH_S * np.arange(epochs), close_s))
    demands = _demands(table, trace, epochs, seconds)
    partitions = [
        _Partition(table, names, gpus) for names in PARTITIONS if all(name in table.mean_work_s for name in names)
    ]
    off_w, parked_by_epoch_w, overloaded = [], [], 0
    for epoch in range(epochs):
        best: list[float] = []
        for freed_w in (0.0, parked_w):
            found = [p.least_w({g: demands[g][epoch] for g in p.names}, freed_w) for p in partitions]
            feasible = [watts for watts in found if watts is not None]
            if feasible:
                best.append(min(feasible))
        if len(best) < 2:
            overloaded += 1
            share = max(p.most_share({g: demands[g][epoch] for g in p.names}) for p in partitions)
            best = []
            for freed_w in (0.0, parked_w):
                found = [
                    p.least_w({g: demands[g][epoch] * share * 0.999 for g in p.names}, freed_w) for p in partitions
                ]
                best.append(min(watts for watts in found if watts is not None))
        off_w.append(best[0])
        parked_by_epoch_w.append(best[1])
    return Bound(
        float(np.dot(off_w, seconds)) / 3.6e6,
        float(np.dot(parked_by_epoch_w, seconds)) / 3.6e6,
        off_w,
        parked_by_epoch_w,
        overloaded,
    )


def _demands(
    table: BoundTable, trace: Trace, epochs: int, seconds: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """What arrived in each epoch, in mean requests/s of each group."""
    inside = trace.arrival_s >= WARM_UP_S
    epoch = np.minimum(((trace.arrival_s[inside] - WARM_UP_S) // EPOCH_S).astype(int), epochs - 1)
    work_s = (table.input_s * trace.input_tokens + table.output_s * trace.output_tokens)[inside]
    classes = classes_of(trace, SweepPlan().scheme)[inside]
    demands = {}
    for group in GROUPS:
        if group.name in table.mean_work_s:
            mine = np.isin(classes, [number for number, c in enumerate(ALL_CLASSES) if c in group.classes])
            total_s = np.bincount(epoch, weights=work_s * mine, minlength=epochs)
            demands[group.name] = total_s / table.mean_work_s[group.name] / seconds
    return demands


class _Partition:
    """The MILP of one way to cut the load: whole instances by (pool, TP), instances at each column in any share."""

    def __init__(self, table: BoundTable, names: Sequence[str], gpus: int) -> None:
        self.names = tuple(names)
        self._columns = [c for c in table.columns if c.group in names]
        self._kinds = sorted({(c.group, c.tp) for c in self._columns})
        self._gpus = gpus
        columns, kinds = len(self._columns), len(self._kinds)
        rows: list[list[float]] = []
        for group, tp in self._kinds:  # what runs is what is there
            rows.append([float((c.group, c.tp) == (group, tp)) for c in self._columns])
        self._balance = np.hstack([np.array(rows), -np.eye(kinds)])
        self._rates = np.zeros((len(self.names), columns + kinds))
        for row, name in enumerate(self.names):
            self._rates[row, :columns] = [c.rate_rps if c.group == name else 0.0 for c in self._columns]
        self._used = np.array([0.0] * columns + [float(tp) for _, tp in self._kinds])
        self._power_w = np.array([c.power_w for c in self._columns] + [0.0] * kinds)
        self._integral = np.array([0] * columns + [1] * kinds)

    def least_w(self, demand: dict[str, float], freed_w: float) -> float | None:
        """Least power that carries the demand, a GPU without an instance drawing `freed_w`; None beyond all GPUs."""
        lows = np.array([demand[name] for name in self.names])
        matrix = np.vstack([self._balance, self._rates, self._used])
        kinds = len(self._kinds)
        constraint = LinearConstraint(
            csr_matrix(matrix),
            np.concatenate([np.zeros(kinds), lows, [0.0]]),
            np.concatenate([np.zeros(kinds), np.full(len(lows), np.inf), [float(self._gpus)]]),
        )
        found = milp(
            self._power_w - freed_w * self._used,
            constraints=constraint,
            integrality=self._integral,
            bounds=Bounds(0, np.inf),
            options={"mip_rel_gap": 1e-3, "node_limit": 5000},
        )
        if found.x is None:
            return None
        # The dual bound, not the solution found: a bound must not be too high.
        value = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
        return float(value) + freed_w * self._gpus

    def most_share(self, demand: dict[str, float]) -> float:
        """The largest share of a demand that all GPUs carry, to a thousandth."""
        good, bad = 0.0, 1.0
        while bad - good > 1e-3:
            middle = (good + bad) / 2
            carried = self.least_w({name: rate * middle for name, rate in demand.items()}, 0.0) is not None
            good, bad = (middle, bad) if carried else (good, middle)
        return good
