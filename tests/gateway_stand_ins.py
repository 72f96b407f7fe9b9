"""Stand-ins for the gateway's neighbours: an engine that does exactly what a test tells it to, and a controller that
only hands out routing tables and takes reports. The gateway itself always runs as its own process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx

from controller.api.wire import routing_to_wire
from controller.domain.classes import ClassGroup, by_input
from controller.fleet.port import RoutedInstance, RoutedPool, RoutingTable
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import controller_pb2_grpc as rpc

MODEL = "test-model"


@dataclass
class Engine:
    """Speaks just enough HTTP/1.1. `dies_after`: closes the connection after so many tokens (0: before the head)."""

    token_s: float = 0.0
    dies_after: int | None = None
    status: int = 200
    hangs: bool = False
    error_event_after: int | None = None  # tokens; then it ends as an engine does that is told to stop
    sends_done: bool = True
    answers_per_connection: int = 1_000_000  # then it closes on the next request, as after a keep-alive timeout
    connections: int = 0
    requests: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cancelled: int = 0
    finished: int = 0
    running: int = 0
    most_running: int = 0
    endpoint: str = ""
    answered: list[dict[str, object]] = field(default_factory=list)  # requests of which a byte of the answer was sent
    _server: asyncio.Server = field(init=False, repr=False)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set, repr=False)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self, "127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()

    async def kill(self) -> None:
        """Dies: running answers break off, new connections are refused."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            for _ in range(self.answers_per_connection):
                if not await self._one(reader, writer):
                    return
            await reader.readuntil(b"\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        headers = {name.lower(): value for name, value in lines}
        body = json.loads(await _body(reader, headers))
        self.requests.append(body)
        self.headers.append(headers)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._answer(body, reader, writer)
        finally:
            self.running -= 1

    async def _answer(
        self, body: dict[str, object], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        if self.hangs:
            await reader.read(1)
            self.cancelled += 1
            return False
        if self.dies_after == 0:
            return False
        tokens = int(str(body.get("max_tokens", 4)))
        if self.status != 200:
            self._whole(writer, self.status, {"error": {"message": "engine says no", "code": self.status}})
        elif not body.get("stream"):
            await asyncio.sleep(self.token_s * tokens)
            if writer.is_closing():
                return False
            choices = [{"index": 0, "text": "x" * tokens, "finish_reason": "length"}]
            self.answered.append(body)
            usage = {"prompt_tokens": 40, "completion_tokens": tokens, "total_tokens": 40 + tokens}
            self._whole(writer, 200, {"id": "a", "object": "text_completion", "choices": choices, "usage": usage})
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for number in range(tokens):
                if number == self.error_event_after:
                    _chunk(writer, b'data: {"error":{"message":"stopping","code":500}}\n\ndata: [DONE]\n\n')
                    break
                if number == self.dies_after or not await self._pause(reader):
                    return False
                if not number and not writer.is_closing():
                    self.answered.append(body)
                _chunk(writer, _event(body, number, tokens))
                await writer.drain()
            if self.sends_done and self.error_event_after is None:
                _chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        self.finished += 1
        return True

    async def _pause(self, reader: asyncio.StreamReader) -> bool:
        """One token's time; False when the client has gone meanwhile."""
        if self.token_s:
            await asyncio.sleep(self.token_s)
        if reader.at_eof():
            self.cancelled += 1
            return False
        return True

    def _whole(self, writer: asyncio.StreamWriter, status: int, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(data))
        )
        writer.write(data)


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """Of a known length, or in chunks, as Envoy sends what passed an external processor."""
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    pieces = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        pieces.append(await reader.readexactly(size))
        await reader.readline()
    await reader.readline()
    return b"".join(pieces)


def _event(body: dict[str, object], number: int, tokens: int) -> bytes:
    last = "length" if number == tokens - 1 else None
    if "messages" in body:
        choice: dict[str, object] = {"index": 0, "delta": {"content": f"w{number} "}, "finish_reason": last}
        kind = "chat.completion.chunk"
    else:
        choice = {"index": 0, "text": f"w{number} ", "finish_reason": last}
        kind = "text_completion"
    event = {"id": "a", "object": kind, "created": 1, "model": MODEL, "choices": [choice], "emulated_at": time.time()}
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


class StandInController(rpc.ControllerServicer):
    """Hands out `table` and what `publish` sets later; keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[pb.ReportLoadRequest] = []
        self.power_w: float | None = None  # of every instance
        self.running: dict[str, float] = {}  # requests that engines say they have
        self.asked_status = 0
        self._table: RoutingTable | None = None
        self._changed = asyncio.Event()

    def publish(self, table: RoutingTable) -> None:
        self._table = table
        self._changed.set()
        self._changed = asyncio.Event()

    async def WatchRouting(
        self, request: pb.WatchRoutingRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchRoutingResponse]:
        while True:
            changed = self._changed
            if self._table is not None:
                yield routing_to_wire(self._table)
            await changed.wait()

    async def ReportLoad(
        self, request: pb.ReportLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReportLoadResponse:
        self.reports.append(request)
        return pb.ReportLoadResponse(term=1)

    async def GetStatus(self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext) -> pb.GetStatusResponse:
        pools = self._table.pools if self._table is not None else ()
        names = [instance.instance_id for pool in pools for instance in pool.instances]
        self.asked_status += 1
        instances = [pb.InstanceStatus(instance_id=name, power_w=self.power_w) for name in names]
        for each in instances:
            if each.instance_id in self.running:
                each.running, each.waiting = self.running[each.instance_id], 0.0
        return pb.GetStatusResponse(pools=[pb.PoolStatus(instances=instances)])


@asynccontextmanager
async def controlling(controller: StandInController, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    rpc.add_ControllerServicer_to_server(controller, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    assert bound
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


SHORT, LONG = by_input("short", "SM"), by_input("long", "L")


def table(
    *pools: tuple[ClassGroup, dict[str, Engine | str]],
    term: int = 1,
    version: int = 1,
    max_in_flight: int = 8,
    draining: tuple[str, ...] = (),
) -> RoutingTable:
    """A routing table over named engines (or endpoints)."""
    return RoutingTable(
        term=term,
        version=version,
        pools=tuple(
            RoutedPool(
                group.name,
                MODEL,
                group.classes,
                tuple(
                    RoutedInstance(
                        name,
                        engine if isinstance(engine, str) else engine.endpoint,
                        4,
                        max_in_flight,
                        1.0,
                        name not in draining,
                    )
                    for name, engine in engines.items()
                ),
            )
            for group, engines in pools
        ),
    )


@dataclass
class Gateway:
    url: str
    process: asyncio.subprocess.Process
    log: list[str]
    picker_port: int = 0


@asynccontextmanager
async def gateway_process(controller_port: int, **settings: object) -> AsyncIterator[Gateway]:
    """The real program. `settings` are configuration keys with __ for dots, e.g. limits__queue_s=1."""
    environment = os.environ | {f"DYNAMOLLM_GATEWAY__{key.upper()}": str(value) for key, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "controller.cli.gateway",
        "run",
        "--listen=127.0.0.1:0",
        f"--controller=127.0.0.1:{controller_port}",
        env=environment | {"DYNAMOLLM_GATEWAY__LOG__FORM": "json", "DYNAMOLLM_GATEWAY__GATEWAY_ID": "gw"},
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stderr is not None
    log: list[str] = []
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    picking: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def read(stream: asyncio.StreamReader) -> None:
        async for raw in stream:
            line = raw.decode()
            log.append(line)
            if '"event": "listening"' in line and not listening.done():
                listening.set_result(json.loads(line)["address"])
            if '"event": "picker_listening"' in line:
                picking.set_result(json.loads(line)["port"])
        if not listening.done():
            listening.set_exception(RuntimeError("the gateway ended: " + "".join(log)))

    reader = asyncio.create_task(read(process.stderr))
    try:
        async with asyncio.timeout(30):
            url = await listening
            port = await picking if "picker__listen" in settings else 0
        yield Gateway(url, process, log, port)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()
                await process.wait()
        await reader


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    """Waits for something to become true, on a machine of any speed."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is another process's doing
            await asyncio.sleep(0.01)


async def until_healthy(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as client, asyncio.timeout(20):
        while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.02)
