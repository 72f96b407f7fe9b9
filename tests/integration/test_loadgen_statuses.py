"""The load generator against engines and gateways that do well and badly: every request ends as exactly one of served,
failed, refused and lost, with its own times beside the engine's."""

from __future__ import annotations

import asyncio

import pytest

from common.loadgen import LoadOptions, Progress, Record, Status, counts, overhead_s, run_load
from tests.gateway_stand_ins import MODEL, Engine, serving


async def load(engine: Engine, *arrivals: tuple[float, int, int], **options: float) -> list[Record]:
    async with serving(engine):
        return await run_load(arrivals, LoadOptions(engine.endpoint, MODEL, **options))


async def test_served_requests_carry_all_times() -> None:
    engine = Engine(token_s=0.02)
    records = await load(engine, (0.0, 10, 5), (0.05, 300, 8))
    assert counts(records) == {Status.SERVED: 2}
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.tokens) for r in records] == [
        (0.0, 10, 5, 5),
        (0.05, 300, 8, 8),
    ]
    for record in records:
        assert record.ttft_s is not None
        assert record.total_s is not None
        assert 0.015 < record.ttft_s < record.total_s
        assert len(record.gaps_s) == len(record.stamp_gaps_s) == record.tokens - 1
        assert len(record.lags_s) == record.tokens
        assert min(record.lags_s) > -1e-3
        stamped = record.latency()
        assert stamped.ttft_s is not None
        assert stamped.ttft_s <= record.ttft_s + 1e-3
        assert stamped.tbt_s is not None
        assert stamped.tbt_s >= 0.015
        assert record.latency(by_stamps=False).ttft_s == record.ttft_s
    assert len(overhead_s(records)) == 13
    assert [len(request["prompt"]) for request in engine.requests] == [10, 300]
    assert engine.requests[0]["ignore_eos"] is True
    assert engine.requests[0]["max_tokens"] == 5


async def test_it_is_open_loop() -> None:
    """Requests go out at their times although none before has been answered."""
    engine = Engine(hangs=True)
    records = await load(engine, *((n * 0.02, 10, 5) for n in range(10)), timeout_s=1.0)
    assert len(engine.requests) == 10
    assert counts(records) == {Status.LOST: 10}
    assert "within 1 s" in records[0].detail
    sent = [record.sent_wall_s - records[0].sent_wall_s for record in records]
    assert sent == sorted(sent)
    assert sent[-1] >= 0.17


@pytest.mark.parametrize(
    ("engine", "status", "detail"),
    [
        (Engine(status=429), Status.REFUSED, "engine says no"),
        (Engine(status=503), Status.REFUSED, "engine says no"),
        (Engine(status=500), Status.FAILED, "engine says no"),
        (Engine(status=400), Status.FAILED, "engine says no"),
        (Engine(dies_after=0), Status.LOST, "connection lost"),
        (Engine(dies_after=2), Status.LOST, "connection lost"),
        (Engine(sends_done=False), Status.LOST, "no end mark"),
    ],
)
async def test_each_bad_end_has_its_status(engine: Engine, status: Status, detail: str) -> None:
    (record,) = await load(engine, (0.0, 10, 4))
    assert record.status is status
    assert detail in record.detail
    assert record.latency().served is False


async def test_progress_and_ends_are_told_as_they_come() -> None:
    progress: list[Progress] = []
    ended: list[Record] = []
    engine = Engine(token_s=0.05)
    async with serving(engine):
        options = LoadOptions(engine.endpoint, MODEL, progress_s=0.05)
        records = await run_load([(0.0, 1, 8), (0.2, 1, 1)], options, progress.append, ended.append)
    assert progress[0].in_flight == 1
    assert progress[-1].in_flight == 0
    assert progress[-1].ended == {Status.SERVED: 2}
    assert {id(record) for record in ended} == {id(record) for record in records}


async def test_a_refused_connection_is_tried_again_as_nothing_was_sent() -> None:
    engine = Engine()
    async with serving(engine):
        port = int(engine.endpoint.rsplit(":", 1)[1])
    running = asyncio.create_task(run_load([(0.0, 1, 2)], LoadOptions(engine.endpoint, MODEL)))
    await asyncio.sleep(0.3)
    server = await asyncio.start_server(engine, "127.0.0.1", port)
    try:
        (record,) = await running
    finally:
        server.close()
    assert record.status is Status.SERVED
    assert record.ttft_s is not None
    assert record.ttft_s > 0.2  # the wait counts


async def test_a_service_that_is_not_there_loses_the_request_with_a_reason() -> None:
    (record,) = await run_load([(0.0, 1, 2)], LoadOptions("http://127.0.0.1:9", MODEL, connect_retry_s=0.1))
    assert record.status is Status.LOST
    assert record.detail.startswith("not sent: 127.0.0.1:9")
