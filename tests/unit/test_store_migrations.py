"""The walk through the revisions, with data; and what a program says that meets the wrong one."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from common.errors import UserError
from controller.store import migrate
from controller.store.codec import to_row
from controller.store.engine import open_engine, writing
from controller.store.leadership import Lead, acquire
from controller.store.models import Base
from controller.store.repositories import get_decision, last_plan, write_records
from tests.store_suite import NOON_S, decision, one_of_each, rows_by_table, sqlite_url

TABLES = set(Base.metadata.tables)
FIRST_VIEWS = {
    "v_decisions",
    "v_energy_by_pool_hour",
    "v_load_by_class_hour",
    "v_slo_by_class_hour",
    "v_switching_costs",
}
FOURTH_VIEWS = FIRST_VIEWS | {"v_savings_by_day"}
VIEWS = FOURTH_VIEWS | {"v_forecast_by_pool_day"}
# Tables that came with 0003, and later.
THIRD = {"input_frames", "input_snapshots", "orders", "saving_days"}
LATER = THIRD | {"choices", "forecasts"}


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path)


@pytest.fixture
def empty(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url, create=True)
    yield engine
    engine.dispose()


def test_walk_up_down_and_up_again_with_data(empty: Engine) -> None:
    """Each revision is reached, keeps what the one before held, and can be left again."""
    assert migrate.current(empty) is None

    assert migrate.upgrade(empty, "0001") == "0001"
    assert set(inspect(empty).get_table_names()) == (TABLES - LATER) | {"alembic_version"}
    assert inspect(empty).get_view_names() == []
    first = [record for record in one_of_each() if to_row(record).table not in LATER]
    assert write_records(empty, first) == len(first) == len(one_of_each()) - len(LATER)
    lead = acquire(empty, "a", 10.0, NOON_S)
    assert lead == Lead(1, "a", NOON_S + 10)

    assert migrate.upgrade(empty, "0002") == "0002"
    assert set(inspect(empty).get_view_names()) == FIRST_VIEWS
    assert migrate.upgrade(empty, "0003") == "0003"
    assert set(inspect(empty).get_table_names()) == (TABLES - LATER) | THIRD | {"alembic_version"}
    assert migrate.upgrade(empty, "0004") == "0004"
    assert set(inspect(empty).get_table_names()) == (TABLES - {"forecasts"}) | {"alembic_version"}
    assert set(inspect(empty).get_view_names()) == FOURTH_VIEWS
    assert migrate.upgrade(empty, "0005") == "0005" == migrate.head()
    assert set(inspect(empty).get_table_names()) == TABLES | {"alembic_version"}
    assert set(inspect(empty).get_view_names()) == VIEWS
    assert write_records(empty, one_of_each()) == len(LATER) + 1  # the node is renewed
    with empty.connect() as connection:
        for view in sorted(VIEWS):
            assert len(connection.execute(text(f"SELECT * FROM {view}")).all()) == 1, view

    before = rows_by_table(empty)
    assert migrate.downgrade(empty, "0001") == "0001"
    assert inspect(empty).get_view_names() == []
    assert migrate.upgrade(empty) == "0005"
    assert rows_by_table(empty) == {name: 0 if name in LATER else rows for name, rows in before.items()}
    stored, plan = get_decision(empty, 1), last_plan(empty)
    assert stored is not None
    assert stored.decision == decision()
    assert plan in one_of_each()

    assert migrate.downgrade(empty, "base") == "base"
    assert set(inspect(empty).get_table_names()) <= {"alembic_version"}
    assert migrate.upgrade(empty) == "0005"
    assert rows_by_table(empty) == {name: int(name == "leadership") for name in TABLES}


def test_upgrading_what_is_up_to_date_changes_nothing(empty: Engine) -> None:
    migrate.upgrade(empty)
    write_records(empty, one_of_each())
    before = rows_by_table(empty)
    assert migrate.upgrade(empty) == migrate.head()
    assert rows_by_table(empty) == before


def test_migrations_and_models_agree(empty: Engine) -> None:
    migrate.upgrade(empty)
    with empty.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_two_upgrades_at_once_both_succeed(empty: Engine, database_url: str) -> None:
    outcomes: list[str] = []

    def upgrade() -> None:
        engine = open_engine(database_url)
        outcomes.append(migrate.upgrade(engine))
        engine.dispose()

    threads = [threading.Thread(target=upgrade) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == [migrate.head()] * 3


def test_an_upgrade_that_fails_half_way_leaves_nothing_behind(empty: Engine) -> None:
    """`plans` stands in the way of the eighth table: the seven before it must be gone again."""
    with writing(empty) as connection:
        connection.execute(text("CREATE TABLE plans (id INTEGER)"))
    with pytest.raises(UserError, match=r"could not be migrated.*plans"):
        migrate.upgrade(empty)
    assert set(inspect(empty).get_table_names()) <= {"plans", "alembic_version"}
    assert migrate.current(empty) is None


def test_a_program_refuses_a_database_without_tables(empty: Engine) -> None:
    with pytest.raises(UserError, match=r"has no tables yet. Run `dynamollm db upgrade`"):
        migrate.require_current(empty)


def test_a_program_refuses_an_older_revision(empty: Engine) -> None:
    migrate.upgrade(empty, "0001")
    with pytest.raises(UserError, match=r"at revision 0001, this version needs 0005.*dynamollm db upgrade"):
        migrate.require_current(empty)
    migrate.upgrade(empty)
    migrate.require_current(empty)


def test_a_program_refuses_a_newer_revision(empty: Engine) -> None:
    migrate.upgrade(empty)
    with writing(empty) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UserError, match=r"9999, which this version does not know"):
        migrate.require_current(empty)
    with pytest.raises(UserError, match="newer one made it"):
        migrate.upgrade(empty)


def test_the_migrations_travel_with_the_package() -> None:
    """They are found from anywhere, by the package's own path, without any file at the top of a checkout."""
    script = "from controller.store import migrate; print(migrate.head())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == migrate.head()
