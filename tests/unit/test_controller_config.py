"""The controller's configuration: the shipped sample, refused mistakes, and all of them named at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.config import load_config
from common.config_sample import to_toml
from common.errors import UserError
from controller.cli.controller import app
from controller.config import ControllerConfig

SAMPLE = Path(__file__).parents[2] / "systemd" / "controller.toml"


def test_the_shipped_sample_is_generated_from_the_model() -> None:
    assert SAMPLE.read_text(encoding="utf-8") == to_toml(ControllerConfig.sample())


def test_the_shipped_sample_loads_to_the_defaults() -> None:
    assert load_config(ControllerConfig, "controller", SAMPLE, environment={}) == ControllerConfig.sample()


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    text = SAMPLE.read_text(encoding="utf-8").replace("quantile = 0.95", "quantile = 1.5")
    path = tmp_path / "controller.toml"
    path.write_text(text.replace("instance_s = 5.0", "instnce_s = 5.0"), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(ControllerConfig, "controller", path, environment={})
    assert "periods.instnce_s: unknown key" in str(error.value)
    assert "planning.quantile" in str(error.value)


def test_the_lease_inequality_is_checked_at_load(tmp_path: Path) -> None:
    path = tmp_path / "controller.toml"
    path.write_text(SAMPLE.read_text(encoding="utf-8").replace("ttl_s = 20.0", "ttl_s = 10.0"), encoding="utf-8")
    with pytest.raises(UserError, match="three instance periods"):
        load_config(ControllerConfig, "controller", path, environment={})


def test_environment_and_flags_win(tmp_path: Path) -> None:
    environment = {"DYNAMOLLM_CONTROLLER__PLANNING__FILL": "0.7", "DYNAMOLLM_CONTROLLER__LISTEN": "127.0.0.1:1"}
    loaded = load_config(ControllerConfig, "controller", SAMPLE, environment, {"listen": "127.0.0.1:2"})
    assert loaded.planning.fill == 0.7
    assert loaded.listen == "127.0.0.1:2"


def test_check_config_says_what_is_missing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check-config", "--config", str(SAMPLE)])
    assert isinstance(result.exception, UserError)
    assert "profile.json: no such profile" in str(result.exception)
