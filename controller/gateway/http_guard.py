"""What uvicorn leaves open to a hostile client: a head that never ends, in time or in size.

A connection has `HEAD_S` to send a request's head once it has begun it, and no more than `HEAD_BYTES` for it; then it
is told so and closed. Bodies are bounded by the server (server.py), idle connections by uvicorn's keep-alive.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from controller.gateway.refusal import error_body

HEAD_BYTES = 32 * 1024
HEAD_S = 10.0


class GuardedProtocol(HttpToolsProtocol):
    """Counts what arrives until a head is complete."""

    _head_bytes = 0
    _in_head = True
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Also of a connection that sends nothing at all.
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            if self._deadline is None:
                self._expect_head()
            self._head_bytes += len(data)
        super().data_received(data)
        # Still no head, or the parser has begun the next one.
        if self._in_head and self._head_bytes > HEAD_BYTES:
            self._refuse(431, "head_too_large", f"The request's head exceeds {HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._forget_deadline()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_S, self._too_slow)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._refuse(408, "request_timeout", f"The request's head did not arrive within {HEAD_S:g} s.")

    def _refuse(self, status: int, code: str, message: str) -> None:
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = error_body(status, code, message)
            head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        transport.close()
