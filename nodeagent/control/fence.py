"""Leadership terms: the highest one ever accepted is kept on disk, and anything older is refused.

That is what stops a controller that lost its leadership, and does not know it yet, from steering GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.clock import Clock
from common.logs import get_logger
from nodeagent.errors import Precondition, Unavailable
from nodeagent.files import set_aside, write_durably

log = get_logger(__name__)


class Fence:
    """The highest term and the controller that brought it."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Reads the term. An unreadable file is kept aside and said so: the next controller then sets the term."""
        self._path = path
        self.term = 0
        self.holder = ""
        self.heard_s = clock.monotonic_s()
        """When a controller's request was last let through (at first: when this agent began)."""
        self._clock = clock
        try:
            data = json.loads(path.read_bytes())
            self.term, self.holder = _checked(data)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            aside = set_aside(path, int(clock.wall_s()))
            log.error("term file is unreadable; the next controller sets the term", why=str(error), kept_as=str(aside))

    def admit(self, term: int, name: str = "", holder_is_active: bool = False) -> None:
        """Lets a controller's request through, or raises Precondition.

        `name` is empty where a request does not carry one. `holder_is_active` says that the present holder still
        has live leases: then another controller with the same term is a second writer, and refused.
        Raises Unavailable when a new term cannot be put on disk: it then is not accepted.
        """
        if term < self.term:
            raise Precondition(
                f"term {term} is older than {self.term}"
                + (f" of controller {self.holder!r}" if self.holder else "")
                + "; this controller is no longer the leader"
            )
        if term == self.term:
            if not name or name == self.holder:
                self.heard_s = self._clock.monotonic_s()
                return
            if self.holder and holder_is_active:
                raise Precondition(
                    f"controller {self.holder!r} holds this node in term {term}; {name!r} needs a higher term"
                )
        data = json.dumps({"version": 1, "term": term, "holder": name}).encode()
        try:
            write_durably(self._path, data)
        except OSError as error:
            raise Unavailable(f"term {term} cannot be written to {self._path}: {error.strerror}") from None
        if term > self.term:
            log.info("new leadership term", term=term, holder=name, before=self.term)
        self.term, self.holder = term, name
        self.heard_s = self._clock.monotonic_s()


def _checked(data: object) -> tuple[int, str]:
    if not isinstance(data, dict) or data.get("version") != 1:
        raise ValueError("not a term file of version 1")
    term, holder = data.get("term"), data.get("holder")
    if not isinstance(term, int) or term < 0 or not isinstance(holder, str):
        raise ValueError("term or holder is missing")
    return term, holder
