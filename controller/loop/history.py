"""What is kept of a running fleet: energy, load and SLO rows per window, and one row per finished transition and
per forecast whose time has come.

Fed by the runtime with the same observations as the core; gives the store's records. Pure but for what it gathers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level
from controller.loop.accounting import EnergyEntry
from controller.loop.latency import ClassLatency, Histogram
from controller.loop.load import ClassWindow, LoadWindow
from controller.loop.state import Instant
from controller.loop.week import ForecastError
from controller.store.records import (
    DecisionOutcome,
    ForecastRow,
    LoadRow,
    Record,
    SloRow,
    TelemetryRow,
    TransitionRow,
)

_NOTHING = Histogram((), (0,))
_EnergyKey = tuple[str, str, GpuState, str, str]


@dataclass(slots=True)
class _Spent:
    seconds: float = 0.0
    energy_j: float = 0.0
    mhz_seconds: float = 0.0
    clocked_s: float = 0.0


@dataclass(slots=True)
class WindowBook:
    """Sums over windows of `window_s` aligned to the wall clock; `close_due` gives the rows of those that ended."""

    term: int
    model: str
    window_s: float
    _start_s: float | None = None
    _spent: dict[_EnergyKey, _Spent] = field(default_factory=dict)
    _load: dict[RequestClass, ClassWindow] = field(default_factory=dict)
    _latency: dict[RequestClass, ClassLatency] = field(default_factory=dict)

    def add(self, entry: EnergyEntry) -> None:
        key = (entry.node_id, entry.gpu_uuid, entry.state, entry.pool, entry.instance_id)
        spent = self._spent.setdefault(key, _Spent())
        spent.seconds += entry.seconds
        spent.energy_j += entry.energy_j
        if entry.sm_mhz is not None:
            spent.mhz_seconds += entry.sm_mhz * entry.seconds
            spent.clocked_s += entry.seconds

    def add_load(self, window: LoadWindow) -> None:
        for request_class, counts in window.classes.items():
            have = self._load.get(request_class)
            self._load[request_class] = counts if have is None else _add(have, counts)

    def add_latency(self, request_class: RequestClass, seen: ClassLatency) -> None:
        have = self._latency.get(request_class)
        self._latency[request_class] = seen if have is None else have + seen

    def close_due(self, now: Instant, *, force: bool = False) -> list[Record]:
        """Rows of the window that has ended; `force` closes the running one (at shutdown)."""
        if self._start_s is None:
            self._start_s = now.wall_s - now.wall_s % self.window_s
        if not force and now.wall_s < self._start_s + self.window_s:
            return []
        rows = [*self._telemetry_rows(self._start_s), *self._load_rows(self._start_s)]
        self._start_s = now.wall_s - now.wall_s % self.window_s
        self._spent = {}
        self._load = {}
        self._latency = {}
        return rows

    def _telemetry_rows(self, start_s: float) -> list[Record]:
        return [
            TelemetryRow(
                term=self.term,
                window_start_s=start_s,
                window_s=self.window_s,
                node_id=node_id,
                gpu_uuid=gpu_uuid,
                state=state,
                seconds=spent.seconds,
                pool=pool,
                instance_id=instance_id,
                energy_j=spent.energy_j,
                mean_power_w=spent.energy_j / spent.seconds,
                mean_sm_mhz=spent.mhz_seconds / spent.clocked_s if spent.clocked_s else None,
            )
            for (node_id, gpu_uuid, state, pool, instance_id), spent in sorted(self._spent.items())
        ]

    def _load_rows(self, start_s: float) -> list[Record]:
        rows: list[Record] = []
        for request_class, counts in sorted(self._load.items()):
            rows.append(
                LoadRow(
                    self.term,
                    start_s,
                    self.window_s,
                    self.model,
                    request_class,
                    arrived=counts.arrived,
                    completed=counts.completed,
                    failed=counts.failed,
                    input_tokens=counts.input_tokens,
                    output_tokens=counts.output_tokens,
                )
            )
            ended = counts.completed + counts.failed
            if ended:
                latency = self._latency.get(request_class)
                ttft, gap = (latency.ttft, latency.gap) if latency else (_NOTHING, _NOTHING)
                rows.append(
                    SloRow(
                        self.term,
                        start_s,
                        self.window_s,
                        self.model,
                        request_class,
                        ended,
                        counts.in_slo,
                        ttft_p50_ms=ttft.quantile_ms(0.5),
                        ttft_p99_ms=ttft.quantile_ms(0.99),
                        token_gap_p50_ms=gap.quantile_ms(0.5),
                        token_gap_p99_ms=gap.quantile_ms(0.99),
                    )
                )
        return rows


def _add(a: ClassWindow, b: ClassWindow) -> ClassWindow:
    return ClassWindow(
        a.arrived + b.arrived,
        a.completed + b.completed,
        a.failed + b.failed,
        a.in_slo + b.in_slo,
        a.input_tokens + b.input_tokens,
        a.output_tokens + b.output_tokens,
    )


@dataclass(slots=True)
class _Open:
    """A decision whose epoch has not ended."""

    decision: Decision
    began_s: float  # wall
    energy_j: float = 0.0
    longest_s: float = 0.0  # span between two readings; 0: none was taken
    told: bool = False  # by any gateway
    ended: int = 0
    in_slo: int = 0
    arrived: int = 0
    latency: ClassLatency | None = None


@dataclass(slots=True)
class OutcomeBook:
    """What happened after each decision until the next one of the same scope: its outcome.

    A pool's energy is that of its instances, as its prediction is; the cluster's is that of every GPU; an instance's
    its own. A clock that stays chosen is measured over `instance_epoch_s`.
    """

    instance_epoch_s: float = 60.0
    _open: dict[tuple[Level, str], _Open] = field(default_factory=dict)

    def add(self, entry: EnergyEntry) -> None:
        for key in ((Level.CLUSTER, "cluster"), (Level.POOL, entry.pool), (Level.INSTANCE, entry.instance_id)):
            item = self._open.get(key)
            if item is not None:
                item.energy_j += entry.energy_j
                item.longest_s = max(item.longest_s, entry.seconds)

    def add_load(self, window: LoadWindow, pool_classes: Mapping[str, frozenset[RequestClass]]) -> None:
        for key, item in self._open.items():
            item.told = True
            for request_class, counts in window.classes.items():
                if _concerns(key, request_class, pool_classes):
                    item.ended += counts.completed + counts.failed
                    item.in_slo += counts.in_slo
                    item.arrived += counts.arrived

    def add_latency(
        self, request_class: RequestClass, seen: ClassLatency, pool_classes: Mapping[str, frozenset[RequestClass]]
    ) -> None:
        for key, item in self._open.items():
            if _concerns(key, request_class, pool_classes):
                item.latency = seen if item.latency is None else item.latency + seen

    def decided(self, decision: Decision, now: Instant) -> list[Record]:
        """Opens a decision and closes the one before it in its scope."""
        key = (decision.level, decision.scope)
        closed = self._close(key, now)
        self._open[key] = _Open(decision, now.wall_s)
        return closed

    def close_due(self, now: Instant) -> list[Record]:
        """Closes clocks whose epoch has ended."""
        due = [
            key
            for key, item in self._open.items()
            if key[0] is Level.INSTANCE and now.wall_s >= item.began_s + self.instance_epoch_s
        ]
        return [record for key in due for record in self._close(key, now)]

    def _close(self, key: tuple[Level, str], now: Instant) -> list[Record]:
        item = self._open.pop(key, None)
        if item is None or now.wall_s <= item.began_s:
            return []
        window_s = now.wall_s - item.began_s
        whole = key[0] is not Level.INSTANCE  # requests are not told by instance
        latency = item.latency
        # Overtaken before it was measured: that is unknown, not 0 W.
        measured = 0 < item.longest_s <= window_s
        return [
            DecisionOutcome(
                item.decision.term,
                item.decision.number,
                measured_at_s=now.wall_s,
                window_s=window_s,
                power_w=item.energy_j / window_s if measured else None,
                energy_j=item.energy_j if measured else None,
                load_rps=item.arrived / window_s if whole and item.told else None,
                slo_attainment=item.in_slo / item.ended if item.ended else None,
                ttft_p99_ms=latency.ttft.quantile_ms(0.99) if latency else None,
                token_gap_p99_ms=latency.gap.quantile_ms(0.99) if latency else None,
            )
        ]


def _concerns(
    key: tuple[Level, str], request_class: RequestClass, pool_classes: Mapping[str, frozenset[RequestClass]]
) -> bool:
    level, scope = key
    return level is Level.CLUSTER or (level is Level.POOL and request_class in pool_classes.get(scope, frozenset()))


@dataclass(slots=True)
class TransitionLog:
    """Follows one way between layouts at a time; a new layout before the end closes the old row as overtaken."""

    term: int
    model: str
    _open: TransitionRow | None = None
    _count: int = 0

    def began(
        self, decision: Decision, now: Instant, before: Mapping[str, int], after: Mapping[str, int]
    ) -> list[Record]:
        """A decision changed the layout from `before` to `after` (instances by pool and tp)."""
        closed = self._close(now, completed=False)
        self._count += 1
        self._open = TransitionRow(
            term=self.term,
            transition_id=f"x{self._count}",
            model=self.model,
            pool="" if decision.level is Level.CLUSTER else decision.scope,
            reason=str(decision.reason),
            started_at_s=now.wall_s,
            duration_s=0.0,
            completed=False,
            starts=sum(max(0, n - before.get(kind, 0)) for kind, n in after.items()),
            stops=sum(max(0, n - after.get(kind, 0)) for kind, n in before.items()),
            decision=decision.number,
            before=dict(before),
            after=dict(after),
        )
        return closed

    def settled(self, now: Instant) -> list[Record]:
        """What is there is what is wanted."""
        return self._close(now, completed=True)

    def _close(self, now: Instant, completed: bool) -> list[Record]:
        if self._open is None:
            return []
        row = replace(self._open, duration_s=now.wall_s - self._open.started_at_s, completed=completed)
        self._open = None
        return [row]


@dataclass(slots=True)
class ForecastLog:
    """Follows the forecasts that the core holds against what came: each gives one row, once its span has ended."""

    term: int
    model: str
    _counts: dict[str, int] = field(default_factory=dict)  # by pool: how many were judged when this looked last

    def judged(self, errors: Mapping[str, ForecastError], now: Instant) -> list[Record]:
        """To be asked after each tick: a pool tick judges at most one forecast of each pool."""
        rows: list[Record] = []
        for pool, error in sorted(errors.items()):
            if error.last is None or self._counts.get(pool) == error.count:
                continue
            self._counts[pool] = error.count
            foreseen = error.last.foreseen
            rows.append(
                ForecastRow(
                    self.term,
                    now.wall_s - (now.monotonic_s - foreseen.from_s),
                    foreseen.until_s - foreseen.from_s,
                    self.model,
                    pool,
                    forecast_rps=foreseen.mean_rps,
                    quantile_rps=foreseen.quantile_rps,
                    plain_forecast_rps=foreseen.plain_mean_rps,
                    plain_quantile_rps=foreseen.plain_quantile_rps,
                    arrived_rps=error.last.came_rps,
                )
            )
        return rows
