"""Fan-out of the routing table: every gateway gets the newest table first, then each change; slow ones skip."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from controller.fleet.port import RoutingTable


class RoutingHub:
    """Holds the newest table. A watcher that falls behind sees only the newest: older ones are worthless."""

    def __init__(self) -> None:
        self._table: RoutingTable | None = None
        self._changed = asyncio.Event()

    @property
    def table(self) -> RoutingTable | None:
        return self._table

    def publish(self, table: RoutingTable) -> None:
        self._table = table
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[RoutingTable]:
        sent: RoutingTable | None = None
        while True:
            changed = self._changed
            if self._table is not None and self._table is not sent:
                sent = self._table
                yield sent
            else:
                await changed.wait()
