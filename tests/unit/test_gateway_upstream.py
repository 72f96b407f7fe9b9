"""An engine's answer as the relay reads it: the bytes untouched, the tokens counted however the stream is cut."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.clock import VirtualClock
from common.http1 import Connection
from controller.gateway.upstream import HIGH_WATER_BYTES, Answer, UpstreamFailed, Upstreams

TOKENS = b"".join(b'data: {"choices":[{"text":"w%d"}]}\n\n' % n for n in range(9))
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":9}}\n\n'
DONE = b"data: [DONE]\n\n"


class Pausable(Connection):
    """A connection without a socket that remembers being paused."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")


@given(cuts=st.lists(st.integers(0, len(TOKENS + USAGE + DONE)), max_size=30), usage=st.booleans())
@settings(max_examples=150, deadline=None)
def test_events_are_counted_however_the_stream_is_cut(cuts: list[int], usage: bool) -> None:
    stream = TOKENS + (USAGE if usage else b"") + DONE

    async def run() -> None:
        clock = VirtualClock()
        answer = Answer(Pausable(), clock.monotonic_s)
        places = sorted({0, *cuts, len(stream)})
        read = b""
        for start, end in itertools.pairwise(places):
            clock.advance(0.01)
            if piece := stream[start:end]:
                answer.body(piece)
                read += await answer.read()
        answer.done(None)
        assert await answer.read() == b""
        assert read == stream
        assert answer.events == 10 + usage
        assert len(answer.gaps_s) == answer.events - 1
        assert answer.first_event_s + sum(answer.gaps_s) == pytest.approx(answer.last_event_s)
        assert answer.complaint() is None
        assert (answer.usage() is not None) == usage
        assert answer.token_events(usage) == 9

    asyncio.run(run())


async def test_a_break_is_told_after_what_had_arrived() -> None:
    answer = Answer(Pausable(), VirtualClock().monotonic_s)
    answer.body(b"data: a\n\n")
    answer.done("connection lost")
    await answer.ready()
    assert await answer.read() == b"data: a\n\n"
    with pytest.raises(UpstreamFailed, match="connection lost"):
        await answer.read()
    assert answer.complaint() == "the stream ended without [DONE]"


@pytest.mark.parametrize("event", [b'{"error":{"message":"x"}}', b'{"object":"error","message":"x"}'])
async def test_an_engines_error_event_is_no_answer(event: bytes) -> None:
    answer = Answer(Pausable(), VirtualClock().monotonic_s)
    answer.body(TOKENS + b"data: " + event + b"\n\n" + DONE)
    assert answer.complaint() == "the engine sent an error event"


async def test_a_slow_client_makes_the_engine_wait() -> None:
    connection = Pausable()
    answer = Answer(connection, VirtualClock().monotonic_s)
    answer.body(b"x" * (HIGH_WATER_BYTES + 1))
    answer.body(b"y")
    assert connection.calls == ["pause"]
    assert len(await answer.read()) == HIGH_WATER_BYTES + 2
    assert connection.calls == ["pause", "resume"]


async def test_a_whole_answer_is_bounded() -> None:
    answer = Answer(Pausable(), VirtualClock().monotonic_s)
    answer.body(b"x" * 100)
    with pytest.raises(UpstreamFailed, match="exceeds 99 bytes"):
        await answer.read_all(99)


async def test_an_endpoint_that_is_none_is_an_engine_failure() -> None:
    with pytest.raises(UpstreamFailed, match="http://HOST:PORT"):
        await Upstreams(1.0, VirtualClock().monotonic_s).open("ftp://x", "/v1/completions", [], b"{}")
