"""Hands samples from the one sampling loop to any number of readers, each at its own pace.

A reader that is slow loses its oldest samples, never memory: its queue is bounded and a gap in its sequence numbers
tells it what it lost. One that comes late may ask for the samples before: a ring of the latest is kept for all of
them together. For the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from nodeagent.telemetry.sample import Sample


class Reader:
    """One subscription."""

    def __init__(
        self, interval_s: float, queue_samples: int, on_lost: Callable[[], None], past: Sequence[Sample] = ()
    ) -> None:
        self.interval_s = interval_s
        self.replayed = len(past)
        """Samples with a lower sequence number are from before the subscription."""
        self._past = deque(enumerate(past))
        self._queue: deque[tuple[int, Sample]] = deque(maxlen=queue_samples)
        self._on_lost = on_lost
        self._sequence = len(past)
        self._due_s = past[-1].monotonic_s + interval_s if past else float("-inf")
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
            while self._past or self._queue:
                yield (self._past or self._queue).popleft()
            self._ready.clear()
            await self._ready.wait()


class SampleStream:
    """All readers, and the latest sample."""

    def __init__(
        self, queue_samples: int, on_lost: Callable[[], None] = lambda: None, history_samples: int = 0
    ) -> None:
        self.latest: Sample | None = None
        self.changed = asyncio.Event()
        """Set when a reader comes: the sampler may have to go faster."""
        self._queue_samples = queue_samples
        self._on_lost = on_lost
        self._history: deque[Sample] = deque(maxlen=history_samples)
        self._readers: set[Reader] = set()

    def subscribe(self, interval_s: float, history_samples: int = 0) -> Reader:
        """A new reader, with so many samples of the past at most; give it back with `unsubscribe`."""
        reader = Reader(interval_s, self._queue_samples, self._on_lost, self._past(interval_s, history_samples))
        self._readers.add(reader)
        self.changed.set()
        return reader

    def unsubscribe(self, reader: Reader) -> None:
        self._readers.discard(reader)

    def publish(self, sample: Sample) -> None:
        self.latest = sample
        self._history.append(sample)
        for reader in self._readers:
            reader.offer(sample)

    def _past(self, interval_s: float, count: int) -> list[Sample]:
        """The latest samples that lie an interval apart, oldest first."""
        chosen: list[Sample] = []
        for sample in reversed(self._history):
            if len(chosen) == count:
                break
            if not chosen or sample.monotonic_s <= chosen[-1].monotonic_s - 0.9 * interval_s:
                chosen.append(sample)
        return chosen[::-1]

    def fastest_s(self, otherwise_s: float) -> float:
        """The shortest interval anyone asks for."""
        return min((reader.interval_s for reader in self._readers), default=otherwise_s)
