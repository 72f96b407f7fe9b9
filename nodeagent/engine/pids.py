"""Processes by pid and start time, so that a pid which was given away again is never mistaken for the old one."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import psutil

from nodeagent.engine.launcher import ProcessId

TOKEN_VARIABLE = "DYNAMOLLM_LAUNCH"
"""In an engine's environment: the token of its launch. Its workers inherit it."""
_SAME_START_S = 0.05
"""Start times come in ticks of 10 ms."""


def identify(pid: int) -> ProcessId:
    """Raises psutil.Error when there is no such process."""
    return ProcessId(pid, round(psutil.Process(pid).create_time() - psutil.boot_time(), 2))


def is_same(process: ProcessId) -> bool:
    """Whether the pid still belongs to that process, living or a zombie."""
    try:
        return abs(identify(process.pid).started_s - process.started_s) <= _SAME_START_S
    except psutil.Error:
        return False


def pid_lives(pid: int) -> bool:
    """A zombie holds nothing any more, whoever is slow to reap it."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def lives(process: ProcessId) -> bool:
    """Whether that very process runs."""
    return pid_lives(process.pid) and is_same(process)


def carries_token(pid: int, token: str) -> bool:
    """Whether a process was launched with that token, or descends from one that was. False where it cannot be read."""
    try:
        return psutil.Process(pid).environ().get(TOKEN_VARIABLE) == token
    except (psutil.Error, OSError):
        return False


def send(pid: int, number: signal.Signals) -> None:
    """A signal; to a process that is gone, or not ours to end, none."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
