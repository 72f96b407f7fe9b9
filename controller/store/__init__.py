"""The history of what was seen, decided and done: SQLite or Postgres, written off the loop, never in its way."""
