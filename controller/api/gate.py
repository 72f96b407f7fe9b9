"""Who may call what of the controller's API: the names on the caller's certificate and the scopes in `[tls.scopes]`.

Stands before service.py as an interceptor wherever the API is served over TLS. Without TLS it is served on this
machine only, to whoever may reach it.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc

from common.logs import get_logger
from common.tls_server import names_of
from dynamollm.v1 import controller_pb2 as pb

_log = get_logger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""grpc.RpcMethodHandler: its attributes are not typed."""

_PREFIX = f"/{pb.DESCRIPTOR.services_by_name['Controller'].full_name}/"


class Scope(enum.IntEnum):
    """What a caller may do; each includes those below it."""

    NONE = 0
    READ = 1
    CONTROL = 2
    """What a gateway does: the plans follow the load that it reports."""
    ADMIN = 3
    """What an operator does: modes, and plans out of turn."""


NEEDS: dict[str, Scope] = {
    "WatchRouting": Scope.READ,
    "ListNodes": Scope.READ,
    "GetStatus": Scope.READ,
    "ListDecisions": Scope.READ,
    "GetDecision": Scope.READ,
    "PreviewPlan": Scope.READ,
    "ReportLoad": Scope.CONTROL,
    "SetMode": Scope.ADMIN,
    "PlanNow": Scope.ADMIN,
}
"""Least scope of each method. One that is missing here is refused to all (a test keeps the table whole)."""


def scope_of(names: list[str], scopes: Mapping[str, str]) -> Scope:
    """The strongest among a certificate's names; none for a stranger."""
    return max((Scope[scopes[name].upper()] for name in names if name in scopes), default=Scope.NONE)


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through if its caller has the scope."""

    def __init__(self, scopes: Mapping[str, str]) -> None:
        self._scopes = scopes

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_PREFIX):
            return handler  # health and reflection tell nothing about the fleet
        method = details.method.removeprefix(_PREFIX)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, handler), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler), handler.request_deserializer, handler.response_serializer
        )

    def _unary(self, method: str, handler: Handler) -> Any:
        async def answer(request: Any, context: Context) -> Any:
            await self._admit(method, context)
            return await handler.unary_unary(request, context)

        return answer

    def _streaming(self, method: str, handler: Handler) -> Any:
        async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._admit(method, context)
            async for message in handler.unary_stream(request, context):
                yield message

        return answer

    async def _admit(self, method: str, context: Context) -> None:
        names = names_of(context.auth_context())
        who = " / ".join(names) or "a certificate without a name"
        present, needed = scope_of(names, self._scopes), NEEDS.get(method)
        if needed is None or present < needed:
            text = f"{method} needs scope {(needed or Scope.ADMIN).name.lower()}; {who} has {present.name.lower()}"
            _log.warning("denied", method=method, caller=who)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, text)
        if needed is Scope.ADMIN:
            _log.info("admitted", method=method, caller=who)
