"""A small network of its own for real processes: network namespaces on a bridge, whose cables can be pulled.

    reason = missing()                     # why there is none on this machine, or ""
    with NetLab() as lab:
        host = lab.host("gpu-1")           # a namespace with an address that the test reaches, too
        subprocess.Popen([*host.enter, "program"])
        host.unplug(); host.plug()

Each namespace is held by a process of its own and is gone with it, also when the test run is killed: nothing is named
under /run, no bridge stands in the machine's own network. Only one end of one cable does, with an address of a private
range that nobody else uses.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_TOOLS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}


def missing() -> str:
    """Why there can be no such network on this machine, as one sentence; "" when there can."""
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            return f"no {tool} here (apt-get install {package})"
    if os.geteuid() != 0:
        return "not root: network namespaces need it"
    try:
        with NetLab():
            return ""
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"network namespaces are refused here: {error}"


@dataclass
class Namespace:
    """One machine on the network."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    switch: Namespace | None = field(default=None, repr=False)
    port: str = ""  # the end of its cable at the switch

    @property
    def enter(self) -> tuple[str, ...]:
        """What goes before a command so that it runs there."""
        return ("nsenter", "-t", str(self.holder.pid), "-n")

    def run(self, *command: str) -> None:
        _run(*self.enter, *command)

    def unplug(self) -> None:
        """Pulls its cable: what it sends is lost, and nobody is told."""
        if self.switch is not None:
            self.switch.run("ip", "link", "set", self.port, "down")

    def plug(self) -> None:
        if self.switch is not None:
            self.switch.run("ip", "link", "set", self.port, "up")


class NetLab:
    def __init__(self) -> None:
        self._number = 1
        self._made: list[Namespace] = []
        try:
            self._net = _free_net()
            self._tag = f"dl{os.getpid() % 100_000}{random.randrange(100)}"
            self._switch = self._namespace("switch", "")
            self._switch.run("ip", "link", "add", "br0", "type", "bridge")
            self._switch.run("ip", "link", "set", "br0", "up")
            # The test's own cable.
            _run("ip", "link", "add", self._tag, "type", "veth", "peer", "name", "p0", "netns", self._pid(self._switch))
            self._switch.run("ip", "link", "set", "p0", "master", "br0", "up")
            _run("ip", "address", "add", f"{self._net}.1/24", "dev", self._tag)
            _run("ip", "link", "set", self._tag, "up")
        except BaseException:
            self.close()
            raise

    @property
    def own_address(self) -> str:
        """The test's."""
        return f"{self._net}.1"

    def host(self, name: str) -> Namespace:
        self._number += 1
        host = self._namespace(name, f"{self._net}.{self._number}")
        host.switch, host.port = self._switch, f"p{self._number}"
        host.run(
            "ip", "link", "add", "eth0", "type", "veth", "peer", "name", host.port, "netns", self._pid(self._switch)
        )
        self._switch.run("ip", "link", "set", host.port, "master", "br0", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        return host

    def _namespace(self, name: str, address: str) -> Namespace:
        mine = Path("/proc/self/ns/net").stat().st_ino
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
        holder = subprocess.Popen(command, stderr=subprocess.PIPE)
        made = Namespace(name, address, holder)
        self._made.append(made)
        deadline_s = time.monotonic() + 10
        while (there := Path(f"/proc/{holder.pid}/ns/net")).exists() and there.stat().st_ino == mine:
            if holder.poll() is not None or time.monotonic() > deadline_s:
                break
            time.sleep(0.005)
        if holder.poll() is not None:
            said = holder.stderr.read().decode(errors="replace").strip() if holder.stderr is not None else ""
            raise RuntimeError(said or "unshare has ended")
        made.run("ip", "link", "set", "lo", "up")
        return made

    @staticmethod
    def _pid(namespace: Namespace) -> str:
        return str(namespace.holder.pid)

    def close(self) -> None:
        """With their holders the namespaces end, and with these every cable."""
        for namespace in self._made:
            namespace.holder.kill()
            namespace.holder.wait()
            if namespace.holder.stderr is not None:
                namespace.holder.stderr.close()
        self._made = []

    def __enter__(self) -> NetLab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free_net() -> str:
    """Three numbers of a /24 that no route of this machine leads to."""
    taken = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
    for _ in range(100):
        net = f"10.{random.randrange(200, 250)}.{random.randrange(256)}"
        if f"{net}." not in taken:
            return net
    raise RuntimeError("no private range is free")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
