"""The emulated engine's HTTP side: raw ASGI, because several thousand tokens a second go through it on shared cores.

Request in, job to the real-time loop, tokens out as server-sent events or as one answer. A client that goes away takes
its request along.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from simulator.host.vllm_loop import Job, RealTimeEngine
from simulator.host.vllm_metrics import EngineMetrics
from simulator.host.vllm_protocol import DONE, EMULATED_VERSION, Answer, ApiError, Ask, engine_stopped, parse
from simulator.host.vllm_sleep import SleepError, SleepMode

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_JSON = (b"content-type", b"application/json")
_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


class _Collected:
    """Listener that hands tokens to the coroutine of its request."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.first_s = 0.0
        self.last_s = 0.0
        self.ended = False
        self.broken = False
        self._parts: list[bytes] = []
        self._news: asyncio.Future[None] | None = None

    def token(self, at_s: float, index: int, last: bool) -> None:
        if index == 0:
            self.first_s = at_s
        self.last_s = at_s
        self.ended = self.ended or last  # a client that has left stays gone
        if self.answer is not None:
            self._parts.append(self.answer.chunk(at_s, index, last))
            self._tell()
        elif last:
            self._tell()

    def failed(self) -> None:
        self.ended = self.broken = True
        self._tell()

    def leave(self) -> None:
        """The client is gone."""
        self.ended = True
        self._tell()

    async def news(self) -> bytes:
        """What there is to send; waits for it unless the request has ended."""
        if not self._parts and not self.ended:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
            self._news = None
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class Api:
    """The ASGI application."""

    def __init__(
        self,
        engine: RealTimeEngine,
        metrics: EngineMetrics,
        models: tuple[str, ...],
        root: str,
        max_model_len: int,
        sleep: SleepMode | None = None,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._models = models
        self._root = root
        self._max_model_len = max_model_len
        self._created = int(time.time())
        self._routes: dict[str, tuple[str, Callable[[Scope, Receive, Send], Awaitable[None]]]] = {
            "/health": ("GET", self._health),
            "/version": ("GET", self._version),
            "/v1/models": ("GET", self._list_models),
            "/metrics": ("GET", self._show_metrics),
            "/v1/completions": ("POST", self._complete),
            "/v1/chat/completions": ("POST", self._chat),
        }
        if sleep is not None:
            self._routes |= {
                "/sleep": ("POST", partial(_sleep, sleep)),
                "/wake_up": ("POST", partial(_wake_up, sleep)),
                "/is_sleeping": ("GET", partial(_is_sleeping, sleep)),
            }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        method, handle = self._routes.get(scope["path"], ("", None))
        if handle is None:
            await _answer(send, 404, b'{"detail":"Not Found"}')
        elif scope["method"] != method:
            await _answer(send, 405, b'{"detail":"Method Not Allowed"}')
        else:
            await handle(scope, receive, send)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def _version(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _answer(send, 200, json.dumps({"version": EMULATED_VERSION}).encode())

    async def _list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        permission = {
            "id": f"modelperm-{secrets.token_hex(8)}",
            "object": "model_permission",
            "created": self._created,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        models = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "vllm",
                "root": self._root,
                "parent": None,
                "max_model_len": self._max_model_len,
                "permission": [permission],
            }
            for name in self._models
        ]
        await _answer(send, 200, json.dumps({"object": "list", "data": models}).encode())

    async def _show_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        page, content_type = self._metrics.page(_header(scope, b"accept").decode("latin-1"))
        await _answer(send, 200, page, (b"content-type", content_type.encode()))

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, chat=False)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, chat=True)

    async def _generate(self, scope: Scope, receive: Receive, send: Send, chat: bool) -> None:
        body = await _read(receive)
        if body is None:
            return
        try:
            if _header(scope, b"content-type").split(b";")[0].strip().lower() != b"application/json":
                message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
                raise ApiError(400, message, "Bad Request")
            ask = parse(body, chat, self._models, self._max_model_len, self._engine.by_priority)
        except ApiError as error:
            await _answer(send, error.status, error.body)
            return
        await self._serve(ask, receive, send)

    async def _serve(self, ask: Ask, receive: Receive, send: Send) -> None:
        collected = _Collected()
        answer = Answer(ask, self._models[0])
        job = Job(
            answer.request_id,
            ask.input_tokens,
            ask.output_tokens,
            ask.max_tokens,
            ask.finish_reason,
            collected,
            ask.priority,
        )
        if ask.stream:
            collected.answer = answer
        answer.arrival_s = self._engine.submit(job)
        gone = asyncio.create_task(_wait_until_gone(receive, collected))
        try:
            if ask.stream:
                await _stream(collected, send)
            else:
                await collected.news()
                if collected.broken:
                    error = engine_stopped()
                    await _answer(send, error.status, error.body)
                else:
                    await _answer(send, 200, answer.whole(collected.first_s, collected.last_s))
        finally:
            gone.cancel()
            self._engine.abort(answer.request_id)


async def _sleep(mode: SleepMode, scope: Scope, receive: Receive, send: Send) -> None:
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    if query.get("level", ["1"]) != ["1"] or query.get("mode", ["abort"]) != ["wait"]:
        await _answer(send, 422, b'{"detail":"The emulated engine sleeps with level=1 and mode=wait only."}')
        return
    try:
        await mode.sleep()
    except SleepError as error:
        await _answer(send, 500, json.dumps({"detail": str(error)}).encode())
    else:
        await _answer(send, 200, b'{"status":"sleeping","level":1}')


async def _wake_up(mode: SleepMode, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        await mode.wake_up()
    except SleepError as error:
        await _answer(send, 500, json.dumps({"detail": str(error)}).encode())
    else:
        await _answer(send, 200, b'{"status":"awake","tags":null}')


async def _is_sleeping(mode: SleepMode, scope: Scope, receive: Receive, send: Send) -> None:
    await _answer(send, 200, json.dumps({"is_sleeping": mode.asleep}, separators=(",", ":")).encode())


async def _wait_until_gone(receive: Receive, collected: _Collected) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    collected.leave()


async def _stream(collected: _Collected, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [_EVENTS]})
    ended = False
    while not ended:
        data = await collected.news()
        ended = collected.ended
        if collected.broken:
            data += b"data: " + engine_stopped().body + b"\n\n" + DONE
        await send({"type": "http.response.body", "body": data, "more_body": not ended})


async def _read(receive: Receive) -> bytes | None:
    """The request's body; None when the client left in the middle of it."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _answer(send: Send, status: int, body: bytes, content_type: tuple[bytes, bytes] = _JSON) -> None:
    headers = [(b"content-length", str(len(body)).encode()), content_type]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
