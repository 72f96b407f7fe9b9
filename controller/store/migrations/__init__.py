"""Alembic migrations of the history database, run by `controller.store.migrate`."""
