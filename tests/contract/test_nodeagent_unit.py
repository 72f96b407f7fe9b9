"""The systemd unit: known keys only, and the promises that rest on it."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from nodeagent.config import NodeAgentConfig

UNIT = Path(__file__).parents[2] / "systemd" / "dynamollm-nodeagent.service"


@pytest.fixture
def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment,method-assign] # keys are case-sensitive
    unit.read(UNIT)
    return unit["Service"]


def test_it_restores_however_the_agent_ended(service: configparser.SectionProxy) -> None:
    assert service["ExecStopPost"].split()[1] == "restore"
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) > 0


def test_a_stop_has_time_to_restore(service: configparser.SectionProxy) -> None:
    assert int(service["TimeoutStopSec"]) > NodeAgentConfig().controls.stop_deadline_s + 5


def test_engines_survive_the_agent(service: configparser.SectionProxy) -> None:
    assert service["KillMode"] == "process"


def test_systemd_knows_every_key(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed: the unit's keys are not checked")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/usr/bin/dynamollm-nodeagent", "/bin/true"))
    checked = subprocess.run(
        [program, "verify", "--man=no", "--recursive-errors=no", str(copy)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr == ""
