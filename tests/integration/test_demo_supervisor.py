"""The demonstration's supervisor against real processes: restarts, ExecStopPost, orphans, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from common.errors import UserError
from simulator.demo.supervisor import RESTART_LIMIT, Part, Supervisor

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# Starts a grandchild in a session of its own, as an agent starts an engine, and lets it outlive itself.
LEAVES_AN_ORPHAN = [
    sys.executable,
    "-c",
    "import subprocess, sys, time;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
    "open(sys.argv[1], 'w').write(str(p.pid)); time.sleep(600)",
]


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        if condition():
            return
        await asyncio.sleep(0.05)
    raise TimeoutError


def has_given_up(supervisor: Supervisor) -> bool:
    try:
        supervisor.check()
    except UserError:
        return True
    return False


async def test_a_killed_part_is_restarted_after_its_stop_post_command(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor(tmp_path / "processes.json", said.append)
    mark = tmp_path / "restored"
    restore = [sys.executable, "-c", f"open({str(mark)!r}, 'a').write('x')"]
    try:
        await supervisor.start(Part("agent", SLEEP, tmp_path / "log", after_death=restore))
        first = json.loads((tmp_path / "processes.json").read_text())["agent"]
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.restarts["agent"] == 1)
        second = json.loads((tmp_path / "processes.json").read_text())["agent"]
        assert second != first
        assert psutil.pid_exists(second)
        assert mark.read_text() == "x"  # ran once, before the restart
        assert "SIGKILL" in said[0]
        await supervisor.stop("agent")
        assert mark.read_text() == "xx"  # and once more after the stop, as ExecStopPost does
        assert not psutil.pid_exists(second)
    finally:
        await supervisor.stop_all()


async def test_a_part_that_keeps_dying_is_reported_with_its_last_words(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "processes.json", lambda _: None)
    broken = [sys.executable, "-c", "import sys; print('cannot: port in use', file=sys.stderr); sys.exit(3)"]
    try:
        await supervisor.start(Part("gateway", broken, tmp_path / "log"))
        await until(lambda: has_given_up(supervisor))
        assert supervisor.restarts["gateway"] == RESTART_LIMIT - 1
        with pytest.raises(UserError, match=r"gateway.*port in use"):
            supervisor.check()
    finally:
        await supervisor.stop_all()


async def test_a_program_that_does_not_exist_is_a_clear_error(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "processes.json", lambda _: None)
    try:
        with pytest.raises(UserError, match="no-such-program"):
            await supervisor.start(Part("part", ["no-such-program"], tmp_path / "log"))
    finally:
        await supervisor.stop_all()


async def test_orphans_live_on_are_reaped_when_dead_and_end_with_the_run(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "processes.json", lambda _: None)
    pid_file = tmp_path / "pid"
    try:
        await supervisor.start(Part("agent", [*LEAVES_AN_ORPHAN, str(pid_file)], tmp_path / "log"))
        await until(lambda: pid_file.exists() and bool(pid_file.read_text()))
        engine = int(pid_file.read_text())
        pid_file.unlink()
        os.kill(json.loads((tmp_path / "processes.json").read_text())["agent"], signal.SIGKILL)
        await until(lambda: supervisor.restarts["agent"] == 1 and pid_file.exists() and bool(pid_file.read_text()))
        assert psutil.Process(engine).is_running()  # outlived its agent
        os.kill(engine, signal.SIGKILL)
        await until(lambda: not psutil.pid_exists(engine))  # no zombie stays
        second = int(pid_file.read_text())
        assert psutil.pid_exists(second)
    finally:
        await supervisor.stop_all()
    assert not psutil.pid_exists(second)
    assert psutil.Process().children(recursive=True) == []
