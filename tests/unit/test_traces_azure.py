"""Reading public traces: everything accepted is exact, everything else is one clear line with file and row."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from simulator import traces

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
TRACE_DIR = Path(os.environ.get("DYNAMOLLM_TRACE_DIR", Path(__file__).parents[3] / "shared" / "data"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_reads_fractions_offsets_and_a_last_line_without_newline(tmp_path: Path) -> None:
    trace = traces.read_azure(
        write(
            tmp_path,
            "\ufeff" + HEADER + "2023-11-16 18:15:46.6805900,374,44\r\n"
            "2023-11-16 18:15:47,396,109\n\n2024-05-10 00:00:00.009930+00:00,1,1",
        )
    )
    assert [(r.input_tokens, r.output_tokens) for r in trace] == [(374, 44), (396, 109), (1, 1)]
    assert trace.arrival_s[0] == 0
    assert trace.arrival_s[1] == pytest.approx(0.31941, abs=1e-5)
    assert len(trace) / trace.duration_s == trace.mean_rate_rps


def test_a_single_row_is_a_trace(tmp_path: Path) -> None:
    trace = traces.read_azure(write(tmp_path, HEADER + "2023-11-16 18:15:46,374,44\n"))
    assert list(trace) == [(0.0, 374, 44)]
    assert trace.duration_s > 0


GOOD = "2023-11-16 18:15:46.68,374,44\n"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", ":1:", "header"),
        ("time,in,out\n", ":1:", "header"),
        (HEADER, "", "no requests"),
        (HEADER + GOOD + "2023-11-16 18:15:47,374\n", ":3:", "2 fields"),
        (HEADER + GOOD + "2023-11-16 18:15:47,374,44,5\n", ":3:", "4 fields"),
        (HEADER + GOOD + "yesterday,374,44\n", ":3:", "TIMESTAMP 'yesterday'"),
        (HEADER + GOOD + ",374,44\n", ":3:", "TIMESTAMP"),
        (HEADER + GOOD + "2023-11-16 18:15:45,374,44\n", ":3:", "earlier"),
        (HEADER + "2023-11-16 18:15:46,-3,44\n", ":2:", "ContextTokens '-3'"),
        (HEADER + "2023-11-16 18:15:46,0,44\n", ":2:", "ContextTokens '0'"),
        (HEADER + "2023-11-16 18:15:46,10,nan\n", ":2:", "GeneratedTokens 'nan'"),
        (HEADER + "2023-11-16 18:15:46,10,1.5\n", ":2:", "GeneratedTokens '1.5'"),
        (HEADER + "2023-11-16 18:15:46,10,٣\n", ":2:", "GeneratedTokens"),
        (HEADER + "2023-11-16 18:15:46,10," + "9" * 5000 + "\n", ":2:", "GeneratedTokens"),
        (HEADER + '2023-11-16 18:15:46,10,"7\n', ":2:", "GeneratedTokens"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path: Path, text: str, where: str, what: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        traces.read_azure(path)
    assert f"{path}{where}" in caught.value.message
    assert what in caught.value.message
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.exit_code != 0


@pytest.mark.parametrize("make", ["missing", "folder", "binary"])
def test_what_is_no_text_file_is_said_so(tmp_path: Path, make: str) -> None:
    path = tmp_path / "trace.csv"
    if make == "folder":
        path.mkdir()
    elif make == "binary":
        path.write_bytes(b"\xff\xfe\x00\x01" * 10)
    with pytest.raises(UserError, match=r"trace\.csv"):
        traces.read_azure(path)


@pytest.mark.skipif(not TRACE_DIR.is_dir(), reason=f"no public traces in {TRACE_DIR} (set DYNAMOLLM_TRACE_DIR)")
@pytest.mark.parametrize(
    ("name", "count", "input_quantiles", "output_quantiles", "arrival_cv"),
    [
        ("conv", 19_366, (207, 1020, 2735, 4142), (54, 129, 424, 601), 1.1),
        ("code", 8_819, (147, 1469, 5188, 7436), (7, 13, 55, 251), 13.2),
    ],
)
def test_the_public_traces_are_read_whole(
    name: str, count: int, input_quantiles: tuple[int, ...], output_quantiles: tuple[int, ...], arrival_cv: float
) -> None:
    trace = traces.read_azure(TRACE_DIR / f"AzureLLMInferenceTrace_{name}.csv")
    assert len(trace) == count
    quantiles = [10, 50, 90, 99]
    np.testing.assert_allclose(np.percentile(trace.input_tokens, quantiles), input_quantiles, atol=1)
    np.testing.assert_allclose(np.percentile(trace.output_tokens, quantiles), output_quantiles, atol=1)
    gaps = np.diff(trace.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(arrival_cv, rel=0.01)
