"""Brings a database to the schema of this version, and refuses to work with one that is not there.

`dynamollm db upgrade` calls `upgrade`; every program that opens the history calls `require_current` first. A
migration runs in one transaction: killed half-way, it leaves the database as it was.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from common.errors import EXIT_UNAVAILABLE, UserError
from controller.store.engine import StoreUnavailable, describe, reading, writing

# Any number will do, as long as every version of this project takes the same.
_POSTGRES_LOCK = 7_264_510


def upgrade(engine: Engine, revision: str = "head") -> str:
    """Migrates up to `revision` and returns the revision reached. Raises UserError when the database refuses."""
    return _migrate(engine, "upgrade", revision)


def downgrade(engine: Engine, revision: str) -> str:
    """Migrates down to `revision` ("base" drops everything, data included)."""
    return _migrate(engine, "downgrade", revision)


def current(engine: Engine) -> str | None:
    """The database's revision; None when it has no schema of ours. Raises StoreUnavailable."""
    with reading(engine) as session:
        return MigrationContext.configure(session.connection()).get_current_revision()


def head() -> str:
    """The revision that this version of the program works with."""
    revision = ScriptDirectory.from_config(_config(None)).get_current_head()
    if revision is None:
        raise RuntimeError("the package has no migrations")
    return revision


def require_current(engine: Engine) -> None:
    """Raises UserError unless the database is at `head()`."""
    found, wanted = current(engine), head()
    if found == wanted:
        return
    if found is None:
        raise UserError(f"{_named(engine)} has no tables yet.", "Run `dynamollm db upgrade`.")
    _require_known(engine, found)
    raise UserError(
        f"{_named(engine)} is at revision {found}, this version needs {wanted}.",
        "Stop the controller, keep a copy, and run `dynamollm db upgrade`.",
    )


def _require_known(engine: Engine, found: str) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config(None)).walk_revisions()}
    if found not in known:
        raise UserError(
            f"{_named(engine)} is at revision {found}, which this version does not know: a newer one made it.",
            "Install that version, or point to another database.",
        )


def _named(engine: Engine) -> str:
    return f"the database {describe(str(engine.url))}"


def _migrate(engine: Engine, direction: str, revision: str) -> str:
    try:
        found = current(engine)
        if found is not None:
            _require_known(engine, found)
        with writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                # One at a time; and a table of years may take longer than any ordinary statement.
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_LOCK})
            getattr(command, direction)(_config(connection), revision)
            return MigrationContext.configure(connection).get_current_revision() or "base"
    except StoreUnavailable as error:
        raise UserError(
            f"{_named(engine)} could not be migrated: {error.why}.",
            "Nothing was changed. Stop whatever else uses it and try again.",
            EXIT_UNAVAILABLE,
        ) from error


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config
