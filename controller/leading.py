"""Getting and keeping the lead: wait in standby, renew in time, and know when it may be gone.

On Postgres several controllers may run: one leads, the others poll its row, whose expiry is by the database's clock.
On SQLite there is one machine and one controller: a second one is refused.

    killed leader      its row expires after TTL_S; a standby polls every POLL_S: it leads within TTL_S + POLL_S
    stopped leader     gives the lead up: within POLL_S
    frozen leader      (SIGSTOP, a paused machine) finds on waking that its time is over: nothing is sent out before the
                       database has confirmed the lead or named the successor; agents refuse the old term in any case
    database gone      nobody can take the lead, so the leader goes on (agents fence by term)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from sqlalchemy import Engine

from common.errors import EXIT_ALREADY_RUNNING, UserError
from common.logs import get_logger
from controller.store.engine import StoreUnavailable, open_engine
from controller.store.leadership import Lead, Refused, acquire, leader, release, renew

_log = get_logger(__name__)

TTL_S = 10.0
RENEW_S = TTL_S / 5
POLL_S = 0.5
# After an outage of the database the row has expired for everybody: the one that leads is let to renew it first.
GRACE_S = 2 * RENEW_S + 1.0
_PATIENCE_S = 2.0

T = TypeVar("T")


async def take_lead(
    url: str, holder: str, stop: asyncio.Event, on_standby: Callable[[str], None], alive: Callable[[], None]
) -> LeadKeeper | None:
    """The lead, as soon as it is free; None when `stop` was set first. Raises UserError on SQLite when it is not free.

    `on_standby` is told whom it waits for, whenever that changes; `alive` is called with every look.
    """
    engine = open_engine(url, patience_s=_PATIENCE_S)
    single = engine.dialect.name == "sqlite"
    waiting_for, database_up = "", True
    failed_s = float("-inf")
    while not stop.is_set():
        asked_s = time.monotonic()
        alive()
        try:
            if time.monotonic() - failed_s < GRACE_S:
                await _within(_PATIENCE_S * 3, _in_thread(lambda: leader(engine)))
                await _sleep(stop, POLL_S)
                continue
            taken = await _within(_PATIENCE_S * 3, _in_thread(lambda: _take(engine, holder, single)))
        except StoreUnavailable as error:
            if database_up:
                _log.warning("lead_not_asked_for", detail=error.why)
            database_up = False
            failed_s = time.monotonic()
        else:
            database_up = True
            if isinstance(taken, Lead):
                return LeadKeeper(engine, taken, asked_s)
            if single:
                raise UserError(
                    f"controller {taken.holder} leads under term {taken.term}.",
                    "On SQLite only one controller can run. Stop it first, or use Postgres.",
                    EXIT_ALREADY_RUNNING,
                )
            if taken.holder != waiting_for:
                waiting_for = taken.holder
                on_standby(f"{taken.holder} leads under term {taken.term}")
        await _sleep(stop, POLL_S)
    engine.dispose()
    return None


def _take(engine: Engine, holder: str, single: bool) -> Lead | Refused:
    taken = acquire(engine, holder, TTL_S)
    if isinstance(taken, Refused) and single:
        # The lock on the database file is ours: whoever held the lead is dead.
        dead = leader(engine)
        if dead is not None:
            release(engine, dead)
        taken = acquire(engine, holder, TTL_S)
    return taken


class LeadKeeper:
    """Renews a lead until it is lost or given up. `asked_s` is the monotonic time before the lead was asked for."""

    def __init__(self, engine: Engine, lead: Lead, asked_s: float) -> None:
        self.lead = lead
        self.lost_to: str | None = None
        self._engine = engine
        self._sure_until_s = asked_s + TTL_S
        self._database_up = True
        self._asked = asyncio.Event()

    async def keep(self, on_lost: Callable[[], None]) -> None:
        """Runs until the lead is lost (`on_lost` is called) or the task is cancelled."""
        pending: asyncio.Future[str | None] | None = None
        while True:
            asked_s = time.monotonic()
            try:
                if pending is None or pending.done():  # one that hangs in a frozen database is not asked again beside
                    pending = _in_thread(self._renew)
                successor = await _within(_PATIENCE_S, asyncio.shield(pending))
                if successor is not None:
                    self.lost_to = successor
                    break
                if not self._database_up:
                    _log.info("lead_renewed_again")
                self._database_up = True
            except StoreUnavailable as error:
                if self._database_up:
                    _log.warning("lead_not_renewed", detail=error.why)
                self._database_up = False
            # Without the database nobody else can take the lead either: what was asked just now, and not denied, holds.
            self._sure_until_s = asked_s + TTL_S
            self._asked.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), RENEW_S)
        on_lost()

    def _renew(self) -> str | None:
        """None when renewed, else who leads now."""
        if renew(self._engine, self.lead, TTL_S) is not None:
            return None
        now = leader(self._engine)
        return now.holder if now is not None else "nobody"

    def superseded(self) -> None:
        """An agent has seen a higher term: ask at once."""
        self._asked.set()

    @property
    def sure(self) -> bool:
        """False once the lead may have expired without our noticing: then nothing may be sent out."""
        return self.lost_to is None and time.monotonic() < self._sure_until_s

    async def give_up(self) -> None:
        try:
            await _within(_PATIENCE_S, _in_thread(lambda: release(self._engine, self.lead)))
        except StoreUnavailable as error:
            _log.warning("lead_not_released", detail=error.why)


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Runs blocking work in a thread that dies with the process: a frozen database may hold it for ever."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T has it

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:
            result, error = None, raised
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="leadership", daemon=True).start()
    return future


async def _within(seconds: float, future: Awaitable[T]) -> T:
    try:
        return await asyncio.wait_for(future, seconds)
    except TimeoutError:
        raise StoreUnavailable(f"no answer within {seconds:g} s") from None


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
