"""One leader at a time, terms that only rise."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from controller.store.engine import open_engine
from controller.store.leadership import Lead, Refused, acquire, leader, release, renew
from tests.store_suite import NOON_S, sqlite_url, upgraded_engine


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from upgraded_engine(database_url)


def lead_of(answer: Lead | Refused) -> Lead:
    assert isinstance(answer, Lead)
    return answer


def test_the_first_one_leads_and_a_second_is_refused_by_name(engine: Engine) -> None:
    assert leader(engine) is None
    lead = lead_of(acquire(engine, "a", 15.0, NOON_S))
    assert lead == Lead(1, "a", NOON_S + 15) == leader(engine)
    assert acquire(engine, "b", 15.0, NOON_S + 14.9) == Refused(1, "a", NOON_S + 15)
    # A name is no key: a second process that was given the same one is refused as well.
    assert acquire(engine, "a", 15.0, NOON_S + 1) == Refused(1, "a", NOON_S + 15)


def test_an_expired_lead_is_taken_under_a_new_term_and_cannot_be_renewed(engine: Engine) -> None:
    slept = lead_of(acquire(engine, "a", 15.0, NOON_S))
    assert acquire(engine, "b", 15.0, NOON_S + 15) == Lead(2, "b", NOON_S + 30)
    assert renew(engine, slept, 15.0, NOON_S + 16) is None
    assert not release(engine, slept)
    assert leader(engine) == Lead(2, "b", NOON_S + 30)


def test_renewing_moves_the_expiry_and_keeps_the_term(engine: Engine) -> None:
    lead = lead_of(acquire(engine, "a", 15.0, NOON_S))
    assert renew(engine, lead, 15.0, NOON_S + 10) == Lead(1, "a", NOON_S + 25)
    assert isinstance(acquire(engine, "b", 15.0, NOON_S + 20), Refused)
    # Late, but nobody else came: the term still fences.
    assert renew(engine, lead, 15.0, NOON_S + 40) == Lead(1, "a", NOON_S + 55)


def test_a_released_lead_is_free_at_once_and_the_term_goes_on(engine: Engine) -> None:
    lead = lead_of(acquire(engine, "a", 15.0, NOON_S))
    assert release(engine, lead)
    assert leader(engine) is None
    assert acquire(engine, "b", 15.0, NOON_S + 1) == Lead(2, "b", NOON_S + 16)


def test_a_leader_needs_a_name(engine: Engine) -> None:
    with pytest.raises(ValueError, match="needs a name"):
        acquire(engine, "", 15.0, NOON_S)


def test_of_many_that_try_at_once_one_leads(engine: Engine, database_url: str) -> None:
    """Repeated, because a race that is lost once in a while is the one that counts."""
    terms = []
    for round_number in range(5):
        answers: list[Lead | Refused] = []
        start = threading.Barrier(6)

        def run(name: str, now_s: float, start: threading.Barrier, answers: list[Lead | Refused]) -> None:
            own = open_engine(database_url)
            start.wait()
            answers.append(acquire(own, name, 15.0, now_s))
            own.dispose()

        threads = [
            threading.Thread(target=run, args=(f"c{n}", NOON_S + 100 * round_number, start, answers)) for n in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        leads = [answer for answer in answers if isinstance(answer, Lead)]
        assert len(answers) == 6
        assert len(leads) == 1
        assert {answer.holder for answer in answers} == {leads[0].holder}
        terms.append(leads[0].term)
    assert terms == [1, 2, 3, 4, 5]
