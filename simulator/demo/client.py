"""The demonstration's users: a process of its own that replays the arrivals and writes down what became of each.

`python -m simulator.demo.client JOB` reads a `Job`, sends its requests through the gateway, tells its progress on
stdout (one JSON object a line) and leaves one JSON object per request in the job's result file.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from common.latency import Latency
from common.loadgen import Arrival, LoadOptions, Progress, Record, Status, run_load
from controller.domain.classes import ClassScheme
from controller.domain.slo import Slo

PROGRESS_S = 0.5


@dataclass(frozen=True, slots=True)
class Job:
    """What to send, and where to leave the results."""

    base_url: str
    model: str
    arrivals: Sequence[Arrival]
    results: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(value["base_url"], value["model"], [tuple(row) for row in value["arrivals"]], value["results"])


@dataclass(frozen=True, slots=True)
class Answered:
    """One request as it stands in the result file. Latencies by the engine's stamps; `client_*` and `lags_s` by the
    clock of the client, which is late by the whole way to it."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    status: Status
    detail: str
    ttft_s: float | None
    gaps_s: Sequence[float]
    client_ttft_s: float | None
    client_gaps_s: Sequence[float]
    lags_s: Sequence[float]  # of each token: received minus stamped
    sent_late_s: float
    headers: dict[str, str]

    def latency(self, by_stamps: bool = True) -> Latency:
        gaps = self.gaps_s if by_stamps else self.client_gaps_s
        ttft_s = self.ttft_s if by_stamps else self.client_ttft_s
        tbt_s = sum(gaps) / len(gaps) if gaps else None
        return Latency(self.input_tokens, self.status is Status.SERVED, ttft_s, tbt_s, gaps)


def read_results(path: Path) -> list[Answered]:
    answers = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            answers.append(Answered(**row | {"status": Status(row["status"])}))
    return answers


def _answered(record: Record) -> Answered:
    stamped = record.latency()
    return Answered(
        arrival_s=record.arrival_s,
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        status=record.status or Status.LOST,
        detail=record.detail,
        ttft_s=stamped.ttft_s,
        gaps_s=_rounded(stamped.gaps_s),
        client_ttft_s=record.ttft_s,
        client_gaps_s=_rounded(record.gaps_s),
        lags_s=_rounded(record.lags_s),
        sent_late_s=record.sent_late_s,
        headers=record.headers,
    )


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in values]


async def send(job: Job) -> list[Record]:
    """Sends everything and waits for the answers, telling of both on the way."""
    scheme, slo = ClassScheme(), Slo()
    judged = in_slo = 0

    def on_record(record: Record) -> None:
        nonlocal judged, in_slo
        latency = record.latency()
        bucket = scheme.input_bucket(record.input_tokens)
        judged += 1
        if latency.served and latency.ttft_s is not None:
            in_slo += slo.met(bucket, latency.ttft_s * 1e3, (latency.tbt_s or 0.0) * 1e3)

    def on_progress(progress: Progress) -> None:
        ended = {status.value: count for status, count in progress.ended.items()}
        _say(sent=progress.sent, in_flight=progress.in_flight, ended=ended, judged=judged, in_slo=in_slo)

    options = LoadOptions(base_url=job.base_url, model=job.model, progress_s=PROGRESS_S)
    _say(started_s=time.monotonic())
    return await run_load(job.arrivals, options, on_progress, on_record)


def _say(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def _until_told(job: Job) -> list[Record] | None:
    """None when SIGTERM came first."""
    work = asyncio.create_task(send(job))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
    with suppress(asyncio.CancelledError):
        return await work
    return None


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    records = uvloop.run(_until_told(job))
    if records is not None:
        lines = "".join(json.dumps(asdict(_answered(record))) + "\n" for record in records)
        Path(job.results).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
