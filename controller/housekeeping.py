"""What the leader does for its history once in a while: prunes it, and counts what yesterday saved."""

from __future__ import annotations

import asyncio

from sqlalchemy import Engine

from common.clock import Clock
from common.errors import UserError
from common.logs import get_logger
from controller.config import ControllerConfig
from controller.savings import Course, savings
from controller.store.engine import StoreUnavailable
from controller.store.repositories import write_records
from controller.store.retention import prune

_log = get_logger(__name__)

_FIRST_S = 120.0  # not while a fleet is just coming up
_EVERY_S = 3600.0
_DAY_S = 86_400.0


async def keep_house(config: ControllerConfig, engine: Engine, clock: Clock) -> None:
    """Runs until it is cancelled; a database that fails is tried again an hour later."""
    delay_s = _FIRST_S
    while True:
        await asyncio.sleep(delay_s)
        delay_s = _EVERY_S
        try:
            done = await asyncio.to_thread(prune, engine, config.retention.limits(), clock.wall_s())
        except StoreUnavailable as error:
            _log.warning("history_not_pruned", detail=error.why)
            continue
        if any(done.values()):
            _log.info("history_pruned", **{table: rows for table, rows in sorted(done.items()) if rows})
        now_s = clock.wall_s()
        usd, carbon = (Course((0.0,), (v,)) for v in (config.savings.usd_per_kwh, config.savings.g_per_kwh))
        try:
            # Yesterday whole, today so far; the same rows are renewed every hour.
            since_s = now_s - now_s % _DAY_S - _DAY_S
            rows = await asyncio.to_thread(savings, engine, since_s, now_s, usd, carbon, now_s)
            await asyncio.to_thread(write_records, engine, rows)
        except UserError as error:
            _log.info("savings_not_counted", detail=error.message)
