"""Engines without an engine: the table of states, records, command line, metrics page, and real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common.clock import VirtualClock
from nodeagent.config import EngineConfig
from nodeagent.engine.command import check_spec, command_line, free_port
from nodeagent.engine.launcher import Launch, LaunchFailed, ProcessId
from nodeagent.engine.lifecycle import ANSWERING, ENDED, RUNNING, TRANSITIONS, Event, State, follow
from nodeagent.engine.process import ProcessLauncher
from nodeagent.engine.records import Record, Records, Spec
from nodeagent.engine.vllm import EngineSilent, parse_metrics
from nodeagent.errors import Invalid, Precondition

SPEC = Spec("i-1", "llama", ("GPU-a", "GPU-b"), {"pool": "short"})


class TestLifecycle:
    def test_nothing_follows_the_end(self) -> None:
        assert not [state for state, _ in TRANSITIONS if state in ENDED]

    @pytest.mark.parametrize("state", [state for state in State if state in RUNNING])
    @pytest.mark.parametrize("event", [Event.STOP, Event.FAIL])
    def test_whatever_runs_can_be_stopped_and_can_die(self, state: State, event: Event) -> None:
        assert follow(state, event) is State.STOPPING

    def test_only_a_proof_ends_an_instance(self) -> None:
        proofs = {event for (_, event), after in TRANSITIONS.items() if after in ENDED}
        assert proofs == {Event.FREED, Event.FREED_AFTER_FAILURE}

    def test_only_a_warm_engine_becomes_ready(self) -> None:
        assert {before for before, after in TRANSITIONS.items() if after is State.READY} == {
            (State.WARMING, Event.WARMED_UP)
        }

    def test_every_state_can_be_reached_and_left_alive(self) -> None:
        assert {after for after in TRANSITIONS.values()} | {State.STARTING} == set(State)
        assert ANSWERING < RUNNING
        with pytest.raises(ValueError, match="ready cannot go on by"):
            follow(State.READY, Event.FREED)


class TestRecords:
    def record(self, name: str = "i-1") -> Record:
        spec = Spec(name, "llama", ("GPU-a",), {"pool": "short"})
        process = ProcessId(123, 4567.89)
        return Record(spec, State.READY, "serving", "boot", "token", 8000, "/log", 12.5, process, step_s={"start": 3.0})

    def test_what_was_saved_is_loaded(self, tmp_path: Path) -> None:
        records = Records(tmp_path, VirtualClock())
        saved = [self.record("a"), self.record("b").but(process=None, state=State.STARTING)]
        for record in saved:
            records.save(record)
        assert records.load_all() == saved
        records.remove("a")
        assert records.load_all() == saved[1:]

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 2}'])
    def test_an_unreadable_record_is_kept_aside(self, tmp_path: Path, content: str) -> None:
        records = Records(tmp_path, VirtualClock())
        records.save(self.record("good"))
        (tmp_path / "bad.json").write_text(content)
        assert [record.spec.instance_id for record in records.load_all()] == ["good"]
        assert len(list(tmp_path.glob("bad.json.unreadable-*"))) == 1


class TestCommandLine:
    def test_it_is_vllms(self) -> None:
        config = EngineConfig(command=("python", "-m", "engine"), args=("--seed", "1"), listen_host="10.0.0.1")
        assert command_line(SPEC, 8001, config) == (
            *("python", "-m", "engine", "serve", "llama", "--tensor-parallel-size", "2"),
            *("--host", "10.0.0.1", "--port", "8001", "--seed", "1"),
        )

    def test_a_model_kept_elsewhere_is_served_under_its_name(self) -> None:
        argv = command_line(SPEC, 8001, EngineConfig(model_paths={"llama": "/models/llama"}))
        assert argv[:5] == ("vllm", "serve", "/models/llama", "--served-model-name", "llama")

    @pytest.mark.parametrize(
        "spec",
        [
            Spec("Upper", "m", ("g",)),
            Spec("", "m", ("g",)),
            Spec("../x", "m", ("g",)),
            Spec("a" * 64, "m", ("g",)),
            Spec("a", "", ("g",)),
            Spec("a", "--trust-remote-code", ("g",)),
            Spec("a", "m\0", ("g",)),
            Spec("a", "m", ()),
            Spec("a", "m", ("g", "g")),
        ],
    )
    def test_a_specification_nobody_can_start_is_refused(self, spec: Spec) -> None:
        with pytest.raises(Invalid):
            check_spec(spec)

    def test_ports_in_use_are_passed_over(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            first = taken.getsockname()[1]
            config = EngineConfig(first_port=first, port_count=1)
            with pytest.raises(Precondition, match=rf"no free port from {first} to {first}"):
                free_port(set(), config)
        assert free_port(set(), config) == first
        with pytest.raises(Precondition):
            free_port({first}, config)
        assert free_port(set(), EngineConfig()) > 0


PAGE = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a, \\"b\\"}"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 1.0
vllm:num_requests_waiting{engine="0",model_name="a"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.75
vllm:prompt_tokens_total{engine="0",model_name="a"} 1000.0
vllm:prompt_tokens_created{engine="0",model_name="a"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="a"} 500.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="a"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="a"} 4.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="a"} 5.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="0.001",model_name="a"} 10.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="0.5",model_name="a"} 20.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="+Inf",model_name="a"} 30.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="a"} 5.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="a"} 1.5
vllm:time_to_first_token_seconds_sum{engine="1",model_name="a"} 2.5
python_gc_objects_collected_total{generation="0"} 400.0
"""


