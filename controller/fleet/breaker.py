"""A circuit breaker for the calls to one agent: one that leaves them unanswered is not called for a while.

Each call that hangs costs its whole deadline, and every tick makes more of them. How calls ended goes in, whether one
may go out comes out; the caller (controller/fleet/grpc.py) brings time and chance.

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

FAILED_CALLS = 3
"""In a row, before the circuit opens."""


class Circuit(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    TRYING = "trying"  # open, with one call under way that shows whether it may close


@dataclass(slots=True)
class Breaker:
    """Of one agent. All times are monotonic."""

    first_s: float  # how long it stays open at first: doubled with each trial that fails
    most_s: float
    chance: Callable[[], float]  # 0 … 1: agents that were lost together are not all tried at the same instant
    circuit: Circuit = Circuit.CLOSED
    failed_calls: int = 0  # in a row
    _open_s: float = 0.0
    _until_s: float = -inf

    @property
    def is_open(self) -> bool:
        return self.circuit is not Circuit.CLOSED

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

    def _open(self, now_s: float, for_s: float) -> None:
        self.circuit = Circuit.OPEN
        self._open_s = min(for_s, self.most_s)
        self._until_s = now_s + self._open_s * (0.5 + 0.5 * self.chance())
