"""Clients that mean harm or know no better: keys, oversized and slow heads, smuggled headers, broken bodies.

Whatever they send, they get one clear error, memory stays bounded, and no engine ever sees it."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from pathlib import Path

import httpx
import psutil
import pytest

from controller.domain.classes import by_input
from controller.gateway.access import hash_of
from tests.certificates import Authority
from tests.gateway_stand_ins import (
    MODEL,
    Engine,
    Gateway,
    StandInController,
    controlling,
    gateway_process,
    serving,
    table,
    until_healthy,
)

ALL = by_input("all", "SML")
FUZZED = 10_000


def good() -> dict[str, object]:
    return {"model": MODEL, "prompt": "hello", "max_tokens": 2}


async def raw(gateway: Gateway, data: bytes, more: bytes = b"", wait_s: float = 0.0) -> bytes:
    """Sends bytes as they are; returns all that comes back until the gateway closes or says nothing for a while."""
    host, _, port = gateway.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        if wait_s:
            await asyncio.sleep(wait_s)
            writer.write(more)
        try:
            async with asyncio.timeout(15):
                return await reader.read(65_536)
        except ConnectionError:
            return b""
    finally:
        writer.close()


async def test_only_known_keys_may_send_and_they_end_here(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"acme {hash_of('right')}\n")
    controller, engine = StandInController(), Engine()
    async with (
        serving(engine),
        controlling(controller) as port,
        gateway_process(port, access__keys_file=keys) as gateway,
    ):
        controller.publish(table((ALL, {"e": engine})))
        await until_healthy(gateway)
        async with httpx.AsyncClient(base_url=gateway.url) as client:
            for header in ({}, {"authorization": "Bearer wrong"}):
                for answer in (
                    await client.post("/v1/completions", json=good(), headers=header),
                    await client.get("/v1/models", headers=header),
                ):
                    assert answer.status_code == 401
                    assert "api_key" in answer.json()["error"]["code"]
            right = {"authorization": "Bearer right"}
            assert (await client.post("/v1/completions", json=good(), headers=right)).status_code == 200
            assert (await client.get("/v1/models", headers=right)).status_code == 200
        assert len(engine.requests) == 1
        assert "authorization" not in engine.headers[0]
        assert not any("right" in line or "wrong" in line for line in gateway.log)


async def test_heads_without_end_are_cut_off() -> None:
    async with controlling(StandInController()) as port, gateway_process(port) as gateway:
        flood = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + b"".join(
            b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(60)
        )
        assert b" 431 " in await raw(gateway, flood)
        # Two requests at once in one write are two requests; a body inside a head is not a second one.
        both = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 2
        assert (await raw(gateway, both)).count(b"HTTP/1.1 ") >= 1
        slow = asyncio.create_task(raw(gateway, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-a: "))
        silent = asyncio.create_task(raw(gateway, b""))
        assert b" 408 " in await slow
        assert b" 408 " in await silent


async def test_bodies_without_end_are_cut_off() -> None:
    controller, engine = StandInController(), Engine()
    async with (
        serving(engine),
        controlling(controller) as port,
        gateway_process(port, limits__body_s=0.5, limits__body_bytes=10_000) as gateway,
    ):
        controller.publish(table((ALL, {"e": engine})))
        await until_healthy(gateway)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        slow = await raw(gateway, head + b'content-length: 1000\r\n\r\n{"model"')
        assert b" 408 " in slow.split(b"\r\n")[0]
        drops = await raw(gateway, head + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n{\r\n" * 9)
        assert b" 408 " in drops.split(b"\r\n")[0]
        flood = await raw(gateway, head + b"transfer-encoding: chunked\r\n\r\n" + b"400\r\n%s\r\n" % (b" " * 1024) * 30)
        assert b" 413 " in flood.split(b"\r\n")[0]
        async with httpx.AsyncClient(base_url=gateway.url) as client:
            assert (await client.post("/v1/completions", json=good())).status_code == 200
    assert len(engine.requests) == 1


async def test_headers_cannot_be_smuggled_and_only_a_few_pass() -> None:
    controller, engine = StandInController(), Engine()
    async with serving(engine), controlling(controller) as port, gateway_process(port) as gateway:
        controller.publish(table((ALL, {"e": engine})))
        await until_healthy(gateway)
        body = json.dumps(good()).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: a\r\n b: c\r\ncookie: s=1\r\n"
        answer = await raw(gateway, head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
        both = (
            b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        answer = await raw(gateway, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + both)
        assert b" 200 " not in answer.split(b"\r\n")[0]
    for headers in engine.headers:
        assert not {"b", "cookie", "x-a"} & headers.keys()


def mutated(draw: random.Random) -> bytes:
    """A request that was good once."""
    body = bytearray(json.dumps(good() | {"stream": draw.random() < 0.3}).encode())
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(body))
        match draw.randrange(4):
            case 0:
                body[at] = draw.randrange(256)
            case 1:
                del body[at : at + draw.randrange(1, 10)]
            case 2:
                body[at:at] = draw.choice([b"\0", b"[[[[", b'"', b"\xff\xfe", b"1e999", b"null", b'{"a":', b"\\ud800"])
            case _:
                body[at:at] = body[: draw.randrange(len(body))]
        body = body or bytearray(b"x")
    return bytes(body)


@pytest.mark.slow
async def test_ten_thousand_broken_requests_get_ten_thousand_answers() -> None:
    controller, engine, draw = StandInController(), Engine(), random.Random(7)
    statuses: dict[int, int] = {}
    async with serving(engine), controlling(controller) as port, gateway_process(port) as gateway:
        controller.publish(table((ALL, {"e": engine}), max_in_flight=100))
        await until_healthy(gateway)
        process = psutil.Process(gateway.process.pid)
        limits = httpx.Limits(max_connections=20)

        async def send(client: httpx.AsyncClient, count: int) -> None:
            for _ in range(count):
                target = draw.choice(["/v1/completions", "/v1/chat/completions"])
                answer = await client.post(target, content=mutated(draw))
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                if answer.status_code != 200:
                    assert answer.json()["error"]["message"]

        async with httpx.AsyncClient(base_url=gateway.url, timeout=30, limits=limits) as client:
            await asyncio.gather(*(send(client, FUZZED // 100) for _ in range(20)))
            before_mib = process.memory_info().rss / 2**20
            await asyncio.gather(*(send(client, FUZZED // 25) for _ in range(20)))
            grown_mib = process.memory_info().rss / 2**20 - before_mib
            assert (await client.post("/v1/completions", json=good())).status_code == 200
    assert sum(statuses.values()) == FUZZED
    assert set(statuses) <= {200, 400, 404}
    assert statuses[400] > FUZZED / 2
    assert grown_mib < 30
    for request in engine.requests:  # what came through was whole
        assert request.get("model") in (MODEL, None)  # the only one there is need not be named


async def test_a_certificate_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    with pytest.raises(RuntimeError, match=r"tls: .*x\.pem cannot be used"):
        async with gateway_process(1, tls__certificate=tmp_path / "x.pem", tls__key=tmp_path / "x.pem"):
            pass


async def test_https_where_it_is_asked_for(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("gateway", "IP:127.0.0.1")
    async with controlling(StandInController()) as port:
        settings = {"tls__certificate": pair.cert, "tls__key": pair.key}
        async with gateway_process(port, **settings) as gateway:
            assert gateway.url.startswith("https://")
            context = ssl.create_default_context(cafile=str(authority.pair.cert))
            async with httpx.AsyncClient(verify=context) as client:
                assert (await client.get(f"{gateway.url}/v1/models")).json() == {"object": "list", "data": []}
