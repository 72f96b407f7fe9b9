"""To the engines: a pool of connections per endpoint, and `Answer`, one engine's response as it arrives.

An `Answer` passes bytes on untouched and times the server-sent events in them as they are read from the socket, by
this process's own clock: that is where the gateway's TTFT and token gaps come from.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from common.http1 import ConnectFailed, Connection, Headers, connect, request_head, split_endpoint

# Unread bytes of one answer beyond which its engine is made to wait for the client.
HIGH_WATER_BYTES = 256 * 1024
# The usage event is the last but one of a stream and far shorter than this.
TAIL_BYTES = 2048
# How engines tell of trouble within a stream: vLLM's present and former form.
ERROR_EVENTS = (b'data: {"error"', b'data: {"object":"error"')
IDLE_CONNECTIONS_PER_ENDPOINT = 64


class UpstreamFailed(Exception):
    """An engine did not give a complete answer; the text says why."""


class EventMeter:
    """Times the server-sent events of an answer as its bytes pass. `events` counts them, token gaps lie between."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.events = 0
        self.first_event_s = self.last_event_s = self.touched_s = now_s()
        self.gaps_s: list[float] = []
        self._now_s = now_s
        self._tail = b""

    def passed(self, data: bytes) -> None:
        """Some more of the answer's body."""
        now_s = self.touched_s = self._now_s()
        # An event ends with an empty line, which may be cut in two by the read.
        events = data.count(b"\n\n") + (self._tail.endswith(b"\n") and data.startswith(b"\n"))
        if events:
            if self.events:
                self.gaps_s.append(now_s - self.last_event_s)
            else:
                self.first_event_s = now_s
            if events > 1:
                self.gaps_s.extend([0.0] * (events - 1))
            self.events += events
            self.last_event_s = now_s
        self._tail = data[-TAIL_BYTES:] if len(data) >= TAIL_BYTES else (self._tail + data)[-TAIL_BYTES:]

    def usage(self) -> dict[str, Any] | None:
        """The usage event of a stream that was asked for one (`stream_options.include_usage`)."""
        for line in reversed(self._tail.split(b"\n")):
            if line.startswith(b"data: {") and b'"usage"' in line:
                try:
                    usage = json.loads(line.removeprefix(b"data: ")).get("usage")
                except ValueError:
                    return None
                return usage if isinstance(usage, dict) else None
        return None

    def token_events(self, usage_event: bool) -> int:
        """Events less the end mark and, where there is one, the usage event."""
        return self.events - self.ended_with_done - usage_event

    def complaint(self) -> str | None:
        """Why a stream that ended in good order is still no answer: the engine said so, or left out the end mark."""
        if any(start in self._tail for start in ERROR_EVENTS):
            return "the engine sent an error event"
        return None if self.ended_with_done else "the stream ended without [DONE]"

    @property
    def ended_with_done(self) -> bool:
        return self._tail.rstrip().endswith(b"data: [DONE]")


