"""The emergency ladder decided by the core: each stage a decision with its reasons, orders in the routing table that
are given anew at every tick, full clocks, nothing touched where nothing may be."""

from __future__ import annotations

from dataclasses import replace

from controller.cli.operate import pools_table
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode, Reason, Stage
from controller.explain import explain
from controller.fleet.port import (
    ApplyClocks,
    Effect,
    LoadSeen,
    PoolOrder,
    PublishRouting,
    QueueObservation,
    ReleaseClocks,
    Tick,
)
from controller.loop.emergency import stage_of
from controller.loop.load import LoadBook
from controller.loop.orders import SetMode
from controller.loop.settings import Knobs
from controller.loop.state import Instant
from dynamollm.v1 import controller_pb2 as pb
from tests.unit.test_loop_core import load
from tests.unit.test_loop_serving import PLANNED_RPS, Fleet

CALM = QueueObservation(0, 3, 0.0)
TROUBLE = QueueObservation(12, 30, 0.6, at_risk=7)


class Troubled(Fleet):
    """Under its planned load, with a queue at the gateway that the test makes up."""

    def tick(self, queue: QueueObservation | None, waiting: float = 0.0, pool: str = "all") -> list[Effect]:
        """Five seconds with a report a second (None: no report); the effects of the tick at their end."""
        for _ in range(5):
            self.wait(1)
            if queue is not None:
                self.arrived += PLANNED_RPS / 4
                seen = load(self.now_s, round(self.arrived))
                assert isinstance(seen, LoadSeen)
                self.send(LoadSeen(replace(seen.observation, queues={pool: queue})))
        for node, instances in self.instances.items():
            self.see(node, *(replace(each, running=6.0, waiting=waiting) for each in instances))
        return self.send(Tick(Level.INSTANCE))

    @property
    def stage(self) -> Stage:
        return stage_of(self.core.state, "all")

    def order(self) -> PoolOrder | None:
        assert self.core.state.routing is not None
        return next(pool.order for pool in self.core.state.routing.pools if pool.name == "all")

    def ladder(self) -> list[Decision]:
        return [d for step in self.steps for d in step.decisions if "stage" in d.outcome]


def published(effects: list[Effect]) -> list[PublishRouting]:
    return [effect for effect in effects if isinstance(effect, PublishRouting)]


def calm(**changes: object) -> Troubled:
    fleet = Troubled(**changes)
    for _ in range(6):
        fleet.tick(CALM)
    assert fleet.stage is Stage.NONE
    assert fleet.order() is None
    return fleet


def test_without_trouble_nothing_is_ordered_published_or_said() -> None:
    fleet = calm()
    version = fleet.core.state.routing
    for queue in (CALM, QueueObservation(4, 9, 0.1), QueueObservation(5, 9, 0.2, at_risk=1), CALM):
        assert published(fleet.tick(queue)) == []
    assert fleet.core.state.routing is version
    assert fleet.ladder() == []


def test_each_stage_is_a_decision_that_can_be_explained() -> None:
    fleet = calm()
    for stage in (Stage.REORDER, Stage.FULL_CLOCK, Stage.MOVE, Stage.REFUSE):
        fleet.tick(TROUBLE)
        assert fleet.stage is stage
        order = fleet.order()
        assert order is not None
        assert set(order.prompt_tokens) == {i.instance_id for all_of in fleet.instances.values() for i in all_of}
        assert (order.stage, order.ttl_s, order.first_token_s) == (stage, 20.0, (0.1, 0.1, 0.1))
    fleet.tick(TROUBLE)
    decisions = fleet.ladder()
    assert [d.outcome["stage"] for d in decisions] == ["reorder", "full_clock", "move", "refuse"]
    assert {(d.level, d.scope, d.reason) for d in decisions} == {(Level.INSTANCE, "all", Reason.DEADLINES_AT_RISK)}
    last = decisions[-1]
    assert (last.inputs["queued"], last.inputs["at_risk"], last.inputs["stage"]) == (12, 7, "move")
    told = " ".join(explain(last))
    for part in ("from the emergency stage move", "to refuse", "7 at risk", "move (not enough"):
        assert part in told


def test_refusals_keep_the_ladder_up_though_the_queue_is_short() -> None:
    fleet = calm()
    for _ in range(4):
        fleet.tick(TROUBLE)
    for number in range(1, 8):
        fleet.tick(QueueObservation(0, 9, 0.0, refused={"too_late": 10 * number}))
        assert fleet.stage is Stage.REFUSE
    refused = {"too_late": 70}
    for _ in range(3):
        fleet.tick(QueueObservation(0, 9, 0.0, refused=refused))
        assert fleet.stage is Stage.REFUSE
    fleet.tick(QueueObservation(0, 9, 0.0, refused=refused))
    assert fleet.stage is Stage.MOVE
    assert fleet.ladder()[-1].reason is Reason.DEADLINES_SAFE
    for _ in range(9):
        fleet.tick(CALM)
    assert fleet.stage is Stage.NONE
    assert fleet.order() is None
    assert [d.outcome["stage"] for d in fleet.ladder()[4:]] == ["move", "full_clock", "reorder", "none"]


