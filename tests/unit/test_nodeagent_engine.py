"""Engines without an engine: the table of states, records, command line, metrics page, and real processes."""

from __future__ import annotations

import asyncio
import json
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
from nodeagent.engine.command import check_spec, command_line, environment, free_port, memory_share
from nodeagent.engine.launcher import Launch, LaunchFailed, ProcessId
from nodeagent.engine.lifecycle import ANSWERING, ENDED, RUNNING, TRANSITIONS, Event, State, follow
from nodeagent.engine.process import ProcessLauncher
from nodeagent.engine.readahead import ReadAhead, weight_bytes, weight_files
from nodeagent.engine.records import Nap, NapPhase, Record, Records, Restart, Spec, Step
from nodeagent.engine.reshard import after_failure, begun, committed, target
from nodeagent.engine.systemd import environment_file
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

    def test_only_a_drained_engine_falls_asleep_and_it_wakes_into_a_warm_up(self) -> None:
        assert [before for before, after in TRANSITIONS.items() if after is State.ASLEEP] == [
            (State.DRAINING, Event.SLEPT)
        ]
        assert follow(State.ASLEEP, Event.WAKE) is State.WARMING
        assert State.ASLEEP not in ANSWERING

    def test_nothing_is_started_anew_before_the_proof(self) -> None:
        assert [before for (before, event) in TRANSITIONS if event is Event.RELAUNCH] == [State.STOPPING]

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

    def test_a_restart_and_a_sleep_are_kept(self, tmp_path: Path) -> None:
        records = Records(tmp_path, VirtualClock())
        restart = Restart("tx", Step.HEALTH, ("GPU-a",), ("GPU-a", "GPU-b"), 1.0, 2.0, back=True, why_back="why")
        nap = Nap(NapPhase.WAKING, 5, {"GPU-a": 3}, {"GPU-a": 1}, 121.5)
        saved = self.record().but(restart=restart, nap=nap, workers=(ProcessId(7, 8.5, "a.service"),))
        records.save(saved)
        assert records.load_all() == [saved]
        assert saved.gpus == {"GPU-a", "GPU-b"}

    def test_a_record_of_an_agent_without_them_is_read(self, tmp_path: Path) -> None:
        records = Records(tmp_path, VirtualClock())
        records.save(self.record())
        path = tmp_path / "i-1.json"
        data = json.loads(path.read_text())
        for name in ("restart", "nap", "workers"):
            del data[name]
        del data["process"]["unit"]
        path.write_text(json.dumps(data))
        assert records.load_all() == [self.record()]

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

    def test_sleep_mode_is_asked_for_by_option_and_environment(self) -> None:
        config = EngineConfig(sleep_mode=True, env={"X": "1"})
        assert "--enable-sleep-mode" in command_line(SPEC, 1, config)
        assert environment(SPEC, config) == {
            "VLLM_SERVER_DEV_MODE": "1",
            "X": "1",
            "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b",
        }
        assert "VLLM_SERVER_DEV_MODE" not in environment(SPEC, EngineConfig())

    @pytest.mark.parametrize(
        ("args", "share"),
        [
            ((), 0.92),
            (("--gpu-memory-utilization", "0.5"), 0.5),
            (("--gpu-memory-utilization=0.5",), 0.5),
            (("--seed", "1", "--gpu_memory_utilization=0.4"), 0.4),
            (("--gpu-memory-utilization",), 0.92),
        ],
    )
    def test_the_share_of_gpu_memory_is_the_engines(self, args: tuple[str, ...], share: float) -> None:
        assert memory_share(EngineConfig(args=args)) == share

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