class Answer(EventMeter):
    """A Sink to await on."""

    def __init__(self, connection: Connection, now_s: Callable[[], float]) -> None:
        super().__init__(now_s)
        self.status = 0
        self.headers: Headers = []
        self.connection = connection
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._ended = False
        self.aborted = False
        self._error: str | None = None
        self._wake: asyncio.Future[None] | None = None

    # --------------------------------------------------------------------------------------------- as a sink

    def head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    def body(self, data: bytes) -> None:
        self.passed(data)
        self._pieces.append(data)
        self._buffered += len(data)
        if self._buffered > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self.connection.pause()
        self._notify()

    def done(self, error: str | None) -> None:
        self._ended, self._error = True, error
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # ------------------------------------------------------------------------------------------- for the relay

    async def ready(self) -> None:
        """Waits until a read need not. UpstreamFailed when the answer breaks off before that."""
        while not self._pieces and not self._ended:
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None
        if not self._pieces and self._error is not None:
            raise UpstreamFailed(self._error)

    async def read(self) -> bytes:
        """All that has arrived since the last read, at least one byte; b"" at the end. UpstreamFailed when it breaks
        off, after what had arrived was read."""
        if not self._pieces:
            await self.ready()
            if not self._pieces:
                return b""
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        if self._paused:
            self._paused = False
            self.connection.resume()
        return data

    async def read_all(self, limit_bytes: int) -> bytes:
        """The whole body; UpstreamFailed beyond the limit."""
        pieces, total = [], 0
        while data := await self.read():
            total += len(data)
            if total > limit_bytes:
                self.abort("answer too long")
                raise UpstreamFailed(f"the engine's answer exceeds {limit_bytes} bytes")
            pieces.append(data)
        return b"".join(pieces)

    def abort(self, reason: str) -> None:
        """Closes the connection: an engine takes that as the request's cancellation."""
        if not self._ended:
            self.aborted = True
            self.connection.abort(reason)

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def opens_with_error(self) -> bool:
        """An engine that stops has begun its stream and says so in the first event; asked before anything is read."""
        return bool(self._pieces) and self._pieces[0].startswith(ERROR_EVENTS)


class Upstreams:
    """Connections to all engines. Idle ones are kept for the next request to the same endpoint."""

    def __init__(self, connect_timeout_s: float, now_s: Callable[[], float]) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._now_s = now_s
        self._idle: defaultdict[str, list[Connection]] = defaultdict(list)
        self._active: set[Answer] = set()

    async def open(self, endpoint: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> Answer:
        """Sends a POST and returns when the first bytes of the body, or the end of an empty one, have arrived.

        UpstreamFailed when there is none: until then nothing has reached the client, so another engine may be asked.
        """
        try:
            host, port = split_endpoint(endpoint)
        except ValueError as error:
            raise UpstreamFailed(str(error)) from None
        head = request_head("POST", target, f"{host}:{port}", headers, len(body))
        while True:
            connection, reused = await self._connection(endpoint, host, port)
            answer = Answer(connection, self._now_s)
            self._active.add(answer)
            connection.send(head, body, answer)
            try:
                await answer.ready()
            except UpstreamFailed:
                self._active.discard(answer)
                # A kept connection may have been closed by the server a moment ago; a fresh one tells for sure.
                if reused and not answer.status and not answer.aborted:
                    continue
                raise
            except BaseException:
                self.release(endpoint, answer)
                raise
            return answer

    def release(self, endpoint: str, answer: Answer) -> None:
        """Gives an answer's connection back. One with an unfinished answer is closed."""
        self._active.discard(answer)
        connection = answer.connection
        if not answer.ended:
            connection.abort("not read to its end")
        elif connection.reusable and len(self._idle[endpoint]) < IDLE_CONNECTIONS_PER_ENDPOINT:
            self._idle[endpoint].append(connection)
        else:
            connection.abort("not kept")

    def keep_only(self, endpoints: Iterable[str]) -> None:
        """Closes idle connections to endpoints that are gone."""
        for endpoint in set(self._idle) - set(endpoints):
            for connection in self._idle.pop(endpoint):
                connection.abort("endpoint gone")

    def abort_silent(self, older_than_s: float) -> None:
        """Ends answers of which nothing has moved for that long: an engine that hangs, or a client that reads no
        more. One call a second costs less than a timer per chunk."""
        now_s = self._now_s()
        for answer in [answer for answer in self._active if now_s - answer.touched_s > older_than_s]:
            answer.abort(f"nothing moved for {older_than_s:g} s")

    def close(self) -> None:
        self.keep_only(())

    async def _connection(self, endpoint: str, host: str, port: int) -> tuple[Connection, bool]:
        idle = self._idle[endpoint]
        while idle:
            connection = idle.pop()
            if not connection.closed:
                return connection, True
        try:
            return await connect(host, port, self._connect_timeout_s), False
        except ConnectFailed as error:
            raise UpstreamFailed(str(error)) from None
