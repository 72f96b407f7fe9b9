"""The request path's figures: both ways in beside a direct connection and, where it is installed, litellm's proxy, all
in one run over one engine. DYNAMOLLM_LITELLM names litellm's program.

Processes are not given a core each: on a small machine they all compete, for every proxy alike.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import uvloop

from common.clock import SystemClock
from common.http1 import Connection, Headers, connect, request_head
from controller.domain.classes import by_input
from controller.domain.slo import Slo
from controller.gateway.asked import read_request
from controller.gateway.brain import Brain, Outcome
from controller.gateway.classify import Classifier
from controller.gateway.tokens import TokenCounter, load_tokenizers
from controller.predictor.best import Best
from controller.predictor.conditional import Conditional
from controller.predictor.port import Features
from controller.predictor.text import TextPredictor
from controller.predictor.train import Pair, train
from dynamollm.v1 import gateway_pb2 as pb
from dynamollm.v1 import gateway_pb2_grpc as rpc
from simulator.bench.metric import Metric, of_repeats
from tests.envoy import binary, envoy_process
from tests.gateway_stand_ins import (
    MODEL,
    Gateway,
    StandInController,
    controlling,
    gateway_process,
    table,
    until_healthy,
)

ALL = by_input("all", "SML")
Say = Callable[[str], None]
ROOT = Path(__file__).parents[1]
RUN_S = 4.0
REPEATS = 3
CONNECTIONS = 32
NICE = -10  # systemd/dynamollm-gateway.service
PICKS_PER_S = 500
PICK_S = 10.0
IN_FLIGHT = 5_000  # answers of ten seconds
STREAMS, STREAM_TOKENS = 40, 200
# litellm does not start without one.
KEY = f"sk-{secrets.token_hex(32)}"
CHARACTERS = 8_000  # of a prompt of 2,000 tokens or a few more
PROMPTS = 50  # a tokenizer remembers words: one prompt again and again would flatter it


def measure(say: Say) -> list[Metric]:
    """All of it; about three minutes."""
    say("classifying prompts of 2,000 tokens")
    metrics = classifying()
    with tempfile.TemporaryDirectory(prefix="dynamollm-") as folder:
        metrics += uvloop.run(_over_the_wire(Path(folder), say))
    return metrics


def measure_chaos(say: Say, seconds: float = 600.0) -> list[Metric]:
    """Ten minutes of drains, kills and re-shards, both ways in; see tests/chaos.py."""
    from tests.faults.test_gateway_chaos import run

    metrics = []
    for way in ("gateway", "envoy") if binary() else ("gateway",):
        say(f"{seconds:g} s of chaos through {way}")
        with tempfile.TemporaryDirectory(prefix="dynamollm-") as folder:
            verdicts, fleet = asyncio.run(run(way, Path(folder), seconds, seed=17))
        requests = sum(verdicts.counted.values())
        answered = verdicts.counted["whole"] + verdicts.counted["streamed"]
        metrics += [
            Metric(f"{way}: requests under chaos", requests, "requests"),
            Metric(f"{way}: disturbances", sum(fleet.done.values()), "drains, kills, re-shards"),
            Metric(f"{way}: without exactly one answer or clear error", len(verdicts.wrong), "requests", target=0),
            Metric(f"{way}: clear errors", requests - answered, "requests"),
        ]
    return metrics


# ------------------------------------------------------------------------------------------------- in this process


def classifying() -> list[Metric]:
    """From the body's bytes to the class, by wall clock and by processor time (another process may hold the core)."""
    bodies = _bodies()
    metrics = []
    with tempfile.TemporaryDirectory(prefix="dynamollm-") as folder:
        counters = {"bytes": TokenCounter()}
        if (file := _tokenizer(Path(folder))) is not None:
            counters["tokenizer"] = TokenCounter(load_tokenizers({MODEL: file}))
    for predictor in ("conditional", "text"):
        for counted, counter in counters.items():
            brain = Brain(1000, Slo(), SystemClock(), Classifier(None, 0.8, _predictor(predictor), 0.4), counter)
            wall, cpu = _classify(brain, bodies)
            name = f"classify 2,000 tokens, {predictor} predictor, {counted} counted"
            metrics += [
                Metric(f"{name}, p50", wall[len(wall) // 2] * 1e3, "ms"),
                Metric(f"{name}, p99", wall[int(len(wall) * 0.99)] * 1e3, "ms", target=1.0),
                Metric(f"{name}, p99 of processor time", cpu[int(len(cpu) * 0.99)] * 1e3, "ms", target=1.0),
            ]
    return metrics


def _bodies() -> list[bytes]:
    """Chats of one message each, from anywhere in this project's documentation."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    draw = random.Random(1)
    starts = [draw.randrange(len(text) - CHARACTERS) for _ in range(PROMPTS)]
    chats = [[{"role": "user", "content": text[start : start + CHARACTERS]}] for start in starts]
    return [json.dumps({"model": MODEL, "messages": chat}, ensure_ascii=False).encode() for chat in chats]


def _classify(brain: Brain, bodies: list[bytes]) -> tuple[list[float], list[float]]:
    wall, cpu = [], []
    for number in range(2_000):
        body = bodies[number % len(bodies)]
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        ticket = brain.arrive(read_request("/v1/chat/completions", body, [MODEL]))
        cpu.append(time.thread_time() - started_cpu_s)
        wall.append(time.perf_counter() - started_s)
        brain.done(ticket, Outcome.SERVED)
    return sorted(wall), sorted(cpu)


def _predictor(name: str) -> Any:
    if name == "conditional":
        return Conditional()
    draw = random.Random(3)
    pairs = [Pair(Features(50, text=_prose(200, draw)), draw.randrange(10, 800)) for _ in range(300)]
    return Best(TextPredictor(train(pairs)), Conditional())


def _prose(characters: int, draw: random.Random | None = None) -> str:
    """Words as they are spread in prose: few common ones, many rare ones."""
    draw = draw or random.Random(1)
    words: list[str] = []
    while sum(map(len, words)) + len(words) < characters:
        words.append(f"w{min(20_000, int(draw.paretovariate(0.8)))}ing")
    return " ".join(words)[:characters]


def _tokenizer(folder: Path) -> Path | None:
    """A vocabulary of 8,000 made of this project's own text; None where the package is missing."""
    try:
        import tokenizers
    except ImportError:
        return None
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8_000, show_progress=False)
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "controller").rglob("*.py")]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


