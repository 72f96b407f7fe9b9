"""An open-loop load generator: sends each request at its own time, whatever became of those before.

Speaks the OpenAI completions API with streaming. Besides its own clock it reads the stamps that an emulated engine
puts on its tokens (`emulated_at`), so that latencies of the engine and the cost of the way to this process stand side
by side. Runs on a shared machine: prompts are slices of prebuilt bytes and a token costs a few microseconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from common.http1 import ConnectFailed, Connection, Headers, connect, request_head, split_endpoint
from common.latency import Latency

Arrival = tuple[float, int, int]  # arrival_s from the start, input tokens, output tokens

STAMP = b'"emulated_at":'
# Prompts are three-digit token ids, which every vocabulary has, so that n tokens are a slice of 4 n bytes.
_LOWEST_ID, _IDS = 100, 400
_PROMPT_TOKENS = 1 << 15
_ERROR_BYTES = 2000


class Status(StrEnum):
    SERVED = "served"  # a complete answer
    FAILED = "failed"  # a clear error, before or within the answer
    REFUSED = "refused"  # 429 or 503: the service said that it cannot take it now
    LOST = "lost"  # neither answer nor word


@dataclass(frozen=True, slots=True)
class LoadOptions:
    base_url: str  # http://host:port
    model: str
    timeout_s: float = 300.0  # for a whole request
    connect_s: float = 5.0
    # Nothing has been sent while a connection is refused, so trying again repeats nothing.
    connect_retry_s: float = 5.0
    progress_s: float = 1.0


@dataclass(slots=True)
class Record:
    """What became of one request. Durations from the monotonic clock of this process; `*_wall_s` are UTC epoch
    seconds, as are the engine's stamps."""

    arrival_s: float
    input_tokens: int
    output_tokens: int  # asked for
    status: Status | None = None  # None until it has ended
    detail: str = ""
    http_status: int = 0
    sent_wall_s: float = 0.0
    sent_late_s: float = 0.0  # behind its arrival time: this process was busy
    tokens: int = 0  # received
    ttft_s: float | None = None  # received here, since sent
    total_s: float | None = None
    stamp_first_wall_s: float | None = None
    stamp_last_wall_s: float | None = None
    gaps_s: array[float] = field(default_factory=lambda: array("f"))  # between tokens received here
    stamp_gaps_s: array[float] = field(default_factory=lambda: array("f"))  # between the engine's stamps
    lags_s: array[float] = field(default_factory=lambda: array("f"))  # received here minus stamped
    headers: dict[str, str] = field(default_factory=dict)  # the service's x-… headers

    def latency(self, by_stamps: bool = True) -> Latency:
        """By the engine's stamps where there are any (and they are wanted), else by this process's clock."""
        served = self.status is Status.SERVED
        if by_stamps and self.stamp_first_wall_s is not None:
            return Latency(
                self.input_tokens,
                served,
                self.stamp_first_wall_s - self.sent_wall_s,
                _mean(self.stamp_gaps_s),
                self.stamp_gaps_s,
            )
        return Latency(self.input_tokens, served, self.ttft_s, _mean(self.gaps_s), self.gaps_s)


@dataclass(frozen=True, slots=True)
class Progress:
    elapsed_s: float
    sent: int
    ended: Counter[Status]

    @property
    def in_flight(self) -> int:
        return self.sent - sum(self.ended.values())


