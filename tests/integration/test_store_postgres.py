"""The store on a real Postgres: the same tests as on SQLite, one by one, and what only a server can do to us.

Every test of the modules below that works on a `database_url` is collected here again, over a database of its own on
one throw-away server.
"""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import psycopg
import pytest
from sqlalchemy import Engine, text

from common.errors import UserError
from controller.store import migrate
from controller.store.engine import StoreUnavailable, open_engine, reading
from controller.store.leadership import acquire
from controller.store.recorder import open_recorder
from controller.store.repositories import write_records
from tests.faults import test_store_faults as faults
from tests.pg import Postgres, missing
from tests.store_suite import (
    NOON_S,
    action,
    decision,
    effect_numbers,
    one_of_each,
    quick_recorder,
    until,
    upgraded_engine,
)
from tests.unit import test_store_leadership as leadership
from tests.unit import test_store_migrations as migrations
from tests.unit import test_store_recorder as recorder_tests
from tests.unit import test_store_repositories as repositories
from tests.unit import test_store_retention as retention
from tests.unit import test_store_sql_cookbook as cookbook

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "PostgreSQL is here")

# Their fault is SQLite's own: it is the driver's connection that they break, or the database's file.
ONLY_SQLITE = {
    "test_a_commit_whose_answer_is_lost_makes_no_second_row",
    "test_a_full_disk_under_database_and_spool_is_survived",
}
Block = Callable[[], AbstractContextManager[None]]


def suite_of(*modules: ModuleType) -> dict[str, object]:
    """The tests of these modules that use a database."""
    found: dict[str, object] = {}
    for module in modules:
        for name, function in vars(module).items():
            if name.startswith("test_") and callable(function) and name not in ONLY_SQLITE:
                wanted = set(inspect.signature(function).parameters)
                if wanted & {"database_url", "engine", "empty", "history"}:
                    assert name not in found, f"two tests are called {name}"
                    found[name] = function
    return found


SUITE = suite_of(migrations, repositories, leadership, recorder_tests, retention, cookbook, faults)
globals().update(SUITE)

empty = migrations.empty
history = cookbook.history
spool = recorder_tests.spool


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def database_url(server: Postgres) -> str:
    return server.new_database()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from upgraded_engine(database_url)


@pytest.fixture
def locked(engine: Engine, database_url: str) -> Block:
    """A context in which another session holds every table that the tests record into."""

    @contextmanager
    def hold() -> Iterator[None]:
        with psycopg.connect(database_url) as holder:
            holder.execute("LOCK TABLE actions, decisions IN ACCESS EXCLUSIVE MODE")
            yield
            holder.rollback()

    return hold


def test_the_suite_is_the_one_of_sqlite() -> None:
    assert len(SUITE) >= 55


def test_sessions_are_in_utc_and_named(engine: Engine) -> None:
    with reading(engine) as session:
        assert session.execute(text("SHOW timezone")).scalar() == "UTC"
        assert session.execute(text("SHOW application_name")).scalar() == "dynamollm"


def test_hours_do_not_depend_on_the_readers_time_zone(engine: Engine, database_url: str) -> None:
    write_records(engine, one_of_each())
    with psycopg.connect(database_url) as connection:
        connection.execute("SET timezone = 'Asia/Kolkata'")
        assert connection.execute("SELECT hour FROM v_energy_by_pool_hour").fetchall() == [("2026-03-01 12:00",)]


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    """A server that the test may stop."""
    with Postgres() as server:
        yield server


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["shut down", "crashed"])
def test_a_server_that_goes_and_comes_back_finds_all_history(
    own_server: Postgres, tmp_path: Path, how: signal.Signals
) -> None:
    url = own_server.new_database()
    engine = next(upgraded_engine(url))
    recorder = quick_recorder(url, tmp_path)
    sent, ending = [0], threading.Event()

    def send() -> None:
        while not ending.is_set():
            recorder.record(action(sent[0]))
            sent[0] += 1
            time.sleep(0.001)

    sender = threading.Thread(target=send)
    sender.start()
    assert until(lambda: recorder.counts().recorded > 100)
    own_server.stop(how)
    assert until(lambda: recorder.counts().spooled > 100)
    assert not recorder.counts().database_ok
    with pytest.raises(StoreUnavailable):
        acquire(engine, "a", 10.0, NOON_S)
    own_server.start()
    assert until(lambda: recorder.counts().database_ok)
    ending.set()
    sender.join()
    assert recorder.settle(30)
    counts = recorder.counts()
    assert recorder.close()
    assert counts.dropped == 0
    assert effect_numbers(engine) == list(range(sent[0]))
    engine.dispose()


