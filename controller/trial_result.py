"""What a trial (controller/trial.py) has shown: energy per served request in on and off windows, and how sure that is.

Each pair of windows gives one number: the logarithm of the energy per served equivalent request with the controller,
over that without. Pairs are drawn at random within, so these numbers are independent of the load's course, and their
mean has Student's t distribution with one degree of freedom less than there are pairs. Where the two-sided 95 %
interval reaches zero, no saving was found: a fleet without one passes for one in 2.5 % of all trials.

Pairs of which a window was not kept, or not measured whole, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, floor, log, sqrt

from scipy.special import stdtrit
from sqlalchemy import Engine, select

from controller.loop.orders import CLUSTER_SCOPE
from controller.savings import Served, served_minutes
from controller.store.codec import to_order
from controller.store.engine import reading
from controller.store.models import OrderModel
from controller.store.records import OrderKind, OrderRecord
from controller.trial import LEAST_PAIRS, Trial, windows_kept

CONFIDENCE = 0.95
# Share of a window's counted time that must be in the history.
_WHOLE = 0.8


@dataclass(frozen=True, slots=True)
class Verdict:
    """Shares of the energy per request without the controller; None while there are too few pairs."""

    pairs: int  # that count
    left_out: int  # of those whose time is over
    saved_ratio: float | None = None
    low: float | None = None
    high: float | None = None
    on_j: float | None = None  # per equivalent request, mean over the pairs
    off_j: float | None = None

    @property
    def found(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def sentence(self) -> str:
        if self.saved_ratio is None or self.low is None or self.high is None:
            return f"Pairs of windows that count so far: {self.pairs}; {LEAST_PAIRS} are the least."
        interval = f"{self.low:.1%} to {self.high:.1%} of the energy per request, from {self.pairs} pairs of windows"
        return f"Saved {self.saved_ratio:.1%}: {interval}." if self.found else f"No saving found: {interval}."


def result(engine: Engine, trial: Trial, now_s: float) -> Verdict:
    """What can be said by now. Raises StoreUnavailable, UserError where there is no profile."""
    until_s = min(now_s, trial.ends_s)
    minutes = served_minutes(engine, trial.begins_s, until_s) if until_s > trial.begins_s else []
    return weigh(trial, mode_orders(engine), minutes, now_s)


def mode_orders(engine: Engine) -> list[OrderRecord]:
    """About the cluster's mode, oldest first."""
    row = OrderModel
    query = select(row).where(row.kind == OrderKind.MODE.value, row.scope == CLUSTER_SCOPE)
    with reading(engine) as session:
        return sorted(map(to_order, session.scalars(query)), key=lambda o: (o.ordered_at_s, o.term, o.number))


def weigh(trial: Trial, orders: Sequence[OrderRecord], minutes: Sequence[Served], now_s: float) -> Verdict:
    """The verdict over rows of the history, oldest first."""
    kept = windows_kept(trial, orders)
    spent: dict[int, list[float]] = {}  # by window: J, equivalent requests, seconds that the history covers
    for minute in minutes:
        number = trial.window_at(minute.start_s)
        if number is None or number not in kept:
            continue
        since_s, until_s = trial.span(number)
        if minute.start_s >= since_s and minute.start_s + minute.seconds <= until_s:
            sums = spent.setdefault(number, [0.0, 0.0, 0.0])
            for index, value in enumerate((minute.energy_j, minute.requests, minute.covered_s)):
                sums[index] += value
    per_request: dict[int, float] = {}
    row_s = max((minute.seconds for minute in minutes), default=1.0)
    for number, (energy_j, requests, covered_s) in spent.items():
        since_s, until_s = trial.span(number)
        whole_rows = floor(until_s / row_s + 1e-9) - ceil(since_s / row_s - 1e-9)
        if requests > 0 and energy_j > 0 and covered_s >= _WHOLE * whole_rows * row_s:
            per_request[number] = energy_j / requests
    ratios, on_j, off_j, over = [], [], [], 0
    for pair in range(trial.pairs):
        if trial.begins_s + (2 * pair + 2) * trial.window_s > now_s:
            break
        over += 1
        both = {trial.is_on(number): per_request.get(number) for number in (2 * pair, 2 * pair + 1)}
        with_us, without = both[True], both[False]
        if with_us is not None and without is not None:
            ratios.append(log(with_us / without))
            on_j.append(with_us)
            off_j.append(without)
    n = len(ratios)
    if n < LEAST_PAIRS:
        return Verdict(n, over - n)
    mean = sum(ratios) / n
    spread = sqrt(sum((r - mean) ** 2 for r in ratios) / (n - 1) / n)
    reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * spread
    low, high = 1 - exp(mean + reach), 1 - exp(mean - reach)
    return Verdict(n, over - n, 1 - exp(mean), low, high, sum(on_j) / n, sum(off_j) / n)
