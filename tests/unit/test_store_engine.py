"""Opening a database: the settings that keep SQLite out of trouble, and one clear line for whatever is wrong."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from common.errors import UserError
from controller.store import engine as store_engine
from controller.store import migrate
from controller.store.engine import PATIENCE_S, StoreUnavailable, describe, open_engine, reading, writing
from tests.store_suite import sqlite_url


def test_every_sqlite_connection_waits_uses_wal_and_checks_foreign_keys(tmp_path: Path) -> None:
    engine = open_engine(sqlite_url(tmp_path), create=True)
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == PATIENCE_S * 1000 >= 30_000
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    engine.dispose()


def test_a_setting_that_does_not_hold_is_refused(tmp_path: Path) -> None:
    """As on a file system without shared memory, where SQLite answers the question for WAL with another mode."""

    class Stubborn(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace("= wal", "= delete"), *rest)

    connection = sqlite3.connect(tmp_path / "h.db", factory=Stubborn)
    with pytest.raises(sqlite3.OperationalError, match="journal_mode = delete where wal"):
        store_engine._set_up_sqlite(connection, 30.0)
    connection.close()


def test_a_missing_sqlite_file_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dynamollm db upgrade") as caught:
        open_engine(sqlite_url(tmp_path))
    assert caught.value.exit_code != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("mysql://root@localhost/x", "mysql:// *"),
        ("no url at all", "cannot be understood"),
        ("sqlite:////nowhere/at/all/h.db", "Create the folder /nowhere/at/all"),
        ("postgresql://nobody:secret@127.0.0.1:1/x", "Check that the server runs"),
    ],
)
def test_a_wrong_url_gets_one_line_that_says_what_to_do(url: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_engine(url, create=True)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "history.db").write_text("this is a diary, not a database\n" * 100)
    with pytest.raises(UserError, match="not a database"):
        open_engine(sqlite_url(tmp_path))


def test_the_password_stays_out_of_descriptions() -> None:
    assert describe("postgresql://me:secret@db.example:5432/history") == "postgresql://me:***@db.example:5432/history"


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    """A connection to a deleted file would go on taking rows that nobody will ever see."""
    url, path = sqlite_url(tmp_path), tmp_path / "history.db"
    engine = open_engine(url, create=True)
    migrate.upgrade(engine)
    path.unlink()
    with pytest.raises(StoreUnavailable, match="unable to open"), writing(engine) as connection:
        connection.execute(text("DELETE FROM nodes"))
    other = open_engine(f"sqlite:///{tmp_path / 'other.db'}", create=True)
    migrate.upgrade(other)
    other.dispose()
    for leftover in tmp_path.glob("history.db-*"):
        leftover.unlink()
    (tmp_path / "other.db").replace(path)
    with writing(engine) as connection:
        assert connection.execute(text("DELETE FROM nodes")).rowcount == 0
    engine.dispose()


def test_a_writer_waits_for_the_lock_from_the_first_statement_on(tmp_path: Path) -> None:
    """A transaction that had read before it wanted to write would be refused without waiting."""
    engine = open_engine(sqlite_url(tmp_path), patience_s=0.1, create=True)
    migrate.upgrade(engine)
    holder = sqlite3.connect(tmp_path / "history.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"), writing(engine):
        pytest.fail("the transaction began without the lock")
    with reading(engine) as session:  # readers go on
        assert session.execute(text("SELECT COUNT(*) FROM nodes")).scalar() == 0
    holder.close()
    engine.dispose()
