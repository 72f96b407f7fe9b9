"""The file in which history waits: bounded, in order, and whole again after any crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from controller.store.spool import Spool

MANY = 1_000_000


@contextmanager
def opened(folder: Path, limit_bytes: int = MANY) -> Iterator[Spool]:
    spool = Spool(folder, limit_bytes)
    try:
        yield spool
    finally:
        spool.close()


def line(number: int, padding: int = 0) -> bytes:
    return json.dumps({"n": number, "x": "x" * padding}).encode() + b"\n"


def test_what_waits_survives_a_restart_in_order(tmp_path: Path) -> None:
    lines = [line(n) for n in range(10)]
    with opened(tmp_path) as spool:
        assert spool.append(lines[:6]) == 6
        spool.advance(spool.peek(2))
        assert spool.append(lines[6:]) == 4
        assert spool.peek(100) == lines[2:]
    with opened(tmp_path) as spool:  # what was drained but not yet cut comes again
        assert spool.peek(100) == lines


def test_a_drained_spool_is_empty_on_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append([line(1), line(2)])
        spool.advance(spool.peek(100))
        assert spool.is_empty
        assert spool.path.stat().st_size == 0
        assert spool.append([line(3)]) == 1
        assert spool.peek(100) == [line(3)]


def test_a_torn_tail_is_cut_and_nothing_else(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append([line(1), line(2, padding=200_000)])
        path = spool.path
    with path.open("ab") as file:
        file.write(line(3, padding=200_000)[:-1])
    with opened(tmp_path) as spool:
        assert spool.peek(100) == [line(1), line(2, padding=200_000)]
        spool.append([line(4)])
        assert spool.peek(100)[-1] == line(4)
    path.write_bytes(b'{"n":')
    with opened(tmp_path) as spool:
        assert spool.is_empty


def test_the_bound_holds_and_takes_what_fits_first(tmp_path: Path) -> None:
    lines = [line(n) for n in range(10)]
    with opened(tmp_path, limit_bytes=sum(map(len, lines[:4]))) as spool:
        assert spool.append(lines) == 4
        assert spool.append(lines) == 0
        assert "bound" in spool.last_error
        assert spool.path.stat().st_size <= spool.limit_bytes
        spool.advance(spool.peek(100))
        assert spool.append(lines[4:5]) == 1  # there is room again


def test_a_line_longer_than_a_read_is_read_whole(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append([line(1, padding=5000), line(2)])
        assert spool.peek(1, limit_bytes=64) == [line(1, padding=5000)]


def test_a_file_cut_by_somebody_else_does_not_stall(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append([line(1), line(2)])
        os.truncate(spool.path, len(line(1)) + 3)
        assert spool.peek(100) == [line(1)]
        assert "cut" in spool.last_error
        spool.advance([line(1)])
        assert spool.is_empty


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        Spool(tmp_path, MANY)
    with opened(tmp_path):  # free again
        pass


def test_a_folder_that_cannot_be_used_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"spool folder .* cannot be used"):
        Spool(tmp_path / "file" / "spool", MANY)


FULL_DISK = """
import resource, sys
from pathlib import Path
from controller.store.spool import Spool

spool = Spool(Path(sys.argv[1]), 1_000_000)
lines = [b'{"n":%d}\\n' % n for n in range(100)]
assert spool.append(lines[:50]) == 50
resource.setrlimit(resource.RLIMIT_FSIZE, (spool.size_bytes + 20, resource.RLIM_INFINITY))
assert spool.append(lines[50:]) == 0, "nothing of a batch may count that does not fit whole"
assert "too large" in spool.last_error, spool.last_error
assert spool.peek(200) == lines[:50]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert spool.append(lines[50:]) == 50
assert spool.peek(200) == lines
"""


def test_a_full_disk_takes_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    """The limit on file size makes the kernel stop a write half-way, as a full disk does."""
    subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True, timeout=60)


Steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 300), max_size=5)),
        st.tuples(st.just("drain"), st.integers(1, 4)),
        st.tuples(st.just("restart"), st.integers(0, 30)),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(Steps)
def test_nothing_is_lost_or_reordered_whatever_happens(steps: list[tuple[str, int | list[int]]]) -> None:
    """Against a plain list: lines drained since the file was last empty may come again, nothing else may differ."""
    with tempfile.TemporaryDirectory() as folder:
        number, kept, drained = 0, [], 0  # the file's lines, how many of them are drained
        spool = Spool(Path(folder), 3000)
        try:
            for kind, value in steps:
                if kind == "append" and isinstance(value, list):
                    lines = [line(number + offset, padding) for offset, padding in enumerate(value)]
                    number += len(lines)
                    kept += lines[: spool.append(lines)]
                elif kind == "drain" and isinstance(value, int):
                    lines = spool.peek(value)
                    assert lines == kept[drained : drained + value]
                    spool.advance(lines)
                    drained += len(lines)
                    if drained == len(kept):
                        kept, drained = [], 0
                elif isinstance(value, int):  # restart, after a crash that tore off `value` bytes of a next line
                    spool.close()
                    with spool.path.open("ab") as file:
                        file.write(line(number)[:value].rstrip(b"\n"))
                    spool = Spool(Path(folder), 3000)
                    drained = 0
                assert spool.size_bytes == sum(map(len, kept[drained:]))
                assert spool.path.stat().st_size <= 3000
        finally:
            spool.close()
