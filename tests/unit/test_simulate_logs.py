"""An operator's own log as a trace: columns, units, nested keys, and rows that are no request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from simulator.logs import AZURE, NAMED_ROWS, LogColumns, read_log

COLUMNS = LogColumns.parse("arrival=at, input=usage.prompt, output=usage.answer, unit=ms")


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_json_lines_are_read_by_nested_keys_and_sorted(tmp_path):
    known = ((9000, 30, 3), (5000, 10, 1), (6500, 20, 2))
    rows = [{"at": at, "usage": {"prompt": tokens, "answer": answer}} for at, tokens, answer in known]
    trace, skipped = read_log(write(tmp_path, "own.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"), COLUMNS)
    assert trace.arrival_s.tolist() == [0.0, 1.5, 4.0]
    assert (trace.input_tokens.tolist(), trace.output_tokens.tolist()) == ([10, 20, 30], [1, 2, 3])
    assert trace.duration_s == pytest.approx(6.0)  # three requests span three gaps of 2 s in the mean
    assert skipped.rows == 0


def test_csv_columns_may_stand_anywhere_and_times_may_be_dates(tmp_path):
    text = "id,out,when,in\na,5,2024-05-10 00:00:00.25+00:00,7\nb,6,2024-05-10T00:00:02Z,8\n"
    file = write(tmp_path, "own.csv", text)
    trace, _ = read_log(file, LogColumns("when", "in", "out"))
    assert trace.arrival_s.tolist() == [0.0, 1.75]
    assert trace.input_tokens.tolist() == [7, 8]


def test_rows_that_are_no_request_are_counted_and_named(tmp_path):
    good = "".join(f"{second},10,5\n" for second in range(40))
    bad = "7,abc,5\n8,10,0\n9,10\nsoon,10,5\ninf,10,5\n,10,5\n"
    trace, skipped = read_log(write(tmp_path, "own.csv", "t,i,o\n" + bad + good), LogColumns("t", "i", "o"))
    assert len(trace) == 40
    assert skipped.rows == 6
    said = "\n".join(skipped.examples)
    for part in ("own.csv:2: i 'abc'", "own.csv:3: o '0'", "own.csv:4: 2 fields", "own.csv:5: t 'soon'"):
        assert part in said
    assert "own.csv:7: t is missing" in said


def test_not_every_bad_row_is_named(tmp_path):
    text = "t,i,o\n" + "1,x,1\n" * 30 + "1,1,1\n" * 31
    _, skipped = read_log(write(tmp_path, "own.csv", text), LogColumns("t", "i", "o"))
    assert (skipped.rows, len(skipped.examples)) == (30, NAMED_ROWS)


def test_where_most_rows_are_bad_the_mapping_is(tmp_path):
    file = write(tmp_path, "own.csv", "t,i,o\n" + "1,x,1\n" * 3 + "1,1,1\n")
    with pytest.raises(UserError, match=r"3 of 4 rows are no request; the first: own\.csv:2"):
        read_log(file, LogColumns("t", "i", "o"))


def test_a_missing_column_or_file_is_said(tmp_path):
    with pytest.raises(UserError, match="has no column 'TIMESTAMP'"):
        read_log(write(tmp_path, "own.csv", "t,i,o\n1,1,1\n"), AZURE)
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path / "none.csv", AZURE)
    with pytest.raises(UserError, match="0 of 0 rows"):
        read_log(write(tmp_path, "empty.jsonl", ""), COLUMNS)


@pytest.mark.parametrize("text", ["at", "arrival=a,input=b", "arrival=a,input=b,output=c,unit=h", "arrival=a,x=b", ""])
def test_bad_mappings_are_refused(text):
    with pytest.raises(UserError, match="--columns"):
        LogColumns.parse(text)


def test_both_azure_formats_of_time_give_the_same(tmp_path):
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    rows_2023 = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    rows_2024 = "2024-05-10 00:00:00+00:00,374,44\n2024-05-10 00:00:04.314579+00:00,396,109\n"
    old, new = write(tmp_path, "a.csv", header + rows_2023), write(tmp_path, "b.csv", header + rows_2024)
    first, second = read_log(old, AZURE)[0], read_log(new, AZURE)[0]
    np.testing.assert_allclose(first.arrival_s, second.arrival_s, atol=1e-6)
