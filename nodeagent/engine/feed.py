"""Tells readers of WatchInstances which instances changed.

A reader that is slow gets the latest state of each instance, not every state in between: what waits for it is bounded
by the number of instances.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from nodeagent.engine.records import Record


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance as the API shows it."""

    record: Record
    endpoint: str
    seconds_in_state: float


@dataclass(slots=True, eq=False)
class FeedReader:
    """One subscription."""

    _waiting: dict[str, InstanceView] = field(default_factory=dict)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, view: InstanceView) -> None:
        self._waiting[view.record.spec.instance_id] = view
        self._ready.set()

    async def __aiter__(self) -> AsyncIterator[list[InstanceView]]:
        while True:
            await self._ready.wait()
            self._ready.clear()
            changed, self._waiting = list(self._waiting.values()), {}
            yield changed


class InstanceFeed:
    """All readers."""

    def __init__(self) -> None:
        self._readers: set[FeedReader] = set()

    def subscribe(self) -> FeedReader:
        reader = FeedReader()
        self._readers.add(reader)
        return reader

    def unsubscribe(self, reader: FeedReader) -> None:
        self._readers.discard(reader)

    def publish(self, view: InstanceView) -> None:
        for reader in self._readers:
            reader.offer(view)
