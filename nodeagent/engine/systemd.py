"""Engines as systemd units: `dynamollm-vllm@ID.service`, started and stopped over D-Bus.

PID 1 is their parent, so a restart of the agent leaves them alone; the unit's cgroup holds all their workers, whatever
session they are in. What to run is written to an environment file before the unit is started; its launch token says
later that the unit which runs is the one that was meant.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from dbus_fast import BusType, DBusError, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

from common.logs import get_logger
from nodeagent.engine.launcher import Launch, LaunchFailed, ProcessId
from nodeagent.engine.pids import TOKEN_VARIABLE, identify, lives, pid_lives
from nodeagent.files import write_durably

log = get_logger(__name__)

TEMPLATE = "dynamollm-vllm@{}.service"
ARGV_VARIABLE = "DYNAMOLLM_ARGV"
DEFAULT_ENVIRONMENT_DIR = Path("/run/dynamollm/engines")
BUS_NAME, MANAGER_PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
MANAGER, UNIT, SERVICE = (f"{BUS_NAME}.{name}" for name in ("Manager", "Unit", "Service"))
PROPERTIES = "org.freedesktop.DBus.Properties"
CALL_TIMEOUT_S = 10.0
JOB_TIMEOUT_S = 30.0
"""A start ends with the exec of the engine, long before it is ready."""
_CGROUP_ROOTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")
_SIGKILL = 9


class SystemdUnavailable(Exception):
    """Nobody answers on the system bus."""


class SystemdLauncher:
    """Starts and ends engine units. For one event loop."""

    def __init__(self, bus: MessageBus, environment_dir: Path) -> None:
        """Use `connect`."""
        environment_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._bus = bus
        self._environment_dir = environment_dir
        self._finished: dict[str, str] = {}
        self._waiting: dict[str, asyncio.Future[str]] = {}
        bus.add_message_handler(self._on_message)

    @classmethod
    async def connect(
        cls, environment_dir: Path = DEFAULT_ENVIRONMENT_DIR, address: str | None = None
    ) -> SystemdLauncher:
        """Raises SystemdUnavailable."""
        bus = MessageBus(bus_address=address, bus_type=BusType.SYSTEM)
        try:
            await asyncio.wait_for(bus.connect(), CALL_TIMEOUT_S)
            launcher = cls(bus, environment_dir)
            # Without it systemd sends no JobRemoved.
            await launcher._call(MANAGER_PATH, MANAGER, "Subscribe")
            rule = f"type='signal',sender='{BUS_NAME}',interface='{MANAGER}',member='JobRemoved'"
            await launcher._call("/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch", "s", [rule], to_bus=True)
        except (OSError, DBusError, TimeoutError, EOFError) as error:
            raise SystemdUnavailable(
                f"systemd does not answer on the system bus: {error or type(error).__name__}"
            ) from None
        return launcher

    async def start(self, launch: Launch) -> ProcessId:
        unit = TEMPLATE.format(launch.instance_id)
        try:
            text = environment_file(launch.env | {TOKEN_VARIABLE: launch.token}, launch.argv)
            write_durably(self._environment_file(launch.instance_id), text.encode(), mode=0o600)
        except (OSError, ValueError) as error:
            raise LaunchFailed(f"the environment of {unit} cannot be written: {error}") from None
        try:
            # A stop that systemd has not closed yet, although all its processes are gone, must not refuse the start:
            # "replace" lets the start wait for its end.
            result = await self._job("StartUnit", unit, "replace")
            if result != "done":
                raise LaunchFailed(f"{unit} could not be started ({result}); see journalctl -u {unit}")
            process = await self._main_process(unit)
        except (DBusError, TimeoutError, EOFError, OSError) as error:
            raise LaunchFailed(f"{unit} could not be started: {error or type(error).__name__}") from None
        if process is None:
            raise LaunchFailed(f"{unit} ended at once; see journalctl -u {unit}")
        return process

    async def find(self, instance_id: str, token: str) -> ProcessId | None:
        try:
            written = self._environment_file(instance_id).read_text()
        except OSError:
            return None
        if f'{TOKEN_VARIABLE}="{token}"' not in written.splitlines():
            return None
        with suppress(DBusError, TimeoutError, EOFError, OSError):
            return await self._main_process(TEMPLATE.format(instance_id))
        return None

    def alive(self, process: ProcessId) -> bool:
        return lives(process)

    def members(self, process: ProcessId) -> frozenset[int]:
        return frozenset(pid for pid in _cgroup_pids(process.unit) if pid_lives(pid))

    async def terminate(self, process: ProcessId) -> None:
        # No wait for the job: it ends when the engine has ended. KillMode=mixed: the leader hears SIGTERM, and
        # whoever outlives it SIGKILL.
        await self._tell("StopUnit", "ss", [process.unit, "fail"])

    async def kill(self, process: ProcessId) -> None:
        if self.members(process):
            await self._tell("KillUnit", "ssi", [process.unit, "all", _SIGKILL])

    async def exit_text(self, process: ProcessId) -> str:
        try:
            path = (await self._call(MANAGER_PATH, MANAGER, "LoadUnit", "s", [process.unit]))[0]
            if await self._property(path, SERVICE, "ExecMainPID") != process.pid:
                return ""
            status = await self._property(path, SERVICE, "ExecMainStatus")
            code = await self._property(path, SERVICE, "ExecMainCode")
        except (DBusError, TimeoutError, EOFError, OSError):
            return ""
        # Noted by the agent, so that `systemctl --failed` shows what still needs somebody.
        await self._tell("ResetFailedUnit", "s", [process.unit])
        return f"exit code {status}" if code == 1 else f"killed by signal {status}" if code in (2, 3) else ""

    async def close(self) -> None:
        self._bus.disconnect()

    # The bus

    async def _main_process(self, unit: str) -> ProcessId | None:
        path = (await self._call(MANAGER_PATH, MANAGER, "LoadUnit", "s", [unit]))[0]
        pid = await self._property(path, SERVICE, "MainPID")
        if not pid:
            return None
        try:
            found = identify(pid)
        except psutil.Error:
            return None
        return ProcessId(found.pid, found.started_s, unit)

    async def _job(self, method: str, unit: str, mode: str) -> str:
        """Runs a job to its end; its result."""
        job = (await self._call(MANAGER_PATH, MANAGER, method, "ss", [unit, mode]))[0]
        if job in self._finished:  # it ended before the call's answer was read
            return self._finished.pop(job)
        waiting = self._waiting[job] = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(waiting, JOB_TIMEOUT_S)
        finally:
            del self._waiting[job]

    async def _tell(self, method: str, signature: str, body: list[Any]) -> None:
        try:
            await self._call(MANAGER_PATH, MANAGER, method, signature, body)
        except DBusError as error:
            if not error.type.endswith((".NoSuchUnit", ".NoSuchProcess")):
                log.error("systemd refuses", method=method, unit=body[0], why=str(error))
        except (TimeoutError, EOFError, OSError) as error:
            log.error("systemd does not answer", method=method, unit=body[0], why=str(error) or type(error).__name__)

    async def _property(self, path: str, interface: str, name: str) -> Any:
        (value,) = await self._call(path, PROPERTIES, "Get", "ss", [interface, name])
        return value.value if isinstance(value, Variant) else value

    async def _call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: list[Any] | None = None,
        to_bus: bool = False,
    ) -> list[Any]:
        message = Message(
            destination="org.freedesktop.DBus" if to_bus else BUS_NAME,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body or [],
        )
        reply = await asyncio.wait_for(self._bus.call(message), CALL_TIMEOUT_S)
        if reply is None:
            raise EOFError("the bus gave no answer")
        if reply.message_type is MessageType.ERROR:
            raise DBusError(reply.error_name or "", str(reply.body[0]) if reply.body else "")
        return list(reply.body)

    def _on_message(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL or message.member != "JobRemoved":
            return
        _, job, _, result = message.body
        waiting = self._waiting.get(job)
        if waiting is None:
            self._finished[job] = result
            while len(self._finished) > 64:  # jobs of others
                self._finished.pop(next(iter(self._finished)))
        elif not waiting.done():
            waiting.set_result(result)

    def _environment_file(self, instance_id: str) -> Path:
        return self._environment_dir / f"{instance_id}.env"


def environment_file(env: dict[str, str], argv: tuple[str, ...]) -> str:
    """The unit's EnvironmentFile=. The command line is one variable, quoted once for each of systemd's two readings.

    Raises ValueError for what such a file cannot hold.
    """
    words = " ".join(f'"{_escaped(word, chars=_WORD_SPECIAL)}"' for word in argv)
    lines = []
    for name, value in (env | {ARGV_VARIABLE: words}).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is not the name of an environment variable")
        if any(ord(character) < 32 for character in value):
            raise ValueError(f"the value of {name} has control characters")
        lines.append(f'{name}="{_escaped(value, chars=_FILE_SPECIAL)}"\n')
    return "".join(lines)


_WORD_SPECIAL = '\\"'
_FILE_SPECIAL = '\\"$`'


def _escaped(text: str, chars: str) -> str:
    return "".join(f"\\{character}" if character in chars else character for character in text)


def _cgroup_pids(unit: str) -> Iterator[int]:
    """Everybody in the cgroup of an engine's unit, sub-groups included."""
    if not unit:
        return
    for root in _CGROUP_ROOTS:
        for group in Path(root).glob(f"*.slice/{unit}"):
            for procs in (group / "cgroup.procs", *group.rglob("*/cgroup.procs")):
                with suppress(OSError, ValueError):
                    yield from (int(line) for line in procs.read_text().split() if line != "0")
