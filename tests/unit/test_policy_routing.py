"""Routing tables from the profile, and the pick of an instance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.classes import ALL_CLASSES, DEFAULT_GROUPS, ClassGroup, RequestClass, by_input
from controller.fleet.port import RoutedInstance, RoutedPool
from controller.policy.routing import (
    IN_FLIGHT_HEADROOM,
    PROMPT_TOKENS_PER_REQUEST,
    Decided,
    RoutableInstance,
    Seen,
    Weights,
    choose,
    max_in_flight,
    pick,
    pools_for,
    route,
    routed_pools,
)
from controller.profile.fit import fit
from tests.synthetic_profile import MODEL, synthetic_profile

FITTED = fit(synthetic_profile())
SS, SL, ML, LS, LL = (RequestClass.parse(name) for name in ("SS", "SL", "ML", "LS", "LL"))
SHORT, LONG = by_input("short", "SM"), by_input("long", "L")


def routable(name: str, pool: str, tp: int = 4, accepts_new: bool = True) -> RoutableInstance:
    return RoutableInstance(name, pool, f"http://{name}", tp, accepts_new)


def pool_of(*instances: RoutedInstance) -> RoutedPool:
    return RoutedPool("all", MODEL, frozenset(ALL_CLASSES), instances)


def routed(name: str, weight: float = 1.0, most: int = 100, accepts_new: bool = True) -> RoutedInstance:
    return RoutedInstance(name, f"http://{name}", 4, most, weight, accepts_new)


def test_weights_and_limits_come_from_the_profile() -> None:
    pools = routed_pools(FITTED, MODEL, (LONG, SHORT), (routable("b", "short", 8), routable("a", "short", 2)))
    assert [pool.name for pool in pools] == ["long", "short"]
    assert pools[0].instances == ()
    small, large = pools[1].instances
    assert (small.instance_id, large.instance_id) == ("a", "b")
    assert large.weight / small.weight == pytest.approx(
        FITTED.max_rate_rps("short", 8) / FITTED.max_rate_rps("short", 2)
    )
    curve = FITTED.clocks("short", 8)[-1]
    assert large.max_in_flight >= (curve.running_p99(curve.max_rate_rps) or 0)


def test_without_a_profile_instances_weigh_by_their_gpus() -> None:
    for fitted in (None, FITTED):
        (pool,) = routed_pools(fitted, MODEL, (ClassGroup("new", LONG.classes),), (routable("a", "new", 16),))
        assert pool.instances[0].weight == 16
        assert pool.instances[0].max_in_flight > 16


def test_own_pool_first_then_dominating_ones_never_a_smaller() -> None:
    pools = routed_pools(FITTED, MODEL, DEFAULT_GROUPS, ())
    assert [p.name for p in pools_for(pools, SS)] == ["short", "all", "long"]
    assert [p.name for p in pools_for(pools, LL)] == ["long", "all"]
    assert [p.name for p in pools_for(pools, LS)] == ["long", "all"]


def test_dominance_needs_both_dimensions() -> None:
    ms = RequestClass.parse("MS")
    pools = tuple(RoutedPool(str(c), MODEL, frozenset({c}), ()) for c in (SL, ms, ML, LL, SS))
    assert [p.name for p in pools_for(pools, SL)] == ["SL", "ML", "LL"]
    assert [p.name for p in pools_for(pools, ms)] == ["MS", "ML", "LL"]
    assert pools_for(pools[:1], LL) == ()
    wider = (replace(pools[0], classes=frozenset({SL, LL})), *pools[1:])
    assert [p.name for p in pools_for(wider, LL)] == ["LL", "SL"], "the same names with other classes are others"
    assert pools_for(wider, LL)[1] is wider[0]


def test_picks_the_least_loaded_by_weight_ties_by_id() -> None:
    pool = pool_of(routed("b"), routed("a"), routed("c", weight=2.0))
    chosen = [pick(pool, held) for held in ({}, {"c": 1}, {"c": 2, "b": 0, "a": 1}, {"a": 3, "b": 3, "c": 6})]
    assert [c.instance_id for c in chosen if c is not None] == ["c", "a", "b", "c"]


def test_who_is_on_call_is_asked_once_those_that_serve_hold_more_than_a_share_of_their_largest_load() -> None:
    (pool,) = routed_pools(
        FITTED,
        MODEL,
        (SHORT,),
        (routable("serves", "short"), replace(routable("waits", "short"), on_call=True)),
    )
    serves, waits = pool.instances
    assert serves.standby_load == 0.0
    # As much as it has beside what is asked of both alike: the request itself.
    enough = int(waits.standby_load) + 1
    seen = Seen({"serves": enough - 1})
    assert choose(pool, seen) == (serves, Decided.LOAD)
    assert choose(pool, Seen({"serves": enough})) == (waits, Decided.ON_CALL)
    assert choose(pool, Seen({}, {"serves": round(enough * PROMPT_TOKENS_PER_REQUEST)})) == (waits, Decided.ON_CALL)
    # A better place by any other term is no reason to wake it.
    by_energy = choose(pool, seen, Weights(energy=5.0))
    assert by_energy is not None
    assert by_energy[0] is serves


def test_those_that_serve_a_pool_of_bursts_fill_one_after_the_other() -> None:
    members = [routable(name, "short") for name in "abc"] + [replace(routable("w", "short"), on_call=True)]
    (pool,) = routed_pools(FITTED, MODEL, (SHORT,), members, {"short"})
    a, b, c, waits = pool.instances
    assert 0.0 == a.rank_load < b.rank_load < c.rank_load < waits.standby_load
    assert waits.rank_load == 0.0
    # Those that decode gather at the first, up to what sets the next one apart.
    gathered = int(b.rank_load)
    assert choose(pool, Seen({"a": gathered})) == (a, Decided.LOAD)
    assert choose(pool, Seen({"a": gathered + 1})) == (b, Decided.LOAD)
    # A prompt to read there sends the next request on.
    unread = round((b.rank_load + 1) * PROMPT_TOKENS_PER_REQUEST)
    assert choose(pool, Seen({}, {"a": unread})) == (b, Decided.LOAD)
    # Elsewhere all are filled alike.
    (even,) = routed_pools(FITTED, MODEL, (SHORT,), members, {"long"})
    assert {each.rank_load for each in even.instances} == {0.0}


def test_prompts_to_be_read_weigh_until_their_first_token() -> None:
    pool = pool_of(routed("a"), routed("b"))
    tokens = round(PROMPT_TOKENS_PER_REQUEST)
    assert [
        chosen.instance_id
        for pending in ({"a": 4 * tokens}, {"a": 2 * tokens})
        if (chosen := pick(pool, {"b": 3}, pending)) is not None
    ] == ["b", "a"]


def test_the_limit_is_that_of_the_batch_not_of_late_first_tokens() -> None:
    profile = synthetic_profile()
    # First tokens are late from a batch of a few on; tokens come late at one of 100, on the line that was measured.
    points = tuple(
        replace(p, attainment_worst=0.999 if p.rate_rps < 1 else 0.5, tbt_p99_ms=p.running_p99) for p in profile.points
    )
    fitted = fit(replace(profile, points=points))
    curve = fitted.clocks("short", 8)[-1]
    assert (curve.running_p99(curve.max_rate_rps) or 0) < 60
    assert max_in_flight(fitted, "short", 8) == pytest.approx(100 * IN_FLIGHT_HEADROOM, rel=0.1)


def test_full_and_draining_instances_are_left_out() -> None:
    pool = pool_of(routed("a", most=2), routed("b", accepts_new=False))
    assert pick(pool, {"a": 2}) is None
    chosen = pick(pool, {"a": 1})
    assert chosen is not None
    assert chosen.instance_id == "a"


def test_spills_only_when_its_own_pool_has_no_room() -> None:
    pools = routed_pools(FITTED, MODEL, (SHORT, LONG), (routable("s", "short"), routable("l", "long")))
    most = {i.instance_id: i.max_in_flight for p in pools for i in p.instances}
    assert [r[1].instance_id for r in [route(pools, SS, {})] if r] == ["s"]
    assert [r[1].instance_id for r in [route(pools, SS, {"s": most["s"]})] if r] == ["l"]
    assert route(pools, LS, {"l": most["l"]}) is None  # never to the smaller pool


@given(st.lists(st.tuples(st.floats(0.1, 10), st.booleans()), min_size=1, max_size=6), st.integers(1, 200))
def test_load_settles_in_proportion_to_weight(rows: list[tuple[float, bool]], requests: int) -> None:
    pool = pool_of(*(routed(f"i{n}", weight, 10_000, ok) for n, (weight, ok) in enumerate(rows)))
    held: Counter[str] = Counter()
    for _ in range(requests):
        chosen = pick(pool, held)
        if chosen is None:
            break
        assert chosen.accepts_new
        held[chosen.instance_id] += 1
    ready = [i for i in pool.instances if i.accepts_new]
    assert sum(held.values()) == (requests if ready else 0)
    total = sum(i.weight for i in ready)
    for instance in ready:
        assert abs(held[instance.instance_id] - requests * instance.weight / total) <= len(ready) + 1
