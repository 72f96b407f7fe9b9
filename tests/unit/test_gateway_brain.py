"""What both ways in share: reading requests, counting tokens, tickets, overflow, API keys, the table on disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from common.clock import VirtualClock
from common.errors import UserError
from controller.domain.classes import by_input
from controller.domain.slo import Slo
from controller.gateway.access import Access
from controller.gateway.asked import Asked, read_request
from controller.gateway.brain import Brain, Outcome
from controller.gateway.classify import Classifier
from controller.gateway.client import InstanceNow
from controller.gateway.refusal import Refusal
from controller.gateway.snapshot import Snapshot
from controller.gateway.tokens import CachedShare, TokenCounter, load_tokenizers
from controller.picker.held import Held
from controller.predictor.conditional import Conditional
from tests.gateway_stand_ins import MODEL, table

ALL = by_input("all", "SML")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def asked(prompt: object = "hello", target: str = COMPLETIONS, tenant: str = "", **more: object) -> Asked:
    wanted = "messages" if target == CHAT else "prompt"
    return read_request(target, json.dumps({"model": MODEL, wanted: prompt, **more}).encode(), [MODEL], tenant)


def brain(overcommit: float = 1.0) -> tuple[Brain, VirtualClock]:
    clock = VirtualClock()
    return Brain(100, Slo(), clock, Classifier(None, 0.8, Conditional()), TokenCounter(), overcommit), clock


def test_what_is_asked_is_read_once_for_both_ways_in() -> None:
    read = asked(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        CHAT,
        "acme",
        max_tokens=50,
        stop=["\n"],
        response_format={"type": "json_object"},
        stream=True,
        stream_options={"include_usage": True},
    )
    assert (read.texts, read.messages, read.chat) == (("be brief", "hi"), 2, True)
    assert (read.stream, read.usage_wanted, read.output_limit_tokens) == (True, True, 50)
    features = read.features
    assert (features.json_mode, features.stops, features.tenant, features.limit_tokens) == (True, True, "acme", 50)
    assert not asked("x", response_format={"type": "text"}).features.json_mode


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b"3", 400, "invalid_json"),
        (b"{}", 200, ""),
        (b'{"model": "m"}', 404, "model_not_found"),
        (b'{"model": 5, "prompt": "x"}', 400, "missing_field"),
        (b'{"model": "test-model"}', 400, "missing_field"),
        (b'{"model": "test-model", "prompt": {}}', 400, "invalid_value"),
        (b'{"model": "test-model", "prompt": "x", "stream": "yes"}', 400, "invalid_value"),
        (b'{"model": "test-model", "prompt": "x", "max_tokens": -1}', 400, "invalid_value"),
    ],
)
def test_bodies_that_are_none_are_refused(body: bytes, status: int, code: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_request(COMPLETIONS, body, [MODEL])
    if status != 200:  # a lone {} names the only model and then lacks its prompt
        assert (refused.value.status, refused.value.code) == (status, code)
    assert json.loads(refused.value.body())["error"]["message"]


def tokenizer_file(folder: Path) -> Path:
    """A real one, trained on the spot."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_tokens_are_counted_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    loaded = load_tokenizers({MODEL: tokenizer_file(tmp_path)})
    counter, text = TokenCounter(loaded), Path(__file__).read_text(encoding="utf-8")
    for cut in (1, 300, 740):
        assert counter.count(asked(text[:cut])) == len(loaded[MODEL].encode(text[:cut], add_special_tokens=False))
    exact = len(loaded[MODEL].encode(text, add_special_tokens=False))
    assert counter.count(asked(text)) == pytest.approx(exact, rel=0.15)  # some slices of it
    for unbroken in ("x" * 751, "漢" * 5_000):  # there is no space to cut at
        assert counter.count(asked(unbroken)) == pytest.approx(
            len(loaded[MODEL].encode(unbroken, add_special_tokens=False)), rel=0.15
        )
    assert counter.count(asked("x\ud800y")) == counter.count(asked("x?y"))  # half a surrogate pair is valid JSON
    assert counter.count(asked([1, 2, 3])) == 3
    # What the engine counts beside the text is learnt per message.
    chat = [{"role": "user", "content": "hello there"}] * 3
    for _ in range(200):
        counter.calibrate(asked(chat, CHAT), 50, counter.count(asked(chat, CHAT)))
    assert counter.count(asked(chat, CHAT)) == pytest.approx(50, abs=1)


