"""`dynamollm simulate` is ended while its workers are busy: nothing of it stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(240)


def until(what, seconds: float = 120.0):
    """The first true value of `what()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_its_workers_end_with_it(tmp_path, number):
    program = Path(sys.executable).with_name("dynamollm")
    command = [str(program), "simulate", "--trace", "conv", "--cache", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        try:
            # They measure as soon as they keep what they found.
            until(lambda: [*tmp_path.glob("profiles/points-*/*.jsonl")] or parent.poll() is not None)
            assert parent.poll() is None
            children = psutil.Process(parent.pid).children(recursive=True)
            assert len(children) >= 2
            parent.send_signal(number)
            assert parent.wait(20) != 0
            gone, alive = psutil.wait_procs(children, timeout=20)
            assert not alive
            assert len(gone) == len(children)
        finally:
            parent.kill()
