"""Why a call is refused, as values the gRPC front maps to canonical status codes.

The rooms below the servicer raise these; none of them knows gRPC. The message is one sentence for the caller.
"""

from __future__ import annotations


class Refused(Exception):
    """A request that is not carried out; nothing was changed."""


class Invalid(Refused):
    """The request itself is malformed."""


class NotFound(Refused):
    """It names something this node does not have."""


class AlreadyExists(Refused):
    """The id is taken by something else."""


class Precondition(Refused):
    """Not in this state: an older term, a GPU in use, an undrained instance."""


class Denied(Refused):
    """The caller may not do this."""


class Unavailable(Refused):
    """The agent is stopping, or could not write what must be on disk first."""