def test_a_connection_killed_in_the_middle_is_replaced(engine: Engine, database_url: str, spool: Path) -> None:
    """As by an administrator, or a failover: sessions end, the server stays."""
    recorder = quick_recorder(database_url, spool)
    for number in range(300):
        recorder.record(action(number))
        if number % 50 == 49:
            recorder.flush(20)
            with psycopg.connect(database_url, autocommit=True) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'dynamollm' AND datname = current_database()"
                )
    assert recorder.settle(20)
    assert recorder.close()
    assert effect_numbers(engine) == list(range(300))


def test_a_statement_that_takes_too_long_is_given_up_and_repeated(
    engine: Engine, database_url: str, spool: Path
) -> None:
    """A trigger makes every insert slower than the recorder's patience: history goes to the spool meanwhile."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(5); RETURN NEW; END'"
        )
        connection.exec_driver_sql("CREATE TRIGGER slow BEFORE INSERT ON actions EXECUTE FUNCTION slow()")
    recorder = quick_recorder(database_url, spool)
    for number in range(10):
        recorder.record(action(number))
    assert recorder.flush(20)
    assert "timeout" in recorder.counts().last_error
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER slow ON actions")
    assert recorder.settle(20)
    assert recorder.close()
    assert effect_numbers(engine) == list(range(10))


def test_text_that_postgres_cannot_hold_is_set_aside(engine: Engine, database_url: str, spool: Path) -> None:
    recorder = quick_recorder(database_url, spool)
    recorder.record(decision(1, sentence="with a NUL\x00 in it"))
    recorder.record(decision(2))
    assert recorder.settle(20)
    counts = recorder.counts()
    assert recorder.close()
    assert (counts.recorded, counts.refused) == (1, 1)


def test_a_user_without_rights_gets_one_line(server: Postgres) -> None:
    url = server.new_database()
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS reader")
        admin.execute("CREATE ROLE reader LOGIN")
    engine = open_engine(url.replace("postgres@", "reader@"))
    with pytest.raises(UserError, match=r"could not be migrated: permission denied"):
        migrate.upgrade(engine)
    engine.dispose()


def test_a_reader_never_holds_up_the_recorder(engine: Engine, database_url: str, spool: Path) -> None:
    recorder = open_recorder(database_url, spool)
    with reading(engine) as session:
        session.execute(text("SELECT COUNT(*) FROM v_switching_costs"))
        recorder.record(action(1))
        assert recorder.settle(20)
        assert recorder.counts().spooled == 0
    assert recorder.close()


def test_the_server_of_a_killed_test_run_goes_with_it() -> None:
    """The helper's own promise: nothing stays behind, not even after SIGKILL."""
    script = "import time\nfrom tests.pg import Postgres\ns = Postgres()\nprint(s.port, flush=True)\ntime.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    address = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    with psycopg.connect(address) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
    process.kill()
    process.wait(30)
    process.stdout.close()

    assert row is not None
    folder = Path(row[0]).parent
    assert folder.name.startswith("dynamollm-pg-")
    # Deaf is not gone: a server that shuts down refuses at once and goes on writing. The pid file goes last.
    assert until(lambda: not (folder / "data" / "postmaster.pid").exists())
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(address, connect_timeout=2)
    shutil.rmtree(folder)
