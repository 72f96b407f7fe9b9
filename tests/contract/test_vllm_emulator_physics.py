"""The emulated engine keeps physics time, and what it does shows on the host's GPUs."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator

import pytest

from simulator.host.nvml.state import HostState
from simulator.physics import Physics
from tests.nvml_client import NvmlClient
from tests.vllm_emulator import Emulator

PHYSICS = Physics.load()
MICROSECONDS = 3e-6  # stamps have six digits


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostState]:
    state = HostState.create(tmp_path_factory.mktemp("host") / "gpus", gpus=8)
    yield state
    state.close()


@pytest.fixture(scope="module")
def engine(host: HostState) -> Iterator[Emulator]:
    """On GPUs 4 to 7 of the host, named by UUID."""
    with Emulator("-tp", "4", state=host.path, gpus=",".join(host.uuids[4:])) as emulator:
        yield emulator


def stamps(engine: Emulator, prompt: int, tokens: int) -> tuple[float, list[float]]:
    """Arrival and token instants of one streamed completion, as the engine states them."""
    events = engine.ask(
        "/v1/completions", {"prompt": [1] * prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    )
    assert events.pop() == "[DONE]"
    return events[0]["emulated_arrival_at"], [event["emulated_at"] for event in events]


def seconds(mhz: int, prompt: int, tokens: int) -> list[float]:
    """What the physics says about a request alone: prefill, then each gap."""
    prefill = PHYSICS.iteration(4, mhz, 0, 0, [(prompt, 0)])[0]
    return [prefill, *(PHYSICS.iteration(4, mhz, 1, prompt + done)[0] for done in range(1, tokens))]


def differences(arrival: float, tokens: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip([arrival, *tokens], tokens, strict=False)]


def test_tokens_leave_at_the_instants_of_the_physics(engine: Emulator) -> None:
    sent = time.time()
    arrival, tokens = stamps(engine, prompt=700, tokens=12)
    assert sent <= arrival <= tokens[0]
    assert tokens[-1] <= time.time(), "a token came before its time"
    assert differences(arrival, tokens) == pytest.approx(seconds(1980, 700, 12), abs=MICROSECONDS)


def test_a_whole_answer_carries_arrival_first_and_last_token(engine: Emulator) -> None:
    answer = engine.ask("/v1/completions", {"prompt": [1] * 300, "max_tokens": 4, "ignore_eos": True})
    prefill, *gaps = seconds(1980, 300, 4)
    arrival, first, last = (answer[f"emulated_{name}"] for name in ("arrival_at", "first_at", "at"))
    assert first - arrival == pytest.approx(prefill, abs=MICROSECONDS)
    assert last - first == pytest.approx(sum(gaps), abs=MICROSECONDS)


def test_requests_in_one_batch_share_their_iterations(engine: Emulator) -> None:
    first_connection, first = engine.open_stream(max_tokens=150)
    second_connection, second = engine.open_stream(max_tokens=150)
    one, other = (set(re.findall(r'"emulated_at":([\d.]+)', r.read().decode())) for r in (first, second))
    first_connection.close()
    second_connection.close()
    assert len(one & other) > 10


def test_a_stalled_process_does_not_slow_the_emulated_gpu(engine: Emulator) -> None:
    """Stopped for a while, the engine catches up: its tokens carry the instants at which they were due."""
    connection, response = engine.open_stream(max_tokens=120)
    engine.process.send_signal(signal.SIGSTOP)
    time.sleep(0.7)
    engine.process.send_signal(signal.SIGCONT)
    tokens = [float(stamp) for stamp in re.findall(r'"emulated_at":([\d.]+)', response.read().decode())]
    connection.close()
    gaps = differences(tokens[0], tokens[1:])
    assert len(tokens) == 119  # the first had been read already
    assert gaps == pytest.approx(seconds(1980, 10, 120)[2:], abs=MICROSECONDS)


def test_a_request_that_comes_during_catching_up_is_not_served_in_the_past(engine: Emulator) -> None:
    connection, response = engine.open_stream(max_tokens=60)
    engine.process.send_signal(signal.SIGSTOP)
    time.sleep(0.4)
    engine.process.send_signal(signal.SIGCONT)
    arrival, tokens = stamps(engine, prompt=10, tokens=3)
    response.read()
    connection.close()
    assert tokens[0] - arrival > PHYSICS.iteration(4, 1980, 0, 0, [(10, 0)])[0] - MICROSECONDS


@pytest.mark.parametrize("mhz", [795, 1200])
def test_a_lower_lock_slows_prefill_and_decode_as_the_physics_says(engine: Emulator, host: HostState, mhz: int) -> None:
    with NvmlClient(host.path) as client:
        for gpu in (4, 5, 6):
            client.call("nvmlDeviceSetGpuLockedClocks", mhz, mhz, gpu=gpu)
        try:
            # One locked GPU of four is enough: the others wait for it at every all-reduce.
            slowed = differences(*stamps(engine, prompt=900, tokens=6))
        finally:
            for gpu in (4, 5, 6):
                client.call("nvmlDeviceResetGpuLockedClocks", gpu=gpu)
    assert slowed == pytest.approx(seconds(mhz, 900, 6), abs=MICROSECONDS)
    assert slowed[0] > 1.1 * seconds(1980, 900, 1)[0]
    assert differences(*stamps(engine, prompt=900, tokens=6)) == pytest.approx(seconds(1980, 900, 6), abs=MICROSECONDS)


def test_power_limit_slows_and_is_kept(engine: Emulator, host: HostState) -> None:
    free = differences(*stamps(engine, prompt=1000, tokens=2))
    with NvmlClient(host.path) as client:
        client.call("nvmlDeviceSetPowerManagementLimit", 300_000, gpu=4)
        try:
            limited = differences(*stamps(engine, prompt=1000, tokens=2))
        finally:
            client.call("nvmlDeviceSetPowerManagementLimit", 700_000, gpu=4)
    mhz = PHYSICS.effective_mhz(4, 1980, 300.0, 0, 0, [(1000, 0)])
    assert limited[0] == pytest.approx(PHYSICS.iteration(4, mhz, 0, 0, [(1000, 0)])[0], abs=MICROSECONDS)
    assert limited[0] > free[0]


def wait_for_power(host: HostState, gpu: int, watts: float) -> None:
    """Until a GPU draws that much, within 2 % (the context grows meanwhile)."""
    deadline = time.monotonic() + 30
    while host.observe(gpu).power_w != pytest.approx(watts, rel=0.02):
        assert time.monotonic() < deadline, f"GPU {gpu} draws {host.observe(gpu).power_w} W, not {watts}"
        time.sleep(0.02)


def test_power_and_activity_show_on_the_engines_gpus_only(engine: Emulator, host: HostState) -> None:
    engine.wait_for("num_requests_running", 0)
    wait_for_power(host, 5, PHYSICS.idle_w(1980, context=True))
    with NvmlClient(host.path) as client:
        connection, response = engine.open_stream()
        wait_for_power(host, 5, PHYSICS.iteration(4, 1980, 1, 20)[1])
        busy = host.observe(6)
        told_w = client.call("nvmlDeviceGetPowerUsage", gpu=7) / 1000
        # Locked meanwhile: the power of the next iterations is that of the lower clock.
        for gpu in (4, 5, 6, 7):
            client.call("nvmlDeviceSetGpuLockedClocks", 1005, 1005, gpu=gpu)
        wait_for_power(host, 5, PHYSICS.iteration(4, 1005, 1, 100)[1])
        for gpu in (4, 5, 6, 7):
            client.call("nvmlDeviceResetGpuLockedClocks", gpu=gpu)
    assert (busy.gpu_util, busy.idle) == (100, False)
    assert told_w == pytest.approx(busy.power_w, rel=0.02)
    assert (host.observe(0).gpu_util, host.observe(0).power_w) == (0, 72.0)
    connection.close()
    response.close()
    engine.wait_for("num_requests_running", 0)
    wait_for_power(host, 5, PHYSICS.idle_w(1980, context=True))
    assert host.observe(5).gpu_util == 0


def test_loading_takes_memory_and_power_and_the_end_gives_them_back(host: HostState) -> None:
    with Emulator("-tp", "2", state=host.path, gpus="0,1", start_s=60, wait=False) as emulator:
        deadline = time.monotonic() + 30
        while not host.observe(0).processes and time.monotonic() < deadline:
            time.sleep(0.05)
        loading = host.observe(0)
        assert [process.pid for process in loading.processes] == [emulator.process.pid]
        assert loading.used_bytes > 0.9 * host.memory_bytes
        assert loading.power_w == pytest.approx(121.0)
        assert not emulator.healthy()
        with Emulator("-tp", "2", state=host.path, gpus="1,2", wait=False) as second:
            code, said = second.end()
        assert code == 1
        assert re.fullmatch(r"vllm: GPU GPU-[\w-]+: .*Another process holds its memory.*\n", said)
        emulator.process.send_signal(signal.SIGTERM)
        assert emulator.end()[0] == 0
    assert (host.observe(0).power_w, host.observe(0).used_bytes) == (72.0, 0)


def test_other_physics_give_other_times(host: HostState) -> None:
    with Emulator("-tp", "4", physics="base+legacy") as legacy:
        arrival, tokens = stamps(legacy, prompt=50, tokens=3)
    assert differences(arrival, tokens)[1:] == pytest.approx([0.028, 0.028], abs=MICROSECONDS)


def test_without_ignore_eos_the_length_follows_from_the_prompt(engine: Emulator) -> None:
    def answer(prompt: str) -> tuple[int, str]:
        body = {"prompt": prompt, "max_tokens": 3000, "stream": False}
        whole = engine.ask("/v1/completions", body)
        return whole["usage"]["completion_tokens"], whole["choices"][0]["finish_reason"]

    first = answer("Is it raining?")
    assert first == answer("Is it raining?")
    assert first[1] == "stop"
    assert first[0] != answer("What time is it?")[0]


@pytest.mark.parametrize(
    ("options", "gpus", "physics", "message"),
    [
        (("-tp", "3"), "", "", "--tensor-parallel-size 3: no physics of .* Use one of: 2, 4, 8"),
        (("-tp", "4"), "0,1", "", "larger than the number of available GPUs \\(2\\)"),
        (("-tp", "2"), "0,GPU-none", "", "CUDA_VISIBLE_DEVICES names GPU GPU-none"),
        (("-tp", "2"), "0,11", "", "CUDA_VISIBLE_DEVICES names GPU 11"),
        (("-tp", "2", "--max-model-len", "32k"), "", "", "larger than the KV cache of 29000 tokens"),
        (("-tp", "2", "--max-model-len", "many"), "", "", "--max-model-len many: not a number of tokens"),
        (("-tp", "2", "--max-num-batched-tokens", "64"), "", "", "smaller than --max-num-seqs"),
        (("-tp", "2"), "", "hopeful", "no physics variant 'hopeful'"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    host: HostState, options: tuple[str, ...], gpus: str, physics: str, message: str
) -> None:
    with Emulator(*options, state=host.path, gpus=gpus, physics=physics, wait=False) as emulator:
        code, said = emulator.end()
    assert code != 0
    assert re.fullmatch(rf"vllm: .*{message}.*\n", said)
