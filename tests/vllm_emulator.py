"""An emulated engine as a process, for tests.

with Emulator("--tensor-parallel-size", "4") as engine:
    engine.ask("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True})
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests import vllm_recording as recording

DEADLINE_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Emulator:
    """One engine process; healthy inside the `with` unless told not to wait."""

    def __init__(
        self,
        *options: str,
        port: int | None = None,
        state: Path | None = None,
        gpus: str = "",
        start_s: float = 0.0,
        physics: str = "",
        wait: bool = True,
    ) -> None:
        self.port = port or free_port()
        self._wait = wait
        environment = os.environ | {"DYNAMOLLM_EMULATED_START_S": str(start_s), "DYNAMOLLM_PHYSICS": physics}
        environment |= {"CUDA_VISIBLE_DEVICES": gpus, "DYNAMOLLM_NVML_STATE": str(state or "")}
        command = [sys.executable, "-m", "simulator.host.vllm", "serve", recording.MODEL]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Emulator:
        if self._wait:
            self.wait_until_healthy()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not self.healthy():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, "the engine does not become healthy"
            time.sleep(0.05)

    def healthy(self) -> bool:
        try:
            return recording.ask(self.port, "/health", None)[0] == 200
        except ConnectionRefusedError:
            return False

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of an answer that must be 200; the list of events of a stream."""
        status, content_type, data = recording.ask(self.port, path, body)
        assert status == 200, data
        return recording.events(data) if content_type.startswith("text/event-stream") else json.loads(data)

    def open_stream(self, **body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A streamed completion of which the first event has come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        data = json.dumps({"prompt": [1] * 10, "max_tokens": 1500, "ignore_eos": True, "stream": True} | body)
        connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
        response = connection.getresponse()
        response.readline()
        return connection, response

    def metric(self, name: str) -> float:
        """The sum over the series of one metric."""
        page = recording.ask(self.port, "/metrics", None)[2].decode()
        values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", page, re.MULTILINE)
        assert values, f"no metric vllm:{name}"
        return sum(map(float, values))

    def wait_for(self, name: str, value: float) -> None:
        """Until a metric has a value."""
        deadline = time.monotonic() + DEADLINE_S
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} stays at {self.metric(name)}"
            time.sleep(0.02)

    def output(self) -> str:
        """All that the process said; waits for its end."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def end(self) -> tuple[int, str]:
        """Exit code and output of a process that ends by itself."""
        text = self.output()
        return self.process.wait(DEADLINE_S), text
