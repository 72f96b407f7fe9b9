"""What is known and kept about choices besides the counts: the beginnings of prompts that instances have read, and a
sample of choices with every alternative, for the controller's history.

The dispatcher tells of each choice (`on_choice`); the controller's client takes the samples away. Nothing of a prompt
is kept but a hash of its beginning, and that stays here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from common.clock import Clock
from controller.domain.classes import RequestClass
from controller.fleet.port import RoutedInstance, RoutedPool
from controller.gateway.asked import Asked
from controller.gateway.dispatcher import Dispatcher, PoolKey, QueuedRequest
from controller.policy.routing import Alternative, Decided, Seen, Weights, explain

# Characters that decide whether two prompts begin alike: a few blocks of an engine's prefix cache.
PREFIX_CHARACTERS = 1_024
PREFIXES = 16_384
MINUTE_S = 60.0
# Samples that wait for the controller; older ones go first when it stays away.
MOST_WAITING = 600


@dataclass(frozen=True, slots=True)
class ChoiceSample:
    """One choice, explained. `number` counts samples since the gateway's start."""

    number: int
    chosen_wall_s: float
    model: str
    request_class: RequestClass
    input_tokens: int
    pool: str
    instance_id: str
    decided_by: Decided
    queue_ms: float
    speaks_for: int  # choices since the sample before
    alternatives: tuple[Alternative, ...]


class PrefixMemory:
    """Which instance last read each beginning of a prompt; the ones not seen for longest are forgotten."""

    def __init__(self, keys: int = PREFIXES) -> None:
        self._keys = keys
        self.at: OrderedDict[str, str] = OrderedDict()

    @staticmethod
    def name(asked: Asked) -> str:
        """Of a prompt's beginning; empty for one without text, or shorter than what is looked at."""
        length, parts = 0, []
        for text in asked.texts:
            parts.append(text[: PREFIX_CHARACTERS - length])
            length += len(parts[-1])
            if length >= PREFIX_CHARACTERS:
                # Hashes of strings are salted anew in every process: no key can be turned back into its text.
                return f"{asked.model}/{hash(tuple(parts)):x}"
        return ""

    def read(self, prefix: str, instance_id: str) -> None:
        if prefix:
            self.at[prefix] = instance_id
            self.at.move_to_end(prefix)
            if len(self.at) > self._keys:
                self.at.popitem(last=False)


class Choices:
    """Follows the dispatchers of one gateway. Single event loop."""

    def __init__(self, clock: Clock, weights: Weights, sample_one_in: int, most_per_minute: int) -> None:
        """`sample_one_in` 0: no samples."""
        self.weights = weights
        self.prefixes = PrefixMemory()
        self.samples: deque[ChoiceSample] = deque(maxlen=MOST_WAITING)
        self._clock = clock
        self._one_in = sample_one_in
        self._most_per_minute = most_per_minute
        self._since = 0  # choices since the last sample
        self._number = 0
        self._minute, self._in_minute = 0, 0

    def follow(self, dispatcher: Dispatcher, beyond: bool = False) -> None:
        """`beyond`: it gives out what is beyond the instances' limits."""
        dispatcher.prefix_at = self.prefixes.at

        def on_choice(
            request: QueuedRequest, pool: PoolKey, instance: RoutedInstance, decided: Decided, seen: Seen
        ) -> None:
            self.prefixes.read(request.prefix, instance.instance_id)
            self._since += 1
            if self._one_in and self._since >= self._one_in and self._may_sample():
                self._sample(dispatcher, request, pool, instance, Decided.OVERFLOW if beyond else decided, seen)

        dispatcher.on_choice = on_choice

    def prefix(self, asked: Asked) -> str:
        """What a request's choice may be weighed by; costs nothing where it is not."""
        return PrefixMemory.name(asked) if self.weights.prefix else ""

    def take(self) -> tuple[ChoiceSample, ...]:
        """The samples that wait. They stay until `sent` says that they have arrived."""
        return tuple(self.samples)

    def sent(self, samples: Sequence[ChoiceSample]) -> None:
        last = samples[-1].number if samples else 0
        while self.samples and self.samples[0].number <= last:
            self.samples.popleft()

    def _may_sample(self) -> bool:
        minute = int(self._clock.monotonic_s() // MINUTE_S)
        if minute != self._minute:
            self._minute, self._in_minute = minute, 0
        self._in_minute += 1
        return self._in_minute <= self._most_per_minute

    def _sample(
        self,
        dispatcher: Dispatcher,
        request: QueuedRequest,
        pool: PoolKey,
        instance: RoutedInstance,
        decided: Decided,
        seen: Seen,
    ) -> None:
        table = dispatcher.table
        pools: tuple[RoutedPool, ...] = tuple(p for p in table.pools if p.model == request.model) if table else ()
        self._number += 1
        self.samples.append(
            ChoiceSample(
                number=self._number,
                chosen_wall_s=self._clock.wall_s(),
                model=request.model,
                request_class=request.request_class,
                input_tokens=request.prompt_tokens,
                pool=pool[1],
                instance_id=instance.instance_id,
                decided_by=decided,
                queue_ms=dispatcher.waited_s(request.request_id, self._clock.monotonic_s()) * 1e3,
                speaks_for=self._since,
                alternatives=explain(
                    pools, request.request_class, instance.instance_id, seen, self.weights, dispatcher.suspects
                ),
            )
        )
        self._since = 0
