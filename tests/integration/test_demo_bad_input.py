"""Bad input to the demonstration and its set-up: one clear line that says what to do, exit status not 0."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo_run import prepared

# The first test may have to measure the profile.
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture(scope="module", autouse=True)
def _profile() -> None:
    prepared()


def demo(*arguments: str) -> tuple[int, str]:
    """Exit status, and the lines on stderr joined."""
    done = subprocess.run(
        [sys.executable, "-m", "simulator.demo", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER + "2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:47.1,many,44\n", ":3: ContextTokens 'many'"),
        (HEADER + "yesterday,374,44\n", ":2: TIMESTAMP 'yesterday'"),
        ("a,b\n1,2\n", ":1: the header"),
        (HEADER, "no requests"),
    ],
)
def test_a_bad_trace_is_named_with_its_row(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text, encoding="utf-8")
    status, line = demo("--quick", "--trace", str(file))
    assert status == 2
    assert said in line
    assert "\n" not in line


def test_an_unknown_trace_file_is_named() -> None:
    status, line = demo("--quick", "--trace", "no-such.csv")
    assert status == 2
    assert "no-such.csv: no such trace file" in line


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, line = demo("--quick", "--port", str(port), "--dir", str(tmp_path / "run"))
    assert status != 0
    assert f"--port {port}: the port is in use" in line
    assert "\n" not in line


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    status, line = demo("--quick", "--dir", str(tmp_path))
    assert status == 2
    assert "not empty" in line


def test_a_json_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    status, line = demo("--quick", "--json", str(tmp_path / "missing" / "figures.json"))
    assert status == 2
    assert "does not exist" in line


def test_unknown_physics_are_refused() -> None:
    status, line = demo("--quick", "--physics", "imaginary")
    assert status == 2
    assert "imaginary" in line


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What scripts/setup reads, with nothing set up."""
    copy = tmp_path / "checkout"
    for folder in ("scripts", "simulator/host/nvml"):
        shutil.copytree(ROOT / folder, copy / folder)
    for file in ("pyproject.toml", "requirements.lock", "requirements-dev.lock"):
        shutil.copy(ROOT / file, copy / file)
    return copy


def setup(checkout: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [checkout / "scripts" / "setup"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )
    return done.returncode, done.stderr.strip()


def test_a_missing_compiler_is_named_before_anything_is_installed(checkout: Path) -> None:
    status, line = setup(checkout, CC="no-such-compiler")
    assert status != 0
    assert "no-such-compiler" in line
    assert "apt-get install gcc" in line
    assert not (checkout / ".venv").exists()


def test_a_missing_python_is_named(checkout: Path) -> None:
    status, line = setup(checkout, PYTHON="no-such-python")
    assert status != 0
    assert "no-such-python is not Python 3.11" in line
