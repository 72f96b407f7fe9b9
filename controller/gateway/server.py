"""The OpenAI-compatible HTTP API: checks requests, hands them to the relay, answers errors in OpenAI's form.

Starlette routes; the two generating endpoints are bare ASGI applications, because a token must pass through as few
layers as possible. Nothing here logs a prompt or an answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.http1 import Headers
from controller.gateway.classify import output_limit, prompt_size
from controller.gateway.config import LimitsConfig
from controller.gateway.relay import Inbound, Refusal, Relay, error_body

GENERATING = ("/v1/completions", "/v1/chat/completions")
# What an engine may need of the client's headers; everything else ends here.
FORWARDED_HEADERS = frozenset({b"authorization", b"x-request-id", b"accept", b"user-agent", b"traceparent"})


def make_app(relay: Relay, limits: LimitsConfig, registry: CollectorRegistry) -> ASGIApp:
    """The whole API as one ASGI application."""
    started_s = int(time.time())

    async def health(_: Request) -> Response:
        """200 once there is an instance to send to, so that a load balancer may rely on it."""
        table = relay.dispatcher.table
        ready = sum(i.accepts_new for pool in table.pools for i in pool.instances) if table else 0
        body = {
            "status": "ok" if ready else "waiting for instances",
            "instances": ready,
            "waiting": relay.dispatcher.waiting,
            "routing_term": table.term if table else None,
            "routing_version": table.version if table else None,
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    async def models(_: Request) -> Response:
        data = [
            {"id": name, "object": "model", "created": started_s, "owned_by": "dynamollm"} for name in relay.models()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    rest = Starlette(
        routes=[Route("/health", health), Route("/v1/models", models), Route("/metrics", metrics)],
        exception_handlers={404: _http_error, 405: _http_error},
    )
    generate = Generate(relay, limits)

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

    def __init__(self, relay: Relay, limits: LimitsConfig) -> None:
        self._relay = relay
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _AsgiClient(send)
        try:
            if scope["method"] != "POST":
                raise Refusal(405, "method_not_allowed", f"{scope['path']} takes POST only.")
            inbound = self._check(scope, await self._read_body(receive))
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

    def _check(self, scope: Scope, body: bytes) -> Inbound:
        """Only what the gateway itself needs to understand; the rest is the engine's to judge."""
        try:
            parsed: Any = json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, "invalid_json", "The request body is not valid JSON.") from None
        if not isinstance(parsed, dict):
            raise Refusal(400, "invalid_json", "The request body must be a JSON object.")
        model = self._model(parsed.get("model"))
        chat = scope["path"].endswith("/chat/completions")
        wanted = "messages" if chat else "prompt"
        if wanted not in parsed:
            raise Refusal(400, "missing_field", f"{wanted} is required.", param=wanted)
        try:
            prompt = prompt_size({wanted: parsed[wanted]})
            limit = output_limit(parsed)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "invalid_value", f"{str(error) or 'The prompt is nested too deeply'}.") from None
        stream = parsed.get("stream") or False
        if not isinstance(stream, bool):
            raise Refusal(400, "invalid_value", "stream must be true or false.", param="stream")
        options = parsed.get("stream_options")
        usage_wanted = isinstance(options, dict) and options.get("include_usage") is True
        headers = (("content-type", "application/json"), *_forwarded(scope["headers"]))
        return Inbound(scope["path"], model, prompt, limit, stream, usage_wanted, headers, body)

    def _model(self, name: object) -> str:
        served = self._relay.models()
        if name is None and len(served) == 1:
            return served[0]
        if not isinstance(name, str) or not name:
            raise Refusal(400, "missing_field", "model is required.", param="model")
        if served and name not in served:
            message = f"The model {name[:100]!r} is not served here; served: {', '.join(served)}."
            raise Refusal(404, "model_not_found", message, param="model")
        return name


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _forwarded(headers: Headers) -> Iterator[tuple[str, str]]:
    return ((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers if name in FORWARDED_HEADERS)


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
        body = error_body(refusal.status, refusal.code, refusal.message, refusal.param)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
        if refusal.status in (408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is not wanted
        await self.begin(refusal.status, headers)
        await self.end(body)
