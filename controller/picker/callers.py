"""Who may call which services of the picker's port: the names on the caller's certificate and `[picker.tls.scopes]`.

Without TLS the port is served on this machine only, to whoever may reach it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from common.logs import get_logger
from common.tls_server import names_of

_log = get_logger(__name__)
ENVOY, TOOL = "envoy", "tool"
# Callers that the log has named, at most: a refused Envoy asks again with every request.
MOST_TOLD = 1000


class Callers:
    """`scopes`: by name; None: everybody may do everything."""

    def __init__(self, scopes: Mapping[str, str] | None = None) -> None:
        self.scopes = scopes
        self._told: set[str] = set()

    async def admit(self, scope: str, context: Any) -> None:
        """Ends the call with PERMISSION_DENIED unless a name of its caller has the scope."""
        if self.scopes is None:
            return
        names = names_of(context.auth_context())
        if any(self.scopes.get(name) == scope for name in names):
            return
        who = " / ".join(names) or "a certificate without a name"
        if who not in self._told and len(self._told) < MOST_TOLD:
            self._told.add(who)
            _log.warning("denied", caller=who, needs=scope)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"this needs scope {scope}, which {who} has not")