async def run_load(
    arrivals: Iterable[Arrival],
    options: LoadOptions,
    on_progress: Callable[[Progress], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Sends all requests and waits for their ends; returns one record each, in order of arrival.

    `on_record` hears of each request as it ends, `on_progress` of the whole every `options.progress_s`.
    Raises ValueError for a base URL that is none. Cancelling it closes all connections.
    """
    return await _Generator(options, on_progress, on_record).run(arrivals)


def counts(records: Iterable[Record]) -> Counter[Status]:
    return Counter(record.status for record in records if record.status is not None)


def overhead_s(records: Iterable[Record]) -> list[float]:
    """Received minus stamped, of every stamped token, in order of size: what the way to this process costs."""
    return sorted(lag for record in records for lag in record.lags_s)


def prompt_bytes(tokens: int, offset: int) -> bytes:
    """A JSON list of exactly `tokens` token ids; another offset gives another prompt, so that no prefix cache helps."""
    ids = _ids()
    start = offset % _PROMPT_TOKENS
    pieces = []
    while tokens > 0:
        taken = min(tokens, _PROMPT_TOKENS - start)
        pieces.append(ids[4 * start : 4 * (start + taken) - 1])
        tokens, start = tokens - taken, 0
    return b"[" + b",".join(pieces) + b"]"


_cached_ids: list[bytes] = []


def _ids() -> bytes:
    if not _cached_ids:
        # A full-period linear congruential sequence (multiplier 5, odd increment, modulus 2^15): scrambled, and the
        # same in every run.
        value, out = 1, []
        for _ in range(_PROMPT_TOKENS):
            value = (5 * value + 12_345) % _PROMPT_TOKENS
            out.append(b"%d" % (_LOWEST_ID + value * _IDS // _PROMPT_TOKENS))
        _cached_ids.append(b",".join(out) + b",")
    return _cached_ids[0]


class _Generator:
    def __init__(
        self,
        options: LoadOptions,
        on_progress: Callable[[Progress], None] | None,
        on_record: Callable[[Record], None] | None,
    ) -> None:
        self._options = options
        self._on_progress = on_progress
        self._on_record = on_record
        self._host, self._port = split_endpoint(options.base_url)
        self._model = json.dumps(options.model).encode()
        self._ended: Counter[Status] = Counter()
        self._sent = 0

    async def run(self, arrivals: Iterable[Arrival]) -> list[Record]:
        _ids()
        records: list[Record] = []
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            progress = group.create_task(self._progress(started_s))
            async with asyncio.TaskGroup() as requests:
                for arrival_s, input_tokens, output_tokens in arrivals:
                    wait_s = started_s + arrival_s - time.monotonic()
                    if wait_s > 0:
                        await asyncio.sleep(wait_s)
                    record = Record(arrival_s, input_tokens, output_tokens)
                    records.append(record)
                    self._sent += 1
                    requests.create_task(self._request(record, started_s, len(records)))
            progress.cancel()
        self._tell(started_s)
        return records

    async def _progress(self, started_s: float) -> None:
        while True:
            await asyncio.sleep(self._options.progress_s)
            self._tell(started_s)

    def _tell(self, started_s: float) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(time.monotonic() - started_s, self._sent, self._ended.copy()))

    async def _request(self, record: Record, started_s: float, number: int) -> None:
        body = b'{"model":%b,"prompt":%b,"max_tokens":%d,"ignore_eos":true,"stream":true,"temperature":0%b}' % (
            self._model,
            prompt_bytes(record.input_tokens, number * 7919),
            record.output_tokens,
            b',"stream_options":{"include_usage":true}',
        )
        headers = [("content-type", "application/json"), ("connection", "close")]
        head = request_head("POST", "/v1/completions", f"{self._host}:{self._port}", headers, len(body))
        record.sent_wall_s = time.time()
        sent_s = time.monotonic()
        record.sent_late_s = sent_s - started_s - record.arrival_s
        try:
            async with asyncio.timeout(self._options.timeout_s):
                connection = await self._connect()
                stream = _Stream(record, sent_s)
                try:
                    connection.send(head, body, stream)
                    await stream.ended
                finally:
                    connection.abort("no longer waited for")
        except ConnectFailed as error:
            record.status, record.detail = Status.LOST, f"not sent: {error}"
        except TimeoutError:
            record.status, record.detail = Status.LOST, f"no complete answer within {self._options.timeout_s:g} s"
        record.total_s = time.monotonic() - sent_s
        assert record.status is not None
        self._ended[record.status] += 1
        if self._on_record is not None:
            self._on_record(record)

    async def _connect(self) -> Connection:
        """The wait for a connection counts into the request's latency: to a user it is no different."""
        give_up_s = time.monotonic() + self._options.connect_retry_s
        while True:
            try:
                return await connect(self._host, self._port, self._options.connect_s)
            except ConnectFailed:
                if time.monotonic() >= give_up_s:
                    raise
                await asyncio.sleep(0.05)


class _Stream:
    """Sink of one answer: counts and times its events as they are read."""

    def __init__(self, record: Record, sent_s: float) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._record = record
        self._sent_s = sent_s
        self._last_s: float | None = None
        self._rest = b""
        self._usage_tokens: int | None = None
        self._error = ""
        self._done_seen = False

    def head(self, status: int, headers: Headers) -> None:
        self._record.http_status = status
        self._record.headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name.startswith(b"x-")
        }

    def body(self, data: bytes) -> None:
        if self._record.http_status != 200:
            self._rest = (self._rest + data)[:_ERROR_BYTES]
            return
        now_s, now_wall_s = time.monotonic(), time.time()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            self._event(event.removeprefix(b"data: "), now_s, now_wall_s)

    def _event(self, payload: bytes, now_s: float, now_wall_s: float) -> None:
        record = self._record
        if payload == b"[DONE]":
            self._done_seen = True
            return
        if payload.startswith(b'{"error"') or payload.startswith(b'{"object":"error"'):
            self._error = payload[:_ERROR_BYTES].decode(errors="replace")
            return
        if b'"usage":{' in payload or b'"usage": {' in payload:
            usage = json.loads(payload)
            self._usage_tokens = int(usage["usage"]["completion_tokens"])
            if not usage.get("choices"):
                return
        record.tokens += 1
        if self._last_s is None:
            record.ttft_s = now_s - self._sent_s
        else:
            record.gaps_s.append(now_s - self._last_s)
        self._last_s = now_s
        at = payload.find(STAMP)
        if at >= 0:
            stamp = _number(payload, at + len(STAMP))
            if record.stamp_last_wall_s is None:
                record.stamp_first_wall_s = stamp
            else:
                record.stamp_gaps_s.append(stamp - record.stamp_last_wall_s)
            record.stamp_last_wall_s = stamp
            record.lags_s.append(now_wall_s - stamp)

    def done(self, error: str | None) -> None:
        """Judges the answer. A break without a word is a loss, even after some tokens."""
        record = self._record
        if self._usage_tokens is not None:
            record.tokens = self._usage_tokens
        if record.http_status in (429, 503):
            record.status, record.detail = Status.REFUSED, self._rest.decode(errors="replace")
        elif record.http_status >= 300:
            record.status, record.detail = Status.FAILED, self._rest.decode(errors="replace")
        elif self._error:
            record.status, record.detail = Status.FAILED, self._error
        elif error is not None:
            record.status, record.detail = Status.LOST, error
        elif not self._done_seen or record.tokens != record.output_tokens:
            record.status = Status.LOST
            record.detail = (
                f"{record.tokens} of {record.output_tokens} tokens, {'' if self._done_seen else 'no '}end mark"
            )
        else:
            record.status = Status.SERVED
        if not self.ended.done():
            self.ended.set_result(None)


def _number(text: bytes, start: int) -> float:
    end = start
    while end < len(text) and text[end] not in b",}":
        end += 1
    return float(text[start:end])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
