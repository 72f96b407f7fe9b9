"""A demonstration as a process, for the tests that run it and kill parts of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from simulator.demo.prepare import prepare
from simulator.host.nvml.state import GpuView, HostState

WIDE_TIMEOUT_S = 200.0


def prepared() -> None:
    """Measures profile and k_max now if it was not done before, so that a test's time limit is not spent on it."""
    prepare("base", None, Console(file=sys.stderr))


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


class DemoRun:
    """`python -m simulator.demo` with `arguments`, its figures and its parts."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder / "run"
        self.json_file = folder / "figures.json"
        self.output_file = folder / "output.txt"
        command: Sequence[str] = (
            *(sys.executable, "-m", "simulator.demo", "--dir", str(self.folder), "--json", str(self.json_file)),
            *arguments,
        )
        with self.output_file.open("wb") as output:
            # A session of its own, so that a signal of the test's reaches nobody else. A shell's background jobs ignore
            # SIGINT, and a child would inherit that.
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def __enter__(self) -> DemoRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for process in self.left_over():
            process.kill()

    @property
    def output(self) -> str:
        return self.output_file.read_text(encoding="utf-8", errors="replace")

    def wait_for_load(self) -> None:
        """Until the client of the controlled fleet has been sending for a moment."""
        sending = self.folder / "dynamollm" / "load.json"
        wait_for(lambda: sending.exists() or self.process.poll() is not None, 90.0, "the load begins")
        assert self.process.poll() is None, self.output
        time.sleep(2.0)

    def pid(self, part: str) -> int | None:
        pids: dict[str, int] = json.loads((self.folder / "processes.json").read_text(encoding="utf-8"))
        return pids.get(part)

    def kill(self, part: str) -> int:
        pid = self.pid(part)
        assert pid is not None, f"{part} does not run: {self.output}"
        os.kill(pid, signal.SIGKILL)
        return pid

    def gpus(self, host: str) -> list[GpuView]:
        """What the host's GPUs are like now, as every NVML client there sees it."""
        state = HostState.open(self.folder / "dynamollm" / host / "gpus")
        try:
            return [state.observe(index) for index in range(state.gpu_count)]
        finally:
            state.close()

    def figures(self) -> dict[str, Any]:
        """Waits for the end and returns what it measured."""
        assert self.process.wait(WIDE_TIMEOUT_S) == 0, self.output
        value: dict[str, Any] = json.loads(self.json_file.read_text(encoding="utf-8"))
        return value

    def left_over(self) -> list[psutil.Process]:
        """Processes of this run that still live, wherever they hang in the process tree."""
        mark = str(self.folder)
        return [process for process in psutil.process_iter() if _belongs(process, mark)]


def _belongs(process: psutil.Process, mark: str) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return any(mark in text for text in (*process.cmdline(), *process.environ().values()))
    except psutil.Error:
        return False
