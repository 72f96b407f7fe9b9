"""Carries trials out (controller/trial.py): the leader's task that sets the cluster's mode as the plan says.

It looks at the history every few seconds, so a plan survives every program but the database; with the database away the
plan known last goes on. What it orders are orders like an operator's: audited, and held over a restart, after which the
next leader goes on, or puts back what is over.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from sqlalchemy import Engine

from common.clock import Clock
from common.errors import UserError
from common.logs import get_logger
from controller.loop.load import LoadBook
from controller.loop.orders import CLUSTER_SCOPE, Order, SetMode
from controller.loop.state import State
from controller.store.engine import StoreUnavailable
from controller.store.records import OrderKind, OrderRecord
from controller.store.repositories import last_orders
from controller.trial import WHO, Trial, next_move, where_it_stands
from controller.trial_result import result

_log = get_logger(__name__)

_EVERY_S = 2.0
_REMEMBERED_S = 86_400.0  # how long the result of one that is over is told
# Over which the share of requests in SLO is taken, and how many must have ended in it.
_SLO_WINDOW_S, _SLO_REQUESTS = 60.0, 50


class Levers(Protocol):
    """What of the runtime it needs."""

    @property
    def state(self) -> State: ...

    async def order(self, kind: OrderKind, order: Order, value: str, who: str, why: str) -> None: ...


TRIAL_LINE = "trial"  # its key beside the levels' sentences


async def run_trials(trials: Trials) -> None:
    """Runs until it is cancelled."""
    while True:
        await trials.step()
        await asyncio.sleep(trials.look_again_s())


class Trials:
    """`said` tells how the trial stands and what it has shown; "" without any."""

    def __init__(self, runtime: Levers, engine: Engine, clock: Clock) -> None:
        self.said = ""
        self._runtime = runtime
        self._engine = engine
        self._clock = clock
        self._trial: Trial | None = None
        self._last: OrderRecord | None = None
        self._shown = ""
        self._weighed: tuple[Trial, int] | None = None  # how many windows had settled then

    def look_again_s(self) -> float:
        """A window begins on time: the first --settle of it is all that is left out."""
        now_s = self._clock.wall_s()
        change_s = self._trial.change_after(now_s) if self._trial is not None else None
        return _EVERY_S if change_s is None else min(_EVERY_S, max(change_s - now_s, 0.0) + 0.01)

    async def step(self) -> None:
        """Looks once, and does what is to be done now."""
        try:
            self._trial, found = await asyncio.to_thread(self._look)
        except StoreUnavailable as error:
            if self._trial is None:
                return
            _log.warning("trial_goes_on_without_database", detail=error.why)
        else:
            # An order of our own may still be on its way into the history.
            if self._last is None or (found is not None and found.ordered_at_s >= self._last.ordered_at_s):
                self._last = found
        now_s, state = self._clock.wall_s(), self._runtime.state
        lately = in_slo(state.load, self._clock.monotonic_s())
        move = next_move(self._trial, now_s, state.mode, self._last, lately)
        if move is not None:
            value = move.mode.value
            await self._runtime.order(OrderKind.MODE, SetMode(CLUSTER_SCOPE, move.mode), value, WHO, move.why)
            self._last = OrderRecord(state.term, 0, now_s, OrderKind.MODE, CLUSTER_SCOPE, value, WHO, move.why)
        await self._tell(now_s)

    async def _tell(self, now_s: float) -> None:
        """How it stands at each look; what it has shown once a window, when its rows are in the history."""
        trial = self._trial
        if trial is None or now_s > trial.ends_s + _REMEMBERED_S:
            self.said, self._shown, self._weighed = "", "", None
            return
        settled = min(int((now_s - trial.settle_s - trial.begins_s) // trial.window_s), trial.windows + 1)
        if self._weighed != (trial, settled):
            try:
                found = await asyncio.to_thread(result, self._engine, trial, now_s)
            except (StoreUnavailable, UserError) as error:
                _log.info("trial_not_weighed", detail=str(error))
            else:
                self._shown, self._weighed = found.sentence, (trial, settled)
        self.said = f"{where_it_stands(trial, now_s, self._last)}. {self._shown}".strip()

    def _look(self) -> tuple[Trial | None, OrderRecord | None]:
        mode = {o.scope: o for o in last_orders(self._engine, OrderKind.MODE)}.get(CLUSTER_SCOPE)
        return last_trial(self._engine), mode


def last_trial(engine: Engine) -> Trial | None:
    """The trial that was ordered last; None when there was none, or it was stopped. Raises StoreUnavailable."""
    for found in last_orders(engine, OrderKind.TRIAL):
        return Trial.from_json(found.value) if found.value else None
    return None


def in_slo(load: LoadBook, now_s: float) -> float | None:
    """Share of the requests that ended in the last minute in SLO; None when too few did."""
    ended = well = 0
    for windows in load.by_gateway(now_s, _SLO_WINDOW_S).values():
        for window in windows:
            for counts in window.classes.values():
                ended += counts.completed + counts.failed
                well += counts.in_slo
    return well / ended if ended >= _SLO_REQUESTS else None
