"""The history's writer under SIGKILL and on a full disk, as real processes: what was called safe is there, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.store_suite import effect_numbers, hold_sqlite, quick_recorder, sqlite_url, upgraded_engine

Block = Callable[[], AbstractContextManager[None]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from upgraded_engine(database_url)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def locked(engine: Engine, tmp_path: Path) -> Block:
    return lambda: hold_sqlite(tmp_path / "history.db")


WRITER = """
import sys
from pathlib import Path
from common.logs import configure_logs
from tests.store_suite import action, quick_recorder

configure_logs("writer")  # on stderr: stdout is for the numbers
recorder = quick_recorder(sys.argv[1], Path(sys.argv[2]))
first = int(sys.argv[3])
print("ready", flush=True)
for number in range(first, 1_000_000):
    recorder.record(action(number))
    if number % 7 == 0 and recorder.flush(30):
        print(number, flush=True)  # from here on it may not get lost
"""


class Writer:
    """Another process that records actions and says up to which one all are safe."""

    def __init__(self, url: str, spool: Path, first: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(spool), str(first)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.said = self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> int:
        """SIGKILL; returns the last number that was called safe."""
        self.process.send_signal(signal.SIGKILL)
        assert self.process.stdout is not None
        rest = self.process.stdout.read().splitlines(keepends=True)
        self.process.wait(30)
        self.process.stdout.close()
        whole = [
            item for item in (self.said, *(said.strip() for said in rest if said.endswith("\n"))) if item.isdigit()
        ]
        return int(whole[-1])


def kill_after(writer: Writer, acknowledgements: int) -> int:
    for _ in range(acknowledgements):
        writer.said = writer.read()
    return writer.kill()


def test_a_killed_writer_loses_nothing_that_was_safe(engine: Engine, database_url: str, spool: Path) -> None:
    safe = kill_after(Writer(database_url, spool, 0), acknowledgements=12)
    recorder = quick_recorder(database_url, spool)
    assert recorder.settle(20)
    assert recorder.close()
    numbers = effect_numbers(engine)
    assert numbers == list(range(len(numbers)))  # no hole, no repeat, in order
    assert len(numbers) > safe


def test_a_writer_killed_while_spooling_and_while_draining_loses_nothing(
    engine: Engine, database_url: str, spool: Path, locked: Block
) -> None:
    with locked():
        safe = kill_after(Writer(database_url, spool, 0), acknowledgements=8)
    assert (spool / "spool.jsonl").stat().st_size > 0
    assert effect_numbers(engine) == []
    # The next one drains that while it goes on recording, and is killed on the way; so is the one after it.
    again = kill_after(Writer(database_url, spool, safe + 1), acknowledgements=1)
    last = kill_after(Writer(database_url, spool, again + 1), acknowledgements=3)
    recorder = quick_recorder(database_url, spool)
    assert recorder.settle(20)
    assert recorder.close()
    numbers = effect_numbers(engine)
    assert sorted(numbers) == list(range(len(numbers)))
    assert len(numbers) > last


FULL_DISK = """
import resource, sys, time
from pathlib import Path
from tests.store_suite import action, quick_recorder, until

recorder = quick_recorder(sys.argv[1], Path(sys.argv[2]))
recorder.record(action(0))
assert recorder.settle(20)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for number in range(1, 201):
    recorder.record(action(number))
assert until(lambda: recorder.counts().last_error.endswith("File too large")), recorder.counts()
counts = recorder.counts()
assert counts.database_ok is False and counts.in_memory > 0 and counts.dropped == 0, counts
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert recorder.settle(20), recorder.counts()
assert recorder.close()
"""


def test_a_full_disk_under_database_and_spool_is_survived(engine: Engine, database_url: str, spool: Path) -> None:
    """The limit on file size stops SQLite's and the spool's writes half-way, as a full disk does; then it is lifted."""
    subprocess.run(
        [sys.executable, "-c", FULL_DISK, database_url, str(spool)],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert effect_numbers(engine) == list(range(201))
