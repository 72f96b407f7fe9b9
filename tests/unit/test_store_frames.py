"""Packed input frames: whatever the journal wrote comes out again, and it takes little room."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.store.codec import pack, unpack
from controller.store.frames import frame_lines, pack_frame
from tests.first_format import pack_first


def text(*line: Any) -> str:
    return json.dumps(line, separators=(",", ":"))


def parsed(lines: tuple[str, ...] | list[str]) -> list[Any]:
    return [json.loads(line) for line in lines]


# Mostly what a controller writes; now and then what it never should.
tenths = st.integers(0, 100).map(lambda n: n / 100)
reading = st.one_of(
    st.none(),
    st.integers(0, 70).map(float),
    tenths,
    st.sampled_from([3, -0.0, -1.0, 1e300, 0.123456, 2.0**40, math.inf]),
)
calm_reading = st.one_of(st.none(), st.integers(0, 300).map(float))
triple = st.one_of(st.tuples(calm_reading, calm_reading, tenths), st.tuples(reading, reading, reading)).map(list)


@st.composite
def batches(draw: st.DrawFn) -> str:
    nodes = draw(st.integers(0, 6))
    ages = draw(
        st.lists(
            st.one_of(st.none(), st.integers(0, 9).map(lambda n: 37 + 100 * n), st.integers(0, 90000), st.just([1.5])),
            min_size=nodes,
            max_size=nodes,
        )
    )
    seen = [str(node) for node, age in enumerate(ages) if age is not None]
    chosen = draw(st.lists(st.sampled_from(seen), unique=True)) if seen else []
    live = {node: draw(st.lists(triple, min_size=1, max_size=4)) for node in chosen}
    return text("b", draw(st.floats(0, 1e6)), ages, live)


count = st.one_of(st.integers(0, 99), st.integers(-(10**6), 10**18))
queue = st.one_of(
    st.tuples(st.sampled_from("pq"), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9999).map(lambda n: n / 1e3)),
    st.tuples(st.just("p"), st.integers(0, 9), st.just(0), st.floats(0, 9), st.just(1), st.just({"too_late": 2})),
)


@st.composite
def loads(draw: st.DrawFn) -> str:
    names = draw(st.lists(st.sampled_from(["SS", "MS", "LL"]), unique=True))
    counts = {name: draw(st.lists(count, min_size=6, max_size=6)) for name in names}
    now_s = draw(st.one_of(st.integers(0, 10**12).map(lambda n: n / 1e6), st.floats(0, 1e6)))
    queues = draw(st.one_of(st.none(), st.lists(queue.map(list), max_size=3)))
    whole = draw(st.sampled_from([0, 0, 0, 1]))
    gateway = [draw(st.sampled_from(["g", "h"])), draw(st.sampled_from(["1", "2"]))]
    return text("l", now_s, now_s + 1.75e9, [*gateway, round(now_s, 3), "m", whole, counts, queues])


other = st.sampled_from(['["t",1.0,2.0,"instance"]', '["d",1.0,2.0,"e",true,"",null]', "[]", '["b",1]', '["l",1,2,3]'])


@given(st.lists(st.one_of(batches(), loads(), other), max_size=12))
def test_lines_come_out_as_they_went_in(lines: list[str]) -> None:
    again = frame_lines(pack_frame(lines))
    assert parsed(again) == parsed(lines or [])
    for was, now in zip(lines, again, strict=True):
        if '"b"' not in was:  # nodes come in another order
            assert now == was


def a_busy_frame(nodes: int, seconds: int) -> list[str]:
    """Four instances a node whose requests come and go, a tick each five seconds, a gateway's report each second."""
    chance = random.Random(1)
    held = [[chance.randint(10, 30) for _ in range(4)] for _ in range(nodes)]
    lines = []
    for second in range(seconds):
        now_s = round(1000.0 + second + chance.gauss(0, 0.002), 6)
        counts = {}
        for name in ("SS", "MS", "LM", "LL"):
            arrived = chance.randint(80, 120)
            done = chance.randint(80, 120)
            counts[name] = [arrived, done, 0, done, 500 * arrived + chance.randint(0, 4000), 150 * done]
        queues = [["short", 0, chance.randint(500, 520), 0.0], ["long", 0, chance.randint(100, 120), 0.0]]
        lines.append(text("l", now_s, now_s + 1.75e9, ["g", "1", round(now_s, 3), "m", 0, counts, queues]))
        if second % 5 == 4:
            live = {}
            for number, node in enumerate(held):
                node[:] = [max(0, n + round(chance.gauss(0, 4))) for n in node]
                live[str(number)] = [[float(n), 0.0, round(n / 50 + chance.random() / 50, 2)] for n in node]
            lines.append(text("b", now_s, [137 + 100 * (number % 10) for number in range(nodes)], live))
    return lines


def test_a_busy_frame_takes_well_under_half_of_what_text_takes() -> None:
    lines = a_busy_frame(nodes=40, seconds=100)
    packed = pack_frame(lines)
    assert list(frame_lines(packed)) == lines
    assert len(packed) < 0.48 * len(pack_first("\n".join(lines)))
    assert len(packed) / (40 * 4 * 20) < 3.2, "bytes for an instance and tick, with its share of the reports"


def test_a_body_is_plain_characters_in_the_database_and_in_the_spool() -> None:
    body = pack_frame(a_busy_frame(2, 10))
    assert json.dumps(body) == f'"{body}"'
    assert body.startswith("2:")
    assert body.isascii()


def test_the_first_format_is_read() -> None:
    lines = ('["t",1.0,2.0,"instance"]', '["b",1.0,[null],{}]')
    assert frame_lines(pack_first("\n".join(lines))) == lines


@pytest.mark.parametrize("damage", [lambda body: body[:-40], lambda body: "3:" + body[2:], lambda body: body[2:]])
def test_what_is_damaged_is_said_to_be(damage: Any) -> None:
    body = pack_frame(a_busy_frame(2, 20))
    with pytest.raises(ValueError, match="damaged"):
        frame_lines(damage(body))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_snapshot_comes_out_again_of_either_format(text: str) -> None:
    assert unpack(pack(text)) == unpack(pack_first(text)) == text


def test_a_snapshot_takes_well_under_what_it_took() -> None:
    text = "\n".join(a_busy_frame(nodes=2, seconds=400))
    assert len(pack(text)) < 0.75 * len(pack_first(text))
    assert pack(text).isascii()


@pytest.mark.parametrize("damage", [lambda body: body[:-40], lambda body: "3:" + body[2:], lambda body: body[2:]])
def test_a_damaged_snapshot_is_said_to_be(damage: Any) -> None:
    with pytest.raises(ValueError, match="damaged"):
        unpack(damage(pack("{}" * 100)))
