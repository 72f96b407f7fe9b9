"""Placement: one owner per GPU, aligned groups, what can stay stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from controller.domain.layout import Gpu, Layout, Node, PlannedInstance
from controller.policy.placement import HeldInstance, Placed, place


def node(name: str, bad: tuple[int, ...] = ()) -> Node:
    return Node(name, tuple(Gpu(f"{name}-{slot}", slot, usable=slot not in bad) for slot in range(8)))


NODES = (node("n0"), node("n1"))


def ids() -> Callable[[], str]:
    numbers = count()
    return lambda: f"new{next(numbers)}"


def gpus(name: str, first: int, tp: int) -> tuple[str, ...]:
    return tuple(f"{name}-{slot}" for slot in range(first, first + tp))


def held(name: str, pool: str, on: str, first: int, tp: int, keep: bool = True) -> HeldInstance:
    return HeldInstance(name, pool, on, gpus(on, first, tp), keep)


def put(
    counts: dict[tuple[str, int], int],
    *instances: HeldInstance,
    current: Layout | None = None,
    nodes: tuple[Node, ...] = NODES,
    least_nodes: int | None = None,
) -> Placed:
    if current is None:
        current = Layout(
            tuple(PlannedInstance(h.instance_id, h.pool, "m", h.node_id, h.gpu_uuids) for h in instances if h.keep)
        )
    placed = place(counts, "m", current, instances, nodes, ids(), least_nodes)
    assert_sound(counts, placed, nodes)
    return placed


def assert_sound(counts: dict[tuple[str, int], int], placed: Placed, nodes: tuple[Node, ...]) -> None:
    slots = {gpu.uuid: (n.node_id, gpu.slot) for n in nodes for gpu in n.gpus if gpu.usable}
    owners = Counter(uuid for i in placed.layout.instances for uuid in i.gpu_uuids)
    assert all(n == 1 for n in owners.values())
    for instance in placed.layout.instances:
        places = [slots[uuid] for uuid in instance.gpu_uuids]  # KeyError: an unusable GPU
        assert {name for name, _ in places} == {instance.node_id}
    wanted = {key: n for key, n in counts.items() if n > 0}
    got = placed.layout.counts()
    assert {key: got.get(key, 0) + placed.missing.get(key, 0) for key in wanted} == wanted
    assert set(got) <= set(wanted)
    assert set(placed.kept) | set(placed.started) == set(placed.layout.by_id())
    assert set(placed.kept).isdisjoint(placed.started)
    assert set(placed.relabelled) <= set(placed.kept)


def test_starts_aligned_on_empty_nodes_and_spreads_a_pool() -> None:
    placed = put({("short", 4): 2, ("long", 8): 0, ("long", 4): 1})
    assert placed.complete
    by_pool = {i.instance_id: i for i in placed.layout.instances}
    short = [i.node_id for i in by_pool.values() if i.pool == "short"]
    assert sorted(short) == ["n0", "n1"]
    assert all(int(i.gpu_uuids[0][-1]) % 4 == 0 for i in by_pool.values())


def test_what_is_there_stays_where_it_is() -> None:
    a, b = held("a", "short", "n0", 4, 4), held("b", "long", "n1", 0, 8)
    placed = put({("short", 4): 1, ("long", 8): 1}, a, b)
    assert placed.kept == ("a", "b")
    assert placed.started == ()
    assert placed.layout.by_id()["a"].gpu_uuids == a.gpu_uuids


def test_an_instance_of_the_same_tp_changes_its_pool_instead_of_restarting() -> None:
    placed = put({("short", 8): 1, ("long", 8): 1}, held("a", "all", "n0", 0, 8), held("b", "long", "n1", 0, 8))
    assert placed.layout.by_id()["a"].pool == "short"
    assert placed.layout.by_id()["b"].pool == "long"
    assert placed.relabelled == ("a",)


def test_same_pool_is_kept_before_a_relabel() -> None:
    placed = put({("short", 4): 1}, held("a", "long", "n0", 0, 4), held("b", "short", "n0", 4, 4))
    assert placed.kept == ("b",)


def test_free_gpus_before_those_that_retiring_instances_free() -> None:
    placed = put({("all", 4): 2}, held("a", "all", "n0", 0, 8))
    assert {i.node_id for i in placed.layout.instances} == {"n1"}
    crowded = put({("all", 4): 2}, held("a", "all", "n0", 0, 8), held("b", "all", "n1", 0, 8, keep=False))
    assert crowded.complete  # on GPUs that will be freed


def test_draining_instances_are_not_kept_and_block_nothing_for_ever() -> None:
    placed = put({("all", 8): 2}, held("a", "all", "n0", 0, 8, keep=False), held("b", "all", "n1", 0, 8))
    assert placed.kept == ("b",)
    assert len(placed.started) == 1
    assert next(i for i in placed.layout.instances if i.instance_id != "b").node_id == "n0"


def test_a_wide_group_displaces_instances_that_leave_anyway() -> None:
    narrow = [held(f"a{i}", "all", "n0", 4 * i, 4) for i in range(2)]
    narrow += [held(f"b{i}", "all", "n1", 4 * i, 4) for i in range(2)]
    placed = put({("all", 8): 1, ("all", 4): 2}, *narrow)
    assert placed.complete
    assert len(placed.kept) == 2
    wide = next(i for i in placed.layout.instances if i.tp == 8)
    assert {placed.layout.by_id()[k].node_id for k in placed.kept} == {"n0", "n1"} - {wide.node_id}


def test_unusable_gpus_are_left_out_and_take_their_instance_along() -> None:
    nodes = (node("n0", bad=(1,)), node("n1"))
    placed = put({("all", 8): 2}, held("a", "all", "n0", 0, 8), nodes=nodes)
    assert placed.missing == {("all", 8): 1}
    assert placed.kept == ()
    narrow = put({("all", 2): 7, ("all", 4): 0}, nodes=nodes)
    assert narrow.complete


def test_what_does_not_fit_is_said_and_pools_take_turns() -> None:
    placed = put({("long", 8): 2, ("short", 8): 2})
    assert placed.missing == {("long", 8): 1, ("short", 8): 1}
    assert placed.layout.counts() == {("long", 8): 1, ("short", 8): 1}


def test_a_plan_not_yet_started_is_kept_when_asked_again() -> None:
    old = (held("a", "all", "n0", 0, 8), held("b", "all", "n1", 0, 8))
    counts = {("short", 4): 2, ("long", 8): 1}
    first = put(counts, *old)
    again = put(counts, *old, current=first.layout)
    assert again.layout == first.layout
    assert again.kept == first.kept


THREE = (node("n0"), node("n1"), node("n2"))


def nodes_of(placed: Placed, pool: str | None = None) -> set[str]:
    return {i.node_id for i in placed.layout.instances if pool in (None, i.pool)}


def test_gathered_instances_fill_a_node_before_they_open_another() -> None:
    assert nodes_of(put({("short", 4): 1, ("long", 4): 1}, nodes=THREE, least_nodes=1)) == {"n0"}
    there = held("a", "long", "n1", 0, 4)
    assert nodes_of(put({("short", 2): 2, ("long", 4): 1}, there, nodes=THREE, least_nodes=1)) == {"n1"}
    assert len(nodes_of(put({("all", 4): 5}, nodes=THREE, least_nodes=1))) == 3


def test_a_narrow_one_that_stays_counts_when_a_wider_one_looks_for_its_place() -> None:
    there = held("a", "short", "n1", 0, 2)
    assert nodes_of(put({("short", 2): 1, ("long", 4): 1}, there, nodes=THREE, least_nodes=1)) == {"n1"}


def test_gathered_the_emptiest_node_loses_its_instances_first() -> None:
    there = [held(f"a{i}", "all", "n0", 4 * i, 4) for i in range(2)] + [held("b", "all", "n1", 0, 4)]
    there += [held(f"c{i}", "all", "n2", 4 * i, 4) for i in range(2)]
    assert nodes_of(put({("all", 4): 4}, *there, nodes=THREE, least_nodes=1)) == {"n0", "n2"}
    # Of two alike one becomes empty, and not a half of each.
    assert len(nodes_of(put({("all", 4): 2}, *there, nodes=THREE, least_nodes=1))) == 1
    # Nothing moves for it.
    apart = [held("a", "all", "n0", 0, 4), held("b", "all", "n1", 0, 4)]
    assert put({("all", 4): 2}, *apart, nodes=THREE, least_nodes=1).started == ()


def test_gathered_what_is_planned_beside_one_of_two_alike_does_not_turn_the_choice_round() -> None:
    there = [held("a", "all", "n0", 0, 8), held("b", "all", "n1", 0, 8)]
    counts = {("all", 8): 1, ("all", 2): 1}
    first = put(counts, *there, nodes=THREE[:2], least_nodes=1)
    assert put(counts, *there, nodes=THREE[:2], current=first.layout, least_nodes=1).layout == first.layout


def test_a_gathered_pool_lies_on_as_many_nodes_as_its_redundancy_asks() -> None:
    placed = put({("short", 4): 2, ("long", 4): 2}, nodes=THREE, least_nodes=2)
    assert len(nodes_of(placed, "short")) == len(nodes_of(placed, "long")) == 2
    assert len(nodes_of(placed)) == 2


KINDS = st.dictionaries(
    st.tuples(st.sampled_from(["all", "short", "long"]), st.sampled_from([2, 4, 8])), st.integers(0, 4), max_size=5
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[tuple[Node, ...], tuple[HeldInstance, ...]]:
    nodes = tuple(
        node(f"n{i}", tuple(draw(st.lists(st.integers(0, 7), max_size=1)))) for i in range(draw(st.integers(1, 3)))
    )
    there: list[HeldInstance] = []
    for each in nodes:
        slot = 0
        while slot < 8:
            tp = draw(st.sampled_from([t for t in (2, 4, 8) if slot % t == 0 and slot + t <= 8]))
            if draw(st.booleans()):
                pool = draw(st.sampled_from(["all", "short", "long"]))
                there.append(held(f"{each.node_id}s{slot}", pool, each.node_id, slot, tp, keep=draw(st.booleans())))
            slot += tp
    return nodes, tuple(there)


LEAST_NODES = st.sampled_from([None, 1, 2])


@given(situations(), KINDS, LEAST_NODES)
def test_sound_and_idempotent_from_any_situation(
    situation: tuple[tuple[Node, ...], tuple[HeldInstance, ...]],
    counts: dict[tuple[str, int], int],
    least_nodes: int | None,
) -> None:
    nodes, there = situation
    first = put(counts, *there, nodes=nodes, least_nodes=least_nodes)
    again = put(counts, *there, nodes=nodes, current=first.layout, least_nodes=least_nodes)
    assert again.layout == first.layout
    usable = sum(gpu.usable for n in nodes for gpu in n.gpus)
    if all(gpu.usable for n in nodes for gpu in n.gpus) and sum(tp * n for (_, tp), n in counts.items()) <= usable:
        assert first.complete


@given(situations(), KINDS, LEAST_NODES)
def test_nothing_is_restarted_that_could_stay(
    situation: tuple[tuple[Node, ...], tuple[HeldInstance, ...]],
    counts: dict[tuple[str, int], int],
    least_nodes: int | None,
) -> None:
    nodes, there = situation
    nodes = tuple(replace(n, gpus=tuple(replace(gpu, usable=True) for gpu in n.gpus)) for n in nodes)
    placed = put(counts, *there, nodes=nodes, least_nodes=least_nodes)
    widest = max((tp for (_, tp), n in counts.items() if n), default=0)
    wanted = sum(n for (_, tp), n in counts.items() if tp == widest)
    keepable = sum(h.keep and h.tp == widest for h in there)
    # Narrower ones may have to make room for wider ones; the widest never have to.
    assert sum(placed.layout.by_id()[k].tp == widest for k in placed.kept) == min(wanted, keepable)
