"""A real NVML client for tests: pynvml in a process of its own, on the emulated GPUs of one host.

    with NvmlClient(host.path) as client:
        client.call("nvmlDeviceGetPowerUsage", gpu=0)

A process of its own, because a process sees one host only and because a client may hang or be killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Gpu = int | tuple[str, str]


class NvmlFailure(Exception):
    """An NVML call that failed; `code` is its nvmlReturn_t."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code


class NvmlClient:
    """One process with pynvml, initialised. Calls by pynvml's names."""

    def __init__(self, state: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=client_environment(state),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.reply()
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, name: str, *arguments: Any, gpu: Gpu | None = None) -> Any:
        """Result of one call as plain values; structures come as dictionaries. `gpu` puts its handle first: by index
        (looked up once and kept), or by any key as ("UUID" | "Serial" | "PciBusId", value)."""
        self.send(name, *arguments, gpu=gpu)
        return self.reply()

    def send(self, name: str, *arguments: Any, gpu: Gpu | None = None) -> None:
        """Starts a call without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, gpu, arguments]) + "\n")
        self._process.stdin.flush()

    def reply(self) -> Any:
        """Waits for the call that was sent."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"NVML client ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "code" in answer:
            raise NvmlFailure(answer["code"], answer["text"])
        return answer["value"]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> NvmlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.kill()


def client_environment(state: Path | None) -> Mapping[str, str]:
    """Environment in which a program sees the emulated GPUs of `state`."""
    from simulator.host.nvml.build import ensure_library

    environment = {**os.environ, "LD_LIBRARY_PATH": str(ensure_library())}
    environment.pop("DYNAMOLLM_NVML_STATE", None)
    if state is not None:
        environment["DYNAMOLLM_NVML_STATE"] = str(state)
    return environment


def _plain(value: Any) -> Any:
    if hasattr(value, "_fields_"):
        return {name: _plain(getattr(value, name)) for name, *_ in value._fields_}
    if type(value).__name__ == "nvmlFriendlyObject":
        return {name: _plain(item) for name, item in vars(value).items()}
    if isinstance(value, list | tuple | ctypes.Array):
        return [_plain(item) for item in value]
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _answer(line: str, handles: dict[int, Any]) -> dict[str, Any]:
    import pynvml

    try:
        name, gpu, arguments = json.loads(line)
        if isinstance(gpu, list):
            arguments.insert(0, getattr(pynvml, f"nvmlDeviceGetHandleBy{gpu[0]}")(gpu[1]))
        elif gpu is not None:
            if gpu not in handles:
                handles[gpu] = pynvml.nvmlDeviceGetHandleByIndex(gpu)
            arguments.insert(0, handles[gpu])
        return {"value": _plain(getattr(pynvml, name)(*arguments))}
    except pynvml.NVMLError as error:
        return {"code": error.value, "text": str(error)}


def _main() -> None:
    handles: dict[int, Any] = {}
    sys.stdout.write(json.dumps(_answer('["nvmlInit", null, []]', handles)) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(line, handles), default=repr) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