def test_tokenizer_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json"):
        load_tokenizers({"m": tmp_path / "none.json"})
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be used"):
        load_tokenizers({"m": tmp_path / "bad.json"})


def test_cached_tokens_are_subtracted_cautiously() -> None:
    cached, chat = CachedShare(), asked("x", tenant="a")
    assert cached.uncached(chat, 1000) == 1000
    cached.observe(chat, 1000, 900)
    assert cached.uncached(chat, 1000) == 1000  # once is no habit
    for _ in range(300):
        cached.observe(chat, 1000, 900)
    assert cached.uncached(chat, 1000) == pytest.approx(100, abs=20)
    assert cached.uncached(asked("x", tenant="b"), 1000) == 1000
    for number in range(300):
        cached.observe(chat, 1000, 900 * (number % 2))
    assert cached.uncached(chat, 1000) > 900  # now it swings: not to be relied on


def test_the_true_class_counts_uncached_tokens_only() -> None:
    mind, _ = brain()
    mind.update_routing(table((ALL, {"e": "http://127.0.0.1:1"})))
    ticket = mind.arrive(asked("x" * 8000))
    assert str(ticket.classified.routing) == "LL"
    usage = {"prompt_tokens": 2000, "prompt_tokens_details": {"cached_tokens": 1900}}
    mind.completed(ticket, 50, usage, 0.1, [0.01] * 49)
    mind.done(ticket, Outcome.SERVED)
    completed = [str(name) for (_, name), meter in mind.meter.classes([]).items() if meter.completed]
    assert completed == ["SS"]
    assert mind.predictions == {("conditional", "too_long"): 1} or mind.predictions == {("conditional", "right"): 1}


def test_an_answer_that_outgrows_its_class_is_noticed_once() -> None:
    mind, _ = brain()
    mind.update_routing(table((ALL, {"e": "http://127.0.0.1:1"})))
    ticket = mind.arrive(asked("x", max_tokens=90))
    assert mind.output_bound_tokens(ticket) == 100
    mind.outgrew(ticket)
    mind.completed(ticket, 500, None, 0.1, [])
    assert mind.outgrown == 1
    assert mind.output_bound_tokens(mind.arrive(asked("x"))) == float("inf")


def test_choose_fills_the_limits_then_overflows_a_little_and_then_says_no() -> None:
    mind, clock = brain(overcommit=1.5)
    mind.update_routing(table((ALL, {"a": "http://127.0.0.1:1", "b": "http://127.0.0.1:2"}), max_in_flight=4))
    tickets = [mind.arrive(asked()) for _ in range(13)]
    chosen = [mind.choose(ticket) for ticket in tickets]
    assert [each is not None for each in chosen] == [True] * 12 + [False]
    names = [each.instance_id for each in chosen if each is not None]
    assert names.count("a") == names.count("b") == 6
    queues = mind.queues(clock.monotonic_s())["all"]
    assert (queues.in_flight, queues.waiting) == (8, 4)  # what overflowed waits inside the engines
    assert mind.pool_of(tickets[0]) == mind.pool_of(tickets[11]) == "all"
    for ticket in tickets:
        mind.done(ticket, Outcome.SERVED)
    queues = mind.queues(clock.monotonic_s())["all"]
    assert (queues.in_flight, queues.waiting) == (0, 0)


def test_what_others_have_sent_leaves_less_room_and_our_own_burst_is_not_taken_for_it() -> None:
    mind, clock = brain()
    mind.update_routing(table((ALL, {"a": "http://127.0.0.1:1", "b": "http://127.0.0.1:2"}), max_in_flight=4))

    def look(**requests: float) -> int:
        """The engines say what they hold; how many of our requests find room then?"""
        mind.status([InstanceNow(name, None, count) for name, count in requests.items()], clock.monotonic_s())
        tickets = [mind.arrive(asked()) for _ in range(10)]
        found = sum(mind.choose(ticket) is not None for ticket in tickets)
        mind.sweep()
        for ticket in tickets:
            mind.done(ticket, Outcome.SERVED)
        return found

    assert look(a=3, b=0) == 1 + 4  # as after a restart: three are running that we know nothing of
    assert look(a=4, b=4) == 1 + 4  # of the four at a one was ours a moment ago, and all four at b
    assert look(a=0, b=0) == 8
    assert look(a=50, b=0) == 1 + 4  # never none
    mind.status([InstanceNow("a", 100.0, None)], clock.monotonic_s())  # not known is not foreign
    assert look() == 8


