"""The emergency ladder in the gateway's queue: reorder, move and refuse while an order stands, nothing lost or doubled,
nothing refused that could make it, and back to what it does by itself when the order ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from controller.api.wire import routing_from_wire, routing_to_wire
from controller.domain.classes import RequestClass
from controller.domain.reasons import Stage
from controller.fleet.port import PoolOrder, RoutedInstance, RoutedPool
from controller.gateway.brain import Outcome
from controller.gateway.dispatcher import Dispatcher, QueuedRequest
from controller.gateway.refusal import Refusal, too_late
from controller.gateway.snapshot import Snapshot
from tests.unit.test_gateway_brain import asked, brain
from tests.unit.test_gateway_dispatcher import (
    ALL,
    LL,
    LONG,
    SHORT,
    SS,
    Walk,
    instance,
    names,
    pool,
    request,
    table,
)

LS, ML = RequestClass.parse("LS"), RequestClass.parse("ML")


def order(stage: Stage, first_token_s: float = 0.0, ttl_s: float = 20.0, **limits: int) -> PoolOrder:
    return PoolOrder(stage, ttl_s, (first_token_s,) * 3, 15.0, limits)


def dispatcher(*pools: RoutedPool, now_s: float = 0.0) -> Dispatcher:
    d = Dispatcher()
    d.update_routing(table(*pools))
    d.obey(pools, now_s)
    return d


def drain(d: Dispatcher, now_s: float) -> list[str]:
    """Gives out all that waits, one at a time; the names in that order."""
    given: list[str] = []
    while one := d.dispatch(now_s):
        given += [r.request_id for r, _ in one]
        d.complete(given[-1])
    return given


def test_reorder_puts_what_will_be_late_behind_what_can_be_in_time() -> None:
    one = pool(ALL, instance("x", room=1))
    arrivals = [("gone", SS, 1.0), ("close", SS, 2.1), ("long", LL, 3.5), ("b", ML, 3.0), ("a", SS, 3.0)]
    for stage, expected in (
        (None, ["gone", "close", "b", "a", "long"]),  # earliest deadline first, whatever has become of it
        (Stage.REORDER, ["b", "a", "long", "gone", "close"]),  # with 200 ms to a first token, 2.1 s is too late
        (Stage.REFUSE, ["b", "a", "long", "gone", "close"]),
    ):
        d = dispatcher(replace(one, order=order(stage, 0.2)) if stage else one)
        for name, cls, deadline_s in arrivals:
            d.offer(request(name, cls, deadline_s), 0.0)
        assert drain(d, 2.0) == expected


def test_an_order_that_is_not_renewed_ends_by_itself() -> None:
    d = dispatcher(replace(pool(ALL, instance("x", room=1)), order=order(Stage.REFUSE, ttl_s=20.0)))
    for name, deadline_s in (("late", 1.0), ("in-time", 50.0), ("running", 0.5)):
        d.offer(request(name, SS, deadline_s), 0.0)
    assert names(d.dispatch(0.0)) == [("running", "x")]
    assert d.dispatch(19.9) == []
    assert d.refuse_late(20.0) == []  # the controller has been silent for too long: nobody is refused
    d.complete("running")
    assert drain(d, 20.0) == ["late", "in-time"]


def test_full_clock_asks_nothing_of_the_queue_but_the_order() -> None:
    short = replace(pool(SHORT, instance("s", room=0)), order=order(Stage.FULL_CLOCK))
    d = dispatcher(short, pool(LONG, instance("l", room=1)))
    d.offer(request("own", LL, 9.0), 0.0)
    d.offer(request("small", SS, 1.0), 0.0)
    assert names(d.dispatch(0.5)) == [("own", "l")]  # as without trouble: the larger pool's own first
    assert d.refuse_late(5.0) == []


def test_move_competes_for_a_dominating_pool_by_deadline_and_never_for_a_smaller_one() -> None:
    long_room = instance("l", room=1)
    d = dispatcher(replace(pool(SHORT, instance("s", room=0)), order=order(Stage.MOVE)), pool(LONG, long_room))
    for name, cls, deadline_s in (("own", LL, 9.0), ("small", SS, 1.0), ("later", SS, 11.0)):
        d.offer(request(name, cls, deadline_s), 0.0)
    assert drain(d, 0.5) == ["small", "own", "later"]
    assert (d.moved, d.spilled) == (2, 2)
    # The other way round there is nowhere to move to.
    d = dispatcher(pool(SHORT, instance("s", room=1)), replace(pool(LONG), order=order(Stage.MOVE)))
    d.offer(request("own", LL, 1.0), 0.0)
    assert d.dispatch(0.0) == []


def test_a_pool_in_the_same_trouble_is_moved_to_by_nobody_before_its_own() -> None:
    moving = order(Stage.MOVE)
    d = dispatcher(
        replace(pool(SHORT, instance("s", room=0)), order=moving), replace(pool(LONG, instance("l", 1)), order=moving)
    )
    for name, cls, deadline_s in (("own", LL, 9.0), ("small", SS, 1.0)):
        d.offer(request(name, cls, deadline_s), 0.0)
    assert drain(d, 0.5) == ["own", "small"]


def test_an_engine_that_queues_gets_nothing_more_while_the_order_stands() -> None:
    held_back = replace(pool(ALL, instance("x", room=9), instance("y", room=2)), order=order(Stage.MOVE, x=1))
    d = dispatcher(held_back)
    for number in range(5):
        d.offer(request(str(number), SS, 30.0), 0.0)
    assert names(d.dispatch(0.0)) == [("0", "x"), ("1", "y"), ("2", "y")]
    assert d.dispatch(19.0) == []
    assert names(d.dispatch(20.0)) == [("3", "x"), ("4", "x")]


def test_what_an_engine_cannot_read_in_time_waits_where_it_can_be_put_in_order() -> None:
    one = pool(ALL, instance("x", room=9), instance("y", room=9, weight=0.1))
    first = replace(order(Stage.REORDER), prompt_tokens={"x": 1000, "y": 0})
    d = dispatcher(replace(one, order=first))
    for name, deadline_s in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("urgent", 0.9)):
        d.offer(replace(request(name, SS, deadline_s), prompt_tokens=600), 0.0)
        if name == "b":
            assert names(d.dispatch(0.0)) == [("a", "x"), ("b", "x")]  # one more while less than 1,000 are unread
    assert d.dispatch(0.1) == []
    assert d.ordered
    d.first_token("a")
    assert names(d.dispatch(0.2)) == [("urgent", "x")]
    assert names(d.dispatch(20.0)) == [("c", "y")]  # the order has ended
    assert not d.ordered


def test_prompts_whose_first_token_nobody_hears_of_count_as_read_when_they_should_be() -> None:
    """Or whole answers would hold an instance back until their end."""
    one = pool(ALL, instance("x", room=9))
    d = dispatcher(replace(one, order=replace(order(Stage.REORDER, 0.2), prompt_tokens={"x": 1000})))
    for name in ("a", "b", "c"):
        d.offer(replace(request(name, SS, 9.0), prompt_tokens=600, tells_first=False), 0.0)
    assert names(d.dispatch(0.0)) == [("a", "x"), ("b", "x")]
    assert d.dispatch(0.19) == []
    assert names(d.dispatch(0.2)) == [("c", "x")]
    for name in ("a", "b", "c"):
        d.complete(name)
    assert d._pending_tokens == {}


def test_only_what_waits_past_its_deadline_is_refused() -> None:
    d = dispatcher(replace(pool(ALL, instance("x", room=1)), order=order(Stage.REFUSE, 0.3)), pool(LONG))
    for name, deadline_s in (("running", 0.5), ("late", 1.0), ("at-last", 1.5), ("in-time", 2.0)):
        d.offer(request(name, SS, deadline_s), 0.0)
    assert names(d.dispatch(0.0)) == [("running", "x")]
    assert d.refuse_late(0.9) == []
    assert [r.request_id for r, _ in d.refuse_late(1.5)] == ["late", "at-last"]
    assert d.waiting == 1
    assert d.in_flight() == {"x": 1}  # what an engine has is not taken from it
    d.cancel("late")  # its client leaves a moment later
    d.complete("running")
    assert names(d.dispatch(1.9)) == [("in-time", "x")]


def test_a_pools_refusals_concern_nobody_elses_requests() -> None:
    d = dispatcher(replace(pool(SHORT), order=order(Stage.REFUSE)), pool(LONG))
    d.offer(request("small", SS, 1.0), 0.0)
    d.offer(request("long", LS, 1.0), 0.0)
    assert [r.request_id for r, _ in d.refuse_late(9.0)] == ["small"]


def test_reports_tell_who_is_at_risk_and_who_was_refused() -> None:
    d = dispatcher(pool(SHORT), pool(LONG))
    for name, deadline_s in (("a", 2.0), ("b", 3.0), ("c", 9.0)):
        d.offer(request(name, SS, deadline_s), 0.0)
    for cls, reason in ((SS, "too_late"), (SS, "too_late"), (SS, "queue_full"), (LL, "queue_full")):
        d.count_refused(request("x", cls), reason)
    queues = d.queues(1.5)
    assert (queues["short"].waiting, queues["short"].at_risk) == (3, 2)
    # At an instance it is at risk when its first token is overdue, unless nobody will hear of that token.
    d.update_routing(table(pool(SHORT, instance("x", room=9)), pool(LONG)))
    d.offer(replace(request("silent", SS, 2.5), tells_first=False), 1.5)
    d.dispatch(1.5)
    assert [d.queues(at_s)["short"].at_risk for at_s in (1.9, 2.1, 5.0)] == [0, 1, 2]
    d.first_token("a")
    assert d.queues(5.0)["short"].at_risk == 1
    assert queues["short"].refused == {"too_late": 2, "queue_full": 1}
    assert queues["long"].refused == {"queue_full": 1}


# --------------------------------------------------------------------------------------- the brain and what is sent


def test_a_refused_request_hears_so_once_and_is_counted_as_a_miss() -> None:
    one, clock = brain()
    routed = replace(pool(ALL, instance("x", room=1), model="test-model"), order=order(Stage.REFUSE, ttl_s=20.0))
    one.update_routing(table(routed))
    taken: list[str] = []
    refused: list[tuple[int, PoolOrder]] = []
    tickets = [one.arrive(asked("hello")) for _ in range(3)]
    for number, ticket in enumerate(tickets):
        one.wait(ticket, lambda i: taken.append(i.instance_id), lambda o, number=number: refused.append((number, o)))
    assert (taken, refused) == (["x"], [])
    clock.advance(0.3)  # past the 250 ms of a short prompt
    one.sweep()
    assert [number for number, _ in refused] == [1, 2]
    for ticket in tickets[1:]:
        one.done(ticket, Outcome.TOO_LATE)
    one.sweep()
    assert len(refused) == 2
    assert one.queues(clock.monotonic_s())["all"].refused == {"too_late": 2}
    assert sum(meter.failed for meter in one.meter.classes(["test-model"]).values()) == 2
    assert one.dispatcher.waiting == 0


def test_without_a_queue_of_ours_nothing_goes_beyond_the_limits_while_refusing() -> None:
    """Through Envoy what is beyond the limits would wait inside an engine."""
    for stage, more in ((Stage.MOVE, True), (Stage.REFUSE, False)):
        one, _ = brain(overcommit=2.0)
        one.update_routing(table(replace(pool(ALL, instance("x", room=1), model="test-model"), order=order(stage))))
        first, second = one.arrive(asked("hello")), one.arrive(asked("hello"))
        assert one.choose(first) is not None
        assert (one.choose(second) is not None) is more
        assert (one.refusing(second) is None) is more


def test_what_overflowed_and_is_unread_counts_as_at_risk() -> None:
    one, clock = brain(overcommit=3.0)
    one.update_routing(table(pool(ALL, instance("x", room=1), model="test-model")))
    tickets = [one.arrive(asked("hello")) for _ in range(3)]
    assert all(one.choose(ticket) for ticket in tickets)
    clock.advance(0.2)
    queue = one.queues(clock.monotonic_s())["all"]
    assert (queue.waiting, queue.at_risk) == (2, 2)
    one.first_token(tickets[2])
    assert one.queues(clock.monotonic_s())["all"].at_risk == 1


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.NONE])
def test_orders_travel_with_the_routing_table_but_are_not_kept_on_disk(stage: Stage, tmp_path) -> None:
    sent = table(replace(pool(ALL, instance("x")), order=order(stage, 0.25, x=3)), pool(LONG))
    assert routing_from_wire(routing_to_wire(sent)) == sent
    snapshot = Snapshot(tmp_path)
    snapshot.save(sent)
    assert Snapshot(tmp_path).load() == replace(sent, pools=tuple(replace(p, order=None) for p in sent.pools))
    (tmp_path / "routing.pb").unlink()
    snapshot.save(replace(sent, pools=tuple(replace(p, order=None) for p in sent.pools)))
    assert not (tmp_path / "routing.pb").exists()  # a renewed order is no news for the disk


def test_a_refusal_says_when_to_come_again() -> None:
    refusal: Refusal = too_late(12.2)
    assert (refusal.status, refusal.code, refusal.retry_after_s) == (503, Outcome.TOO_LATE, 13)


# ------------------------------------------------------------------------------------------------- any sequence


class Emergency(Walk):
    """The dispatcher's walk, with orders of any stage in between."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: dict[str, tuple[PoolOrder, float]] = {}

    @precondition(lambda self: self.table is not None)
    @rule(
        stages=st.lists(st.sampled_from(Stage), min_size=3, max_size=3),
        first_token_s=st.sampled_from([0.0, 0.1, 1.0]),
        ttl_s=st.sampled_from([0.5, 3.0]),
        limit=st.integers(0, 2),
    )
    def give_orders(self, stages: list[Stage], first_token_s: float, ttl_s: float, limit: int) -> None:
        assert self.table is not None
        pools = tuple(
            replace(each, order=order(stage, first_token_s, ttl_s, i1=limit) if stage is not Stage.NONE else None)
            for each, stage in zip(self.table.pools, stages, strict=False)
        )
        self.dispatcher.obey(pools, self.now_s)
        self.orders = {each.name: (each.order, self.now_s + ttl_s) for each in pools if each.order is not None}

    def take(self, given: list[tuple[QueuedRequest, RoutedInstance]]) -> None:
        """A limit by order takes the place of the instance's own."""
        assert self.table is not None or not given
        listed = {} if self.table is None else {i.instance_id: i for p in self.table.pools for i in p.instances}
        super().take([(queued, listed[chosen.instance_id]) for queued, chosen in given])
        for _, chosen in given:
            assert chosen.max_in_flight <= listed[chosen.instance_id].max_in_flight

    @rule(step_s=st.floats(0, 1))
    def refuse(self, step_s: float) -> None:
        self.now_s += step_s
        for queued, by in self.dispatcher.refuse_late(self.now_s):
            assert self.waiting.pop(queued.request_id) == queued  # once, and only what waited
            assert queued.deadline_s <= self.now_s  # what can make it is never refused
            assert any(stands is by and until_s > self.now_s for stands, until_s in self.orders.values())
            assert by.stage is Stage.REFUSE


TestEmergency = Emergency.TestCase
TestEmergency.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
