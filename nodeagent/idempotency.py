"""Makes every mutating call idempotent: the same request id gets the first answer, and nothing is done twice.

The work runs in a task of its own, so that a caller who hangs up, or whose deadline passes, cannot stop it half-way.
Answers are kept for the latest `capacity` ids.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from nodeagent.errors import Invalid

T = TypeVar("T")


class RequestLog:
    """Answers by request id."""

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._known: OrderedDict[str, tuple[bytes, asyncio.Task[Any]]] = OrderedDict()
        self._running: set[asyncio.Task[Any]] = set()  # the event loop itself only keeps weak references

    async def once(self, request_id: str, content: bytes, work: Callable[[], Awaitable[T]]) -> T:
        """The answer of `work`, run at most once per id. `content` tells a repetition from an id used twice.

        A failed request is forgotten, so that it can be tried again under the same id. Raises Invalid for an empty
        id or one that came with other content, and whatever `work` raises.
        """
        if not request_id or len(request_id) > 128:
            raise Invalid("request_id must have 1 to 128 characters")
        known = self._known.get(request_id)
        if known is not None:
            if known[0] != content:
                raise Invalid(f"request_id {request_id!r} was used before for another request")
            answer: T = await asyncio.shield(known[1])
            return answer

        async def run() -> T:
            return await work()

        task = asyncio.get_running_loop().create_task(run())
        self._known[request_id] = (content, task)
        self._running.add(task)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        task.add_done_callback(lambda done: self._done(request_id, done))
        return await asyncio.shield(task)

    def _done(self, request_id: str, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        failed = task.cancelled() or task.exception() is not None
        known = self._known.get(request_id)
        if known is not None and known[1] is task and failed:
            del self._known[request_id]