class TestMetricsPage:
    def test_series_of_several_engine_cores_are_added_up(self) -> None:
        reading = parse_metrics(PAGE)
        assert (reading.running, reading.waiting, reading.kv_cache_usage_ratio) == (4.0, 2.0, 0.5)
        assert (reading.prompt_tokens_total, reading.generation_tokens_total) == (1000.0, 500.0)
        assert reading.ttft_seconds is not None
        assert reading.ttft_seconds.bounds == (0.001, 0.5)
        assert reading.ttft_seconds.counts == (11, 24, 35)
        assert reading.ttft_seconds.sum == 4.0
        assert reading.token_gap_seconds is None
        assert not reading.idle

    @pytest.mark.parametrize("page", [b"", b"<html>", b'vllm:num_requests_running{a="b"} 0\n'])
    def test_a_page_without_the_counts_proves_nothing(self, page: bytes) -> None:
        with pytest.raises(EngineSilent):
            parse_metrics(page)


SLEEP = "import time; time.sleep(600)"
WITH_WORKER = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEP}']); {SLEEP}"


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., tuple[ProcessLauncher, ProcessId]]]:
    started: list[ProcessId] = []
    launcher = ProcessLauncher()

    def launch(code: str, token: str = "t") -> tuple[ProcessLauncher, ProcessId]:
        argv = (sys.executable, "-c", code)
        launch = Launch("i", token, argv, {"EXTRA": "1"}, tmp_path / "logs" / "i.log")
        process = asyncio.run(launcher.start(launch))
        started.append(process)
        return launcher, process

    yield launch
    for process in started:
        asyncio.run(launcher.kill(process))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about within 10 s"
        time.sleep(0.01)


class TestProcesses:
    def test_an_engine_lives_in_its_own_session_with_its_output_in_a_file(
        self, launched: Callable[..., tuple[ProcessLauncher, ProcessId]], tmp_path: Path
    ) -> None:
        launcher, process = launched("import os; print('says', os.environ['EXTRA'], flush=True); " + SLEEP)
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        until(lambda: (tmp_path / "logs" / "i.log").read_text() == "says 1\n")
        assert launcher.alive(process)

    def test_the_end_is_noticed_and_told(self, launched: Callable[..., tuple[ProcessLauncher, ProcessId]]) -> None:
        launcher, process = launched("import sys; sys.exit(3)")
        until(lambda: not launcher.alive(process))
        assert asyncio.run(launcher.exit_text(process)) == "exit code 3"
        launcher, process = launched(SLEEP)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not launcher.alive(process))
        assert asyncio.run(launcher.exit_text(process)) == "killed by SIGKILL"

    def test_workers_that_outlive_their_leader_are_found_and_killed(
        self, launched: Callable[..., tuple[ProcessLauncher, ProcessId]]
    ) -> None:
        launcher, process = launched(WITH_WORKER)
        until(lambda: len(launcher.members(process)) == 2)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not launcher.alive(process))
        (worker,) = launcher.members(process)
        assert worker != process.pid
        asyncio.run(launcher.kill(process))
        until(lambda: not launcher.members(process))

    def test_another_agent_finds_it_by_pid_and_start_or_by_token(
        self, launched: Callable[..., tuple[ProcessLauncher, ProcessId]]
    ) -> None:
        _, process = launched(SLEEP, token="only-this-one")
        heir = ProcessLauncher()
        assert heir.alive(process)
        until(lambda: asyncio.run(heir.find("i", "only-this-one")) == process)  # once it has become the engine
        assert asyncio.run(heir.find("i", "another")) is None
        asyncio.run(heir.terminate(process))
        until(lambda: not heir.alive(process))

    def test_a_pid_that_was_given_away_again_is_a_stranger(self) -> None:
        with subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True) as stranger:
            launcher = ProcessLauncher()
            mistaken = ProcessId(stranger.pid, 1.0)
            assert not launcher.alive(mistaken)
            assert launcher.members(mistaken) == frozenset()
            asyncio.run(launcher.terminate(mistaken))
            asyncio.run(launcher.kill(mistaken))
            time.sleep(0.1)
            assert psutil.Process(stranger.pid).status() != psutil.STATUS_ZOMBIE
            stranger.kill()

    def test_a_missing_program_is_named(self, tmp_path: Path) -> None:
        launch = Launch("i", "t", ("no-such-engine", "serve"), {}, tmp_path / "i.log")
        with pytest.raises(LaunchFailed, match=r"no-such-engine.*engine\.command"):
            asyncio.run(ProcessLauncher().start(launch))
