"""`dynamollm profile`: shown from a file and from the history, moved between them, drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import UserError
from controller.cli import main as cli
from controller.profile.table import SERVING, Actuator, ActuatorRow, Profile
from controller.store import migrate
from controller.store.engine import open_engine
from tests.synthetic_profile import synthetic_profile

LOCK_WINS = ActuatorRow(SERVING, "all", 8, 2.0, 800, 1000.0, 400.0, 1250.0, 0.01, Actuator.CLOCK)
CAP_WINS = replace(LOCK_WINS, load=4.0, cap_power_w=900.0, better=Actuator.CAP)
NO_CAP = replace(LOCK_WINS, load=6.0, cap_w=None, cap_power_w=0.0)


def run(*arguments: str) -> str:
    """Output of a command that succeeds; UserErrors come through."""
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def profile() -> Profile:
    plain = synthetic_profile()
    points = tuple(replace(p, repeats=4, power_sd_w=0.02 * p.power_w) for p in plain.points)
    capped = (replace(plain.points[0], cap_w=300.0),)
    return replace(plain, points=points, cap_points=capped, actuators=(LOCK_WINS, CAP_WINS, NO_CAP))


@pytest.fixture
def url(tmp_path: Path) -> str:
    name = f"sqlite:///{tmp_path / 'history.db'}"
    migrate.upgrade(open_engine(name, create=True))
    return name


def test_a_profile_goes_into_the_history_and_comes_back_the_same(profile: Profile, tmp_path: Path, url: str) -> None:
    file, out = tmp_path / "p.json", tmp_path / "again.json"
    file.write_text(profile.to_json())
    short = profile.checksum()[:12]
    assert short in run("profile", "import", str(file), "--database-url", url)
    listed = json.loads(run("profile", "list", "--database-url", url, "--json"))
    assert [(row["checksum"], row["schema"]) for row in listed] == [(profile.checksum(), 2)]
    assert short in run("profile", "list", "--database-url", url)
    run("profile", "export", short, str(out), "--database-url", url)
    assert Profile.from_json(out.read_text()) == profile


def test_show_tells_how_sure_it_is_and_which_actuator_wins(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(profile.to_json())
    said = run("profile", "show", str(file))
    for part in ("800 MHz", "400 W", "none in SLO", "clock", "cap", "the lock is better at 2, the cap at 1", "± W"):
        assert part in said, part
    rows = json.loads(run("profile", "show", str(file), "--json"))
    assert [row["better"] for row in rows["actuators"]] == ["clock", "cap", "clock"]
    assert rows["curves"][0]["error_ratio"] == pytest.approx(0.01)


def test_a_profile_without_caps_shows_none(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(synthetic_profile().to_json())
    assert "Clock lock or power cap" not in run("profile", "show", str(file))


def test_a_plot_is_drawn(profile: Profile, tmp_path: Path) -> None:
    file, out = tmp_path / "p.json", tmp_path / "p.svg"
    file.write_text(profile.to_json())
    run("profile", "plot", str(file), str(out))
    assert "<svg" in out.read_text()[:600]
    with pytest.raises(UserError, match=r"\.svg, \.png or \.pdf"):
        run("profile", "plot", str(file), str(tmp_path / "p.txt"))


def test_what_is_not_there_is_said(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        run("profile", "show", "nothing.json", "--database-url", url)
    with pytest.raises(UserError, match="no profile of that checksum"):
        run("profile", "show", "abc123", "--database-url", url)
    with pytest.raises(UserError, match="no folder"):
        run("calibrate", "--out", str(tmp_path / "missing" / "p.json"))
    for caps in ("many", "4000", "0"):
        with pytest.raises(UserError, match="--caps"):
            run("calibrate", "--out", str(tmp_path / "p.json"), "--caps", caps)
