"""Two real controllers on a real Postgres, real agents on emulated hosts: who leads when; nobody else acts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.leading import POLL_S, TTL_S
from controller.store import migrate
from controller.store.engine import open_engine
from controller.store.leadership import leader
from controller.store.repositories import list_decisions
from dynamollm.v1 import controller_pb2 as pb
from tests.controllerrig import Controller, ControllerRig
from tests.pg import Postgres, missing

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "PostgreSQL is here"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

# What is asked of a takeover, in seconds.
AFTER_SIGKILL_S = 15.0
AFTER_SIGTERM_S = 2.0
NOISE_S = 3.0  # a machine with two busy cores


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as running:
        yield running


@pytest.fixture
def rig(server: Postgres, tmp_path: Path) -> Iterator[ControllerRig]:
    url = server.new_database()
    engine = open_engine(url)
    migrate.upgrade(engine)
    engine.dispose()
    with ControllerRig(tmp_path, url) as running:
        yield running


def pair(rig: ControllerRig) -> tuple[Controller, Controller]:
    """A leader with a standby that waits for it."""
    first = rig.start("a")
    rig.wait(lambda: first.status() is not None, 60, "the first one leads")
    second = rig.start("b")
    rig.wait(lambda: "standby" in second.said, 60, "the second one waits")
    assert second.status() is None, "a standby does not listen"
    rig.serve_load(1.0)
    rig.wait(lambda: rig.ready(first), 60, "an instance is ready")
    rig.wait(rig.locked, 30, "a clock is locked")
    return first, second


def decisions_by_term(rig: ControllerRig) -> dict[int, float]:
    """The time of the last decision of each term."""
    engine = open_engine(rig.database_url)
    found = list_decisions(engine, limit=1000)
    engine.dispose()
    last: dict[int, float] = {}
    for stored in found:
        last[stored.decision.term] = max(last.get(stored.decision.term, 0.0), stored.decision.decided_at_s)
    return last


def test_a_killed_leader_is_followed_within_the_time_and_the_fleet_serves_on(rig: ControllerRig) -> None:
    first, second = pair(rig)
    serving = {instance.spec.instance_id for instance in rig.instances()}
    first.process.kill()
    took_s = rig.wait(lambda: second.status() is not None, AFTER_SIGKILL_S + NOISE_S, "the standby leads")
    assert took_s <= TTL_S + POLL_S + NOISE_S
    rig.wait(lambda: rig.ready(second), 30, "it sees the instances")
    assert serving <= {instance.spec.instance_id for instance in rig.instances()}, "nothing was restarted"
    status = second.status()
    assert status is not None
    assert status.term == 2
    rig.wait(rig.locked, 30, "it locks clocks under its own term")


def test_a_leader_that_is_told_to_stop_hands_over_at_once(rig: ControllerRig) -> None:
    first, second = pair(rig)
    first.process.terminate()
    rig.wait(lambda: second.status() is not None, AFTER_SIGTERM_S + NOISE_S, "the standby leads")
    assert first.process.wait(20) == 0


def test_a_frozen_leader_that_wakes_up_does_nothing_and_ends(rig: ControllerRig) -> None:
    first, second = pair(rig)
    os.kill(first.process.pid, signal.SIGSTOP)
    rig.wait(lambda: second.status() is not None, AFTER_SIGKILL_S + NOISE_S, "the standby leads")
    rig.wait(lambda: rig.ready(second) and rig.locked(), 40, "the new leader acts")
    # An order to the new one alone: whatever touches a clock after it is the old one.
    second.call("SetMode", pb.SetModeRequest(scope="cluster", mode=pb.MODE_PAUSED, who="test", why="hold still"))
    rig.wait(lambda: not rig.locked(), 20, "the locks have run out")
    os.kill(first.process.pid, signal.SIGCONT)
    woke_s = time.time()
    while time.time() < woke_s + 6:
        assert not rig.locked(), "the old leader has locked a clock"
        time.sleep(0.05)
    assert first.process.wait(20) == 4
    assert "the lead was lost" in first.said
    engine = open_engine(rig.database_url)
    held = leader(engine)
    engine.dispose()
    assert held is not None
    assert held.term == 2


def test_a_database_that_is_gone_stops_no_control_and_its_return_loses_no_history(
    rig: ControllerRig, server: Postgres
) -> None:
    first, _ = pair(rig)
    server.stop(signal.SIGQUIT)  # as its crash would
    try:
        began_s = time.time()
        while time.time() < began_s + TTL_S + 4:
            assert first.process.poll() is None
            assert rig.locked(), "the leases are no longer renewed"
            time.sleep(0.5)
    finally:
        server.start()
    rig.wait(lambda: (s := first.status()) is not None and s.database_up, 30, "history is written again")
    rig.wait(lambda: decisions_by_term(rig).get(1, 0.0) > began_s, 30, "with what was decided meanwhile")
    assert rig.leaders() == [first]
