"""Kills a node agent again and again, at random moments and at the worst ones, and checks what is left each time.

After every kill, and whatever `restore` or the next start finds: no clock is locked, the limit of a plain lease is as
it was found, and a cap that protects is in force. Used by tests/faults (a few dozen) and the agent's benchmark.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import dataclass, field

import grpc

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from nodeagent.control.journal import load
from simulator.host.nvml.state import Calls
from tests.nodehost import NodeHost, until

CAPPED, CAP_W = 3, 420.0
"""The GPU that has a protecting cap, and its limit."""
FLOOR_W = 330.0


@dataclass
class Killing:
    """What happened so far."""

    kills: int = 0
    between_journal_and_write: int = 0
    found_locked: int = 0
    """Kills after which a clock was locked, that is those that a careless agent would have left so."""
    tripped: int = 0
    problems: list[str] = field(default_factory=list)


def kill_many(host: NodeHost, kills: int, seed: int) -> Killing:
    """Runs the campaign on a host with four GPUs whose agent is not running yet."""
    chance, told = random.Random(seed), Killing()
    for index in range(4):
        host.gpus.set_fault(index, Calls.CLOCK_WRITE | Calls.POWER_WRITE, delay_s=0.002)
    host.start()
    _protect(host)
    floor = False
    for number in range(kills):
        term = number + 2
        if chance.random() < 0.25:
            _die_between_journal_and_write(host, chance, told, term)
        else:
            floor = _die_while_steered(host, chance, told, term, floor)
        told.kills += 1
        told.found_locked += any(lock is not None for lock in host.locks())
        if chance.random() < 0.5:
            outcome = host.restore()
            if outcome.returncode != 0:
                told.problems.append(f"kill {number}: restore ended with {outcome.returncode}: {outcome.stderr[-500:]}")
            _check(host, told, f"kill {number}, restore", floor)
        host.start()
        _check(host, told, f"kill {number}, next start", floor)
        status = host.stub.GetGuard(pb.GetGuardRequest(), timeout=10).status
        if floor and not status.floor_tripped:
            told.problems.append(f"kill {number}: the watts floor was forgotten")
        if status.floor_tripped:
            _trip(host, False)
            floor = False
    host.terminate()
    return told


def _die_while_steered(host: NodeHost, chance: random.Random, told: Killing, term: int, floor: bool) -> bool:
    stop, pace = threading.Event(), random.Random(chance.random())

    def steer() -> None:
        while not stop.is_set():
            try:
                host.lock(range(4), pace.choice([600, 990, 1395]), ttl_s=pace.choice([0.01, 5.0]), term=term)
                _limit(host, pace.randrange(3), pace.choice([300.0, 500.0]), term)
            except grpc.RpcError:
                return

    steering = threading.Thread(target=steer)
    steering.start()
    if chance.random() < 0.2:
        _trip(host, True)
        told.tripped += 1
        floor = True
    time.sleep(chance.uniform(0.0, 0.3))
    host.kill()
    stop.set()
    steering.join()
    return floor


def _die_between_journal_and_write(host: NodeHost, chance: random.Random, told: Killing, term: int) -> None:
    """The write hangs in the driver while the journal has it already."""
    gpu = chance.randrange(3)
    host.gpus.hang(gpu, Calls.CLOCK_WRITE)

    def ask() -> None:
        with contextlib.suppress(grpc.RpcError):
            host.lock([gpu], 990, term=term)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: bool(load(host.state_dir / "journal.json")[1]))
    time.sleep(chance.uniform(0.0, 0.02))
    host.kill()
    asking.join()
    host.gpus.set_fault(gpu, Calls.CLOCK_WRITE, delay_s=0.002)
    told.between_journal_and_write += 1


def _check(host: NodeHost, told: Killing, when: str, floor: bool) -> None:
    if host.locks() != [None] * 4:
        told.problems.append(f"{when}: clocks are locked: {host.locks()}")
    limits = [host.gpus.observe(index).power_limit_w for index in range(4)]
    wanted = [FLOOR_W if floor else 700.0] * 3 + [FLOOR_W if floor else CAP_W]
    if limits != wanted:
        told.problems.append(f"{when}: limits are {limits} instead of {wanted}")


def _protect(host: NodeHost) -> None:
    lease = types.Lease(
        owner=types.Owner(kind=types.OWNER_KIND_CONTROLLER, name="ctl"), reason="breaker", ttl_s=5, term=1
    )
    cap = pb.ControlRequest(gpu_uuid=host.uuids[CAPPED], power_limit=pb.PowerLimit(limit_w=CAP_W, protects=True))
    request = pb.ApplyControlsRequest(request_id=host.request_id(), lease=lease, controls=[cap])
    assert host.stub.ApplyControls(request, timeout=10).results[0].code == pb.CONTROL_CODE_APPLIED
    rules = pb.SetGuardRequest(
        request_id=host.request_id(),
        term=1,
        watts_floor=pb.WattsFloorRule(enabled=True, limit_w=FLOOR_W),
        reason="campaign",
    )
    host.stub.SetGuard(rules, timeout=10)


def _limit(host: NodeHost, gpu: int, watts: float, term: int) -> None:
    lease = types.Lease(
        owner=types.Owner(kind=types.OWNER_KIND_CONTROLLER, name="ctl"), reason="test", ttl_s=5, term=term
    )
    limit = pb.ControlRequest(gpu_uuid=host.uuids[gpu], power_limit=pb.PowerLimit(limit_w=watts))
    host.stub.ApplyControls(
        pb.ApplyControlsRequest(request_id=host.request_id(), lease=lease, controls=[limit]), timeout=10
    )


def _trip(host: NodeHost, trip: bool) -> None:
    request = pb.TripGuardRequest(request_id=host.request_id(), trip=trip, reason="campaign")
    host.stub.TripGuard(request, timeout=10)
