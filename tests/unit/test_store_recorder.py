"""The recorder: nothing that happens to the database stops it, loses what it called safe, or doubles a row."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, event, text

from common.errors import UserError
from controller.store.recorder import Recorder, open_recorder
from controller.store.repositories import list_decisions
from tests.store_suite import (
    action,
    decision,
    effect_numbers,
    hold_sqlite,
    one_of_each,
    quick_recorder,
    rows_by_table,
    sqlite_url,
    until,
    upgraded_engine,
)

Block = Callable[[], AbstractContextManager[None]]


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
    """A context in which another process holds the database."""
    return lambda: hold_sqlite(tmp_path / "history.db")


def test_all_that_is_recorded_is_in_the_database(engine: Engine, database_url: str, spool: Path) -> None:
    recorder = open_recorder(database_url, spool)
    for record in one_of_each():
        recorder.record(record)
    assert recorder.settle(20)
    counts = recorder.counts()
    assert recorder.close()
    assert (counts.recorded, counts.spooled, counts.dropped, counts.in_memory) == (len(one_of_each()), 0, 0, 0)
    assert rows_by_table(engine) == {**dict.fromkeys(rows_by_table(engine), 1), "profiles": 0}


def test_a_locked_database_is_caught_up_with_in_order(
    engine: Engine, database_url: str, spool: Path, locked: Block
) -> None:
    recorder = quick_recorder(database_url, spool)
    recorder.record(action(0))
    assert recorder.settle(20)
    with locked():
        for number in range(1, 401):
            recorder.record(action(number))
        assert recorder.flush(20)
        during = recorder.counts()
        assert during.database_ok is False
        assert during.last_error
        assert (during.recorded, during.spooled) == (1, 400)
        assert during.spool_bytes > 0
        # Meanwhile it has tried again and again; new values go to the spool all the same.
        recorder.record(action(401))
        assert recorder.flush(20)
        assert recorder.counts().spooled == 402 - 1
    assert recorder.settle(20)
    after = recorder.counts()
    assert recorder.close()
    assert (after.recorded, after.repeated, after.dropped, after.spool_bytes) == (402, 0, 0, 0)
    assert after.database_ok
    assert effect_numbers(engine) == list(range(402))


def test_recording_does_not_wait_for_anything(engine: Engine, database_url: str, spool: Path, locked: Block) -> None:
    """While the writing thread hangs on a lock for seconds, a thousand calls return in a fraction of one."""
    recorder = open_recorder(database_url, spool)  # waits 2 s for a lock
    with locked():
        recorder.record(action(0))
        time.sleep(0.2)  # by now the thread waits
        started_s = time.monotonic()
        for number in range(1, 1001):
            recorder.record(action(number))
        assert time.monotonic() - started_s < 1.0
        assert recorder.counts().in_memory == 1001
    assert recorder.settle(20)
    assert recorder.close()
    assert len(effect_numbers(engine)) == 1001


def test_a_database_that_loses_its_tables_and_gets_them_back(engine: Engine, database_url: str, spool: Path) -> None:
    recorder = quick_recorder(database_url, spool)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE actions RENAME TO elsewhere"))
    recorder.record(action(1))
    assert recorder.flush(20)
    assert "actions" in recorder.counts().last_error
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE elsewhere RENAME TO actions"))
    assert recorder.settle(20)
    assert recorder.close()
    assert effect_numbers(engine) == [1]


def test_when_database_and_disk_are_full_memory_holds_and_the_overflow_is_counted(
    engine: Engine, database_url: str, spool: Path, locked: Block
) -> None:
    recorder = quick_recorder(database_url, spool, spool_limit_bytes=3000, queue_limit=50)
    with locked():
        recorder.record(action(0))
        assert until(lambda: recorder.counts().spooled == 1)
        for number in range(1, 2001):
            recorder.record(action(number))
            if number % 20 == 0:
                time.sleep(0.001)
        assert until(lambda: recorder.counts().dropped > 0)
        during = recorder.counts()
        assert 0 < during.spool_bytes <= 3000
        assert "bound" in during.last_error or "lock" in during.last_error
        assert during.in_memory <= 50 + 500
    assert recorder.settle(20)
    after = recorder.counts()
    assert recorder.close()
    numbers = effect_numbers(engine)
    assert numbers == sorted(numbers)
    assert len(numbers) == after.recorded == 2001 - after.dropped
    assert after.repeated == 0


def test_a_value_that_no_database_takes_is_set_aside_and_blocks_nothing(
    engine: Engine, database_url: str, spool: Path
) -> None:
    recorder = quick_recorder(database_url, spool)
    recorder.record(decision(1))
    recorder.record(decision(2, inputs={"rate": math.nan}))  # has no canonical form
    recorder.record(decision(3, sentence=None))  # breaks a rule of the table
    recorder.record("not a record")  # type: ignore[arg-type]
    recorder.record(decision(4))
    assert recorder.settle(20)
    counts = recorder.counts()
    assert recorder.close()
    assert (counts.recorded, counts.refused, counts.dropped) == (2, 3, 0)
    assert [stored.decision.number for stored in list_decisions(engine)] == [4, 1]
    kept = [json.loads(line) for line in (spool / "refused.jsonl").read_text().splitlines()]
    assert len(kept) == 3
    assert all(entry["why"] and entry["row"] for entry in kept)


def test_garbage_in_the_spool_is_set_aside(engine: Engine, database_url: str, spool: Path, locked: Block) -> None:
    recorder = quick_recorder(database_url, spool)
    with locked():
        recorder.record(action(1))
        recorder.record(action(2))
        assert recorder.flush(20)
        assert recorder.close()
    path = spool / "spool.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\x00" * 40 + b"\n" + second)
    recorder = quick_recorder(database_url, spool)
    assert recorder.settle(20)
    counts = recorder.counts()
    assert recorder.close()
    assert (counts.recorded, counts.refused) == (2, 1)
    assert effect_numbers(engine) == [1, 2]


def test_a_close_while_the_database_is_down_keeps_all_for_the_next_start(
    engine: Engine, database_url: str, spool: Path, locked: Block
) -> None:
    recorder = quick_recorder(database_url, spool)
    with locked():
        for number in range(100):
            recorder.record(action(number))
        assert recorder.close()
        assert recorder.counts().spool_bytes > 0
        recorder.record(action(100))  # too late: counted, not raised
        assert recorder.counts().dropped == 1
    assert effect_numbers(engine) == []
    recorder = quick_recorder(database_url, spool)
    assert recorder.settle(20)
    assert recorder.close()
    assert effect_numbers(engine) == list(range(100))


def test_a_close_does_not_wait_for_a_database_that_hangs(
    engine: Engine, database_url: str, spool: Path, locked: Block
) -> None:
    """The thread hangs in the database for far longer than the deadline: what it holds goes to the spool."""
    recorder = open_recorder(database_url, spool)  # waits 2 s for a lock
    with locked():
        for number in range(20):
            recorder.record(action(number))
        time.sleep(0.2)
        started_s = time.monotonic()
        assert recorder.close(deadline_s=0.2)
        assert time.monotonic() - started_s < 1.5
    recorder = quick_recorder(database_url, spool)
    assert recorder.settle(20)
    assert recorder.close()
    assert sorted(effect_numbers(engine)) == list(range(20))


def test_a_close_that_loses_something_says_so(engine: Engine, database_url: str, spool: Path, locked: Block) -> None:
    recorder = quick_recorder(database_url, spool, spool_limit_bytes=10)
    with locked():
        recorder.record(action(1))
        assert recorder.close(deadline_s=0.5) is False
    assert recorder.counts().in_memory == 1


def test_a_commit_whose_answer_is_lost_makes_no_second_row(engine: Engine, database_url: str, spool: Path) -> None:
    """The transaction is in, the connection breaks before the answer: the recorder can only write it again."""
    recorder = quick_recorder(database_url, spool)
    broken: list[int] = []

    @event.listens_for(recorder._engine, "commit")
    def commit_and_break(connection: object) -> None:
        if not broken:
            broken.append(1)
            connection.connection.driver_connection.commit()  # type: ignore[attr-defined]
            raise sqlite3.OperationalError("disk I/O error")

    for number in range(10):
        recorder.record(action(number))
    assert recorder.settle(20)
    counts = recorder.counts()
    assert recorder.close()
    assert broken
    assert (counts.recorded, counts.repeated) == (0, 10)
    assert effect_numbers(engine) == list(range(10))


def test_a_second_recorder_on_one_spool_is_refused(engine: Engine, database_url: str, spool: Path) -> None:
    recorder = quick_recorder(database_url, spool)
    with pytest.raises(UserError, match="in use by process"):
        quick_recorder(database_url, spool)
    assert recorder.close()


def test_a_later_term_may_use_the_same_effect_ids(engine: Engine, database_url: str, spool: Path) -> None:
    recorder: Recorder = quick_recorder(database_url, spool)
    for term in (1, 2):
        for number in range(5):
            recorder.record(replace(action(number), term=term))
    assert recorder.settle(20)
    assert recorder.counts().recorded == 10
    assert recorder.close()
