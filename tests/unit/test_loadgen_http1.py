"""The HTTP/1.1 client under load generator and gateway: whatever way the bytes are cut, the sink hears the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from common.http1 import ConnectFailed, Connection, Headers, connect, request_head, split_endpoint

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"


@dataclass
class Heard:
    status: int = 0
    headers: Headers = field(default_factory=list)
    data: bytes = b""
    ends: list[str | None] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def head(self, status: int, headers: Headers) -> None:
        assert self.status == 0
        self.status, self.headers = status, headers

    def body(self, data: bytes) -> None:
        assert data
        assert not self.ends
        self.data += data

    def done(self, error: str | None) -> None:
        self.ends.append(error)
        self.ended.set()


@asynccontextmanager
async def server(*replies: bytes, pieces: int = 0, close: bool = False) -> AsyncIterator[int]:
    """Answers the requests of a connection with `replies`, each cut after every `pieces` bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for reply in replies:
                await reader.readuntil(b"\r\n\r\n")
                size = pieces or len(reply)
                for start in range(0, len(reply), size):
                    writer.write(reply[start : start + size])
                    await writer.drain()
                    await asyncio.sleep(0)
            if not close:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


async def ask(connection: Connection) -> Heard:
    heard = Heard()
    connection.send(request_head("POST", "/x", "h", [], 0), b"", heard)
    async with asyncio.timeout(10):
        await heard.ended.wait()
    return heard


@pytest.mark.parametrize("pieces", [0, 1, 2, 7, 50])
@pytest.mark.parametrize(
    "reply",
    [
        CHUNKED,
        b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nX-A: b\r\n\r\nhello world",
        b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED,
    ],
)
async def test_a_response_is_the_same_however_it_is_cut_and_the_connection_serves_again(
    reply: bytes, pieces: int
) -> None:
    async with server(reply, reply, pieces=pieces) as port:
        connection = await connect("127.0.0.1", port, 5)
        for _ in range(2):
            heard = await ask(connection)
            assert (heard.status, heard.data, heard.ends) == (200, b"hello world", [None])
            assert (b"x-a", b"b") in heard.headers
            assert connection.reusable
        connection.abort("test over")


async def test_an_answer_without_length_ends_with_the_connection() -> None:
    async with server(b"HTTP/1.1 200 OK\r\n\r\nhello world", close=True) as port:
        connection = await connect("127.0.0.1", port, 5)
        heard = await ask(connection)
        assert (heard.data, heard.ends) == (b"hello world", [None])
        assert not connection.reusable


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        CHUNKED[:30],
        CHUNKED[:-12],
        CHUNKED[:-5],
        b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
async def test_an_answer_that_breaks_off_is_an_error(reply: bytes) -> None:
    async with server(reply, close=True) as port:
        connection = await connect("127.0.0.1", port, 5)
        heard = await ask(connection)
        (end,) = heard.ends
        assert end is not None
        assert "connection lost" in end
        assert connection.closed


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_an_error(reply: bytes) -> None:
    async with server(reply) as port:
        connection = await connect("127.0.0.1", port, 5)
        (end,) = (await ask(connection)).ends
        assert end is not None
        assert connection.closed


async def test_a_connection_the_server_wants_closed_is_not_reusable() -> None:
    async with server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok") as port:
        connection = await connect("127.0.0.1", port, 5)
        assert (await ask(connection)).ends == [None]
        assert not connection.reusable
        assert connection.closed


async def test_abort_ends_a_response_once_with_its_reason() -> None:
    async with server(CHUNKED[:40]) as port:
        connection = await connect("127.0.0.1", port, 5)
        heard = Heard()
        connection.send(request_head("POST", "/x", "h", [], 0), b"", heard)
        with pytest.raises(RuntimeError, match="under way"):
            connection.send(b"", b"", heard)
        connection.abort("enough")
        connection.abort("again")
        await asyncio.sleep(0.05)
        assert heard.ends == ["enough"]


async def test_sending_on_a_closed_connection_is_told_to_the_sink() -> None:
    async with server(b"", close=True) as port:
        connection = await connect("127.0.0.1", port, 5)
        connection.abort("test")
        assert (await ask(connection)).ends == ["connection closed before the request was sent"]


async def test_no_connection_says_why() -> None:
    with pytest.raises(ConnectFailed, match=r"127\.0\.0\.1:9"):
        await connect("127.0.0.1", 9, 5)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:80", "https://x:1", "http://", "http://x:1/path", "http://u@x:1", ""])
def test_endpoints_that_are_none_are_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="http"):
        split_endpoint(endpoint)


@pytest.mark.parametrize("make", [lambda: request_head("POST", "/x", "h", [("a", "b\r\nc: d")], 0)])
def test_no_header_can_be_smuggled_in(make: Callable[[], bytes]) -> None:
    with pytest.raises(ValueError, match="line break"):
        make()
