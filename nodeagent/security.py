"""Who may call what: identities from the transport, scopes from the configuration, one audit line per change.

Stands between gRPC and service.py as an interceptor. The unix socket is guarded by its mode and group and may do
everything; TCP beyond loopback needs a client certificate, whose name or URI the configuration gives a scope.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import Message

from common import tls_server
from common.scopes import Caller, Context, Handler, Scope, ScopeGate, by_certificate, caller
from common.tls import check_pem
from dynamollm.v1 import node_agent_pb2 as pb
from nodeagent.audit import AuditLog
from nodeagent.config import ListenConfig, SecurityConfig
from nodeagent.errors import Denied
from nodeagent.telemetry.metrics import AgentMetrics

MAX_REQUEST_BYTES = 256 * 1024
"""Eight times the largest batch of controls."""
MAX_CALLS = 512
"""Calls and streams under way at once; more are refused by the library."""
_MAX_TEXT = 500
SERVICE = pb.DESCRIPTOR.services_by_name["NodeAgent"].full_name


NEEDS: dict[str, Scope] = {
    "GetNode": Scope.READ,
    "WatchTelemetry": Scope.READ,
    "ListControls": Scope.READ,
    "ListInstances": Scope.READ,
    "WatchInstances": Scope.READ,
    "GetGuard": Scope.READ,
    "ApplyControls": Scope.CONTROL,
    "ReleaseControls": Scope.CONTROL,
    "StartInstance": Scope.CONTROL,
    "DrainInstance": Scope.CONTROL,
    "StopInstance": Scope.CONTROL,
    "RestartInstance": Scope.CONTROL,
    "SleepInstance": Scope.CONTROL,
    "WakeInstance": Scope.CONTROL,
    "SetGuard": Scope.CONTROL,
    "TripGuard": Scope.CONTROL,
    "DrainNode": Scope.ADMIN,
    "ResumeNode": Scope.ADMIN,
}
"""Least scope of each method. One that is missing here is refused to all (a test keeps the table whole)."""


def require(scope: Scope, what: str) -> None:
    """Raises Denied unless the present caller has this scope."""
    present = caller.get()
    if present.scope < scope:
        raise Denied(f"{what} needs scope {scope.name.lower()}; {present.name} has {present.scope.name.lower()}")


def identify(peer: str, auth: Mapping[str, Any], config: SecurityConfig) -> Caller:
    """The caller behind a connection. With several names on one certificate the strongest scope counts."""
    if peer.startswith("unix:"):
        return Caller("unix socket", Scope.ADMIN)
    if auth.get("transport_security_type") not in ([b"ssl"], (b"ssl",)):
        return Caller(peer, Scope[config.loopback_scope.upper()])  # bound to loopback only, see ListenConfig
    return by_certificate(auth, config.scopes, Scope[config.default_scope.upper()])


def check_certificates(config: ListenConfig) -> None:
    """Raises UserError for files that no caller could be served with."""
    if config.tls:
        check_pem(
            {"listen.tls_client_ca": config.tls_client_ca},
            {"listen.tls_cert": config.tls_cert},
            {"listen.tls_key": config.tls_key},
        )


def server_credentials(config: ListenConfig) -> grpc.ServerCredentials:
    """Mutual TLS from the configured files; a renewed certificate is taken up without a restart.

    Raises UserError when a file cannot be used.
    """
    check_certificates(config)
    hint = "Check listen.tls_cert, tls_key, tls_client_ca."
    return tls_server.server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca, hint)


class Gate(ScopeGate):
    """Lets a call through if its caller has the scope, and writes down every call that may change something."""

    def __init__(self, config: SecurityConfig, audit: AuditLog, metrics: AgentMetrics) -> None:
        super().__init__(SERVICE, NEEDS, lambda context: identify(context.peer(), context.auth_context(), config))
        self._audit = audit
        self._metrics = metrics

    def denied(self, needed: Scope) -> None:
        self._metrics.calls_denied.labels(needed.name.lower()).inc()

    async def answer(self, method: str, handler: Handler, data: bytes, context: Context) -> Message:
        if NEEDS.get(method, Scope.ADMIN) <= Scope.READ:
            seen: Message = await super().answer(method, handler, data, context)
            return seen
        outcome, detail = "internal", ""
        request = None
        try:
            await self.admit(method, context)
            request = await self.parsed(method, handler, data, context)
            response: Message = await handler.unary_unary(request, context)
            outcome, detail = "ok", _told(response)
            return response
        finally:
            if outcome != "ok":
                code = context.code()
                outcome = code.name.lower() if isinstance(code, grpc.StatusCode) else "cancelled"
                detail = str(context.details() or "")
            self._write(method, request, outcome, detail)

    def _write(self, method: str, request: Any, outcome: str, detail: str) -> None:
        who = caller.get().name
        if request is None:  # turned away before it was read
            self._audit.write(who, method, "", outcome, detail=detail[:_MAX_TEXT])
            return
        why = request.lease.reason if isinstance(request, pb.ApplyControlsRequest) else request.reason
        owner = request.lease.owner if isinstance(request, pb.ApplyControlsRequest) else getattr(request, "owner", None)
        who += f" as {owner.name[:_MAX_TEXT]!r}" if owner is not None and owner.name else ""
        what = f"{method} {{{' '.join(str(request).split())}}}"  # the text form is made in C, the JSON form is not
        self._audit.write(
            who, what[: 8 * _MAX_TEXT], why[:_MAX_TEXT], outcome, request.request_id[:128], detail[:_MAX_TEXT]
        )


def _told(response: Message) -> str:
    """Per-GPU results in a few words: a batch is `ok` although one GPU refused."""
    if not isinstance(response, pb.ApplyControlsResponse | pb.ReleaseControlsResponse):
        return ""
    counts = Counter(result.code for result in response.results)
    named = {pb.ControlCode.Name(code).removeprefix("CONTROL_CODE_").lower(): count for code, count in counts.items()}
    return ", ".join(f"{count} {name}" for name, count in sorted(named.items()))
