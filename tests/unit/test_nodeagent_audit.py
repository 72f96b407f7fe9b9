"""The audit log: whole lines, bounded size, and a disk that refuses them stops nothing."""

from __future__ import annotations

import json
from pathlib import Path

from common.clock import VirtualClock
from nodeagent.audit import AuditLog


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_line_says_who_what_why_when_and_what_came_of_it(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log", VirtualClock(), 1 << 20)
    log.write("ada", "TripGuard", "smoke\nin the aisle", "ok", request_id="r1")
    (line,) = lines(tmp_path / "audit.log")
    assert line == {
        "at": "2023-11-14T22:13:20.000+00:00",
        "who": "ada",
        "what": "TripGuard",
        "why": "smoke\nin the aisle",
        "outcome": "ok",
        "request_id": "r1",
    }


def test_one_older_file_is_kept(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log", VirtualClock(), 1000)
    for number in range(50):
        log.write("ada", f"{number}", "why", "ok")
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert all(0 < size <= 1000 for size in sizes)
    whole = lines(tmp_path / "audit.log.1") + lines(tmp_path / "audit.log")
    assert [line["what"] for line in whole] == [str(number) for number in range(50 - len(whole), 50)]


def test_a_new_agent_appends_also_after_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    AuditLog(path, VirtualClock(), 1 << 20).write("ada", "one", "", "ok")
    path.write_bytes(path.read_bytes() + b'{"half')
    AuditLog(path, VirtualClock(), 1 << 20).write("ada", "two", "", "ok")
    first, half, second = path.read_bytes().splitlines()
    assert json.loads(first)["what"] == "one"
    assert half == b'{"half'
    assert json.loads(second)["what"] == "two"


def test_a_file_that_cannot_be_written_is_counted_and_tried_again(tmp_path: Path) -> None:
    lost: list[int] = []
    log = AuditLog(tmp_path / "no-such-directory" / "audit.log", VirtualClock(), 1 << 20, lambda: lost.append(1))
    log.write("ada", "one", "", "ok")
    assert lost == [1]
    (tmp_path / "no-such-directory").mkdir()
    log.write("ada", "two", "", "ok")
    assert lost == [1]
    assert [line["what"] for line in lines(tmp_path / "no-such-directory" / "audit.log")] == ["two"]
