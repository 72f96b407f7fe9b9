"""Two real controllers, a real Postgres and four emulated hosts in network namespaces: one is stopped, frozen, cut off
and killed after the other, a host is cut off, and what must hold holds all the while.

One fleet for all: each test begins with one controller that leads and one that stands by.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from controller.leading import POLL_S, TTL_S
from dynamollm.v1 import controller_pb2 as pb
from simulator.demo.fleet import LEASE, STALENESS
from tests import netlab, pg
from tests.netrig import ANSWERS, Controller, NetRig

WHY_NOT = pg.missing() or netlab.missing()

pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there is all it needs"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

# What is asked of a takeover, in seconds; and what a machine with two busy cores may add.
AFTER_SIGKILL_S, AFTER_SIGTERM_S, NOISE_S = 15.0, 2.0, 4.0


class Pair:
    """Who leads, who stands by, and what there is to see of both."""

    def __init__(self, rig: NetRig) -> None:
        self.rig = rig
        self.leads = rig.start("a")
        rig.wait(lambda: rig.status(self.leads), 60, "the first one leads")
        self.waits = rig.start("b")
        rig.wait(lambda: "standby" in self.waits.said, 60, "the second one waits")

    def term(self) -> int:
        status = self.rig.status(self.leads)
        return status.term if status is not None else 0

    def taken_over(self, within_s: float) -> float:
        """Waits for the standby to lead; `again` then makes the other one the standby."""
        took_s = self.rig.wait(lambda: self.rig.status(self.waits), within_s, "the standby leads")
        self.leads, self.waits = self.waits, self.leads
        return took_s

    def again(self) -> None:
        self.waits = self.rig.start(self.waits.name)
        self.rig.wait(lambda: "standby" in self.waits.said, 60, "the other one waits again")

    def acts(self) -> None:
        """The leader sees what serves, and renews its locks."""
        self.rig.wait(lambda: self.rig.ready_on(self.leads), 30, "it sees the instances")
        self.rig.wait(self.rig.all_locked, 30, "clocks are locked")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with NetRig(tmp_path_factory.mktemp("net")) as rig:
        running = Pair(rig)
        running.acts()
        rig.watch_always()
        rig.wait(lambda: len(rig.ready_on(running.leads)) > 1, 30, "instances on more than one host")
        rig.ask_always()
        rig.wait(lambda: rig.answers[200], 30, "requests are answered")
        yield running


@pytest.fixture(autouse=True)
def held(pair: Pair) -> Iterator[None]:
    """What must hold has held; whatever a controller suffers, requests are served."""
    before = len(pair.rig.not_served_s)
    yield
    assert pair.rig.broken == []
    assert pair.rig.unanswered == []
    assert set(pair.rig.answers) <= set(ANSWERS)
    if not cut_off:
        assert len(pair.rig.not_served_s) == before, f"{pair.rig.answers}\n{pair.rig.logs()}"


cut_off: set[str] = set()  # hosts that were: requests on them may have ended in an error


def test_a_leader_that_is_told_to_stop_hands_over_at_once(pair: Pair) -> None:
    pair.leads.process.terminate()
    assert pair.taken_over(AFTER_SIGTERM_S + NOISE_S) < AFTER_SIGTERM_S + NOISE_S
    assert pair.waits.process.wait(20) == 0
    pair.again()
    pair.acts()


def test_a_frozen_leader_that_wakes_up_can_do_nothing(pair: Pair) -> None:
    frozen, term = pair.leads, pair.term()
    os.kill(frozen.process.pid, signal.SIGSTOP)
    pair.taken_over(AFTER_SIGKILL_S + NOISE_S)
    assert pair.term() == term + 1
    pair.acts()
    os.kill(frozen.process.pid, signal.SIGCONT)
    assert frozen.process.wait(20) == 4
    assert "the lead was lost" in frozen.said
    assert all(pair.rig.now(name).term in (0, term + 1) for name in pair.rig.host_names)
    pair.again()


def test_a_leader_that_is_cut_off_is_followed_and_gives_up_when_it_is_back(pair: Pair) -> None:
    cut, term = pair.leads, pair.term()
    serving = instances(pair)
    pair.rig.cable[cut.name].unplug()
    took_s = pair.taken_over(TTL_S + AFTER_SIGKILL_S + NOISE_S)
    assert took_s < TTL_S + POLL_S + NOISE_S
    pair.acts()
    assert serving <= instances(pair), "nothing was restarted"
    pair.rig.cable[cut.name].plug()
    assert cut.process.wait(30) == 4
    assert pair.term() == term + 1
    pair.again()


def test_a_killed_leader_is_followed_in_time_while_a_host_is_cut_off(pair: Pair) -> None:
    """The host's locks end with their leases, though nobody can tell it; back again, no GPU has two owners."""
    rig = pair.rig
    lost = sorted(rig.ready_on(pair.leads))[-1]
    cut_off.add(lost)
    pair.leads.process.kill()
    rig.cable[lost].unplug()
    assert rig.wait(lambda: not rig.locked(lost), LEASE.ttl_s + NOISE_S, "the host's locks have ended") > 0
    pair.taken_over(AFTER_SIGKILL_S + NOISE_S)
    rig.wait(lambda: rig.ready_on(pair.leads) - {lost}, STALENESS.lost_s + 30, "the others serve")
    served = rig.answers[200]
    rig.wait(lambda: rig.answers[200] > served + 3, 30, "requests are served without it")
    rig.cable[lost].plug()
    rig.wait(lambda: lost in nodes_seen(pair.leads, rig), 30, "the host is back")
    time.sleep(2)  # for what may go wrong now


def instances(pair: Pair) -> set[str]:
    return {i for name in pair.rig.host_names for owners in pair.rig.now(name).owners.values() for i in owners}


def nodes_seen(controller: Controller, rig: NetRig) -> set[str]:
    status = rig.status(controller)
    return set() if status is None else {node.node_id for node in status.nodes if node.freshness == pb.FRESHNESS_FRESH}
