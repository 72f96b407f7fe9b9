"""The gateway process before real HTTP clients: pass-through, headers, limits, cancellation, fail-over, broken engines,
and a controller that comes and goes."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest

from controller.domain.classes import by_input
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

ALL = by_input("all", "SML")


@asynccontextmanager
async def system(*engines: Engine, **settings: object) -> AsyncIterator[tuple[Gateway, StandInController]]:
    """Engines e0, e1, … in one pool behind a gateway."""
    controller = StandInController()
    async with controlling(controller) as port:
        for engine in engines:
            await engine.start()
        try:
            async with gateway_process(port, **settings) as gateway:
                controller.publish(table((ALL, {f"e{n}": engine for n, engine in enumerate(engines)})))
                if engines:
                    await until_healthy(gateway)
                yield gateway, controller
        finally:
            for engine in engines:
                await engine.stop()


def post(prompt: object = (1, 2, 3), tokens: int = 5, **more: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **more}


async def complete(gateway: Gateway, **body: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
        return await client.post("/v1/completions", json=post(**body))


async def get(gateway: Gateway, path: str) -> str:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
        return (await client.get(path)).text


async def until_version(gateway: Gateway, version: int) -> None:
    """Waits until a routing table is in force."""
    async with asyncio.timeout(15):
        while json.loads(await get(gateway, "/health"))["routing_version"] != version:  # noqa: ASYNC110 - not ours
            await asyncio.sleep(0.02)


async def test_whole_and_streamed_answers_pass_through_untouched() -> None:
    engine = Engine()
    async with system(engine) as (gateway, _), openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k") as client:
        whole = await client.completions.create(model=MODEL, prompt="hello", max_tokens=6)
        assert whole.choices[0].text == "xxxxxx"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 6
        streamed = await client.completions.create(model=MODEL, prompt=[5] * 300, max_tokens=4, stream=True)
        assert [chunk.choices[0].text async for chunk in streamed] == ["w0 ", "w1 ", "w2 ", "w3 "]
        chat = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True
        )
        assert [chunk.choices[0].delta.content async for chunk in chat] == ["w0 ", "w1 ", "w2 "]
        assert [model.id async for model in client.models.list()] == [MODEL]
        raw = await complete(gateway, stream=True, tokens=2)
    assert raw.headers["content-type"] == "text/event-stream"
    assert raw.headers["x-dynamollm-pool"] == "all"
    assert raw.headers["x-dynamollm-instance"] == "e0"
    assert raw.headers["x-dynamollm-class"].startswith("S")
    assert float(raw.headers["x-dynamollm-queue-ms"]) >= 0
    assert raw.text.count("data: ") == 3
    assert raw.text.endswith("data: [DONE]\n\n")
    assert engine.requests[1]["prompt"] == [5] * 300
    assert engine.headers[0]["authorization"] == "Bearer k"
    assert "cookie" not in engine.headers[0]


async def test_requests_go_to_the_pool_of_their_length_and_bound_the_engines_work() -> None:
    short, long = Engine(token_s=0.01), Engine(token_s=0.01)
    controller = StandInController()
    async with serving(short), serving(long), controlling(controller) as port, gateway_process(port) as gateway:
        controller.publish(table((SHORT, {"s": short}), (LONG, {"l": long}), max_in_flight=3))
        await until_healthy(gateway)
        lengths = [10, 500, 2000] * 6
        answers = await asyncio.gather(*(complete(gateway, prompt=[7] * n, stream=True) for n in lengths))
    for length, answer in zip(lengths, answers, strict=True):
        assert answer.status_code == 200
        if length > 1024:
            assert answer.headers["x-dynamollm-pool"] == "long"
    assert all(request["prompt"] != [7] * 2000 for request in short.requests)
    assert short.most_running <= 3
    assert long.most_running <= 3
    assert len(short.requests) + len(long.requests) == 18


async def test_an_engine_that_fails_before_the_first_byte_is_replaced_by_another() -> None:
    for bad in (Engine(dies_after=0), Engine(status=500), Engine(status=503), Engine(error_event_after=0)):
        good = Engine()
        async with system(bad, good) as (gateway, _):
            answers = await asyncio.gather(*(complete(gateway, stream=True) for _ in range(6)))
            assert [answer.status_code for answer in answers] == [200] * 6
            assert {answer.headers["x-dynamollm-instance"] for answer in answers} == {"e1"}
            assert len(good.requests) == 6
            assert bad.requests  # it was tried


async def test_an_engine_that_cannot_be_reached_is_replaced_and_spared_for_a_while() -> None:
    good = Engine()
    async with system(good) as (gateway, controller):
        controller.publish(table((ALL, {"a-dead": "http://127.0.0.1:9", "e0": good}), version=2, max_in_flight=2))
        answers = await asyncio.gather(*(complete(gateway) for _ in range(8)))
        assert {answer.headers["x-dynamollm-instance"] for answer in answers} == {"e0"}
        metrics = await get(gateway, "/metrics")
    assert "dynamollm_gateway_failovers_total" in metrics
    failovers = [line for line in metrics.splitlines() if line.startswith("dynamollm_gateway_failovers_total")]
    assert 1 <= float(failovers[0].split()[-1]) <= 3


async def test_connections_are_kept_and_a_stale_one_is_no_engine_failure() -> None:
    keeping, closing = Engine(), Engine(answers_per_connection=2)
    for engine, connections in ((keeping, 1), (closing, 3)):
        async with system(engine) as (gateway, _):
            for number in range(6):
                assert (await complete(gateway, stream=number % 2 == 0)).status_code == 200
            metrics = await get(gateway, "/metrics")
        assert len(engine.requests) == 6
        assert engine.connections == connections
        assert "dynamollm_gateway_failovers_total 0.0" in metrics


async def test_when_every_engine_fails_the_client_gets_one_clear_error() -> None:
    async with system(Engine(dies_after=0), Engine(dies_after=0), Engine(dies_after=0)) as (gateway, controller):
        answer = await complete(gateway, stream=True)
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "failed"
        assert "connection lost" in answer.json()["error"]["message"]
        await until(lambda: bool(controller.reports) and sum(c.failed for c in controller.reports[-1].classes) == 1)


async def test_an_engine_that_dies_within_an_answer_is_told_and_never_repeated() -> None:
    bad, other = Engine(dies_after=3, token_s=0.01), Engine(dies_after=3, token_s=0.01)
    async with system(bad, other) as (gateway, controller):
        answer = await complete(gateway, stream=True, tokens=9)
        assert answer.status_code == 200
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert [json.loads(event).get("choices", [{}])[0].get("text") for event in events[:-1]] == ["w0 ", "w1 ", "w2 "]
        assert json.loads(events[-1])["error"]["code"] == "engine_failed"
        assert len(bad.requests) + len(other.requests) == 1
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client:
            stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=9, stream=True)
            with pytest.raises(openai.APIError, match="failed within"):
                async for _ in stream:
                    pass
        await until(lambda: bool(controller.reports) and sum(c.failed for c in controller.reports[-1].classes) == 2)
        assert sum(c.completed for c in controller.reports[-1].classes) == 0


async def test_an_answer_without_its_end_mark_is_no_complete_answer() -> None:
    async with system(Engine(sends_done=False)) as (gateway, _):
        answer = await complete(gateway, stream=True, tokens=2)
        assert '"code": "engine_failed"' in answer.text


async def test_an_engine_that_stops_within_an_answer_says_so_itself() -> None:
    async with system(Engine(error_event_after=2)) as (gateway, controller):
        answer = await complete(gateway, stream=True, tokens=4)
        assert answer.text.count('"error"') == 1
        assert '"message":"stopping"' in answer.text
        await until(lambda: bool(controller.reports) and sum(c.failed for c in controller.reports[-1].classes) == 1)


async def test_a_client_that_leaves_cancels_its_request_running_or_waiting() -> None:
    engine = Engine(token_s=0.02)
    async with system(engine) as (gateway, controller):
        controller.publish(table((ALL, {"e0": engine}), version=2, max_in_flight=1))
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
            await until_version(gateway, 2)
            async with client.stream("POST", "/v1/completions", json=post(stream=True, tokens=10_000)) as running:
                chunks = running.aiter_raw()  # kept: httpx closes an answer whose iterator is dropped
                await anext(chunks)
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/completions", json=post(), timeout=0.3)
                assert (await client.get("/health")).json()["waiting"] in (0, 1)
            await until(lambda: engine.cancelled == 1)
            assert (await client.post("/v1/completions", json=post())).status_code == 200
        assert len(engine.requests) == 2  # the one that left the queue never reached the engine
        await until(lambda: bool(controller.reports) and controller.reports[-1].queues[0].in_flight == 0)
        assert sum(c.failed for c in controller.reports[-1].classes) == 0


async def test_a_silent_engine_is_given_up() -> None:
    hung, good = Engine(hangs=True), Engine()
    async with system(hung, good, limits__silent_s=0.5) as (gateway, _):
        answers = await asyncio.gather(*(complete(gateway) for _ in range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert hung.cancelled >= 1


async def test_bad_requests_get_openai_errors_and_reach_no_engine() -> None:
    engine = Engine()
    async with (
        system(engine, limits__body_bytes=4096) as (gateway, _),
        httpx.AsyncClient(base_url=gateway.url, timeout=30) as client,
    ):

        async def answer(content: bytes, path: str = "/v1/completions") -> tuple[int, str]:
            response = await client.post(path, content=content)
            return response.status_code, response.json()["error"]["code"]

        assert await answer(b"{") == (400, "invalid_json")
        assert await answer(b"[]") == (400, "invalid_json")
        assert await answer(b"[" * 4000) == (400, "invalid_json")
        assert await answer(b"\xff\xfe{}") == (400, "invalid_json")
        assert await answer(b'{"model": "test-model"}') == (400, "missing_field")
        assert await answer(b'{"model": 5, "prompt": "x"}') == (400, "missing_field")
        assert await answer(b'{"prompt": "x", "model": "gpt"}') == (404, "model_not_found")
        assert await answer(b'{"prompt": [], "model": "test-model"}') == (400, "invalid_value")
        assert await answer(b'{"prompt": "x", "max_tokens": -1}') == (400, "invalid_value")
        assert await answer(b'{"prompt": "x", "stream": "yes"}') == (400, "invalid_value")
        assert await answer(b'{"prompt": "x"}', "/v1/chat/completions") == (400, "missing_field")
        assert await answer(b'{"prompt": "' + b"x" * 5000 + b'"}') == (413, "request_too_large")
        assert await answer(b"{}", "/v1/nothing") == (404, "not_found")
        assert (await client.get("/v1/completions")).status_code == 405
        assert (await client.post("/health")).status_code == 405
        assert engine.requests == []
        # Without a model the only one is meant.
        assert (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})).status_code == 200


async def test_an_engines_own_complaint_reaches_the_client() -> None:
    async with system(Engine(status=400)) as (gateway, controller):
        answer = await complete(gateway, stream=True)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "engine says no")
        await until(lambda: bool(controller.reports) and sum(c.arrived for c in controller.reports[-1].classes) == 1)
        assert sum(c.failed for c in controller.reports[-1].classes) == 0


async def test_without_instances_requests_wait_then_are_refused() -> None:
    controller, engine = StandInController(), Engine()
    async with (
        serving(engine),
        controlling(controller) as port,
        gateway_process(port, limits__queue_s=1.0, limits__waiting=2) as gateway,
    ):
        assert "waiting for instances" in await get(gateway, "/health")
        answers = await asyncio.gather(*(complete(gateway) for _ in range(3)))
        assert sorted(answer.status_code for answer in answers) == [429, 503, 503]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        waiting = asyncio.create_task(complete(gateway))
        await asyncio.sleep(0.2)
        controller.publish(table((ALL, {"e0": engine})))
        assert (await waiting).status_code == 200


async def test_serving_goes_on_without_the_controller_and_over_its_restart() -> None:
    engine, successor = Engine(), Engine()
    first = StandInController()
    async with serving(engine), serving(successor):
        async with controlling(first) as port:
            first.publish(table((ALL, {"e0": engine}), term=1))
            process = gateway_process(port, report_interval_s=0.1)
            gateway = await process.__aenter__()
            await until_healthy(gateway)
            await until(lambda: bool(first.reports))
        try:
            assert (await complete(gateway)).status_code == 200  # the controller is gone
            second = StandInController()
            second.publish(table((ALL, {}), term=2))  # it has not seen its nodes yet
            async with controlling(second, port):
                await until(lambda: bool(second.reports))
                assert (await complete(gateway)).headers["x-dynamollm-instance"] == "e0"
                second.publish(table((ALL, {"e1": successor}), term=2, version=2))
                await until_version(gateway, 2)
                assert (await complete(gateway)).headers["x-dynamollm-instance"] == "e1"
                epochs = {report.epoch for report in first.reports + second.reports}
                assert len(epochs) == 1
                await until(lambda: sum(c.completed for c in second.reports[-1].classes) >= 2)
        finally:
            await process.__aexit__(None, None, None)


async def test_reports_count_arrivals_outcomes_and_times() -> None:
    engine = Engine(token_s=0.01)
    async with system(engine, report_interval_s=0.1) as (gateway, controller):
        await asyncio.gather(*(complete(gateway, prompt=[9] * 300, tokens=5, stream=True) for _ in range(4)))
        await until(lambda: sum(c.completed for c in controller.reports[-1].classes) == 4)
        report = controller.reports[-1]
        assert len(report.classes) == 9
        assert sum(c.arrived for c in report.classes) == 4
        assert sum(c.input_tokens for c in report.classes) == 1200
        (true_class,) = [c for c in report.classes if c.completed]
        assert true_class.request_class == "MS"
        assert true_class.output_tokens == 20
        assert true_class.ttft_seconds.counts[-1] == 4
        assert true_class.token_gap_seconds.counts[-1] == 16
        assert true_class.token_gap_seconds.sum / 16 >= 0.009
        assert controller.reports[0].epoch == report.epoch


async def test_sigterm_lets_running_answers_finish() -> None:
    engine = Engine(token_s=0.02)
    async with system(engine) as (gateway, _):
        running = asyncio.create_task(complete(gateway, stream=True, tokens=40))
        await until(lambda: engine.running == 1)
        gateway.process.send_signal(signal.SIGTERM)
        assert (await running).text.endswith("data: [DONE]\n\n")
        assert await asyncio.wait_for(gateway.process.wait(), 10) == 0


async def test_prompts_never_reach_the_log() -> None:
    secret = "sesame-open-42"
    async with system(Engine(dies_after=2), log__level="debug") as (gateway, _):
        await complete(gateway, prompt=secret, stream=True)
        await complete(gateway, prompt=secret, model="nope")
        await complete(gateway, prompt=[secret, 5])
    assert gateway.log
    assert secret not in "".join(gateway.log)


async def test_joules_are_told_where_the_controller_knows_the_power() -> None:
    engine = Engine(token_s=0.02)
    async with system(engine) as (gateway, controller):
        whole = await complete(gateway, tokens=5)
        assert "x-dynamollm-joules" not in whole.headers  # unknown is not zero
        controller.power_w = 1000.0
        async with asyncio.timeout(15):
            while "x-dynamollm-joules" not in (whole := await complete(gateway, tokens=5)).headers:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert 80 < float(whole.headers["x-dynamollm-joules"]) < 5_000  # a tenth of a second, on a slow machine more
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
            asked = {"x-dynamollm-report-joules": "1"}
            streamed = await client.post("/v1/completions", json=post(stream=True), headers=asked)
            plain = await client.post("/v1/completions", json=post(stream=True))
        last = streamed.text.rstrip().rpartition("\n\n")[2]
        assert last.startswith(": dynamollm joules=")
        assert "joules" not in plain.text
        assert "dynamollm_gateway_request_joules_total" in await get(gateway, "/metrics")
