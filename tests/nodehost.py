"""One emulated GPU host for tests: GPUs of its own, a node agent as a real process, engines the agent starts.

    with NodeHost(tmp_path) as host:          # GPUs exist, no agent yet
        host.start()                          # agent serves
        host.lock([0, 1], 990, ttl_s=5)
        host.kill()                           # SIGKILL: the GPUs stay as they are
        host.restore()                        # what ExecStopPost would run
        host.start()

Leaving the context ends the agent and every engine it started.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import psutil
import pytest

from common.config_sample import to_toml
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types
from nodeagent.config import NodeAgentConfig
from simulator.host.nvml.build import ensure_library
from simulator.host.nvml.state import STATE_VARIABLE, HostState

ENGINE = (sys.executable, "-m", "simulator.host.vllm")
MODEL = "llama-70b"


class NodeHost:
    """See the module's text. `config` overrides sections of the agent's configuration, by section and key."""

    def __init__(
        self,
        directory: Path,
        gpus: int = 8,
        node: str = "node-0",
        engine: Sequence[str] = ENGINE,
        engine_args: Sequence[str] = (),
        engine_start_s: float = 0.3,
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.state_dir = directory / "state"
        # Short, because the kernel allows a socket's path about 100 characters.
        self.socket = Path(tempfile.mkdtemp(prefix="dynamollm-")) / "agent.sock"
        self.log_path = directory / "agent.log"
        self.gpus = HostState.create(directory / "gpus", gpus, node=node)
        self.environment = os.environ | {
            STATE_VARIABLE: str(directory / "gpus"),
            "LD_LIBRARY_PATH": str(ensure_library()),
            "DYNAMOLLM_EMULATED_START_S": str(engine_start_s),
        }
        sections: dict[str, dict[str, Any]] = {
            "listen": {"unix_socket": str(self.socket), "tcp": "127.0.0.1:0"},
            "metrics": {"listen": "127.0.0.1:0"},
            "telemetry": {"interval_s": 0.25},
            "engine": {
                "launcher": "process",
                "command": list(engine),
                "args": list(engine_args),
                "drain_interval_s": 0.05,
                "stop_timeout_s": 5.0,
                "gpu_free_timeout_s": 5.0,
                "start_timeout_s": 60.0,
            },
        }
        for section, values in (config or {}).items():
            sections.setdefault(section, {}).update(values)
        whole = NodeAgentConfig.model_validate({"node_id": node, "state_dir": self.state_dir, **sections})
        self.config_path = directory / "nodeagent.toml"
        self.config_path.write_text(to_toml(whole, comments=False))
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        self._stub: rpc.NodeAgentStub | None = None
        self._ids = itertools.count()

    # The agent

    def command(self, verb: str) -> list[str]:
        """The agent's command line."""
        return [sys.executable, "-m", "nodeagent.cli", verb, "--config", str(self.config_path)]

    def start(self, wait: bool = True) -> None:
        """Starts the agent; with `wait`, returns once it serves."""
        (self.state_dir / "listen").unlink(missing_ok=True)  # what a killed agent left says nothing of this one
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.command("run"), env=self.environment, stdout=log, stderr=log)
        if wait:
            self.wait_serving()

    def wait_serving(self, timeout_s: float = 30.0) -> None:
        """Returns once the agent has written where it listens, which it does when it serves."""
        process = self.process
        assert process is not None

        def serving() -> bool:
            assert process.poll() is None, f"the agent ended with {process.returncode}:\n{self.log()}"
            return self.addresses() != {}

        until(serving, timeout_s)

    def kill(self) -> None:
        """SIGKILL, as the kernel's OOM killer would."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM, as `systemctl stop` would; the exit code."""
        return self._end(signal.SIGTERM)

    def restore(self) -> subprocess.CompletedProcess[str]:
        """Runs `dynamollm-nodeagent restore`, as ExecStopPost would."""
        return subprocess.run(
            self.command("restore"), env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )

    def addresses(self) -> dict[str, str]:
        """Where the agent listens: unix, tcp (gRPC targets) and metrics (URL)."""
        try:
            found: dict[str, str] = json.loads((self.state_dir / "listen").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    @property
    def stub(self) -> rpc.NodeAgentStub:
        """A client over the unix socket; it finds a restarted agent again."""
        if self._stub is None:
            self._stub = rpc.NodeAgentStub(self.channel)
        return self._stub

    @property
    def channel(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=[("grpc.enable_retries", 0)])
        return self._channel

    def log(self) -> str:
        """What the agent has written."""
        return self.log_path.read_text(errors="replace")

    # Short forms of calls

    def request_id(self) -> str:
        return f"test-{os.getpid()}-{next(self._ids)}"

    @property
    def uuids(self) -> tuple[str, ...]:
        return self.gpus.uuids

    def locks(self) -> list[tuple[int, int] | None]:
        """The clock locks as the GPUs have them."""
        return [self.gpus.observe(index).lock_mhz for index in range(self.gpus.gpu_count)]

    def lock(
        self,
        gpus: Sequence[int],
        mhz: int,
        ttl_s: float = 30.0,
        term: int = 1,
        name: str = "ctl",
        timeout_s: float = 10.0,
    ) -> list[pb.ControlResult]:
        """Locks clocks as a controller."""
        lease = types.Lease(
            owner=types.Owner(kind=types.OWNER_KIND_CONTROLLER, name=name), reason="test", ttl_s=ttl_s, term=term
        )
        controls = [
            pb.ControlRequest(gpu_uuid=self.uuids[gpu], clock_lock=pb.ClockLock(min_mhz=mhz, max_mhz=mhz))
            for gpu in gpus
        ]
        request = pb.ApplyControlsRequest(request_id=self.request_id(), lease=lease, controls=controls)
        return list(self.stub.ApplyControls(request, timeout=timeout_s).results)

    def launch(self, instance_id: str, gpus: Sequence[int], term: int = 1) -> types.Instance:
        """Asks for an engine; returns at once."""
        spec = types.InstanceSpec(instance_id=instance_id, model=MODEL, gpu_uuids=[self.uuids[gpu] for gpu in gpus])
        request = pb.StartInstanceRequest(request_id=self.request_id(), term=term, spec=spec, reason="test")
        return self.stub.StartInstance(request, timeout=10).instance

    def drain(self, instance_id: str, term: int = 1) -> types.Instance:
        request = pb.DrainInstanceRequest(
            request_id=self.request_id(), term=term, instance_id=instance_id, reason="test"
        )
        return self.stub.DrainInstance(request, timeout=10).instance

    def stop(self, instance_id: str, force: bool = False, term: int = 1) -> types.Instance:
        request = pb.StopInstanceRequest(
            request_id=self.request_id(), term=term, instance_id=instance_id, force=force, reason="test"
        )
        return self.stub.StopInstance(request, timeout=10).instance

    def restart(
        self, instance_id: str, gpus: Sequence[int], drain_deadline_s: float = 0, term: int = 1
    ) -> pb.RestartInstanceResponse:
        """Asks for a restart on other GPUs; returns at once."""
        request = pb.RestartInstanceRequest(
            request_id=self.request_id(),
            term=term,
            instance_id=instance_id,
            gpu_uuids=[self.uuids[gpu] for gpu in gpus],
            drain_deadline_s=drain_deadline_s,
            reason="test",
        )
        return self.stub.RestartInstance(request, timeout=10)

    def sleep(self, instance_id: str, term: int = 1) -> types.Instance:
        request = pb.SleepInstanceRequest(
            request_id=self.request_id(), term=term, instance_id=instance_id, reason="test"
        )
        return self.stub.SleepInstance(request, timeout=10).instance

    def wake(self, instance_id: str, term: int = 1) -> types.Instance:
        request = pb.WakeInstanceRequest(
            request_id=self.request_id(), term=term, instance_id=instance_id, reason="test"
        )
        return self.stub.WakeInstance(request, timeout=10).instance

    def drained(self, instance_id: str) -> None:
        """Drains it and waits for the proof."""
        self.drain(instance_id)
        until(
            lambda: self.instance(instance_id).detail.startswith("drained"), 30, lambda: str(self.instance(instance_id))
        )

    def instance(self, instance_id: str) -> types.Instance:
        """The instance as the agent lists it now."""
        listed = self.stub.ListInstances(pb.ListInstancesRequest(), timeout=10).instances
        return next(instance for instance in listed if instance.spec.instance_id == instance_id)

    def wait_state(self, instance_id: str, *states: int, timeout_s: float = 60.0) -> types.Instance:
        """Waits until the instance is in one of the states."""
        until(lambda: self.instance(instance_id).state in states, timeout_s, lambda: str(self.instance(instance_id)))
        return self.instance(instance_id)

    def engine_pids(self) -> list[int]:
        """Every living process this host's agent launched, and their workers."""
        return [process.pid for process in _engines(self.directory / "gpus")]

    # The end

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = self._stub = None
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for process in _engines(self.directory / "gpus"):
            with suppress(psutil.Error):
                process.kill()
        self.gpus.close()
        shutil.rmtree(self.socket.parent, ignore_errors=True)

    def __enter__(self) -> NodeHost:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and self.log_path.exists():
            sys.stderr.write(f"--- log of the agent ---\n{self.log()}")
        self.close()

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


def until(condition: Callable[[], bool], timeout_s: float = 30.0, explain: Callable[[], str] = lambda: "") -> None:
    """Waits for a condition; fails the test when it does not come about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"it did not come about within {timeout_s:g} s {explain()}"
        time.sleep(0.02)


@contextmanager
def refused(code: grpc.StatusCode, text: str = "") -> Iterator[None]:
    """Expects a call to be refused with a status code and a detail that contains `text`."""
    with pytest.raises(grpc.RpcError) as refusal:
        yield
    assert refusal.value.code() is code, f"{refusal.value.code()}: {refusal.value.details()}"
    assert text in (refusal.value.details() or ""), refusal.value.details()


def _engines(gpu_state: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            environment = process.environ()
            if environment.get(STATE_VARIABLE) == str(gpu_state) and "DYNAMOLLM_LAUNCH" in environment:
                found.append(process)
    return found
