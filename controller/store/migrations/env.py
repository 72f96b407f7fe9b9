"""Alembic's entry: runs revisions on the connection that `controller.store.migrate` holds, inside its transaction."""

from alembic import context
from sqlalchemy import Connection

from controller.store.models import Base


def run() -> None:
    connection = context.config.attributes["connection"]
    if not isinstance(connection, Connection):
        raise TypeError("migrations are run by controller.store.migrate, which passes its connection")
    # SQLite can undo DDL too, given that the driver does not commit behind our back (engine.py sees to that): a
    # killed upgrade leaves the database at the old revision, never between two.
    context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


run()
