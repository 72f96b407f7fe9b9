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
from common.logs import get_logger
from controller.loop.load import LoadBook
from controller.loop.orders import CLUSTER_SCOPE, Order, SetMode
from controller.loop.state import State
from controller.store.engine import StoreUnavailable
from controller.store.records import OrderKind, OrderRecord
from controller.store.repositories import last_orders
from controller.trial import WHO, Trial, next_move

_log = get_logger(__name__)

_EVERY_S = 2.0
# Over which the share of requests in SLO is taken, and how many must have ended in it.
_SLO_WINDOW_S, _SLO_REQUESTS = 60.0, 50


class Levers(Protocol):
    """What of the runtime it needs."""

    @property
    def state(self) -> State: ...

    async def order(self, kind: OrderKind, order: Order, value: str, who: str, why: str) -> None: ...


async def run_trials(runtime: Levers, engine: Engine, clock: Clock) -> None:
    """Runs until it is cancelled."""
    trials = Trials(runtime, engine, clock)
    while True:
        await trials.step()
        await asyncio.sleep(_EVERY_S)


class Trials:
    def __init__(self, runtime: Levers, engine: Engine, clock: Clock) -> None:
        self._runtime = runtime
        self._engine = engine
        self._clock = clock
        self._trial: Trial | None = None
        self._last: OrderRecord | None = None

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
        if move is None:
            return
        value = move.mode.value
        await self._runtime.order(OrderKind.MODE, SetMode(CLUSTER_SCOPE, move.mode), value, WHO, move.why)
        self._last = OrderRecord(state.term, 0, now_s, OrderKind.MODE, CLUSTER_SCOPE, value, WHO, move.why)

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
