"""When nodes go off and come back: need, spare, break-even, least time on, back-off."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.policy.provision import (
    Change,
    NodePower,
    NodeSeen,
    ProvisionSettings,
    changes,
    pay_back_s,
    retry_after_s,
)

RULES = ProvisionSettings(spare_nodes=1, min_on_s=1000.0)
PAY_BACK_S = 400.0


def node(
    number: int,
    power: NodePower = NodePower.ON,
    empty_s: float | None = None,
    since_s: float = 5000.0,
    free: bool = True,
) -> NodeSeen:
    return NodeSeen(f"n{number}", power, 8, since_s, empty_s, free)


def decide(nodes: list[NodeSeen], needed: int, unserved: bool = False) -> list[tuple[str, bool]]:
    return [(c.node_id, c.on) for c in changes(nodes, needed, unserved, PAY_BACK_S, RULES)]


def test_what_is_empty_for_long_enough_goes_off_but_for_the_spare() -> None:
    nodes = [node(0), node(1, empty_s=500), node(2, empty_s=900), node(3, empty_s=300)]
    assert decide(nodes, 8) == [("n2", False), ("n1", False)]
    assert decide(nodes, 9) == [("n2", False)], "one node more is needed, one is the spare"
    assert decide(nodes, 24) == []


def test_not_before_it_pays_and_not_before_it_was_on_for_a_while() -> None:
    rest = [node(0), node(1)]
    assert decide([*rest, node(2, empty_s=399)], 0) == []
    assert decide([*rest, node(2, empty_s=400, since_s=999)], 0) == []
    assert decide([*rest, node(2, empty_s=400, since_s=1000)], 0) == [("n2", False)]
    assert decide([*rest, node(2, empty_s=400, free=False)], 0) == [], "it is not to be touched"


def test_it_comes_back_ahead_of_need_the_longest_off_first() -> None:
    off = NodePower.OFF
    nodes = [node(0), node(1, off, since_s=100), node(2, off, since_s=900), node(3, off, since_s=300)]
    assert decide(nodes, 1) == [("n2", True)], "the spare"
    assert decide(nodes, 9) == [("n2", True), ("n3", True)]
    assert decide([*nodes, node(4, NodePower.BOOTING)], 9) == [("n2", True)], "one is on its way"
    assert decide([replace(n, free=n.power is NodePower.ON) for n in nodes], 9) == [], "all wait after a failure"


def test_load_that_is_not_served_wakes_one_at_once_and_holds_the_rest() -> None:
    nodes = [node(0), node(1, empty_s=9999), node(2, empty_s=9999), node(3, NodePower.OFF)]
    assert decide(nodes, 8, unserved=True) == [("n3", True)]
    assert decide([*nodes, node(4, NodePower.BOOTING)], 8, unserved=True) == []


def test_the_break_even_is_what_going_off_and_coming_back_costs() -> None:
    assert pay_back_s(1000.0, 1500.0, 300.0, 60.0) == pytest.approx(60 + 450)
    assert pay_back_s(1000.0, 0.0, 300.0, 60.0) == 360.0
    assert pay_back_s(0.0, 0.0, 300.0, 60.0) == float("inf")


def test_failures_back_off_and_never_stop_being_tried() -> None:
    waits = [retry_after_s(n, RULES) for n in range(1, 60)]
    assert waits[:3] == [60.0, 120.0, 240.0]
    assert waits == sorted(waits)
    assert waits[-1] == RULES.most_retry_s


nodes_strategy = st.lists(
    st.tuples(st.sampled_from(NodePower), st.none() | st.floats(0, 5000), st.floats(0, 5000), st.booleans()),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(nodes_strategy, st.integers(0, 120), st.booleans())
def test_whatever_comes_it_never_turns_off_what_is_needed(
    drawn: list[tuple[NodePower, float | None, float, bool]], needed: int, unserved: bool
) -> None:
    nodes = {f"n{i}": node(i, power, empty, since, free) for i, (power, empty, since, free) in enumerate(drawn)}
    found: tuple[Change, ...] = changes(list(nodes.values()), needed, unserved, PAY_BACK_S, RULES)
    assert len({c.node_id for c in found}) == len(found)
    assert len({c.on for c in found}) <= 1, "never both in one go"
    on = {n for n, seen in nodes.items() if seen.power in (NodePower.ON, NodePower.BOOTING)}
    for change in found:
        seen = nodes[change.node_id]
        assert seen.free
        if change.on:
            assert seen.power is NodePower.OFF
            on.add(change.node_id)
        else:
            assert seen.power is NodePower.ON
            assert seen.empty_for_s is not None
            assert seen.empty_for_s >= PAY_BACK_S
            on.remove(change.node_id)
    if found and not found[0].on:
        assert 8 * len(on) >= needed + 8 * RULES.spare_nodes
        assert not unserved
