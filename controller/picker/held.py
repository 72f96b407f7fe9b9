"""Tickets of requests that somebody else carries, by a name that only this process gives out.

The carrier is asked to speak of them now and then (Envoy's access log, ReportCompletion). One that has not for
`forget_s` has died with its requests: they are given back, so that no instance stays occupied by ghosts.
"""

from __future__ import annotations

import heapq
import secrets
from collections import OrderedDict
from dataclasses import dataclass

from controller.fleet.port import RoutedInstance
from controller.gateway.brain import Brain, Outcome, Ticket


@dataclass(slots=True)
class HeldTicket:
    ticket: Ticket
    instance: RoutedInstance
    heard_s: float
    request_id: str
    observed: bool = False  # its answer has been counted in full (ext_proc.py)


class Held:
    """Single event loop. Thousands are held at a time, so none of this walks through all of them."""

    def __init__(self, brain: Brain, forget_s: float) -> None:
        self.forget_s = forget_s
        self.unknown = 0  # reports of tickets that are not held
        self._brain = brain
        self._held: OrderedDict[str, HeldTicket] = OrderedDict()  # those not heard of for longest first
        self._names: dict[str, str] = {}  # by request id
        self._due: list[tuple[float, str]] = []  # heap: until then a prompt counts as unread
        # Tells our tickets from those of another gateway, or of an earlier life of this one.
        self._life = secrets.token_hex(4)

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, ticket: Ticket, instance: RoutedInstance, request_id: str = "") -> str:
        """`request_id`: the carrier's own, for when it has lost the request before it heard the ticket's name."""
        name = f"{self._life}-{ticket.id}"
        self._brain.runs_on(ticket, instance)
        self._held[name] = HeldTicket(ticket, instance, self._brain.clock.monotonic_s(), request_id)
        if request_id:
            self._names[request_id] = name
        heapq.heappush(self._due, (ticket.request.deadline_s, name))
        return name

    def named(self, request_id: str) -> str | None:
        """Name of the ticket that is held for a request of the carrier's."""
        return self._names.get(request_id)

    def hear(self, name: str) -> HeldTicket | None:
        """Its carrier has spoken of it; None when it is not held (any more)."""
        held = self._held.get(name)
        if held is None:
            self.unknown += 1
        else:
            held.heard_s = self._brain.clock.monotonic_s()
            self._held.move_to_end(name)
        return held

    def end(self, name: str, outcome: Outcome) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            if self._names.get(held.request_id) == name:
                del self._names[held.request_id]
            self._brain.done(held.ticket, outcome)

    def sweep(self) -> None:
        """Forgets what was not heard of for too long, and takes prompts for read by when they should be: whoever
        carries an answer does not say when it began. To be called now and then."""
        now_s = self._brain.clock.monotonic_s()
        while self._due and self._due[0][0] <= now_s:
            _, name = heapq.heappop(self._due)
            if (held := self._held.get(name)) is not None:
                self._brain.first_token(held.ticket)
        while self._held:
            name, held = next(iter(self._held.items()))
            if held.heard_s >= now_s - self.forget_s:
                break
            self.end(name, Outcome.FORGOTTEN)
