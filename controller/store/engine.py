"""Opens the database: SQLite by default, Postgres by URL; and the two kinds of transaction that the store uses.

Every SQLite connection is in WAL mode, waits for a lock, checks foreign keys, and reads these settings back: a
database that silently ignores one of them (a network file system, say) is refused at the start, not found out
under load.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    NotSupportedError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from common.errors import EXIT_UNAVAILABLE, UserError

# How long anybody but the recorder waits for a locked database. Five seconds is known to be too short under bursts.
PATIENCE_S = 30.0
# The recorder has a better place to wait, its spool on disk: what waits in memory is lost with the process.
RECORDER_PATIENCE_S = 2.0


class StoreUnavailable(UserError):
    """The database did not do what was asked: gone, locked beyond patience, full, or not at the right revision.

    `why` is what the driver said. A command that is stopped by it ends with one line for the person at the terminal.
    """

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the history database fails: {why}.",
            "Check that it is there, at the right revision (`dynamollm db current`), and not held by another program.",
            EXIT_UNAVAILABLE,
        )
        self.why = why


def open_engine(url: str, *, patience_s: float = PATIENCE_S, create: bool = False) -> Engine:
    """An engine that has connected once.

    `url` is `sqlite:////absolute/path.db` or `postgresql://user@host:port/name`. `create` lets SQLite make the file.
    Raises UserError when the URL is wrong or the database cannot be opened.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = _sqlite_engine(parsed, patience_s, create)
    else:
        engine = _postgres_engine(parsed, patience_s)
    try:
        with engine.connect():
            pass
    except SQLAlchemyError as error:
        engine.dispose()
        raise UserError(
            f"the database {describe(url)} cannot be opened: {first_line(error)}.", _hint(parsed), EXIT_UNAVAILABLE
        ) from None
    return engine


def parse_url(url: str) -> URL:
    """Raises UserError for anything but SQLite with a file or Postgres."""
    hint = "Write sqlite:////var/lib/dynamollm/controller.db or postgresql://user@host:5432/name."
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UserError("the database URL cannot be understood.", hint) from None
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
            raise UserError("a SQLite database URL must name a file.", hint)
        return parsed.set(drivername="sqlite+pysqlite")
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    raise UserError(f"the database URL begins with {parsed.drivername}://, which is not supported.", hint)


def describe(url: str) -> str:
    """The URL as it may stand in a log: without the password."""
    return parse_url(url).set(drivername=parse_url(url).get_backend_name()).render_as_string(hide_password=True)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One short write transaction; commits at the end. Raises StoreUnavailable when the database fails.

    On SQLite it takes the write lock at once (BEGIN IMMEDIATE): a transaction that reads first and then wants to
    write is refused without any waiting when another has written in between.
    """
    try:
        with engine.execution_options(sqlite_begin="BEGIN IMMEDIATE").begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        if is_unavailable(error):
            raise StoreUnavailable(first_line(error)) from error
        raise


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """One read transaction. Raises StoreUnavailable when the database fails."""
    try:
        with Session(engine, expire_on_commit=False) as session:
            yield session
    except SQLAlchemyError as error:
        if is_unavailable(error):
            raise StoreUnavailable(first_line(error)) from error
        raise


def is_unavailable(error: Exception) -> bool:
    """Does the database fail, or has it refused what was asked of it? What would fail for everything alike is the
    database: gone, locked, full, read-only, damaged, without its tables."""
    if isinstance(error, IntegrityError | DataError | NotSupportedError):
        return False
    return isinstance(error, DBAPIError | PoolTimeout | DisconnectionError)


def first_line(error: BaseException) -> str:
    """What the driver said, as the end of a sentence."""
    cause = getattr(error, "orig", None) or error
    text = str(cause).strip()
    return (text.splitlines()[0] if text else type(cause).__name__).rstrip(".")


def _sqlite_engine(url: URL, patience_s: float, create: bool) -> Engine:
    path = Path(url.database or "").absolute()
    if create:
        with suppress(OSError):  # the first connection says it better
            path.touch(mode=0o640)  # an empty file is an empty database
    # mode=rw: a file that is missing later is an error, and not replaced by an empty database.
    uri = f"file:{quote(str(path))}?mode=rw"

    def connect() -> sqlite3.Connection:
        # isolation_level=None: transactions begin where SQLAlchemy says so (see `begin`), not where the driver guesses.
        connection = sqlite3.connect(uri, uri=True, timeout=patience_s, isolation_level=None, check_same_thread=False)
        try:
            _set_up_sqlite(connection, patience_s)
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine(url, creator=connect, poolclass=QueuePool, pool_size=4)

    @event.listens_for(engine, "connect")
    def remember_file(_: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        record.info["file"] = _file_identity(path)

    @event.listens_for(engine, "checkout")
    def same_file(_: DBAPIConnection, record: ConnectionPoolEntry, __: object) -> None:
        # A connection to a file that was deleted or replaced would go on writing into nowhere without an error.
        if record.info["file"] != _file_identity(path):
            raise DisconnectionError(f"{path} is another file than before")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))

    return engine


def _set_up_sqlite(connection: sqlite3.Connection, patience_s: float) -> None:
    """Sets and reads back; the error is sqlite3's own, so that it counts as a database that does not work."""
    wanted = (("busy_timeout", round(patience_s * 1000)), ("journal_mode", "wal"), ("foreign_keys", 1))
    for name, value in wanted:
        connection.execute(f"PRAGMA {name} = {value}")
        got = connection.execute(f"PRAGMA {name}").fetchone()[0]
        if got != value:
            raise sqlite3.OperationalError(f"SQLite answers {name} = {got} where {value} was set")


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _postgres_engine(url: URL, patience_s: float) -> Engine:
    patience_ms = round(patience_s * 1000)
    return create_engine(
        url,
        pool_size=4,
        pool_pre_ping=True,
        connect_args={
            "application_name": "dynamollm",
            "connect_timeout": 5,
            # A statement that cannot finish, and a server that has gone without a word, both end.
            "options": f"-c timezone=UTC -c lock_timeout={patience_ms} -c statement_timeout={patience_ms}",
            "tcp_user_timeout": patience_ms,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
        },
    )


def _hint(url: URL) -> str:
    if url.get_backend_name() != "sqlite":
        return "Check that the server runs, its address, the user's password and rights."
    path = Path(url.database or "")
    if not path.absolute().parent.is_dir():
        return f"Create the folder {path.absolute().parent}."
    if not path.exists():
        return "Run `dynamollm db upgrade` to create it."
    return "Check the file's owner and mode, and that it is a SQLite database on a local disk."
