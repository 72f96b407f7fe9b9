"""The choice of an instance: each term of the score, head-room, what decided, and why the others lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.classes import RequestClass, by_input
from controller.fleet.port import RoutedInstance, RoutedPool
from controller.policy.routing import (
    Barred,
    Decided,
    RoutableInstance,
    Seen,
    Weights,
    choose,
    explain,
    marginal_j,
    pick,
    routed_pools,
)
from controller.profile.fit import fit
from tests.synthetic_profile import MODEL, synthetic_profile

SS, LL = RequestClass.parse("SS"), RequestClass.parse("LL")
FITTED = fit(synthetic_profile())


def instance(name: str, most: int = 100, weight: float = 1.0, *joules: float, ready: bool = True) -> RoutedInstance:
    return RoutedInstance(name, f"http://{name}", 4, most, weight, ready, joules)


def pool(*instances: RoutedInstance, name: str = "all", classes: str = "SML") -> RoutedPool:
    return RoutedPool(name, MODEL, by_input(name, classes).classes, instances)


def chosen(found: tuple[RoutedInstance, Decided] | None) -> tuple[str, Decided]:
    assert found is not None
    return found[0].instance_id, found[1]


def test_what_decided_is_told() -> None:
    two = pool(instance("a"), instance("b"))
    assert chosen(choose(two, Seen({"a": 3}))) == ("b", Decided.LOAD)
    assert chosen(choose(two, Seen({"a": 100}))) == ("b", Decided.ONLY_ONE)
    assert choose(two, Seen({"a": 100, "b": 100})) is None


def test_the_marginal_energy_is_read_between_its_points() -> None:
    known = instance("a", 40, 1.0, 100.0, 20.0, 60.0)
    assert [marginal_j(known, held) for held in (0, 10, 20, 30, 40, 50)] == [100, 60, 20, 40, 60, 60]
    assert marginal_j(instance("b"), 3) is None


def test_energy_first_gathers_work_where_one_more_costs_least_and_leaves_headroom() -> None:
    two = pool(instance("a", 10, 1.0, 500.0, 50.0, 50.0), instance("b", 10, 1.0, 500.0, 50.0, 50.0))
    weights = Weights(load=0.1, energy=1.0, fill=0.8)
    held: dict[str, int] = {}
    order = []
    for _ in range(10):
        name, _ = chosen(choose(two, Seen(held), weights))
        held[name] = held.get(name, 0) + 1
        order.append(name)
    # Eight fill "a" up to its head-room, only then is another one woken; load alone would have dealt them out.
    assert order == ["a"] * 8 + ["b"] * 2
    assert chosen(choose(two, Seen({"a": 5}), weights)) == ("a", Decided.ENERGY)
    assert chosen(choose(two, Seen({"a": 5}))) == ("b", Decided.LOAD)


def test_beyond_their_headroom_instances_are_still_chosen_by_load() -> None:
    two = pool(instance("a", 10, 1.0, 1.0, 1.0), instance("b", 10, 1.0, 9.0, 9.0))
    assert chosen(choose(two, Seen({"a": 9, "b": 8}), Weights(energy=1.0)))[0] == "b"


def test_a_term_that_is_not_known_of_all_counts_for_none() -> None:
    two = pool(instance("a", 100, 1.0, 500.0, 500.0), instance("b"))
    assert chosen(choose(two, Seen({"b": 1}), Weights(energy=10.0))) == ("a", Decided.LOAD)
    weights = Weights(kv_use=10.0)
    assert chosen(choose(two, Seen({"b": 1}, kv_use={"a": 0.9}), weights)) == ("a", Decided.LOAD)
    assert chosen(choose(two, Seen({"b": 1}, kv_use={"a": 0.9, "b": 0.2}), weights)) == ("b", Decided.KV)


def test_a_prompt_goes_where_its_beginning_was_read_until_that_is_too_loaded() -> None:
    two = pool(instance("a"), instance("b"))
    weights = Weights(load=1.0, prefix=0.5)
    assert chosen(choose(two, Seen({"b": 10, "a": 8}, prefix_at="b"), weights)) == ("b", Decided.PREFIX)
    assert chosen(choose(two, Seen({"b": 30, "a": 8}, prefix_at="b"), weights)) == ("a", Decided.LOAD)


@given(st.lists(st.tuples(st.floats(0.1, 9), st.integers(0, 8), st.integers(0, 900), st.booleans()), max_size=6))
def test_load_alone_ranks_as_the_short_way_does(rows: list[tuple[float, int, int, bool]]) -> None:
    """The path that every request takes is written out by hand: it must agree with the general one."""
    members = [instance(f"i{n}", 7, weight, ready=ready) for n, (weight, _, _, ready) in enumerate(rows)]
    seen = Seen({f"i{n}": row[1] for n, row in enumerate(rows)}, {f"i{n}": row[2] for n, row in enumerate(rows)})
    short = pick(pool(*members), seen.in_flight, seen.pending_tokens)
    # A prefix that nobody has read is the same for all, and every instance keeps its head-room.
    general = choose(pool(*members), seen, Weights(prefix=1e-9, fill=1e9))
    assert (short is None) == (general is None)
    if short is not None and general is not None:
        loads = [seen.load_per_weight(each) for each in (short, general[0])]
        assert loads[0] == pytest.approx(loads[1])


def test_the_table_tells_marginal_energy_from_the_profile() -> None:
    (short,) = [
        each
        for each in routed_pools(
            FITTED, MODEL, (by_input("short", "SM"),), (RoutableInstance("a", "short", "", 8, True),)
        )
    ]
    (only,) = short.instances
    assert len(only.marginal_j) == 17
    # Requests on an idle instance cost more than one more on one that works already: it must leave its standby clock.
    assert only.marginal_j[0] > min(only.marginal_j) > 0
    (bare,) = routed_pools(None, MODEL, (by_input("short", "SM"),), (RoutableInstance("a", "short", "", 8, True),))
    assert bare.instances[0].marginal_j == ()


def test_every_alternative_is_explained() -> None:
    short = pool(
        instance("a"), instance("b"), instance("c", most=2), instance("d", ready=False), name="short", classes="SM"
    )
    long = pool(instance("e"), name="long", classes="L")
    seen = Seen({"b": 4, "c": 2}, {"b": 700})
    lost = {each.instance_id: each for each in explain((short, long), SS, "a", seen, suspects={"f"})}
    assert {name: each.lost_by for name, each in lost.items()} == {
        "b": "load",
        "c": Barred.FULL,
        "d": Barred.NOT_READY,
        "e": Barred.NOT_NEEDED,
    }
    assert (lost["b"].in_flight, lost["b"].pending_tokens) == (4, 700)
    assert lost["c"].score is None
    (smaller, *rest) = explain((short, long), LL, "e", seen)[:1]
    assert (smaller.lost_by, rest) == (Barred.SMALLER_POOL, [])


def test_a_spill_names_the_full_pool_first_and_suspects_as_such() -> None:
    short = pool(instance("a", most=1), instance("b"), name="short", classes="SM")
    long = pool(instance("c"), instance("d"), name="long", classes="L")
    found = explain((short, long), SS, "c", Seen({"a": 1, "d": 5}), suspects={"b"})
    assert [(each.instance_id, each.lost_by) for each in found] == [
        ("a", Barred.FULL),
        ("b", Barred.SUSPECT),
        ("d", "load"),
    ]
