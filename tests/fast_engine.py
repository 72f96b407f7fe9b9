"""An engine that costs next to nothing, as a process of its own: `python -m tests.fast_engine` prints its port.

What a proxy adds can only be measured before something faster than the proxy. Answers are canned; the tokens of a
stream come `TOKEN_S` apart.
"""

from __future__ import annotations

import asyncio
import json
from typing import cast

import httptools
import uvloop

TOKEN_S = 0.01
USAGE = {"prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 45}
CHOICES = {
    False: [{"index": 0, "text": "five tokens of an answer", "finish_reason": "stop", "logprobs": None}],
    True: [{"index": 0, "message": {"role": "assistant", "content": "five tokens"}, "finish_reason": "stop"}],
}


def _whole(chat: bool) -> bytes:
    kind = "chat.completion" if chat else "text_completion"
    content = {"id": "a", "object": kind, "created": 1, "model": "test-model", "choices": CHOICES[chat], "usage": USAGE}
    data = json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data


WHOLE = {chat: _whole(chat) for chat in (False, True)}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"test-model","choices":'
    b'[{"index":0,"text":" token","logprobs":null,"finish_reason":null}]}\n\n'
)
EVENT = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._target = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._target, self._body = url, []

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        body = json.loads(b"".join(self._body) or b"{}")
        if body.get("stream"):
            self._transport.write(HEAD)
            self._next(int(body.get("max_tokens", 5)))
        else:
            self._transport.write(WHOLE[b"chat" in self._target])

    def _next(self, left: int) -> None:
        if self._transport.is_closing():
            return
        if left:
            self._transport.write(EVENT)
            asyncio.get_running_loop().call_later(TOKEN_S, self._next, left - 1)
        else:
            self._transport.write(END)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - whoever started it reads this
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
