"""A circuit breaker for the calls to one agent: one that leaves them unanswered is not called for a while.

Each call that hangs costs its whole deadline, and every tick makes more of them. How calls ended and when the node was
heard goes in, whether a call may go out comes out; the caller (controller/fleet/grpc.py) brings time and chance.

    circuit   a call is due              a call failed                 an answer, or the node is heard again
    closed    goes out                   open, after the third in row  closed
    open      refused until its time     open                          closed
              is over, then: trying
    trying    refused                    open, for longer              closed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from controller.fleet.port import ApplyCaps, ApplyClocks, NodeEffect

FAILED_CALLS = 3
"""In a row, before the circuit opens."""
# An open circuit costs at most one deadline in so many.
_OPEN_DEADLINES = 8.0
# Without a sample for so long a node is heard again with the next one, also on a stream that never broke.
_SILENT_INTERVALS = 3.0


class Circuit(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    TRYING = "trying"  # open, with one call under way that shows whether it may close


@dataclass(slots=True)
class Breaker:
    """Of one agent. All times are monotonic."""

    first_s: float  # how long it stays open at first: doubled with each trial that fails
    most_s: float
    silent_s: float  # a node that was not heard for longer is silent
    chance: Callable[[], float]  # 0 … 1: agents that were lost together are not all tried at the same instant
    circuit: Circuit = Circuit.CLOSED
    failed_calls: int = 0  # in a row
    _open_s: float = 0.0
    _until_s: float = -inf
    _heard_s: float = -inf  # when the last sample of a stream that stands came

    @property
    def is_open(self) -> bool:
        return self.circuit is not Circuit.CLOSED

    def lets_out(self, effect: NodeEffect, now_s: float) -> bool:
        """Whether this is sent: where the circuit admits a call, and whatever must be tried always. That is a cap that
        guards a budget: nobody else lowers the power. And the clocks of a node that reports: it may do as it is told
        and only be slow to say so; unsent, its leases would run out, or hold a clock that is too low."""
        if self.admits(now_s):
            return True
        match effect:
            case ApplyCaps():
                return effect.protects
            case ApplyClocks():
                return not self._is_silent(now_s)
            case _:
                return False

    def admits(self, now_s: float) -> bool:
        """Whether a call may go out. One that may while the circuit is open is the trial: its end is to be told."""
        if self.circuit is Circuit.CLOSED:
            return True
        if now_s < self._until_s:
            return False
        self.circuit = Circuit.TRYING
        self._until_s = now_s + self.most_s  # a trial whose end is never told must not keep the agent out for ever
        return True

    def failed(self, now_s: float) -> bool:
        """A call was not answered. True when that opens a closed circuit."""
        self.failed_calls += 1
        if self.circuit is Circuit.TRYING:
            self._open(now_s, 2 * self._open_s)
        elif self.circuit is Circuit.CLOSED and self.failed_calls >= FAILED_CALLS:
            self._open(now_s, self.first_s)
            return True
        return False  # too few, or known already: calls that were under way when it opened end one by one

    def answered(self) -> bool:
        """The agent is there: it has answered a call, or is heard again. True when that closes an open circuit."""
        was_open = self.is_open
        self.circuit, self.failed_calls = Circuit.CLOSED, 0
        return was_open

    def heard(self, now_s: float) -> bool:
        """A sample has come. True when that closes an open circuit: only after a silence, since an agent may report all
        the time and yet hang in every call."""
        was_silent, self._heard_s = self._is_silent(now_s), now_s
        return was_silent and self.answered()

    def stream_lost(self) -> None:
        """Whatever comes next comes after a silence."""
        self._heard_s = -inf

    def _is_silent(self, now_s: float) -> bool:
        return now_s - self._heard_s > self.silent_s

    def _open(self, now_s: float, for_s: float) -> None:
        self.circuit = Circuit.OPEN
        self._open_s = min(for_s, self.most_s)
        self._until_s = now_s + self._open_s * (0.5 + 0.5 * self.chance())


def breaker_of(deadline_s: float, interval_s: float, chance: Callable[[], float]) -> Breaker:
    """For an agent whose calls may take `deadline_s` and that reports every `interval_s`."""
    return Breaker(deadline_s, _OPEN_DEADLINES * deadline_s, _SILENT_INTERVALS * interval_s, chance)