def test_an_order_is_given_anew_at_every_tick_under_the_same_version() -> None:
    fleet = calm()
    fleet.tick(TROUBLE)
    strained = replace(TROUBLE, at_risk=1)
    versions = {effect.table.version for _ in range(4) for effect in published(fleet.tick(strained))}
    assert len(versions) == 1
    assert len(published(fleet.tick(strained))) == 1
    seen = fleet.core.state.instances()
    assert seen
    # Between ticks it is not: what holds it up is a decision.
    node = next(iter(fleet.instances))
    assert published(fleet.see(node, *(replace(i, running=9.0) for i in fleet.instances[node]))) == []


def test_from_full_clock_on_no_clock_is_locked_and_all_serve() -> None:
    fleet = calm()
    assert any(choice.mhz is not None for choice in fleet.core.state.clocks.values())
    fleet.tick(TROUBLE)
    effects = fleet.tick(TROUBLE)
    assert fleet.stage is Stage.FULL_CLOCK
    assert any(isinstance(effect, ReleaseClocks) for effect in effects)
    assert not any(isinstance(effect, ApplyClocks) for effect in effects)
    assert {choice.mhz for choice in fleet.core.state.clocks.values()} == {None}
    assert fleet.serving() == sum(len(instances) for instances in fleet.instances.values())
    clocks = [d for d in fleet.steps[-1].decisions if d.outcome.get("mhz") and d.reason is Reason.DEADLINES_AT_RISK]
    assert clocks
    for _ in range(12):
        fleet.tick(CALM)
    assert any(choice.mhz is not None for choice in fleet.core.state.clocks.values())  # and back


def test_an_engine_that_queues_is_held_to_what_it_runs_from_move_on() -> None:
    fleet = calm()
    for _ in range(2):
        fleet.tick(TROUBLE, waiting=5.0)
    order = fleet.order()
    assert order is not None
    assert order.limits == {}
    fleet.tick(TROUBLE, waiting=5.0)
    order = fleet.order()
    assert order is not None
    assert set(order.limits.values()) == {6}
    assert set(order.limits) == {i.instance_id for instances in fleet.instances.values() for i in instances}
    fleet.tick(TROUBLE)
    order = fleet.order()
    assert order is not None
    assert order.limits == {}


def test_silence_refuses_nobody() -> None:
    fleet = calm()
    for _ in range(4):
        fleet.tick(TROUBLE)
    for _ in range(4):  # stale after 15 s
        fleet.tick(None)
    assert fleet.stage is Stage.MOVE
    assert fleet.ladder()[-1].reason is Reason.NO_LOAD_DATA
    assert "nobody is refused on old news" in " ".join(explain(fleet.ladder()[-1]))


def test_advice_is_recorded_and_ordered_of_nobody() -> None:
    fleet = calm()
    fleet.core.order(Instant(fleet.now_s, 1e9), SetMode("cluster", Mode.ADVISORY))
    fleet.tick(TROUBLE)
    fleet.tick(TROUBLE)
    assert fleet.stage is Stage.FULL_CLOCK
    assert fleet.order() is None
    assert {d.mode for d in fleet.ladder()} == {Mode.ADVISORY}


def test_the_knob_turns_it_off() -> None:
    fleet = calm(knobs=Knobs(emergency=False))
    for _ in range(3):
        fleet.tick(TROUBLE)
    assert fleet.stage is Stage.NONE
    assert fleet.ladder() == []


def test_the_pools_table_says_how_far_up_a_pool_is() -> None:
    climbing = pb.PoolStatus(name="a", queued=3, emergency=pb.EMERGENCY_STAGE_FULL_CLOCK)
    table = pools_table(pb.GetStatusResponse(pools=[climbing, pb.PoolStatus(name="b", queued=4)]))
    assert list(table.columns[6].cells) == ["3 (full clock)", "4"]


def test_a_gateway_that_is_gone_neither_waits_nor_refuses_for_ever() -> None:
    book = LoadBook(keep_s=900)
    report = load(10.0, 5)
    assert isinstance(report, LoadSeen)
    for at_s, refused in ((10.0, 4), (11.0, 9), (12.0, 9)):
        queue = QueueObservation(3, 1, 0.4, 2, {"too_late": refused})
        book.add(replace(report.observation, observed_at_s=at_s, queues={"all": queue}))
    assert book.refused(10.0) == {"all": 5}  # the first report of an epoch only sets the base
    assert book.refused(11.0) == {}
    assert book.queues(20.0, 15.0)["all"].waiting == 3
    assert book.queues(28.0, 15.0) == {}
    other = replace(report.observation, gateway_id="other", observed_at_s=28.0, queues={"all": TROUBLE})
    book.add(other)
    assert book.queues(28.0, 15.0)["all"] == TROUBLE
    assert book.queues(28.0)["all"].at_risk == 9
