"""Calls to nodes that fail, by node and kind: what is news of them, and how many there were.

Every tick asks again for what it wants, so an operator's lock, or an agent that is away, would put the same line into
the log every few seconds. The runtime (loop/runtime.py) tells how each call ended and hears whether to speak of it:
when calls begin to fail, fail for another reason, and go through again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

UNSENT = "not sent:"
"""How the detail of a call begins that was not even tried. It tells nothing new of a node whose calls fail."""
# Nobody answered: an agent that goes away, or hangs, gives now the one and now the other.
_NO_ANSWER = ("UNAVAILABLE:", "DEADLINE_EXCEEDED:")


class News(StrEnum):
    NONE = "none"
    FAILS = "fails"
    GOES_AGAIN = "goes_again"


@dataclass(slots=True)
class FailingCalls:
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # since the start, by node and kind
    _why: dict[tuple[str, str], str] = field(default_factory=dict)  # of those that fail now

    def ended(self, node_id: str, kind: str, ok: bool, detail: str) -> News:
        key = node_id, kind
        if ok:
            return News.NONE if self._why.pop(key, None) is None else News.GOES_AGAIN
        self.counts[key] += 1
        known, why = self._why.get(key), "no answer" if detail.startswith(_NO_ANSWER) else detail
        if known is not None and (why == known or detail.startswith(UNSENT)):
            return News.NONE
        self._why[key] = why
        return News.FAILS