def test_what_overflowed_is_our_own_too() -> None:
    mind, clock = brain(overcommit=2)
    mind.update_routing(table((ALL, {"a": "http://127.0.0.1:1"}), max_in_flight=4))
    for _ in range(8):
        assert mind.choose(mind.arrive(asked())) is not None
    mind.sweep()
    mind.status([InstanceNow("a", None, 8)], clock.monotonic_s())
    assert mind.queues(0.0)["all"].waiting == 4
    assert mind.dispatcher.table is not None
    assert mind.dispatcher.table.pools[0].instances[0].max_in_flight == 4


def test_alternatives_are_other_instances_of_pools_that_may_serve() -> None:
    mind, _ = brain()
    short, long = by_input("short", "SM"), by_input("long", "L")
    ends = {name: f"http://127.0.0.1:{number}" for number, name in enumerate("abc", start=1)}
    mind.update_routing(table((short, {"a": ends["a"], "b": ends["b"]}), (long, {"c": ends["c"]})))
    ticket = mind.arrive(asked("hi"))
    chosen = mind.choose(ticket)
    assert chosen is not None
    others = [each.instance_id for each in mind.alternatives(ticket, chosen, 5)]
    assert others == [("b" if chosen.instance_id == "a" else "a"), "c"]
    large = mind.arrive(asked([1] * 2000))
    only = mind.choose(large)
    assert only is not None
    assert only.instance_id == "c"
    assert mind.alternatives(large, only, 5) == []


def test_what_nobody_speaks_of_is_forgotten_and_given_back() -> None:
    mind, clock = brain()
    mind.update_routing(table((ALL, {"e": "http://127.0.0.1:1"}), max_in_flight=2))
    held = Held(mind, forget_s=30)
    names = []
    for _ in range(2):
        ticket = mind.arrive(asked())
        instance = mind.choose(ticket)
        assert instance is not None
        names.append(held.hold(ticket, instance))
    assert mind.choose(mind.arrive(asked())) is None
    clock.advance(20)
    assert held.hear(names[0]) is not None
    clock.advance(20)
    held.sweep()
    assert len(held) == 1
    assert held.hear(names[1]) is None
    assert held.unknown == 1
    assert mind.choose(mind.arrive(asked())) is not None
    held.end(names[0], Outcome.SERVED)
    held.end(names[0], Outcome.SERVED)
    assert mind.outcomes == {(Outcome.FORGOTTEN, "SL"): 1, (Outcome.SERVED, "SL"): 1}


def test_keys_are_known_by_their_hash_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\nacme {hashlib.sha256(b'secret').hexdigest()}\n")
    access = Access(path)
    assert access.tenant("Bearer secret") == "acme"
    for wrong in ("", "Basic secret", "Bearer other", "secret"):
        with pytest.raises(Refusal) as refused:
            access.tenant(wrong, "acme")
        assert refused.value.status == 401
        assert "secret" not in refused.value.message
    path.write_text(f"other {hashlib.sha256(b'new').hexdigest()}\n")
    os.utime(path, ns=(1, 1))
    access.refresh()
    assert access.tenant("bearer new") == "other"
    path.write_text("broken\n")
    os.utime(path, ns=(2, 2))
    access.refresh()
    assert access.tenant("bearer new") == "other"  # the last good ones hold
    with pytest.raises(UserError, match="line 1"):
        Access(path)
    assert Access(None).tenant("", "claimed") == "claimed"


def test_the_last_table_is_kept_and_a_broken_one_is_none(tmp_path: Path) -> None:
    kept = table((ALL, {"e": "http://127.0.0.1:1"}), term=3, version=7)
    snapshot = Snapshot(tmp_path)
    assert snapshot.load() is None
    snapshot.save(kept)
    assert Snapshot(tmp_path).load() == kept
    (tmp_path / "routing.pb").write_bytes(b"\xff\xff")
    assert Snapshot(tmp_path).load() is None
    Snapshot(tmp_path / "no" / "folder").save(kept)  # costs the snapshot, nothing else
    Snapshot(None).save(kept)
    assert Snapshot(None).load() is None
