"""Tells systemd how a service is doing: one datagram to `$NOTIFY_SOCKET`, as sd_notify(3) describes.

Does nothing where no service manager listens, so that programs need not ask who started them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(*lines: str, environment: Mapping[str, str] | None = None) -> bool:
    """Sends lines such as "READY=1", "STATUS=…", "WATCHDOG=1", "STOPPING=1".

    Returns False when there is nobody to tell or the socket does not take it: a service never fails for that.
    """
    address = (os.environ if environment is None else environment).get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto("\n".join(lines).encode(), address)
    except OSError:
        return False
    return True


def watchdog_interval_s(environment: Mapping[str, str] | None = None) -> float | None:
    """How often "WATCHDOG=1" is due (half of systemd's limit), or None when no watchdog is set for this process."""
    env = os.environ if environment is None else environment
    try:
        limit_us = int(env.get("WATCHDOG_USEC", ""))
        pid = int(env.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    return limit_us / 2e6 if limit_us > 0 and pid == os.getpid() else None
