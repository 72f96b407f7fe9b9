"""A small HTTP/1.1 client on asyncio transports: what stands between a stream of tokens and a shared core.

A streamed chunk costs httpx 73 microseconds of CPU where this takes 20 (layers of awaits and a pure-Python parser,
measured on one core with uvloop): at thousands of tokens a second through gateway and load generator that is a third
of a core. Here the C parser `httptools` calls a `Sink` from the read callback, which also gives tokens the time at
which they were read. Plain TCP, one request at a time on a connection, no redirects, no cookies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

Headers = list[tuple[bytes, bytes]]


class ConnectFailed(Exception):
    """No connection: nothing of the request has been sent."""


class Sink(Protocol):
    """Takes one response, called from the event loop. `head` comes at most once; `done` exactly once, last, with
    None for a complete response or what went wrong."""

    def head(self, status: int, headers: Headers) -> None: ...

    def body(self, data: bytes) -> None: ...

    def done(self, error: str | None) -> None: ...


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of `http://host:port`. ValueError for anything else."""
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.username:
        raise ValueError(f"{endpoint!r} is no http://HOST:PORT")
    return parts.hostname, parts.port or 80


def request_head(method: str, target: str, host: str, headers: Iterable[tuple[str, str]], length: int) -> bytes:
    """Request line and headers. ValueError when a value holds a line break, so that no header can be smuggled in."""
    lines = [f"{method} {target} HTTP/1.1", f"host: {host}", f"content-length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header holds a line break")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Opens a connection; ConnectFailed says why not."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await loop.create_connection(Connection, host, port)
    except TimeoutError:
        raise ConnectFailed(f"{host}:{port}: no connection within {timeout_s:g} s") from None
    except OSError as error:
        raise ConnectFailed(f"{host}:{port}: {error.strerror or error}") from None
    return connection


class Connection(asyncio.Protocol):
    """One connection. `reusable` once a response is complete and the server keeps the connection."""

    def __init__(self) -> None:
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._pieces: list[bytes] = []
        self._framed = False  # the head states a length or chunks: an early end is then an error
        self._open_ended = False  # a head has come without either: the end of the connection ends the body
        self._complete = False
        self._keep_alive = False

    # -------------------------------------------------------------------------------------------- for callers

    def send(self, head: bytes, body: bytes, sink: Sink) -> None:
        """Sends a request; everything further goes to `sink`."""
        if self._sink is not None:
            raise RuntimeError("a response is still under way on this connection")
        self._sink, self.reusable = sink, False
        self._complete = self._framed = self._open_ended = False
        if self._transport is None or self._transport.is_closing():
            self._finish("connection closed before the request was sent")
            return
        self._transport.write(head + body)

    def pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self, reason: str) -> None:
        """Closes at once; a response under way ends with `reason`."""
        self._finish(reason)
        if self._transport is not None:
            self._transport.abort()

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    # ------------------------------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._sink is None:
            self.abort("data without a request")  # a server that talks unasked is not to be trusted with the next
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._deliver()
            self.abort(f"not HTTP: {error}")
            return
        except httptools.HttpParserUpgrade:
            self.abort("the server wants another protocol")
            return
        self._deliver()
        if self._complete:
            keep = self._keep_alive and not self.closed
            self._parser = httptools.HttpResponseParser(self)
            self.reusable = keep
            if not keep and self._transport is not None:
                self._transport.close()
            self._finish(None)  # last: the next request may be sent from within it

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._finish(None if self._open_ended and exc is None else f"connection lost{f': {exc}' if exc else ''}")
        self._transport = None

    # ---------------------------------------------------------------------------------------- httptools callbacks

    def on_message_begin(self) -> None:
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._headers.append((name, value))
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and self._sink is not None:
            self._open_ended = not self._framed
            self._sink.head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        # 100 Continue and its like are no answer yet.
        self._complete = self._parser.get_status_code() >= 200
        self._keep_alive = self._parser.should_keep_alive()  # known only here: the parser forgets it afterwards

    # ------------------------------------------------------------------------------------------------ internals

    def _deliver(self) -> None:
        """All that one read brought goes on as one piece."""
        if self._pieces and self._sink is not None:
            data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces = []
            self._sink.body(data)

    def _finish(self, error: str | None) -> None:
        sink, self._sink = self._sink, None
        self._pieces = []
        if sink is not None:
            sink.done(error)
