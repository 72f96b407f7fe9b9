"""Hands samples from the one sampling loop to any number of readers, each at its own pace.

A reader that is slow loses its oldest samples, never memory: its queue is bounded and a gap in its sequence numbers
tells it what it lost. For the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from nodeagent.telemetry.sample import Sample


class Reader:
    """One subscription."""

    def __init__(self, interval_s: float, queue_samples: int, on_lost: Callable[[], None]) -> None:
        self.interval_s = interval_s
        self._queue: deque[tuple[int, Sample]] = deque(maxlen=queue_samples)
        self._on_lost = on_lost
        self._sequence = 0
        self._due_s = float("-inf")
        self._ready = asyncio.Event()

    def offer(self, sample: Sample) -> None:
        """Queues the sample if one is due; samples arrive a little early or late, hence the slack."""
        if sample.monotonic_s < self._due_s - 0.1 * self.interval_s:
            return
        self._due_s = sample.monotonic_s + self.interval_s
        if len(self._queue) == self._queue.maxlen:
            self._on_lost()
        self._queue.append((self._sequence, sample))
        self._sequence += 1
        self._ready.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Sample]]:
        while True:
            while self._queue:
                yield self._queue.popleft()
            self._ready.clear()
            await self._ready.wait()


class SampleStream:
    """All readers, and the latest sample."""

    def __init__(self, queue_samples: int, on_lost: Callable[[], None] = lambda: None) -> None:
        self.latest: Sample | None = None
        self.changed = asyncio.Event()
        """Set when a reader comes: the sampler may have to go faster."""
        self._queue_samples = queue_samples
        self._on_lost = on_lost
        self._readers: set[Reader] = set()

    def subscribe(self, interval_s: float) -> Reader:
        """A new reader; give it back with `unsubscribe`."""
        reader = Reader(interval_s, self._queue_samples, self._on_lost)
        self._readers.add(reader)
        self.changed.set()
        return reader

    def unsubscribe(self, reader: Reader) -> None:
        self._readers.discard(reader)

    def publish(self, sample: Sample) -> None:
        self.latest = sample
        for reader in self._readers:
            reader.offer(sample)

    def fastest_s(self, otherwise_s: float) -> float:
        """The shortest interval anyone asks for."""
        return min((reader.interval_s for reader in self._readers), default=otherwise_s)
