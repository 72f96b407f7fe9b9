"""The sample of choices: how often, how many, what it says, and its way to the history and to the operator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.clock import VirtualClock
from controller.api.choices import MOST_ALTERNATIVES, choices_from_wire
from controller.cli.main import app
from controller.domain.slo import Slo
from controller.gateway.asked import Asked
from controller.gateway.brain import Brain, Outcome, Ticket
from controller.gateway.choices import MOST_WAITING, PREFIX_CHARACTERS, Choices, PrefixMemory
from controller.gateway.classify import Classifier
from controller.gateway.client import ControllerClient, InstanceNow
from controller.gateway.load import LoadMeter
from controller.gateway.tokens import TokenCounter
from controller.policy.routing import Decided, Weights
from controller.store.engine import open_engine
from controller.store.migrate import upgrade
from controller.store.repositories import write_records
from dynamollm.v1 import controller_pb2 as pb
from tests.gateway_stand_ins import LONG, SHORT, table
from tests.store_suite import sqlite_url
from tests.unit.test_gateway_brain import asked


def gateway(
    one_in: int = 1, per_minute: int = 100, overcommit: float = 1.0, weights: Weights | None = None
) -> tuple[Brain, VirtualClock]:
    clock = VirtualClock()
    choices = Choices(clock, weights or Weights(), one_in, per_minute)
    brain = Brain(1000, Slo(), clock, Classifier(), TokenCounter(), overcommit, choices)
    brain.update_routing(table((SHORT, {"a": "http://a", "b": "http://b"}), (LONG, {"c": "http://c"}), max_in_flight=2))
    return brain, clock


def send(brain: Brain, request: Asked | None = None) -> Ticket:
    ticket = brain.arrive(request or asked("hello"))
    assert brain.choose(ticket) is not None
    return ticket


def client_of(brain: Brain) -> ControllerClient:
    return ControllerClient(
        "127.0.0.1:1",
        "gw",
        "epoch",
        brain.clock,
        1.0,
        LoadMeter(),
        lambda _: None,
        lambda: ["m"],
        lambda _: {},
        brain.status,
        brain.choices,
    )


def test_every_choice_is_counted_by_what_decided_it() -> None:
    brain, _ = gateway(overcommit=2.0)
    for _ in range(7):
        send(brain)
    # a, b, a full and then b alone, c as the larger pool, c alone of it; the seventh goes beyond a limit.
    assert brain.chosen() == {Decided.LOAD: 3, Decided.ONLY_ONE: 1, Decided.SPILLED: 2, Decided.OVERFLOW: 1}
    assert brain.chosen().total() == 7


def test_one_in_so_many_is_explained_with_what_each_other_held() -> None:
    brain, clock = gateway(one_in=3)
    clock.advance(5.0)
    for _ in range(3):
        send(brain)
    (sample,) = brain.choices.take()
    assert (sample.instance_id, sample.pool, sample.decided_by, sample.speaks_for) == ("a", "short", Decided.LOAD, 3)
    # As they were just before this choice: a and b held one each, "a" won the tie by its name.
    assert [(each.instance_id, each.lost_by, each.in_flight) for each in sample.alternatives] == [
        ("b", "load", 1),
        ("c", "pool_not_needed", 0),
    ]


def test_a_minute_has_so_many_samples_and_their_weight_covers_the_rest() -> None:
    brain, clock = gateway(one_in=1, per_minute=2)
    for _ in range(5):
        brain.done(send(brain), Outcome.SERVED)
    assert len(brain.choices.take()) == 2
    clock.advance(60.0)
    brain.done(send(brain), Outcome.SERVED)
    assert [sample.speaks_for for sample in brain.choices.take()] == [1, 1, 4]


def test_samples_wait_for_the_controller_boundedly_and_go_once_they_arrived() -> None:
    brain, clock = gateway(per_minute=1000)
    for _ in range(MOST_WAITING + 5):
        brain.done(send(brain), Outcome.SERVED)
        clock.advance(0.1)
    taken = brain.choices.take()
    assert (len(taken), taken[0].number) == (MOST_WAITING, 6)
    brain.done(send(brain), Outcome.SERVED)
    brain.choices.sent(taken)
    assert [sample.number for sample in brain.choices.take()] == [MOST_WAITING + 6]


def test_those_to_retry_on_are_the_least_loaded_of_the_pools_in_order_and_no_suspects() -> None:
    brain, _ = gateway()
    ticket = brain.arrive(asked("hello"))
    chosen = brain.choose(ticket)
    assert chosen is not None
    assert [each.instance_id for each in brain.alternatives(ticket, chosen, 2)] == ["b", "c"]
    assert [each.instance_id for each in brain.alternatives(ticket, chosen, 1)] == ["b"]
    brain.suspect("b")
    assert [each.instance_id for each in brain.alternatives(ticket, chosen, 2)] == ["c"]


def test_no_samples_where_none_are_wanted() -> None:
    brain, _ = gateway(one_in=0)
    send(brain)
    assert brain.choices.take() == ()


async def test_the_history_gets_what_the_gateway_saw() -> None:
    brain, _ = gateway(overcommit=2.0)
    for _ in range(7):
        send(brain, asked("secret words"))
    report = client_of(brain).report(brain.choices.take())
    assert b"secret" not in report.SerializeToString()
    rows = choices_from_wire(report)
    assert [row.decided_by for row in rows][-3:] == ["spilled", "spilled", "overflow"]
    assert rows[0].alternatives[0] == {
        "instance": "b",
        "pool": "short",
        "lost_by": "load",
        "in_flight": 0,
        "pending_tokens": 0,
        "score": 1.0,
    }


def test_a_report_cannot_flood_the_history() -> None:
    flood = [pb.ChoiceAlternative(instance_id="x" * 1_000, pool="p", lost_by="y")] * 20
    message = pb.ReportLoadRequest(choices=[pb.ChoiceSample(request_class="SS", alternatives=flood)] * 700)
    rows = choices_from_wire(message)
    assert len(rows) == 600
    assert len(rows[0].alternatives) == MOST_ALTERNATIVES
    assert len(str(rows[0].alternatives[0]["instance"])) == 200
    with pytest.raises(ValueError, match="valid Bucket"):
        choices_from_wire(pb.ReportLoadRequest(choices=[pb.ChoiceSample(request_class="XX")]))


def test_prompts_that_begin_alike_go_where_that_was_read() -> None:
    brain, _ = gateway(weights=Weights(load=0.1, prefix=1.0, fill=1.0), one_in=0)
    system = "you are a helpful assistant " * 60
    first, other = asked(system + "one"), asked("x" * PREFIX_CHARACTERS)
    assert PrefixMemory.name(asked(system + "one")) == PrefixMemory.name(asked(system + "two"))
    assert PrefixMemory.name(asked("short")) == ""
    for request in (first, other):
        brain.done(send(brain, request), Outcome.SERVED)
    ticket = send(brain, first)
    brain.first_token(ticket)  # a prompt that is still read would use up the head-room of so small an instance
    where = {name: n for name, n in brain.dispatcher.in_flight().items() if n}
    again = send(brain, first)
    assert set(brain.dispatcher.in_flight()) == set(where)
    assert brain.chosen()[Decided.PREFIX] >= 1
    for each in (ticket, again):
        brain.done(each, Outcome.SERVED)


def test_the_cache_use_that_the_controller_tells_is_weighed() -> None:
    brain, clock = gateway(weights=Weights(load=0.1, kv_use=1.0))
    brain.status([InstanceNow("a", None, None, 0.9), InstanceNow("b", None, None, 0.2)], clock.monotonic_s())
    send(brain)
    assert brain.dispatcher.in_flight() == {"b": 1}
    assert brain.chosen()[Decided.KV] == 1


async def test_operators_read_choices_as_sentences(tmp_path: Path) -> None:
    brain, _ = gateway(overcommit=2.0)
    for _ in range(7):
        send(brain)
    url = sqlite_url(tmp_path)
    engine = open_engine(url, create=True)
    upgrade(engine)
    report = client_of(brain).report(brain.choices.take())
    rows = [replace(row, chosen_at_s=1e9) for row in choices_from_wire(report)]
    write_records(engine, rows)
    engine.dispose()
    at = ["--database-url", url]
    listed = CliRunner().invoke(app, ["choice", "list", "--from", "2001-01-01", *at])
    assert listed.exit_code == 0, listed.output
    assert "overflow" in listed.output
    found = json.loads(CliRunner().invoke(app, ["choice", "list", "--from", "2001-01-01", "--json", *at]).output)
    spilled = next(each for each in found if each["decided_by"] == "spilled")
    said = CliRunner().invoke(app, ["choice", "explain", str(spilled["id"]), *at]).output
    assert "went to c of pool long" in said
    assert "the class's own pool was full, and this one dominates it." in said
    assert "a of pool short was full up to its limit (2 in flight" in said
    assert CliRunner().invoke(app, ["choice", "explain", "99", *at]).exit_code != 0
