"""Who holds which control until when. Pure: every question carries the time it is asked at.

A lease is live while `now < expires_at`; what an ended lease leaves behind is cleaned up by control/controls.py.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from nodeagent.control.settings import ControlKey, Setting


class OwnerKind(enum.IntEnum):
    """Who asks; the greater wins."""

    CONTROLLER = 1
    OPERATOR = 2
    GUARD = 3


@dataclass(frozen=True, slots=True)
class Owner:
    """One holder of leases."""

    kind: OwnerKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.name!r}"


GUARD = Owner(OwnerKind.GUARD, "this node")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to keep one control at a setting until an instant of the monotonic clock."""

    owner: Owner
    reason: str
    ttl_s: float
    term: int
    setting: Setting
    expires_at_s: float

    def live(self, now_s: float) -> bool:
        return now_s < self.expires_at_s


@dataclass(slots=True)
class LeaseTable:
    """At most one lease per control, and pins: a stronger owner's word that a control stays in its safe state."""

    _leases: dict[ControlKey, Lease] = field(default_factory=dict)
    _pins: dict[ControlKey, Lease] = field(default_factory=dict)

    def holder(self, key: ControlKey, now_s: float) -> Lease | None:
        """The live lease on a control."""
        lease = self._leases.get(key)
        return lease if lease is not None and lease.live(now_s) else None

    def in_the_way(self, key: ControlKey, kind: OwnerKind, now_s: float) -> Lease | None:
        """The live lease or pin of a stronger owner, if one keeps `kind` from taking the control."""
        for lease in (self._pins.get(key), self._leases.get(key)):
            if lease is not None and lease.live(now_s) and lease.owner.kind > kind:
                return lease
        return None

    def pin(self, key: ControlKey, lease: Lease) -> None:
        """Keeps weaker owners off a control that is in its safe state, or on the way there."""
        self._pins[key] = lease

    def pins(self, now_s: float) -> dict[ControlKey, Lease]:
        """All live pins; ended ones are forgotten."""
        self._pins = {key: lease for key, lease in self._pins.items() if lease.live(now_s)}
        return dict(self._pins)

    def grant(self, key: ControlKey, lease: Lease) -> None:
        """Replaces whatever lease there was; ask `in_the_way` first."""
        self._leases[key] = lease

    def drop(self, key: ControlKey) -> None:
        """Ends a lease; no error if there is none."""
        self._leases.pop(key, None)

    def drop_all(self) -> None:
        self._leases.clear()

    def live(self, now_s: float) -> dict[ControlKey, Lease]:
        """All live leases."""
        return {key: lease for key, lease in self._leases.items() if lease.live(now_s)}

    def ended(self, now_s: float) -> list[ControlKey]:
        """Controls whose lease ran out and was not dropped yet."""
        return [key for key, lease in self._leases.items() if not lease.live(now_s)]

    def next_expiry_s(self) -> float | None:
        """The earliest instant at which a lease ends."""
        return min((lease.expires_at_s for lease in self._leases.values()), default=None)
