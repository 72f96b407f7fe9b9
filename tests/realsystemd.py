"""A real systemd as PID 1 of a throw-away machine: private namespaces over an overlay of this host's root.

    with Machine(tmp_path, [checkout]) as machine:
        machine.run("systemctl", "start", "some.service")

The host's files stay as they are; the first folder is /srv/test in there, the others are where they are outside.
Needs root: `missing()` says what a test lacks, for a named skip. Memory and CPU limits of units do nothing in there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil

SYSTEMD = Path("/lib/systemd/systemd")
BOOT_TIMEOUT_S = 40.0
# What a machine without hardware, network and terminals does not need, or must not touch.
MASKED = (
    *(f"systemd-{name}.service" for name in ("networkd", "timesyncd", "logind", "sysctl", "modules-load")),
    *(
        "systemd-random-seed.service",
        "systemd-udevd.service",
        "systemd-udev-trigger.service",
        "systemd-resolved.service",
    ),
    *("systemd-udevd-control.socket", "systemd-udevd-kernel.socket", "systemd-update-utmp.service"),
    *("getty@tty1.service", "console-getty.service", "getty.target", "apt-daily.timer", "apt-daily-upgrade.timer"),
    *("dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer", "logrotate.timer", "man-db.timer"),
    *(
        "systemd-tmpfiles-clean.timer",
        "postgresql.service",
        "cron.service",
        "ssh.service",
        "ssh.socket",
        "nginx.service",
    ),
)

FRESH = ("/run", "/tmp", "/var/log")
"""Folders of its own, empty at first."""

INNER = """#!/bin/bash
set -euo pipefail
base=$1 shared=$2
shift 2
mount --make-rprivate /
mount -t tmpfs -o size=512m tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$base/root"
root=$base/root
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
for folder in FRESH; do mount -t tmpfs tmpfs "$root$folder"; done
for folder in "$@"; do # what the overlay does not show: file systems of their own, and what lies in /tmp
  mkdir -p "$root$folder"; mount --rbind "$folder" "$root$folder"
done
mkdir -p "$root/run/lock" "$root/srv/test"
mount --bind "$shared" "$root/srv/test"
echo node-0 >"$root/etc/hostname"
: >"$root/etc/fstab"
: >"$root/etc/machine-id"
rm -f "$root"/etc/systemd/system/multi-user.target.wants/* "$root"/etc/systemd/system/timers.target.wants/*
for unit in MASKED; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
cd "$root"
mkdir -p .old
pivot_root . .old
umount -l /.old
ip link set lo up 2>/dev/null || true
export container=test
unset NOTIFY_SOCKET INVOCATION_ID JOURNAL_STREAM
exec </dev/null >/dev/null 2>&1
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
"""


def missing() -> str:
    """Why no such machine can be made here; empty when one can."""
    if os.getuid() != 0:
        return "needs root for namespaces"
    if not SYSTEMD.exists() or shutil.which("dbus-daemon") is None:
        return "needs Debian's systemd and dbus (apt-get install systemd dbus)"
    if _cgroups() is None:
        return "needs a cgroup2 file system that can be written"
    return ""


def unseen(folders: Iterable[Path]) -> list[Path]:
    """Those of the folders that a machine does not see by itself: the overlay shows one file system, without what
    lies under the machine's own /tmp and the like."""
    root = Path("/").stat().st_dev
    found = dict.fromkeys(path.resolve() for path in folders)
    lost = [path for path in found if path.stat().st_dev != root or any(path.is_relative_to(top) for top in FRESH)]
    return [path for path in lost if not any(other in path.parents for other in lost)]


class Machine:
    """See the module's text."""

    def __init__(self, shared: Path, needs: Iterable[Path] = ()) -> None:
        self.shared = shared
        self._base = shared / "machine"
        self._mounts = unseen(needs)
        self._cgroup: Path | None = None
        self._outer: subprocess.Popen[bytes] | None = None
        self.pid = 0
        """Of its PID 1, as seen from outside."""

    def __enter__(self) -> Machine:
        try:
            self._boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def run(self, *command: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        done = self._nsenter(command, timeout_s)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done

    def show(self, unit: str, name: str) -> str:
        """A unit's property."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def journal(self, unit: str) -> str:
        """What a unit has said."""
        return self.run("journalctl", "--no-pager", "-q", "-o", "cat", "-u", unit, check=False).stdout

    def path(self, inside: str) -> str:
        """A path inside, as this process can use it: a unix socket too."""
        return f"/proc/{self.pid}/root{inside}"

    def _nsenter(self, command: tuple[str, ...], timeout_s: float) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "-t", str(self.pid), "-p", "-m", "-u", "-i", "-n", "-C", "--"]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DYNAMOLLM"))
        }
        return subprocess.run(
            [*enter, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd="/",
        )

    def _boot(self) -> None:
        cgroups = _cgroups()
        assert cgroups is not None
        self._cgroup = cgroups / f"dynamollm-{uuid.uuid4().hex[:8]}"
        self._cgroup.mkdir()
        self._base.mkdir()
        inner = self.shared / "inner.sh"
        inner.write_text(INNER.replace("MASKED", " ".join(MASKED)).replace("FRESH", " ".join(FRESH)))
        unshare = "exec unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup --mount-proc"
        script = f'echo $$ >"$0/cgroup.procs"; {unshare} bash "$@"'
        with (self.shared / "machine.log").open("wb") as log:
            self._outer = subprocess.Popen(
                ["bash", "-c", script, str(self._cgroup), str(inner), str(self._base), str(self.shared)]
                + [str(mount) for mount in self._mounts],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline_s = time.monotonic() + BOOT_TIMEOUT_S
        while not self._is_up():
            said = (self.shared / "machine.log").read_text(errors="replace")
            assert self._outer.poll() is None, f"the machine ended while it booted: {said}"
            assert time.monotonic() < deadline_s, f"the machine did not boot: {said}"
            time.sleep(0.1)

    def _is_up(self) -> bool:
        assert self._outer is not None
        if not self.pid:
            children = psutil.Process(self._outer.pid).children()
            if not children or children[0].name() != "systemd":
                return False
            self.pid = children[0].pid
        state = self._nsenter(("systemctl", "is-system-running"), 10).stdout.strip()
        return state in ("running", "degraded")

    def _end(self) -> None:
        if self._outer is not None and self._outer.poll() is None:
            if self.pid:
                os.kill(self.pid, signal.SIGRTMIN + 14)  # power off at once
            try:
                self._outer.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._outer.kill()
                self._outer.wait(timeout=10)
        if self._cgroup is not None:
            for folder in sorted((path for path in self._cgroup.rglob("*") if path.is_dir()), reverse=True):
                _remove(folder)
            _remove(self._cgroup)


def _remove(cgroup: Path) -> None:
    for _ in range(50):
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)  # its last process is on its way out
        else:
            return


def _cgroups() -> Path | None:
    """Where this host's cgroup2 tree is."""
    for mount in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = mount.split()
        if fields[fields.index("-") + 1] == "cgroup2" and os.access(fields[4], os.W_OK):
            return Path(fields[4])
    return None
