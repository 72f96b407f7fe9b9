"""Load generator -> gateway -> emulated engines, all as processes: a generated trace is served whole, latencies by the
engines' stamps and by the client's clock agree, and an engine that goes away loses nothing without a word."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from common.latency import BucketBound, summarise
from common.loadgen import LoadOptions, Status, counts, overhead_s, run_load
from controller.domain.classes import ClassScheme, by_input
from simulator import traces
from simulator.host.nvml.state import HostState
from tests.gateway_stand_ins import (
    LONG,
    MODEL,
    SHORT,
    Gateway,
    StandInController,
    controlling,
    gateway_process,
    table,
    until,
    until_healthy,
)

ROOT = Path(__file__).parents[2]
BUCKETS = [BucketBound("S", 0, 250.0), BucketBound("M", 256, 400.0), BucketBound("L", 1024, 2000.0)]
ALL = by_input("all", "SML")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def emulators(
    state: Path, count: int, gpus: int = 4
) -> AsyncIterator[list[tuple[str, asyncio.subprocess.Process]]]:
    """`count` engines of so many GPUs each on one emulated host."""
    host = HostState.create(state)
    started: list[tuple[str, asyncio.subprocess.Process]] = []
    try:
        for number in range(count):
            port = free_port()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "simulator.host.vllm", "serve", MODEL,
                f"--tensor-parallel-size={gpus}", "--host=127.0.0.1", f"--port={port}", "--uvicorn-log-level=error",
                env=os.environ
                | {
                    "DYNAMOLLM_NVML_STATE": str(state),
                    "CUDA_VISIBLE_DEVICES": ",".join(host.uuids[gpus * number : gpus * (number + 1)]),
                    "DYNAMOLLM_EMULATED_START_S": "0.1",
                },
                stderr=asyncio.subprocess.DEVNULL,
                cwd=ROOT,
            )  # fmt: skip
            started.append((f"http://127.0.0.1:{port}", process))
        async with httpx.AsyncClient() as client, asyncio.timeout(60):
            for endpoint, process in started:
                while not await healthy(client, endpoint):
                    assert process.returncode is None, "the emulated engine ended"
                    await asyncio.sleep(0.1)
        yield started
    finally:
        for _, process in started:
            if process.returncode is None:
                process.kill()
            await process.wait()
        host.close()


async def healthy(client: httpx.AsyncClient, endpoint: str) -> bool:
    try:
        return (await client.get(f"{endpoint}/health")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
async def test_a_generated_trace_is_served_whole(tmp_path: Path) -> None:
    trace = traces.generate("conv", duration_s=6, mean_rate_rps=5, seed=7)
    controller = StandInController()
    async with (
        emulators(tmp_path / "gpus", 2) as engines,
        controlling(controller) as port,
        gateway_process(port, report_interval_s=0.2) as gateway,
    ):
        (short, _), (long, _) = engines
        controller.publish(table((SHORT, {"s": short}), (LONG, {"l": long}), max_in_flight=64))
        await until_healthy(gateway)
        records = await run_load(trace, LoadOptions(gateway.url, MODEL))
        await until(lambda: sum(c.completed for c in controller.reports[-1].classes) == len(trace))
    assert counts(records) == {Status.SERVED: len(trace)}
    assert [(r.input_tokens, r.tokens) for r in records] == [(r.input_tokens, r.output_tokens) for r in trace]
    for record in records:
        assert record.headers["x-dynamollm-pool"] == ("long" if record.input_tokens >= 1024 else "short")
        assert len(record.stamp_gaps_s) == record.tokens - 1
    report = controller.reports[-1]
    assert sum(c.output_tokens for c in report.classes) == sum(r.tokens for r in records)
    assert sum(c.token_gap_seconds.counts[-1] for c in report.classes) == sum(r.tokens - 1 for r in records)
    # Outcomes count under true classes, not the predicted ones.
    scheme = ClassScheme()
    true_classes = Counter(str(scheme.classify(r.input_tokens, r.output_tokens)) for r in records)
    assert {c.request_class: c.completed for c in report.classes if c.completed} == true_classes
    everything = summarise((r.latency() for r in records), BUCKETS, tbt_ms=100.0)[-1]
    assert everything.served == len(trace)
    assert everything.tbt_p50_ms is not None
    assert 10 < everything.tbt_p50_ms < 60  # an H100 group of four decodes a small batch in about 17 ms
    lags = overhead_s(records)
    assert len(lags) == sum(r.tokens for r in records)
    assert lags[0] > -0.001  # nothing is received before it was stamped


@pytest.mark.slow
async def test_an_engine_that_goes_away_loses_no_request_without_a_word(tmp_path: Path) -> None:
    """One is killed, one told to stop: what they were answering fails clearly, what waited is served elsewhere."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        controller = StandInController()
        async with (
            emulators(tmp_path / f"gpus{number}", 2) as engines,
            controlling(controller) as port,
            gateway_process(port) as gateway,
        ):
            controller.publish(table((ALL, {f"e{n}": url for n, (url, _) in enumerate(engines)}), max_in_flight=6))
            await until_healthy(gateway)
            load = [(n * 0.05, 400, 40) for n in range(60)]
            running = asyncio.create_task(run_load(load, LoadOptions(gateway.url, MODEL)))
            await asyncio.sleep(1.2)
            engines[0][1].send_signal(number)
            records = await running
            await check_idle(gateway)
        got = counts(records)
        assert set(got) <= {Status.SERVED, Status.FAILED}, got
        assert 1 <= got[Status.FAILED] <= 6  # at most what it held
        assert all("error" in r.detail for r in records if r.status is Status.FAILED)
        assert all(r.tokens == 40 for r in records if r.status is Status.SERVED)
        assert max(r.tokens for r in records) == 40  # no answer was begun twice


async def check_idle(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as client:
        metrics = (await client.get("/metrics")).text
    held = [line.split()[-1] for line in metrics.splitlines() if line.startswith("dynamollm_gateway_in_flight{")]
    assert held == ["0.0"]
