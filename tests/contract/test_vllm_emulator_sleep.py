"""Sleep mode of the emulated engine: memory, power, work that waits, and what it does without enough memory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulator.host.nvml.state import HostState
from tests import vllm_recording as recording
from tests.vllm_emulator import Emulator

GIB = 1 << 30
ASK = {"model": recording.MODEL, "prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostState]:
    for name, value in (("VLLM_SERVER_DEV_MODE", "1"), ("DYNAMOLLM_EMULATED_SLEEP_S", "0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DYNAMOLLM_EMULATED_WAKE_S", "0.1")
    state = HostState.create(tmp_path / "gpus", 2)
    yield state
    state.close()


def engine(host: HostState) -> Emulator:
    return Emulator("--tensor-parallel-size", "2", "--enable-sleep-mode", state=host.path, gpus="0,1")


def call(port: int, method: str, path: str) -> tuple[int, dict[str, object]]:
    status, _, body = recording.ask(port, path, {} if method == "POST" else None)
    return status, json.loads(body)


def test_it_gives_up_memory_and_power_and_takes_them_back(host: HostState) -> None:
    with engine(host) as emulator:
        awake = host.observe(0)
        assert call(emulator.port, "GET", "/is_sleeping") == (200, {"is_sleeping": False})
        assert call(emulator.port, "POST", "/sleep?level=1&mode=wait") == (200, {"status": "sleeping", "level": 1})
        assert call(emulator.port, "GET", "/is_sleeping") == (200, {"is_sleeping": True})
        asleep = host.observe(0)
        assert asleep.processes[0].used_bytes < awake.processes[0].used_bytes / 20
        assert asleep.power_w == pytest.approx(122, abs=0.5)
        answers: list[int] = []
        client = threading.Thread(
            target=lambda: answers.append(recording.ask(emulator.port, "/v1/completions", ASK)[0])
        )
        client.start()  # waits for the wake-up
        assert call(emulator.port, "POST", "/wake_up")[0] == 200
        client.join(20)
        assert answers == [200]
        assert host.observe(0).processes[0].used_bytes == awake.processes[0].used_bytes


def test_without_gpu_memory_it_sleeps_on(host: HostState) -> None:
    with engine(host) as emulator:
        assert call(emulator.port, "POST", "/sleep?level=1&mode=wait")[0] == 200
        host.attach_process(1, os.getpid(), 60 * GIB)
        status, body = call(emulator.port, "POST", "/wake_up")
        assert status == 500
        assert "out of memory" in str(body["detail"])
        assert call(emulator.port, "GET", "/is_sleeping") == (200, {"is_sleeping": True})
        assert host.observe(0).processes[0].used_bytes < 2 * GIB  # nothing half taken


def test_host_memory_is_one_for_all_engines(host: HostState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMOLLM_EMULATED_HOST_MEMORY_GIB", "150")  # one set of weights (131 GiB), not two
    with engine(host) as emulator:
        assert call(emulator.port, "POST", "/sleep?level=1&mode=wait")[0] == 200
        with engine(host) as second:
            status, body = call(second.port, "POST", "/sleep?level=1&mode=wait")
            assert status == 500
            assert "host memory" in str(body["detail"])
        assert call(emulator.port, "POST", "/wake_up")[0] == 200


def test_the_endpoints_are_there_only_when_asked_for(host: HostState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE")
    with engine(host) as emulator:
        assert call(emulator.port, "GET", "/is_sleeping")[0] == 404
