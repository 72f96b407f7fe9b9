"""The dispatcher: every request goes once, never to a smaller pool, never beyond an instance's bound; queues are
earliest deadline first; spill and fail-over as documented; accounting returns to zero."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.domain.classes import ALL_CLASSES, ClassGroup, RequestClass, by_input
from controller.fleet.port import RoutedInstance, RoutedPool, RoutingTable
from controller.gateway.dispatcher import Dispatcher, QueuedRequest

MODEL = "m"
SHORT, LONG, ALL = by_input("short", "SM"), by_input("long", "L"), by_input("all", "SML")
SS, LL = RequestClass.parse("SS"), RequestClass.parse("LL")


def instance(name: str, room: int = 2, weight: float = 1.0, accepts_new: bool = True) -> RoutedInstance:
    return RoutedInstance(name, f"http://{name}:1", 4, room, weight, accepts_new)


def pool(group: ClassGroup, *instances: RoutedInstance, model: str = MODEL) -> RoutedPool:
    return RoutedPool(group.name, model, group.classes, instances)


def table(*pools: RoutedPool, version: int = 1) -> RoutingTable:
    return RoutingTable(1, version, pools)


def request(name: str, request_class: RequestClass = SS, deadline_s: float = 1.0, model: str = MODEL) -> QueuedRequest:
    return QueuedRequest(name, model, request_class, deadline_s)


def names(given: list[tuple[QueuedRequest, RoutedInstance]]) -> list[tuple[str, str]]:
    return [(r.request_id, i.instance_id) for r, i in given]


def test_requests_wait_until_there_is_a_table() -> None:
    d = Dispatcher()
    assert d.offer(request("a"), 0.0)
    assert d.dispatch(0.0) == []
    assert d.waiting == 1
    d.update_routing(table(pool(ALL, instance("x"))))
    assert names(d.dispatch(1.0)) == [("a", "x")]
    assert d.waiting == 0
    assert d.pool_of("a") == "all"


def test_earliest_deadline_goes_first_and_ties_by_arrival() -> None:
    d = Dispatcher()
    for name, deadline_s, cls in (("late", 3.0, "SS"), ("b", 1.0, "ML"), ("c", 1.0, "SS"), ("first", 0.5, "MM")):
        d.offer(request(name, RequestClass.parse(cls), deadline_s), 0.0)
    d.update_routing(table(pool(SHORT, instance("x", room=3))))
    assert [name for name, _ in names(d.dispatch(0.0))] == ["first", "b", "c"]
    d.complete("b")
    assert names(d.dispatch(0.0)) == [("late", "x")]


def test_a_full_pool_spills_to_a_dominating_one_but_never_to_a_smaller() -> None:
    d = Dispatcher()
    d.update_routing(table(pool(SHORT, instance("s", room=1)), pool(LONG, instance("l", room=2))))
    for number in range(4):
        d.offer(request(f"s{number}", SS, deadline_s=number), 0.0)
    assert names(d.dispatch(0.0)) == [("s0", "s"), ("s1", "l"), ("s2", "l")]
    assert d.spilled == 2
    assert d.pool_of("s1") == "long"
    for number in range(3):
        d.complete(f"s{number}")
    assert names(d.dispatch(0.0)) == [("s3", "s")]
    for number in range(4):
        d.offer(request(f"l{number}", LL, deadline_s=number), 0.0)
    assert names(d.dispatch(0.0)) == [("l0", "l"), ("l1", "l")]  # the short pool is free to nobody here
    d.complete("s3")
    assert d.dispatch(0.0) == []


def test_the_larger_pools_own_requests_come_before_spilled_ones() -> None:
    d = Dispatcher()
    d.update_routing(table(pool(SHORT), pool(LONG, instance("l", room=1))))
    d.offer(request("spills", SS, deadline_s=0.0), 0.0)
    d.offer(request("own", LL, deadline_s=9.0), 0.0)
    assert names(d.dispatch(0.0)) == [("own", "l")]
    d.complete("own")
    assert names(d.dispatch(0.0)) == [("spills", "l")]


def test_another_models_instances_serve_nothing_of_this_one() -> None:
    d = Dispatcher()
    d.update_routing(table(pool(ALL, instance("x"), model="other")))
    d.offer(request("a"), 0.0)
    assert d.dispatch(0.0) == []
    d.offer(request("b", model="other"), 0.0)
    assert names(d.dispatch(0.0)) == [("b", "x")]


def test_draining_instances_get_nothing_new_and_keep_what_they_have() -> None:
    d = Dispatcher()
    d.update_routing(table(pool(ALL, instance("x", room=9))))
    d.offer(request("a"), 0.0)
    d.dispatch(0.0)
    d.update_routing(table(pool(ALL, instance("x", room=9, accepts_new=False)), version=2))
    d.offer(request("b"), 0.0)
    assert d.dispatch(0.0) == []
    assert d.in_flight() == {"x": 1}
    d.update_routing(table(pool(ALL, instance("y")), version=3))
    assert names(d.dispatch(0.0)) == [("b", "y")]
    assert d.in_flight() == {"x": 1, "y": 1}
    d.complete("a")
    assert d.in_flight() == {"y": 1}


def test_fail_over_goes_elsewhere_at_once_and_keeps_its_place() -> None:
    d = Dispatcher(suspect_s=2.0)
    d.update_routing(table(pool(ALL, instance("bad", room=1, weight=9.0), instance("good", room=1))))
    for number in range(3):
        d.offer(request(f"r{number}", deadline_s=number), 0.0)
    assert names(d.dispatch(0.0)) == [("r0", "bad"), ("r1", "good")]
    d.fail_over("r0", 10.0)
    assert d.dispatch(10.0) == []  # the only instance with room is the suspect
    d.complete("r1")
    assert names(d.dispatch(10.1)) == [("r0", "good")]  # before r2, whose deadline is later
    assert d.dispatch(11.9) == []
    assert names(d.dispatch(12.0)) == [("r2", "bad")]  # no longer suspect
    assert d.failed_over == 1


def test_a_suspect_stays_suspect_over_a_routing_update() -> None:
    d = Dispatcher(suspect_s=2.0)
    d.update_routing(table(pool(ALL, instance("x"))))
    d.suspect("x", 0.0)
    d.offer(request("a"), 0.0)
    d.update_routing(table(pool(ALL, instance("x")), version=2))
    assert d.dispatch(1.0) == []
    assert names(d.dispatch(2.0)) == [("a", "x")]


def test_the_queue_is_bounded_and_ids_are_unique() -> None:
    d = Dispatcher(max_waiting=2)
    assert d.offer(request("a"), 0.0)
    assert d.offer(request("b"), 0.0)
    assert not d.offer(request("c"), 0.0)
    with pytest.raises(ValueError, match="already known"):
        d.offer(request("a"), 0.0)
    d.cancel("a")
    assert d.offer(request("c"), 0.0)
    d.cancel("never seen")
    with pytest.raises(KeyError):
        d.complete("c")  # it waits
    with pytest.raises(KeyError):
        d.fail_over("gone", 0.0)


def test_queues_are_reported_per_pool() -> None:
    d = Dispatcher()
    d.update_routing(table(pool(SHORT, instance("s", room=1)), pool(LONG)))
    for number, cls in enumerate(("SS", "SS", "LL", "LS")):
        d.offer(request(str(number), RequestClass.parse(cls), deadline_s=number), float(number))
    d.dispatch(4.0)
    queues = d.queues(10.0)
    assert (queues["short"].waiting, queues["short"].in_flight, queues["short"].oldest_wait_s) == (1, 1, 9.0)
    assert (queues["long"].waiting, queues["long"].in_flight, queues["long"].oldest_wait_s) == (2, 0, 8.0)


def test_it_is_cheap_enough_for_a_simulator() -> None:
    """No exact bound: a loaded machine must not fail it, a quadratic queue must."""
    d = Dispatcher(max_waiting=100_000)
    d.update_routing(
        table(
            pool(SHORT, *(instance(f"s{n}", room=50) for n in range(12))),
            pool(LONG, *(instance(f"l{n}", room=50) for n in range(12))),
        )
    )
    count = 20_000
    started = time.process_time()
    running: list[str] = []
    for number in range(count):
        d.offer(request(str(number), ALL_CLASSES[number % 9], deadline_s=number), number)
        running += [r.request_id for r, _ in d.dispatch(number)]
        if len(running) > 600:
            d.complete(running.pop(0))
    assert time.process_time() - started < 10.0


class Walk(RuleBasedStateMachine):
    """Any sequence of events, against a model that only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher(max_waiting=30, suspect_s=5.0)
        self.now_s = 0.0
        self.number = 0
        self.waiting: dict[str, QueuedRequest] = {}
        self.flying: dict[str, tuple[QueuedRequest, str]] = {}
        self.suspect_until_s: dict[str, float] = {}
        self.table: RoutingTable | None = None

    def take(self, given: list[tuple[QueuedRequest, RoutedInstance]]) -> None:
        assert self.table is not None or not given
        listed = {} if self.table is None else {i.instance_id: (i, p) for p in self.table.pools for i in p.instances}
        for queued, chosen in given:
            assert self.waiting.pop(queued.request_id) == queued  # dispatched once, and only what waited
            known, of_pool = listed[chosen.instance_id]
            assert chosen == known
            assert chosen.accepts_new
            assert any(c.dominates(queued.request_class) for c in of_pool.classes)
            assert self.dispatcher.pool_of(queued.request_id) == of_pool.name
            assert self.suspect_until_s.get(chosen.instance_id, -1.0) <= self.now_s
            self.flying[queued.request_id] = (queued, chosen.instance_id)
        if given:
            loads = Counter(name for _, name in self.flying.values())
            for name in {chosen.instance_id for _, chosen in given}:
                assert loads[name] <= listed[name][0].max_in_flight

    @rule(
        cls=st.sampled_from(ALL_CLASSES),
        slack_s=st.floats(0, 3),
    )
    def offer(self, cls: RequestClass, slack_s: float) -> None:
        self.number += 1
        queued = request(str(self.number), cls, self.now_s + slack_s)
        taken = self.dispatcher.offer(queued, self.now_s)
        assert taken == (len(self.waiting) < 30)
        if taken:
            self.waiting[queued.request_id] = queued

    @rule(step_s=st.floats(0, 4))
    def dispatch(self, step_s: float) -> None:
        self.now_s += step_s
        self.take(self.dispatcher.dispatch(self.now_s))
        assert self.dispatcher.dispatch(self.now_s) == []  # nothing left that could have gone

    @rule(
        cut=st.booleans(),
        rooms=st.lists(st.integers(0, 4), min_size=4, max_size=4),
        accepting=st.lists(st.booleans(), min_size=4, max_size=4),
        present=st.lists(st.booleans(), min_size=4, max_size=4),
    )
    def route(self, cut: bool, rooms: list[int], accepting: list[bool], present: list[bool]) -> None:
        all_four = [instance(f"i{n}", rooms[n], 1.0 + n, accepting[n]) for n in range(4)]
        here = [i for n, i in enumerate(all_four) if present[n]]
        if cut:
            pools = (
                pool(SHORT, *(i for i in here if i in all_four[:2])),
                pool(LONG, *(i for i in here if i in all_four[2:])),
            )
        else:
            pools = (pool(ALL, *here),)
        self.table = table(*pools, version=self.number)
        self.dispatcher.update_routing(self.table)
        listed = {i.instance_id for i in here}
        self.suspect_until_s = {name: until for name, until in self.suspect_until_s.items() if name in listed}

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), how=st.sampled_from(["complete", "cancel", "fail_over"]))
    def end(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.flying)))
        queued, instance_id = self.flying.pop(name)
        if how == "fail_over":
            self.dispatcher.fail_over(name, self.now_s)
            self.suspect_until_s[instance_id] = self.now_s + 5.0
            self.waiting[name] = queued
        else:
            getattr(self.dispatcher, how)(name)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_the_queue(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[name]
        self.dispatcher.cancel(name)

    @invariant()
    def counts_agree(self) -> None:
        assert self.dispatcher.waiting == len(self.waiting)
        assert self.dispatcher.in_flight() == Counter(name for _, name in self.flying.values())

    def teardown(self) -> None:
        """All ends; nothing stays behind."""
        for name in self.flying:
            self.dispatcher.complete(name)
        for name in self.waiting:
            self.dispatcher.cancel(name)
        assert self.dispatcher.in_flight() == {}
        assert self.dispatcher.waiting == 0
        assert all(q == replace(q, waiting=0, in_flight=0) for q in self.dispatcher.queues(self.now_s).values())


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