# ----------------------------------------------------------------------------------------------------- over the wire


async def _over_the_wire(folder: Path, say: Say) -> list[Metric]:
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(_engine())
        controller = StandInController()
        port = await stack.enter_async_context(controlling(controller))
        gateway = await stack.enter_async_context(gateway_process(port, picker__listen="127.0.0.1:0"))
        controller.publish(table((ALL, {"e": engine}), max_in_flight=100_000))  # picks are never reported as over
        await until_healthy(gateway)
        ways = {"direct": engine, "gateway": gateway.url}
        metrics: list[Metric] = []
        if binary() is not None:
            latencies = folder / "latencies.txt"
            envoy = await stack.enter_async_context(envoy_process(gateway.picker_port, folder, latencies=latencies))
            ways["envoy and picker"] = envoy.url
            await asyncio.sleep(1.5)  # the first health check of the picker
            say("picking for Envoy")
            metrics += await _picks(envoy.url, latencies, gateway)
        if (litellm := os.environ.get("DYNAMOLLM_LITELLM")) is not None:
            say("starting litellm's proxy")
            ways["litellm"] = await stack.enter_async_context(_litellm(litellm, engine, folder))
        else:
            say("litellm is left out: DYNAMOLLM_LITELLM does not name its program")
        rates: dict[str, list[float]] = {way: [] for way in ways}
        latencies: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(REPEATS):
            say(f"asking through {', '.join(ways)}, {repeat + 1} of {REPEATS}")
            for way, url in ways.items():  # side by side: whatever else the machine does, it does to all
                took = await _ask(url, CONNECTIONS, RUN_S)
                rates[way].append(len(took) / RUN_S)
                latencies[way] += await _ask(url, 1, RUN_S / 4)
        for way in ways:
            ordered = sorted(latencies[way])
            metrics += [
                of_repeats(f"{way}: requests/s, {CONNECTIONS} connections", rates[way], "1/s"),
                Metric(f"{way}: latency of one request at a time, p50", ordered[len(ordered) // 2] * 1e3, "ms"),
                Metric(f"{way}: latency of one request at a time, p99", _p99(ordered) * 1e3, "ms"),
            ]
        if "litellm" in ways:
            factors = [ours / theirs for ours, theirs in zip(rates["gateway"], rates["litellm"], strict=True)]
            metrics.append(of_repeats("gateway: requests/s as a multiple of litellm's", factors, "x", target=2.0))
        say("streaming")
        for way in ways:
            pid = {"gateway": gateway.process.pid}.get(way)
            metrics += await _streams(way, ways[way], pid)
        return metrics


def _p99(ordered: list[float]) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


@asynccontextmanager
async def _engine() -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fast_engine", stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@asynccontextmanager
async def _litellm(program: str, engine: str, folder: Path) -> AsyncIterator[str]:
    """With one worker, as it is started by default, and nothing but forwarding configured."""
    probe = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = probe.sockets[0].getsockname()[1]
    probe.close()
    params = f"{{model: text-completion-openai/{MODEL}, api_base: {engine}/v1, api_key: x}}"
    text = f"model_list:\n- {{model_name: {MODEL}, litellm_params: {params}}}\n"
    (folder / "litellm.yaml").write_text(text + "litellm_settings: {telemetry: false, set_verbose: false}\n")
    with (folder / "litellm.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program,
            *("--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(120), httpx.AsyncClient() as client:
            while not await _alive(client, url):
                if process.returncode is not None:
                    raise RuntimeError((folder / "litellm.log").read_text()[-2000:])
                await asyncio.sleep(0.5)
        yield url
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _alive(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/health/liveliness", timeout=2)).status_code == 200
    except httpx.HTTPError:
        return False


class _Sink:
    """One answer, counted."""

    def __init__(self) -> None:
        self.status, self.events = 0, 0
        self.finished: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def head(self, status: int, headers: Headers) -> None:
        self.status = status

    def body(self, data: bytes) -> None:
        self.events += data.count(b"\n\n")

    def done(self, error: str | None) -> None:
        if not self.finished.done():
            self.finished.set_result(error)


def _request(url: str, body: dict[str, object]) -> tuple[str, int, bytes]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    data = json.dumps({"model": MODEL, **body}).encode()
    headers = [("content-type", "application/json"), ("authorization", f"Bearer {KEY}")]
    return host, int(port), request_head("POST", "/v1/completions", f"{host}:{port}", headers, len(data)) + data


async def _ask(url: str, connections: int, seconds: float) -> list[float]:
    """Durations of whole answers, each connection asking again at once."""
    host, port, request = _request(url, {"prompt": "hello " * 40, "max_tokens": 5})
    ends_s, took = time.perf_counter() + seconds, []

    async def client(connection: Connection) -> None:
        while (started_s := time.perf_counter()) < ends_s:
            if connection.closed:
                connection = await connect(host, port, 5)
            sink = _Sink()
            connection.send(request, b"", sink)
            error = await sink.finished
            if error is not None or sink.status != 200:
                raise RuntimeError(f"{url}: {error or sink.status}")
            took.append(time.perf_counter() - started_s)
        connection.abort("done")

    opened = [await connect(host, port, 5) for _ in range(connections)]
    await asyncio.gather(*map(client, opened))
    return took


async def _streams(way: str, url: str, pid: int | None) -> list[Metric]:
    """What a proxy adds to a token: by its processor time where it is one process of ours, else by the clock."""
    host, port, request = _request(url, {"prompt": "hello", "max_tokens": STREAM_TOKENS, "stream": True})
    process = psutil.Process(pid) if pid is not None else None
    before = _cpu_s(process)
    started_s = time.perf_counter()

    async def client() -> int:
        connection, sink = await connect(host, port, 5), _Sink()
        connection.send(request, b"", sink)
        await sink.finished
        connection.abort("done")
        return sink.events

    events = sum(await asyncio.gather(*(client() for _ in range(STREAMS))))
    wall_s = time.perf_counter() - started_s
    metrics = [Metric(f"{way}: time for {STREAMS} streams of {STREAM_TOKENS} tokens", wall_s, "s")]
    if process is not None:
        per_token_us = (_cpu_s(process) - before) / events * 1e6
        metrics.append(Metric(f"{way}: processor time per token", per_token_us, "us"))
    return metrics


def _cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


async def _picks(url: str, latencies: Path, gateway: Gateway) -> list[Metric]:
    """Decisions at a steady rate, by the clock of the Envoy that asks for them: from its first word of a request to the
    last of the answer. The gateway has a core to itself where there are two, the others share the rest, and it holds as
    many requests as engines would be answering at that rate."""
    host, port, request = _request(url, {"prompt": _prose(2_000), "max_tokens": 100})
    idle: list[Connection] = []

    async def ask() -> None:
        connection = idle.pop() if idle else await connect(host, port, 5)
        sink = _Sink()
        connection.send(request, b"", sink)
        if (error := await sink.finished) is not None or sink.status != 200:
            raise RuntimeError(f"no choice: {error or sink.status}")
        if not connection.closed:
            idle.append(connection)

    p50_ms: list[float] = []
    p99_ms: list[float] = []
    cpu_s: list[float] = []
    await _hold(gateway.picker_port, IN_FLIGHT)
    process = psutil.Process(gateway.process.pid)
    with suppress(PermissionError):  # as its unit does
        _go_first(process)
    # A pause of this process would let requests pile up that then come all at once.
    gc.collect()
    gc.disable()
    with _core_of_its_own(process):
        await _paced(ask, 50, 1.0)
        await asyncio.sleep(0.5)  # Envoy writes its log now and then
        for _ in range(REPEATS):
            told = len(_read(latencies))
            before_s = _cpu_s(process)
            await _paced(ask, PICKS_PER_S, PICK_S)
            cpu_s.append((_cpu_s(process) - before_s) / (PICKS_PER_S * PICK_S))
            await asyncio.sleep(0.5)
            ordered = sorted(map(_decision_ms, _read(latencies)[told:]))
            if len(ordered) != PICKS_PER_S * PICK_S:
                raise RuntimeError(f"Envoy tells of {len(ordered)} decisions")
            p50_ms.append(ordered[len(ordered) // 2])
            p99_ms.append(_p99(ordered))
    gc.enable()
    for connection in idle:
        connection.abort("done")
    name = f"picker: decision at {PICKS_PER_S} req/s on one core, {IN_FLIGHT:,} in flight"
    return [
        of_repeats(f"{name}, p50", p50_ms, "ms"),
        of_repeats(f"{name}, p99", p99_ms, "ms", target=3.0),
        of_repeats(f"picker: processor time of a decision at {PICKS_PER_S} req/s", [s * 1e6 for s in cpu_s], "us"),
        of_repeats("picker: decisions that one core has time for", [1 / s for s in cpu_s], "1/s"),
    ]


def _read(file: Path) -> list[str]:
    return file.read_text().splitlines()


def _decision_ms(line: str) -> float:
    """Until head and body were answered. What Envoy waited for in vain (`message_timeout`) it says nothing of."""
    us = [int(each) if each != "-" else 1_000_000 for each in line.split()]
    return max(us) / 1e3


async def _hold(port: int, requests: int) -> None:
    """Chosen for and never reported: they stay in flight for as long as this takes."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = rpc.GatewayStub(channel)
        for start in range(0, requests, 50):
            routes = (pb.RouteRequest(model=MODEL, input_tokens=300) for _ in range(min(50, requests - start)))
            await asyncio.gather(*(stub.Route(each) for each in routes))


@contextmanager
def _core_of_its_own(process: psutil.Process) -> Iterator[None]:
    """The first core for one process, the rest for all others of this run. Nothing on a machine of one core.

    This process, which asks and answers, gives way to Envoy: on two cores Envoy's clock would tell of the load's
    processor time otherwise. Only root may take that back.
    """
    cores = sorted(os.sched_getaffinity(0))
    this = psutil.Process()
    others = [this, *(each for each in this.children(recursive=True) if each.pid != process.pid)]
    if len(cores) > 1:
        _run_on(process, cores[:1])
        for each in others:
            _run_on(each, cores[1:])
    niceness = os.nice(0)
    os.nice(10)
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
        for each in (process, *others):
            _run_on(each, cores)


def _go_first(process: psutil.Process) -> None:
    for thread in process.threads():
        os.setpriority(os.PRIO_PROCESS, thread.id, NICE)


def _run_on(process: psutil.Process, cores: list[int]) -> None:
    with suppress(psutil.NoSuchProcess):
        for thread in process.threads():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, cores)


async def _paced(work: Callable[[], Awaitable[None]], per_s: float, seconds: float) -> None:
    """Starts `work` at a steady rate, whatever it takes."""
    loop = asyncio.get_running_loop()
    started_s, tasks = loop.time(), []
    for number in range(round(per_s * seconds)):
        await asyncio.sleep(started_s + number / per_s - loop.time())
        tasks.append(asyncio.ensure_future(work()))
    await asyncio.gather(*tasks)
