"""Who may call what of the controller's API: the names on the caller's certificate and the scopes in `[tls.scopes]`.

Stands before service.py as an interceptor wherever the API is served over TLS. Without TLS it is served on this
machine only, to whoever may reach it.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.scopes import HERE, Scope, ScopeGate, by_certificate, caller
from dynamollm.v1 import controller_pb2 as pb

NEEDS: dict[str, Scope] = {
    "WatchRouting": Scope.READ,
    "ListNodes": Scope.READ,
    "GetStatus": Scope.READ,
    "ListDecisions": Scope.READ,
    "GetDecision": Scope.READ,
    "PreviewPlan": Scope.READ,
    "GetPowerBudget": Scope.READ,
    "ReportLoad": Scope.CONTROL,
    "SetMode": Scope.ADMIN,
    "PlanNow": Scope.ADMIN,
    "SetPowerBudget": Scope.ADMIN,
}
"""Least scope of each method. One that is missing here is refused to all (a test keeps the table whole)."""


def gate(scopes: Mapping[str, str]) -> ScopeGate:
    """The gate of a server over TLS."""
    service = pb.DESCRIPTOR.services_by_name["Controller"].full_name
    return ScopeGate(service, NEEDS, lambda context: by_certificate(context.auth_context(), scopes))


def asker(who: str) -> str:
    """For the history: over TLS the name on the certificate is known, whatever name the request gives."""
    present = caller.get()
    return who if present is HERE else f"{present.name} as {who}"
