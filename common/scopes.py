"""Who may call what over gRPC: a caller, a scope for each method, and the gate in front of a service.

The agent and the controller both stand behind a `ScopeGate`; which names have which scope is in their configuration.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

from common.logs import get_logger
from common.tls_server import names_of

log = get_logger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""grpc.RpcMethodHandler: its attributes are not typed."""


class Scope(enum.IntEnum):
    """What a caller may do; each includes those below it."""

    NONE = 0
    READ = 1
    CONTROL = 2
    """What programs do: a controller at its agents, a gateway at its controller."""
    ADMIN = 3
    """What an operator does."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is on the other end."""

    name: str
    scope: Scope


HERE = Caller("this process", Scope.ADMIN)
caller: ContextVar[Caller] = ContextVar("caller", default=HERE)
"""The caller of the request being served."""


def by_certificate(auth: Mapping[str, Any], scopes: Mapping[str, str], default: Scope = Scope.NONE) -> Caller:
    """The caller by the names on a client certificate; with several the strongest scope counts."""
    names = names_of(auth)
    known = {name: Scope[scopes[name].upper()] for name in names if name in scopes}
    if not known:
        return Caller(" / ".join(names) or "a certificate without a name", default)
    name = max(known, key=lambda candidate: known[candidate])
    return Caller(name, known[name])


class ScopeGate(grpc.aio.ServerInterceptor):
    """Lets a call through if its caller has the method's scope, and sets `caller` for the work behind it."""

    def __init__(self, service: str, needs: Mapping[str, Scope], identify: Callable[[Context], Caller]) -> None:
        """`needs` has the least scope of each method of `service` (full name): one that is missing is refused to all.

        Other services, such as health and reflection, are not looked at.
        """
        self._prefix = f"/{service}/"
        self._needs = needs
        self._identify = identify

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        method = details.method.removeprefix(self._prefix)
        if handler.unary_stream is not None:

            async def stream(data: bytes, context: Context) -> AsyncIterator[Any]:
                await self.admit(method, context)
                async for message in handler.unary_stream(await self.parsed(method, handler, data, context), context):
                    yield message

            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=handler.response_serializer)

        async def answer(data: bytes, context: Context) -> Any:
            return await self.answer(method, handler, data, context)

        return grpc.unary_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)

    async def answer(self, method: str, handler: Handler, data: bytes, context: Context) -> Any:
        """One call with one answer, admitted and carried out."""
        await self.admit(method, context)
        return await handler.unary_unary(await self.parsed(method, handler, data, context), context)

    async def admit(self, method: str, context: Context) -> None:
        """Ends the call with PERMISSION_DENIED unless its caller has the scope."""
        present = self._identify(context)
        caller.set(present)
        needed = self._needs.get(method)
        if needed is None or present.scope < needed:
            self.denied(needed or Scope.ADMIN)
            text = f"{method} needs scope {(needed or Scope.ADMIN).name.lower()}"
            text += f"; {present.name} has {present.scope.name.lower()}"
            log.warning("denied", method=method, caller=present.name)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, text)

    def denied(self, needed: Scope) -> None:
        """Called for each call that is turned away."""

    async def parsed(self, method: str, handler: Handler, data: bytes, context: Context) -> Any:
        """The message; the library itself would answer bad bytes with an `unknown` and a traceback in the log."""
        try:
            return handler.request_deserializer(data)
        except Exception:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the bytes are no request of {method}")