class TestRestart:
    def record(self, **changes: object) -> Record:
        spec = Spec("i-1", "llama", ("GPU-a",))
        restart = Restart("tx", Step.HEALTH, ("GPU-a",), ("GPU-b", "GPU-c"), 1.0, 2.0)
        return Record(spec, State.STARTING, "", "boot", "t", 1, "/log", 0.0, restart=restart).but(**changes)

    def test_it_begins_from_an_engine_that_serves(self) -> None:
        ready = self.record(state=State.READY, restart=None)
        restart = begun(ready, ("GPU-b", "GPU-c"), now_s=10.0, drain_s=5.0)
        assert (restart.step, restart.old_gpus, restart.drain_until_s) == (Step.DRAIN, ("GPU-a",), 15.0)
        assert target(restart, ready.spec).gpu_uuids == ("GPU-b", "GPU-c")
        assert target(restart.but(back=True), ready.spec).gpu_uuids == ("GPU-a",)
        assert begun(ready, ("GPU-a",), 0.0, 1.0).transaction_id != restart.transaction_id

    @pytest.mark.parametrize("state", [state for state in State if state not in (State.READY, State.DRAINING)])
    def test_nothing_else_is_restarted(self, state: State) -> None:
        with pytest.raises(Precondition, match=state.value):
            begun(self.record(state=state, restart=None), ("GPU-b",), 0.0, 1.0)

    def test_a_failure_goes_on_back_or_ends(self) -> None:
        def after(**changes: object) -> Record:
            record = self.record()
            assert record.restart is not None
            return record.but(**after_failure(record.but(restart=record.restart.but(**changes)), "boom"))

        draining = after(step=Step.DRAIN).restart
        assert draining is not None
        assert (draining.step, draining.back) == (Step.STOP, False)
        for step in (Step.START, Step.HEALTH, Step.WARM):
            back = after(step=step).restart
            assert back is not None
            assert (back.step, back.back, back.why_back) == (Step.STOP, True, "boom")
            assert "boom" in committed(back)
        ended = after(step=Step.HEALTH, back=True, why_back="first")
        assert ended.restart is None
        assert ended.failed
        assert "first" in ended.detail
        assert "boom" in ended.detail
        assert after_failure(self.record(restart=None), "boom") == {"failed": True}


class TestReadAhead:
    def test_weights_are_read_and_nothing_else(self, tmp_path: Path) -> None:
        for name, size in (("b.safetensors", 3 << 20), ("a.safetensors", 9 << 20), ("readme.md", 5 << 20)):
            (tmp_path / name).write_bytes(b"x" * size)
        assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
        assert weight_bytes(tmp_path) == 12 << 20
        reader = ReadAhead(tmp_path, 1 << 40)
        reader.join(20)
        assert (reader.progress.bytes_read, reader.progress.done) == (12 << 20, True)

    def test_it_stays_within_its_limit_and_can_be_stopped(self, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").write_bytes(b"x" * (40 << 20))
        reader = ReadAhead(tmp_path, 10 << 20)
        reader.join(20)
        assert reader.progress.bytes_read == 16 << 20  # whole chunks
        with (tmp_path / "a.gguf").open("r+b") as file:
            file.truncate(1 << 36)  # all hole: takes no room, and more seconds to read than the next line needs
        stopped = ReadAhead(tmp_path, 1 << 40)
        stopped.stop()
        stopped.join(20)
        assert not stopped.progress.done

    def test_a_model_that_is_not_there_is_no_trouble(self, tmp_path: Path) -> None:
        reader = ReadAhead(tmp_path / "gone", 1 << 40)
        reader.join(20)
        assert reader.progress.bytes_read == 0


class TestUnitEnvironment:
    def test_the_command_line_is_one_variable(self) -> None:
        assert environment_file({"A": 'b "c"'}, ("vllm", "serve", "m n")) == (
            'A="b \\"c\\""\nDYNAMOLLM_ARGV="\\"vllm\\" \\"serve\\" \\"m n\\""\n'
        )

    @pytest.mark.parametrize("env", [{"A": "b\nc"}, {"A=B": "c"}, {"": "c"}])
    def test_what_cannot_be_written_is_refused(self, env: dict[str, str]) -> None:
        with pytest.raises(ValueError, match=r"control characters|not the name"):
            environment_file(env, ("vllm",))
