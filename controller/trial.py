"""The live proof of a saving: windows with the controller's hand on the fleet and windows without, in turn, by a plan.

A plan is an order of an operator, kept in the history's `orders` like any other; the controller that leads carries it
out (controller/trials.py), whatever becomes of the command line that gave it. Windows come in pairs, one of each kind
next to the other, so that both meet the same time of day and nearly the same load; a seed draws which comes first.

    on    `active`: the loop acts
    off   `advisory`: it decides and touches nothing. Clock locks end with their leases and every ready instance serves;
          the layout stays. So the trial shows what clocks and standby save on the layout that runs, not what a smaller
          layout saves: that could be had back only after minutes, at the price of requests.

What follows is pure: who ordered what, and when, decides.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from common.errors import UserError
from controller.domain.reasons import Mode
from controller.loop.orders import CLUSTER_SCOPE
from controller.store.records import OrderKind, OrderRecord

WHO = "savings --ab"
LEAST_PAIRS = 3
# Of the requests that ended lately: below it an off window is given up, for the layout cannot grow meanwhile.
LEAST_IN_SLO = 0.95
_OVER, _STOPPED = "the trial is over", "the trial was stopped"


@dataclass(frozen=True, slots=True)
class Trial:
    """`pairs` x 2 windows of `window_s` from `begins_s` on (UTC epoch seconds). The first `settle_s` of each do not
    count: locks run out, clocks are chosen anew."""

    begins_s: float
    window_s: float
    settle_s: float
    pairs: int
    seed: int

    @property
    def windows(self) -> int:
        return 2 * self.pairs

    @property
    def ends_s(self) -> float:
        return self.begins_s + self.windows * self.window_s

    def window_at(self, now_s: float) -> int | None:
        """Number of the window, from 0; None before and after the trial."""
        number = int((now_s - self.begins_s) // self.window_s)
        return number if 0 <= number < self.windows else None

    def span(self, number: int) -> tuple[float, float]:
        """What of a window counts: from, until."""
        start_s = self.begins_s + number * self.window_s
        return start_s + self.settle_s, start_s + self.window_s

    def change_after(self, now_s: float) -> float | None:
        """When the next window begins, or the last one ends; None when all is over."""
        if now_s >= self.ends_s:
            return None
        number = self.window_at(now_s)
        return self.begins_s if number is None else self.begins_s + (number + 1) * self.window_s

    def is_on(self, number: int) -> bool:
        first_on = random.Random(f"{self.seed}/{number // 2}").random() < 0.5
        return first_on == (number % 2 == 0)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Trial:
        return cls(**json.loads(text))


def plan(begins_s: float, total_s: float, window_s: float, settle_s: float, seed: int, row_s: float = 60.0) -> Trial:
    """As many pairs as fit. Windows begin on the grid of the history's rows (`row_s` long). Raises UserError."""
    if window_s < settle_s + 3 * row_s:
        raise UserError(
            f"a window of {window_s:g} s with {settle_s:g} s to settle leaves too few rows of {row_s:g} s.",
            "Make --window longer. The history's rows are as long as the controller's telemetry_window_s.",
        )
    pairs = int(total_s // (2 * window_s))
    if pairs < LEAST_PAIRS:
        raise UserError(
            f"{total_s:g} s hold {pairs} pairs of windows of {window_s:g} s; {LEAST_PAIRS} are the least.",
            "Make --for longer or --window shorter. Ten pairs or more tell small savings.",
        )
    return Trial(begins_s - begins_s % row_s + row_s, window_s, settle_s, pairs, seed)


@dataclass(frozen=True, slots=True)
class Move:
    """The mode to set now, and the reason to keep in the history."""

    mode: Mode
    why: str


def next_move(
    trial: Trial | None, now_s: float, mode: Mode, last: OrderRecord | None, in_slo: float | None
) -> Move | None:
    """What is to be done now. `last` is the last order about the cluster's mode, `in_slo` the share of requests that
    ended well lately; None where that is unknown.

    The cluster is left as it was found, which is active: a trial waits for that. An order of anybody else ends it.
    """
    ours = last is not None and last.who == WHO
    if trial is None or now_s >= trial.ends_s:
        held = ours and mode is Mode.ADVISORY
        return Move(Mode.ACTIVE, _STOPPED if trial is None else _OVER) if held else None
    number = trial.window_at(now_s)
    begun = ours and last is not None and last.ordered_at_s >= trial.begins_s
    if number is None or overruled(trial, last) or (not begun and mode is not Mode.ACTIVE):
        return None
    if trial.is_on(number):
        return Move(Mode.ACTIVE, _says(trial, number, "on")) if mode is not Mode.ACTIVE else None
    if mode is Mode.ADVISORY:
        late = in_slo is not None and in_slo < LEAST_IN_SLO
        return Move(Mode.ACTIVE, _given_up(trial, number, in_slo)) if late and in_slo is not None else None
    if last is not None and last.why.startswith(_given_up(trial, number)):
        return None
    return Move(Mode.ADVISORY, _says(trial, number, "off"))


def overruled(trial: Trial, last: OrderRecord | None) -> bool:
    """Somebody else has set the cluster's mode since the trial began."""
    return last is not None and last.who != WHO and last.ordered_at_s >= trial.begins_s


def where_it_stands(trial: Trial, now_s: float, last: OrderRecord | None) -> str:
    """For whoever looks at the fleet while a trial runs."""
    number = trial.window_at(now_s)
    if last is not None and overruled(trial, last):
        return f"the trial ended when {last.who} set the cluster's mode"
    if now_s >= trial.ends_s:
        return _OVER
    if number is None:
        return f"{trial.pairs} pairs of windows begin at {_clock(trial.begins_s)}"
    kind = "on (active)" if trial.is_on(number) else "off (advisory)"
    if last is not None and last.why.startswith(_given_up(trial, number)):
        kind = "given up"
    return f"{_says(trial, number, kind)} until {_clock(trial.begins_s + (number + 1) * trial.window_s)}"


def _clock(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, tz=UTC):%H:%M:%S} UTC"


def _says(trial: Trial, number: int, what: str) -> str:
    return f"window {number + 1} of {trial.windows} is {what}"


def _given_up(trial: Trial, number: int, in_slo: float | None = None) -> str:
    said = _says(trial, number, "given up")
    return said if in_slo is None else f"{said}: only {in_slo:.1%} of the requests were in SLO"


# ------------------------------------------------------------------------------------------- what was really done


def windows_kept(trial: Trial, orders: Sequence[OrderRecord]) -> set[int]:
    """Windows through which the cluster was in the mode that the plan wanted, by the orders about it, oldest first."""
    changes = [(o.ordered_at_s, o.value) for o in orders if o.kind is OrderKind.MODE and o.scope == CLUSTER_SCOPE]
    if not any(o.who == WHO and o.ordered_at_s >= trial.begins_s for o in orders):
        return set()  # nobody has carried it out
    kept = set()
    for number in range(trial.windows):
        since_s, until_s = trial.span(number)
        before = [value for at_s, value in changes if at_s <= since_s]
        during = {value for at_s, value in changes if since_s < at_s < until_s}
        wanted = Mode.ACTIVE if trial.is_on(number) else Mode.ADVISORY
        if {before[-1] if before else Mode.ACTIVE.value} | during == {wanted.value}:
            kept.add(number)
    return kept
