"""The OpenAI-compatible HTTP API: checks requests, hands them to the relay, answers errors in OpenAI's form.

Starlette routes; the two generating endpoints are bare ASGI applications, because a token must pass through as few
layers as possible. Nothing here logs a prompt or an answer.
"""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.http1 import Headers
from controller.gateway.access import Access
from controller.gateway.asked import GENERATING, read_request
from controller.gateway.config import LimitsConfig
from controller.gateway.refusal import Refusal, error_body
from controller.gateway.relay import Inbound, Relay

# What an engine may need of the client's headers; everything else ends here.
FORWARDED_HEADERS = frozenset({b"authorization", b"x-request-id", b"accept", b"user-agent", b"traceparent"})
# A client that sets it to 1 gets the joules of a streamed answer as a comment at its end.
ENERGY_WANTED = b"x-dynamollm-report-joules"


def make_app(
    relay: Relay, limits: LimitsConfig, registry: CollectorRegistry, access: Access, tenant_header: str = ""
) -> ASGIApp:
    """The whole API as one ASGI application."""
    started_s = int(time.time())

    async def health(_: Request) -> Response:
        """200 once there is an instance to send to, so that a load balancer may rely on it."""
        table = relay.brain.dispatcher.table
        ready = sum(i.accepts_new for pool in table.pools for i in pool.instances) if table else 0
        body = {
            "status": "ok" if ready else "waiting for instances",
            "instances": ready,
            "waiting": relay.brain.dispatcher.waiting,
            "routing_term": table.term if table else None,
            "routing_version": table.version if table else None,
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    async def models(request: Request) -> Response:
        try:
            access.tenant(request.headers.get("authorization", ""))
        except Refusal as refusal:
            return Response(refusal.body(), refusal.status, media_type="application/json")
        data = [
            {"id": name, "object": "model", "created": started_s, "owned_by": "dynamollm"}
            for name in relay.brain.models()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    rest = Starlette(
        routes=[Route("/health", health), Route("/v1/models", models), Route("/metrics", metrics)],
        exception_handlers={404: _http_error, 405: _http_error},
    )
    generate = Generate(relay, limits, access, tenant_header)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in GENERATING:
            await generate(scope, receive, send)
        else:
            await rest(scope, receive, send)

    return app


async def _http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    code, message = {
        404: ("not_found", f"There is no {request.url.path} here."),
        405: ("method_not_allowed", f"{request.url.path} does not take {request.method}."),
    }.get(status, ("error", str(error)))
    return Response(error_body(status, code, message), status, media_type="application/json")


class Generate:
    """/v1/completions and /v1/chat/completions."""

    def __init__(self, relay: Relay, limits: LimitsConfig, access: Access, tenant_header: str) -> None:
        self._relay = relay
        self._limits = limits
        self._access = access
        self._tenant_header = tenant_header.lower().encode()
        # With keys of our own, what a client authorises with is not the engines' to see.
        self._forwarded = FORWARDED_HEADERS - {b"authorization"} if access.checks else FORWARDED_HEADERS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _AsgiClient(send)
        try:
            if scope["method"] != "POST":
                raise Refusal(405, "method_not_allowed", f"{scope['path']} takes POST only.")
            # Before the body is read: whoever may not send need not be listened to.
            tenant = self._tenant(scope["headers"])
            inbound = self._check(scope, await self._read_body(receive), tenant)
            await self._serve(inbound, client, receive)
        except Refusal as refusal:
            await client.refuse(refusal)
        except _ClientLeft:
            return

    async def _serve(self, inbound: Inbound, client: _AsgiClient, receive: Receive) -> None:
        """Serves until done or until the client leaves, whichever is first."""
        serving = asyncio.create_task(self._relay.serve(inbound, client))
        watching = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not serving.done():
                serving.cancel()
                await asyncio.wait((serving,))
        if serving.cancelled():
            raise _ClientLeft
        serving.result()

    async def _read_body(self, receive: Receive) -> bytes:
        limit = self._limits.body_bytes
        pieces: list[bytes] = []
        total = 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeft
                    piece = message.get("body", b"")
                    total += len(piece)
                    if total > limit:
                        raise Refusal(413, "request_too_large", f"The request body exceeds {limit} bytes.")
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise Refusal(
                408, "request_timeout", f"The request body did not arrive within {self._limits.body_s:g} s."
            ) from None

    def _tenant(self, headers: Headers) -> str:
        found = dict(headers)
        authorization = found.get(b"authorization", b"").decode("latin-1")
        return self._access.tenant(authorization, found.get(self._tenant_header, b"").decode("latin-1"))

    def _check(self, scope: Scope, body: bytes, tenant: str) -> Inbound:
        asked = read_request(scope["path"], body, self._relay.brain.models(), tenant)
        passed = ((name, value) for name, value in scope["headers"] if name in self._forwarded)
        headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in passed)
        energy_wanted = (ENERGY_WANTED, b"1") in scope["headers"]
        return Inbound(asked, (("content-type", "application/json"), *headers), body, energy_wanted)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _ClientLeft(Exception):
    """There is nobody left to answer."""


class _AsgiClient:
    """The relay's `Client` over ASGI messages."""

    def __init__(self, send: Send) -> None:
        self._send = send
        # One message, sent again for every chunk: only its body changes.
        self._chunk: Message = {"type": "http.response.body", "body": b"", "more_body": True}

    async def begin(self, status: int, headers: Headers) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        self._chunk["body"] = data
        await self._send(self._chunk)

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data})

    async def refuse(self, refusal: Refusal) -> None:
        body = refusal.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refusal.status in (401, 408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is not wanted
        await self.begin(refusal.status, headers)
        await self.end(body)
