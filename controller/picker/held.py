"""Tickets of requests that somebody else carries, by a name that only this process gives out.

The carrier is asked to speak of them now and then (Envoy's access log, ReportCompletion). One that has not for
`forget_s` has died with its requests: they are given back, so that no instance stays occupied by ghosts.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from controller.fleet.port import RoutedInstance
from controller.gateway.brain import Brain, Outcome, Ticket


@dataclass(slots=True)
class HeldTicket:
    ticket: Ticket
    instance: RoutedInstance
    heard_s: float
    due_s: float | None  # until then its prompt counts as unread
    observed: bool = False  # its answer has been counted in full (ext_proc.py)


class Held:
    """Single event loop."""

    def __init__(self, brain: Brain, forget_s: float) -> None:
        self.forget_s = forget_s
        self.unknown = 0  # reports of tickets that are not held
        self._brain = brain
        self._held: dict[str, HeldTicket] = {}
        # Tells our tickets from those of another gateway, or of an earlier life of this one.
        self._life = secrets.token_hex(4)

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, ticket: Ticket, instance: RoutedInstance) -> str:
        name = f"{self._life}-{ticket.id}"
        self._brain.runs_on(ticket, instance)
        self._held[name] = HeldTicket(ticket, instance, self._brain.clock.monotonic_s(), ticket.request.deadline_s)
        return name

    def hear(self, name: str) -> HeldTicket | None:
        """Its carrier has spoken of it; None when it is not held (any more)."""
        held = self._held.get(name)
        if held is None:
            self.unknown += 1
        else:
            held.heard_s = self._brain.clock.monotonic_s()
        return held

    def end(self, name: str, outcome: Outcome) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            self._brain.done(held.ticket, outcome)

    def sweep(self) -> None:
        """Forgets what was not heard of for too long, and takes prompts for read by when they should be: whoever
        carries an answer does not say when it began. To be called now and then."""
        now_s = self._brain.clock.monotonic_s()
        for held in self._held.values():
            if held.due_s is not None and held.due_s <= now_s:
                held.due_s = None
                self._brain.first_token(held.ticket)
        oldest_s = now_s - self.forget_s
        for name in [name for name, held in self._held.items() if held.heard_s < oldest_s]:
            self.end(name, Outcome.FORGOTTEN)
