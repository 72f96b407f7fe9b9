"""Who leads: one row with a holder, an expiry and a term that only ever rises, taken by compare and set.

Terms fence: agents refuse an order from a lower one, so a leader that slept through its expiry can do nothing.
Expiry is by the database's clock, so that machines whose clocks differ agree on it; with SQLite there is only one
machine, and its clock is taken.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, func, or_, select, update

from controller.store.engine import reading, writing
from controller.store.models import LeadershipModel


@dataclass(frozen=True, slots=True)
class Lead:
    """What a leader holds; it must be renewed before `expires_at_s` (UTC epoch seconds)."""

    term: int
    holder: str
    expires_at_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """Another one leads, and may do so until `expires_at_s`."""

    term: int
    holder: str
    expires_at_s: float


def acquire(engine: Engine, holder: str, ttl_s: float, now_s: float | None = None) -> Lead | Refused:
    """Takes the lead under a new term if nobody holds it or the holder's time is over.

    `holder` must be unique to the process (host, pid and something random), so that no two ever pass for one.
    `now_s` overrides the database's clock.
    Raises ValueError for an empty holder, StoreUnavailable when the database fails.
    """
    if not holder:
        raise ValueError("a leader needs a name: empty means that nobody leads")
    row = LeadershipModel
    with writing(engine) as connection:
        now_s = _now_s(connection) if now_s is None else now_s
        expires_at_s = now_s + ttl_s
        taken = connection.execute(
            update(row)
            .where(row.id == 1, or_(row.holder == "", row.expires_at <= now_s))
            .values(term=row.term + 1, holder=holder, expires_at=expires_at_s)
        ).rowcount
        now = connection.execute(select(row.term, row.holder, row.expires_at).where(row.id == 1)).one()
    return Lead(now.term, holder, expires_at_s) if taken else Refused(now.term, now.holder, now.expires_at)


def renew(engine: Engine, lead: Lead, ttl_s: float, now_s: float | None = None) -> Lead | None:
    """The lead with a later expiry; None when another has taken it meanwhile. Raises StoreUnavailable."""
    row = LeadershipModel
    with writing(engine) as connection:
        expires_at_s = (_now_s(connection) if now_s is None else now_s) + ttl_s
        renewed = connection.execute(
            update(row)
            .where(row.id == 1, row.term == lead.term, row.holder == lead.holder)
            .values(expires_at=expires_at_s)
        ).rowcount
    return Lead(lead.term, lead.holder, expires_at_s) if renewed else None


def release(engine: Engine, lead: Lead) -> bool:
    """Gives the lead up, so that the next one need not wait; False when it was lost before. Raises StoreUnavailable."""
    row = LeadershipModel
    with writing(engine) as connection:
        released = connection.execute(
            update(row).where(row.id == 1, row.term == lead.term, row.holder == lead.holder).values(holder="")
        ).rowcount
    return bool(released)


def leader(engine: Engine) -> Lead | None:
    """Who leads, as far as the row says; None when nobody does. The expiry may have passed. Raises StoreUnavailable."""
    with reading(engine) as session:
        row = session.get_one(LeadershipModel, 1)
        return Lead(row.term, row.holder, row.expires_at) if row.holder else None


def _now_s(connection: Connection) -> float:
    """The time on the database's own clock."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0.0)
