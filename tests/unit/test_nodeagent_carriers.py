"""Lanes and threads: order within a lane, never two calls of one lane at once, and no lane waits for one that hangs."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from nodeagent.gpu.carriers import Carriers, Job, Lane

LANES = 8
DEADLINE_S = 60.0  # beyond anything here, also on a machine that is busy


class Road:
    """Lanes under test, with what their calls saw."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.carriers = Carriers(deadline_s)
        self.lanes = [self.carriers.lane() for _ in range(LANES)]
        self.inside = [0] * LANES
        self.seen: list[list[int]] = [[] for _ in range(LANES)]
        self.together = False

    def ask(
        self, lane: int, number: int, wait: threading.Event | None = None, take_s: float = 0.0, bounded: bool = True
    ) -> Job:
        def work() -> int:
            self.inside[lane] += 1
            self.together |= self.inside[lane] > 1
            if wait is not None:
                wait.wait(30)
            if take_s:
                time.sleep(take_s)
            self.seen[lane].append(number)
            self.inside[lane] -= 1
            return number

        job = Job(work, asyncio.get_running_loop(), bounded)
        self.carriers.ask(self.lanes[lane], job)
        return job

    def close(self) -> None:
        for lane in self.lanes:
            self.carriers.close(lane)


@pytest.mark.parametrize("seed", range(6))
async def test_any_traffic_keeps_order_and_answers_everyone(seed: int) -> None:
    chance = random.Random(seed)
    road = Road()
    asked: list[list[int]] = [[] for _ in range(LANES)]
    jobs: list[Job] = []
    number = 0
    for _ in range(60):
        for _ in range(chance.choice((1, 1, 2, LANES, 20))):
            lane = chance.randrange(LANES)
            asked[lane].append(number)
            jobs.append(road.ask(lane, number, take_s=chance.choice((0, 0, 0, 0, 0.003))))
            number += 1
        await asyncio.sleep(chance.choice((0, 0, 0.001, 0.004)))
    async with asyncio.timeout(30):
        assert await asyncio.gather(*(job.answer for job in jobs)) == list(range(number))
    assert road.seen == asked
    assert not road.together
    assert all(lane.idle for lane in road.lanes)
    road.close()


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_hangs_the_other_lanes_go_on(seed: int) -> None:
    """All but one lane hang, at random moments of random traffic; the last one must still be served."""
    chance = random.Random(seed)
    road = Road()
    free = chance.randrange(LANES)
    hanging = [lane for lane in range(LANES) if lane != free]
    chance.shuffle(hanging)
    gate = threading.Event()
    stuck: list[Job] = []
    for lane in hanging:
        together = chance.sample(range(LANES), chance.randrange(LANES))
        jobs = [road.ask(other, 0) for other in together if other == free or other not in hanging[: len(stuck) + 1]]
        stuck.append(road.ask(lane, 1, wait=gate))
        jobs.append(road.ask(free, 2))
        async with asyncio.timeout(20):
            await asyncio.gather(*(job.answer for job in jobs))
        await asyncio.sleep(chance.choice((0, 0.001, 0.004)))
    assert not any(job.answer.done() for job in stuck)
    assert sum(lane.idle for lane in road.lanes) <= 1
    gate.set()
    async with asyncio.timeout(20):
        await asyncio.gather(*(job.answer for job in stuck))
    road.close()


@pytest.mark.parametrize("others", [0, 1, LANES - 2])
async def test_the_deadline_is_for_those_that_have_one(others: int) -> None:
    road = Road(deadline_s=0.02)
    gate = threading.Event()
    bounded = [road.ask(lane, lane, wait=gate) for lane in range(1 + others)]
    free = road.ask(LANES - 1, 7, wait=gate, bounded=False)
    await asyncio.wait([job.answer for job in bounded], timeout=20)
    assert all(isinstance(job.answer.exception(), TimeoutError) for job in bounded)
    assert not free.answer.done()
    gate.set()
    assert await asyncio.wait_for(free.answer, 20) == 7
    road.close()


async def test_a_deadline_holds_for_one_that_is_asked_alone() -> None:
    road = Road(deadline_s=0.02)
    gate = threading.Event()
    alone = road.ask(0, 1, wait=gate)
    await asyncio.wait([alone.answer], timeout=20)
    assert isinstance(alone.answer.exception(), TimeoutError)
    assert not road.lanes[0].idle
    gate.set()
    road.close()


async def test_a_quick_round_is_carried_by_one_thread() -> None:
    carriers = Carriers(DEADLINE_S)
    lanes = [carriers.lane() for _ in range(LANES)]
    names: list[int] = []

    def ask(lane: Lane) -> Job:
        job = Job(lambda: names.append(threading.get_ident()), asyncio.get_running_loop())
        carriers.ask(lane, job)
        return job

    rounds = []
    for _ in range(20):
        names.clear()
        await asyncio.gather(*(job.answer for job in [ask(lane) for lane in lanes]))
        rounds.append(len(set(names)))
    assert min(rounds) == 1  # a paused test machine may wake more in some of them
    for lane in lanes:
        carriers.close(lane)
