"""Transitions: simulated to their end, never under the demand, one owner per GPU, safe to restart at any step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.classes import DEFAULT_GROUPS, RequestClass
from controller.domain.layout import Gpu, Layout, Node, PlannedInstance
from controller.domain.reasons import StepReason
from controller.fleet.port import HOLDS_GPUS, InstanceState
from controller.policy.placement import HeldInstance, place
from controller.policy.transition import (
    ActualInstance,
    CapacityModel,
    Step,
    StepKind,
    Transition,
    TransitionSettings,
    can_roll,
    next_steps,
    shortfall_rps,
    standing_layout,
)

SS, LS, LL = (RequestClass.parse(name) for name in ("SS", "LS", "LL"))
READY, STARTING, DRAINING = InstanceState.READY, InstanceState.STARTING, InstanceState.DRAINING
NODES = tuple(Node(f"n{n}", tuple(Gpu(f"n{n}-{slot}", slot) for slot in range(8))) for n in range(3))
GPUS = frozenset(gpu.uuid for node in NODES for gpu in node.gpus)


def demand(short: float = 0.0, long: float = 0.0, per_gpu: float = 1.0) -> CapacityModel:
    """An instance of `tp` GPUs carries tp x per_gpu requests/s of any class of its pool."""
    return CapacityModel(
        rates_rps={SS: short, LS: long},
        max_rate_rps={(group.name, tp): tp * per_gpu for group in DEFAULT_GROUPS for tp in (2, 4, 8)},
        work={(group.name, c): 1.0 for group in DEFAULT_GROUPS for c in group.classes},
    )


def actual(
    name: str, pool: str, node: int, first: int, tp: int, state: InstanceState = READY, **changes: object
) -> ActualInstance:
    gpus = tuple(f"n{node}-{slot}" for slot in range(first, first + tp))
    plain = ActualInstance(name, pool, f"n{node}", gpus, state, running=1.0, waiting=0.0)
    return replace(plain, **changes)  # type: ignore[arg-type] - keyword names are ActualInstance's own


def planned(name: str, pool: str, node: int, first: int, tp: int) -> PlannedInstance:
    return PlannedInstance(name, pool, "m", f"n{node}", tuple(f"n{node}-{s}" for s in range(first, first + tp)))


def of_kind(transition: Transition, kind: StepKind) -> list[str]:
    return [s.instance_id for s in transition.steps if s.kind is kind]


# ------------------------------------------------------------------------------------------------ shortfall


def test_shortfall_fills_special_pools_first() -> None:
    both = demand(short=4.0, long=6.0)
    assert shortfall_rps([("short", 4), ("long", 8)], both) == 0.0
    assert shortfall_rps([("all", 8), ("short", 2)], both) == 0.0
    assert shortfall_rps([("all", 8)], both) == pytest.approx(2.0)
    assert shortfall_rps([("short", 8)], both) == pytest.approx(6.0)  # long prompts have no pool
    assert shortfall_rps([], both) == pytest.approx(10.0)


def test_shortfall_weighs_requests() -> None:
    model = replace(demand(short=4.0), work={("short", SS): 2.0})
    assert shortfall_rps([("short", 4)], model) == pytest.approx(2.0)
    assert shortfall_rps([("short", 16)], model) == pytest.approx(4.0)  # an unknown kind carries nothing


def test_another_partition_that_takes_new_labels_alone_comes_at_once() -> None:
    """One label after the other there would be no way: each leaves too little in the pool that the rest still is in."""
    there = (actual("a", "all", 0, 0, 8), actual("b", "all", 1, 0, 4), actual("c", "all", 1, 4, 4))
    wanted = Layout((planned("a", "long", 0, 0, 8), planned("b", "short", 1, 0, 4), planned("c", "short", 1, 4, 4)))
    full = demand(short=8.0, long=8.0)
    relabelled = next_steps(wanted, there, GPUS, full)
    assert of_kind(relabelled, StepKind.RELABEL) == ["a", "b", "c"]
    assert not relabelled.stuck
    # What would miss more of the load is not done at once either.
    more_short = demand(short=12.0, long=4.0)
    assert of_kind(next_steps(wanted, there, GPUS, more_short), StepKind.RELABEL) != ["a", "b", "c"]


# -------------------------------------------------------------------------------------------- single steps


def test_grows_before_it_shrinks() -> None:
    wanted = Layout((planned("new", "all", 1, 0, 8),))
    there = (actual("old", "all", 0, 0, 8),)
    first = next_steps(wanted, there, GPUS, demand(short=6.0))
    assert of_kind(first, StepKind.START) == ["new"]
    assert of_kind(first, StepKind.DRAIN) == []
    during = next_steps(wanted, (*there, actual("new", "all", 1, 0, 8, STARTING)), GPUS, demand(short=6.0))
    assert {(s.kind, s.reason) for s in during.steps} == {(StepKind.WAIT, StepReason.WAITING_FOR_READY)}
    after = next_steps(wanted, (*there, actual("new", "all", 1, 0, 8)), GPUS, demand(short=6.0))
    assert of_kind(after, StepKind.DRAIN) == ["old"]


def test_what_comes_up_for_a_pool_is_there_before_anything_of_it_goes_though_nothing_arrives_just_now() -> None:
    wanted = Layout((planned("new", "short", 1, 0, 4),))
    old, other = actual("old", "short", 0, 0, 8), actual("other", "long", 2, 0, 8)
    quiet = replace(demand(), work={key: 1.0 for key in demand().work if key[0] == "short"})
    for coming in ((), (actual("new", "short", 1, 0, 4, STARTING),)):
        steps = next_steps(wanted, (old, other, *coming), GPUS, quiet)
        assert of_kind(steps, StepKind.DRAIN) == ["other"], "nothing comes up for its pool"
        assert StepReason.WAITING_FOR_READY in {s.reason for s in steps.steps if s.instance_id == "old"}
        at_once = TransitionSettings(make_first=False)
        drains = of_kind(
            next_steps(wanted, (old, actual("b", "short", 2, 0, 8), *coming), GPUS, quiet, at_once), StepKind.DRAIN
        )
        assert drains, "as under a power budget"
    there = next_steps(wanted, (old, actual("new", "short", 1, 0, 4)), GPUS, quiet)
    assert of_kind(there, StepKind.DRAIN) == ["old"]


def test_whoever_holds_gpus_that_others_wait_for_goes_as_soon_as_the_demand_allows() -> None:
    wanted = Layout((planned("new", "all", 0, 0, 8), planned("more", "all", 1, 0, 4)))
    steps = next_steps(wanted, (actual("a", "all", 0, 0, 8), actual("b", "all", 2, 0, 8)), GPUS, demand(short=2.0))
    assert of_kind(steps, StepKind.START) == ["more"]
    assert of_kind(steps, StepKind.DRAIN) == ["a"]


def test_drains_at_once_what_the_demand_does_not_need() -> None:
    there = (actual("a", "all", 0, 0, 8), actual("b", "all", 1, 0, 8))
    wanted = Layout((planned("a", "all", 0, 0, 8),))
    steps = next_steps(wanted, there, GPUS, demand(short=6.0))
    assert of_kind(steps, StepKind.DRAIN) == ["b"]
    assert not steps.done


def test_a_drained_instance_stops_only_when_proven_empty() -> None:
    wanted = Layout((planned("a", "all", 0, 0, 8),))
    keep = actual("a", "all", 0, 0, 8)
    for running, waiting, kind in ((0.0, 0.0, StepKind.STOP), (2.0, 0.0, StepKind.WAIT), (None, 0.0, StepKind.WAIT)):
        old = actual("b", "all", 1, 0, 8, DRAINING, running=running, waiting=waiting)
        steps = next_steps(wanted, (keep, old), GPUS, demand(short=6.0))
        assert [s.kind for s in steps.steps] == [kind]


def test_the_last_instance_of_a_class_stays_even_without_load() -> None:
    there = (actual("s", "short", 0, 0, 4), actual("l", "long", 1, 0, 8))
    wanted = Layout((planned("l", "long", 1, 0, 8),))
    steps = next_steps(wanted, there, GPUS, demand())
    assert of_kind(steps, StepKind.DRAIN) == []
    assert steps.stuck


def test_one_drain_per_pool_at_a_time() -> None:
    there = tuple(actual(f"a{i}", "all", i, 0, 8) for i in range(3))
    wanted = Layout((planned("a0", "all", 0, 0, 8),))
    one = next_steps(wanted, there, GPUS, demand(short=1.0))
    assert len(of_kind(one, StepKind.DRAIN)) == 1
    two = next_steps(wanted, there, GPUS, demand(short=1.0), TransitionSettings(max_drains_per_pool=2))
    assert len(of_kind(two, StepKind.DRAIN)) == 2


def test_a_large_pool_drains_several_at_a_time() -> None:
    there = tuple(actual(f"a{n}{slot}", "all", n, slot, 2) for n in range(3) for slot in (0, 2, 4, 6))
    wanted = Layout((planned("a00", "all", 0, 0, 2),))
    steps = next_steps(wanted, there, GPUS, demand(short=1.0))
    assert len(of_kind(steps, StepKind.DRAIN)) == 2  # a fifth of twelve
    going = tuple(replace(i, state=DRAINING) if i.instance_id in ("a02", "a04") else i for i in there)
    assert of_kind(next_steps(wanted, going, GPUS, demand(short=1.0)), StepKind.DRAIN) == []


def test_a_pool_change_waits_for_capacity_like_a_drain() -> None:
    there = (actual("a", "all", 0, 0, 8), actual("b", "all", 1, 0, 8))
    wanted = Layout((planned("a", "short", 0, 0, 8), planned("b", "long", 1, 0, 8)))
    steps = next_steps(wanted, there, GPUS, demand(short=5.0, long=5.0))
    assert of_kind(steps, StepKind.RELABEL) == ["a", "b"]  # first a, then b may go too
    lopsided = next_steps(wanted, there, GPUS, demand(short=9.0, long=5.0))
    assert of_kind(lopsided, StepKind.RELABEL) == ["a"]


def test_a_failed_start_is_tried_again_and_then_given_up() -> None:
    wanted = Layout((planned("a", "all", 0, 0, 8), planned("b", "all", 1, 0, 8)))
    keep = actual("b", "all", 1, 0, 8)
    again = next_steps(
        wanted, (actual("a", "all", 0, 0, 8, InstanceState.FAILED, attempts=1), keep), GPUS, demand(short=1.0)
    )
    assert [(s.kind, s.reason) for s in again.steps] == [(StepKind.START, StepReason.LOST)]
    over = next_steps(
        wanted, (actual("a", "all", 0, 0, 8, InstanceState.FAILED, attempts=3), keep), GPUS, demand(short=1.0)
    )
    assert over.given_up == ("a",)
    assert of_kind(over, StepKind.START) == []


def test_lost_gpus_are_given_up_not_waited_for() -> None:
    wanted = Layout((planned("a", "all", 0, 0, 8),))
    steps = next_steps(wanted, (), GPUS - {"n0-3"}, demand(short=1.0))
    assert steps.given_up == ("a",)
    assert "n0-3" in steps.steps[0].sentence


def test_a_quarantined_instance_keeps_its_gpus_out_of_use() -> None:
    wanted = Layout((planned("new", "all", 0, 0, 4),))
    steps = next_steps(wanted, (actual("old", "all", 0, 0, 8, InstanceState.QUARANTINED),), GPUS, demand(short=1.0))
    assert of_kind(steps, StepKind.START) == []


def test_without_a_free_gpu_nothing_breaks_that_carries_the_demand() -> None:
    there = (actual("a", "all", 0, 0, 8),)
    wanted = Layout((planned("b", "short", 0, 0, 4), planned("c", "long", 0, 4, 4)))
    only = frozenset(gpu.uuid for gpu in NODES[0].gpus)
    for allowed in (False, True):
        steps = next_steps(wanted, there, only, demand(short=2.0, long=2.0), allow_shortfall=allowed)
        assert steps.stuck
        assert of_kind(steps, StepKind.DRAIN) == []
        standing = standing_layout(wanted, there, "m")
        assert next_steps(standing, there, only, demand(short=2.0, long=2.0)).done
    light = next_steps(wanted, there, GPUS, demand(), TransitionSettings())
    assert light.stuck  # even without load its classes would have no instance


def test_a_break_is_made_where_it_is_allowed_and_what_it_misses_is_worth_it() -> None:
    there = (actual("a", "short", 0, 0, 8),)
    wanted = Layout((planned("b", "short", 0, 0, 4), planned("c", "long", 0, 4, 4)))
    only = frozenset(gpu.uuid for gpu in NODES[0].gpus)
    short_of_long = demand(short=1.0, long=2.0)
    assert next_steps(wanted, there, only, short_of_long).stuck
    allowed = next_steps(wanted, there, only, short_of_long, allow_shortfall=True)
    assert of_kind(allowed, StepKind.DRAIN) == ["a"]
    cautious = TransitionSettings(max_break_ratio=1.0)
    assert next_steps(wanted, there, only, short_of_long, cautious, allow_shortfall=True).stuck


def test_no_break_for_a_replacement_that_cannot_start() -> None:
    there = (actual("a", "short", 0, 0, 4),)
    wanted = Layout((planned("b", "long", 0, 0, 4), planned("gone", "short", 1, 0, 4)))
    usable = GPUS - {"n1-2"}
    steps = next_steps(wanted, there, usable, demand(long=2.0), allow_shortfall=True)
    assert steps.given_up == ("gone",)
    assert of_kind(steps, StepKind.DRAIN) == []


# --------------------------------------------------------------------------------------------- to their end


@dataclass
class World:
    """A fleet that does what steps say: starts take three ticks, drains two."""

    wanted: Layout
    capacity: CapacityModel
    allow_shortfall: bool = False
    settings: TransitionSettings = field(default_factory=TransitionSettings)
    fails: set[str] = field(default_factory=set)  # ids whose first start fails
    instances: dict[str, ActualInstance] = field(default_factory=dict)
    ages: Counter[str] = field(default_factory=Counter)
    worst_rps: float = 0.0
    gaps: set[RequestClass] = field(default_factory=set)

    def serving(self) -> list[tuple[str, int]]:
        return [(i.pool, i.tp) for i in self.instances.values() if i.state is READY]

    def tick(self) -> Transition:
        before = self.serving()
        there = tuple(self.instances.values())
        rest = (GPUS, self.capacity, self.settings, self.allow_shortfall)
        transition = next_steps(self.wanted, there, *rest)
        assert next_steps(self.wanted, there[::-1], *rest) == transition
        for step in transition.steps:
            self.do(step)
        owners = Counter(u for i in self.instances.values() if i.state in HOLDS_GPUS for u in i.gpu_uuids)
        assert all(n == 1 for n in owners.values())
        self.worst_rps = max(self.worst_rps, shortfall_rps(self.serving(), self.capacity))
        covered = {c for pool, c in self.capacity.work if pool in {p for p, _ in before}}
        self.gaps |= covered - {c for pool, c in self.capacity.work if pool in {p for p, _ in self.serving()}}
        for name, instance in list(self.instances.items()):
            self.ages[name] += 1
            if instance.state is STARTING and self.ages[name] >= 3:
                failed = name in self.fails
                self.fails.discard(name)
                state = InstanceState.FAILED if failed else READY
                self.instances[name] = replace(instance, state=state, attempts=instance.attempts + failed)
            if instance.state is DRAINING and self.ages[name] >= 2:
                self.instances[name] = replace(instance, running=0.0)
        return transition

    def do(self, step: Step) -> None:
        there = self.instances.get(step.instance_id)
        self.ages[step.instance_id] = 0 if step.kind is not StepKind.WAIT else self.ages[step.instance_id]
        if step.kind is StepKind.START:
            attempts = there.attempts if there else 0
            self.instances[step.instance_id] = ActualInstance(
                step.instance_id, step.pool, step.node_id, step.gpu_uuids, STARTING, 0.0, 0.0, attempts
            )
        elif there is not None and step.kind is StepKind.RELABEL:
            self.instances[step.instance_id] = replace(there, pool=step.pool)
        elif there is not None and step.kind is StepKind.DRAIN:
            self.instances[step.instance_id] = replace(there, state=DRAINING)
        elif step.kind is StepKind.STOP:
            assert there is not None
            assert there.state is not READY
            assert not there.running
            del self.instances[step.instance_id]


def new_ids(prefix: str) -> Callable[[], str]:
    numbers = count()
    return lambda: f"{prefix}{next(numbers)}"


def laid_out(counts: Mapping[tuple[str, int], int], before: Layout, prefix: str) -> Layout:
    held = tuple(HeldInstance(i.instance_id, i.pool, i.node_id, i.gpu_uuids, True) for i in before.instances)
    return place(counts, "m", before, held, NODES, new_ids(prefix)).layout


COUNTS = st.one_of(
    st.fixed_dictionaries(
        {("all", 2): st.integers(0, 3), ("all", 4): st.integers(0, 2), ("all", 8): st.integers(0, 3)}
    ),
    st.fixed_dictionaries(
        {
            ("short", 2): st.integers(0, 2),
            ("short", 4): st.integers(1, 2),
            ("long", 4): st.integers(0, 2),
            ("long", 8): st.integers(1, 2),
        }
    ),
)


@settings(max_examples=150, deadline=None)
@given(COUNTS, COUNTS, st.floats(0, 12), st.floats(0, 12), st.data())
def test_every_transition_ends_or_says_that_it_cannot_without_dropping_demand(
    old: dict[tuple[str, int], int], new: dict[tuple[str, int], int], short: float, long: float, data: st.DataObject
) -> None:
    before = laid_out(old, Layout(), "old")
    capacity = demand(short, long)
    after = laid_out(new, before, "new")
    world = World(after, capacity)
    world.fails = set(data.draw(st.lists(st.sampled_from(sorted(after.by_id()) or ["none"]), max_size=2)))
    for i in before.instances:
        world.instances[i.instance_id] = ActualInstance(i.instance_id, i.pool, i.node_id, i.gpu_uuids, READY, 3.0, 0.0)
    base_rps = shortfall_rps(world.serving(), capacity)
    last = world.tick()
    for _ in range(200):
        if last.done or last.stuck:
            break
        last = world.tick()
    assert last.done or last.stuck
    assert last.done or base_rps > 0 or not last.given_up
    if base_rps == 0:
        # Carried at the start, carried at every step.
        assert world.worst_rps == 0
        assert not world.gaps
    if last.done:
        assert {i.instance_id: (i.pool, i.gpu_uuids) for i in world.instances.values()} == {
            i.instance_id: (i.pool, i.gpu_uuids) for i in after.instances
        }
        assert next_steps(after, tuple(world.instances.values()), GPUS, capacity).steps == ()
    if last.stuck:
        there = tuple(world.instances.values())
        assert next_steps(standing_layout(after, there, "m"), there, GPUS, capacity).done
    if last.stuck and base_rps == 0:
        # Only for lack of room or because what is wanted does not carry the demand.
        wanted_rps = shortfall_rps([(i.pool, i.tp) for i in after.instances], capacity)
        used = {u for i in world.instances.values() for u in i.gpu_uuids}
        missing = [i for i in after.instances if i.instance_id not in world.instances]
        uncovered = {c for p, c in capacity.work if p in {i.pool for i in before.instances}} - {
            c for p, c in capacity.work if p in {i.pool for i in after.instances}
        }
        assert wanted_rps > 0 or uncovered or any(used & set(i.gpu_uuids) for i in missing)


@settings(max_examples=60, deadline=None)
@given(COUNTS, COUNTS)
def test_what_is_allowed_to_break_ends_where_the_wanted_layout_would_carry_no_more(
    old: dict[tuple[str, int], int], new: dict[tuple[str, int], int]
) -> None:
    before = laid_out(old, Layout(), "old")
    after = laid_out(new, before, "new")
    capacity = demand(9.0, 9.0)
    world = World(after, capacity, allow_shortfall=True, settings=TransitionSettings(max_break_ratio=1e9))
    for i in before.instances:
        world.instances[i.instance_id] = ActualInstance(i.instance_id, i.pool, i.node_id, i.gpu_uuids, READY, 3.0, 0.0)
    last = world.tick()
    for _ in range(200):
        if last.done or last.stuck:
            break
        last = world.tick()
    waiting = {u for i in after.instances if i.instance_id not in world.instances for u in i.gpu_uuids}
    in_the_way = [i for i in world.instances.values() if waiting & set(i.gpu_uuids)]
    assert (
        last.done
        or not in_the_way
        or last.shortfall_rps <= shortfall_rps([(i.pool, i.tp) for i in after.instances], capacity) + 1e-9
    )


def test_a_restart_of_the_caller_at_any_tick_changes_nothing() -> None:
    """No state outside the arguments: a second caller that takes over mid-way gives the same steps."""
    before = laid_out({("all", 8): 2}, Layout(), "old")
    after = laid_out({("short", 4): 1, ("long", 8): 1}, before, "new")
    world = World(after, demand(2.0, 2.0))
    for i in before.instances:
        world.instances[i.instance_id] = ActualInstance(i.instance_id, i.pool, i.node_id, i.gpu_uuids, READY, 3.0, 0.0)
    for _ in range(30):
        frozen = tuple(world.instances.values())
        assert next_steps(after, frozen, GPUS, world.capacity) == next_steps(after, frozen, GPUS, world.capacity)
        if world.tick().done:
            break
    assert world.worst_rps == 0
    assert {i.pool for i in world.instances.values()} == {"short", "long"}


CARRIED = {("a", 8): 8.0, ("a", 4): 4.5, ("a", 2): 2.0}


class TestCanRoll:
    def can(
        self, present: dict[tuple[str, int], int], wanted: dict[tuple[str, int], int], free: int, load: float
    ) -> bool:
        def carries(there: Mapping[tuple[str, int], int]) -> bool:
            return sum(CARRIED[kind] * n for kind, n in there.items()) >= load

        return can_roll(present, wanted, free, carries)

    def test_one_after_the_other_while_the_rest_carries_the_load(self) -> None:
        assert self.can({("a", 8): 4}, {("a", 4): 8}, 0, 24.0)
        assert not self.can({("a", 8): 4}, {("a", 4): 8}, 0, 24.5)  # not even the first may go

    def test_what_fits_beside_the_others_comes_first(self) -> None:
        assert self.can({("a", 8): 1}, {("a", 4): 2}, 8, 8.0)
        assert not self.can({("a", 8): 1}, {("a", 4): 2}, 0, 8.0)

    def test_the_end_is_reached_and_nothing_goes_for_nothing(self) -> None:
        assert self.can({("a", 8): 2}, {("a", 8): 2}, 0, 16.0)
        assert self.can({("a", 8): 2}, {("a", 8): 1}, 0, 16.0)  # nothing new is needed: the way down is next_steps' own

    @given(
        st.dictionaries(st.sampled_from(sorted(CARRIED)), st.integers(0, 4)),
        st.dictionaries(st.sampled_from(sorted(CARRIED)), st.integers(0, 4)),
        st.integers(0, 16),
    )
    def test_it_always_ends_and_without_load_gpus_decide(
        self, present: dict[tuple[str, int], int], wanted: dict[tuple[str, int], int], free: int
    ) -> None:
        gpus = free + sum(tp * n for (_, tp), n in present.items())
        assert self.can(present, wanted, free, 0.0) == (gpus >= _gpus_needed(present, wanted))


def _gpus_needed(present: Mapping[tuple[str, int], int], wanted: Mapping[tuple[str, int], int]) -> int:
    return sum(tp * n for (_, tp), n in wanted.items()) if Counter(wanted) - Counter(present) else 0
