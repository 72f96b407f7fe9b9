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


@pytest.mark.parametrize("listen", ["0.0.0.0:7700", "[::]:7700", "10.0.0.1:7700", "controller.fleet:7700", ":7700"])
def test_beyond_this_machine_it_listens_with_tls_only(listen: str) -> None:
    with pytest.raises(UserError, match=r"is not a loopback address; without \[tls\]"):
        load_config(ControllerConfig, "controller", SAMPLE, {}, {"listen": listen})
    files = {f"DYNAMOLLM_CONTROLLER__TLS__{name}": f"/{name}.pem" for name in ("CERT", "KEY", "CLIENT_CA")}
    assert load_config(ControllerConfig, "controller", SAMPLE, files, {"listen": listen}).tls.on
    del files["DYNAMOLLM_CONTROLLER__TLS__KEY"]
    with pytest.raises(UserError, match="cert, key and client_ca belong together"):
        load_config(ControllerConfig, "controller", SAMPLE, files, {"listen": listen})


@pytest.mark.parametrize("listen", ["127.0.0.1:7700", "[::1]:7700", "localhost:7700", "unix:/run/dynamollm/c.sock"])
def test_on_this_machine_it_needs_no_tls(listen: str) -> None:
    assert not load_config(ControllerConfig, "controller", SAMPLE, {}, {"listen": listen}).tls.on


def test_rows_and_hooks_are_checked_at_load(tmp_path: Path) -> None:
    sample = ControllerConfig.sample().model_dump()
    for section, wrong, said in (
        ("power", {"rows": {"a": ["nowhere"]}}, "power.rows.a: nowhere is no node_id"),
        ("power", {"min_cap_w": 800.0}, "min_cap_w is above"),
        ("provisioner", {"on": ["bmc", "{node}", "on"]}, "belong together"),
        ("provisioner", {"on": ["bmc", "on"], "off": ["bmc", "off"]}, "need {node}"),
    ):
        with pytest.raises(ValueError, match=said):
            ControllerConfig.model_validate({**sample, section: {**sample[section], **wrong}})
    good = {**sample, "power": {**sample["power"], "rows": {"a": ["gpu-1"]}, "host_w": 900.0}}
    loop = ControllerConfig.model_validate(good).loop_settings()
    assert (loop.rows, loop.host_w, loop.node_ids, loop.provision) == ({"a": ("gpu-1",)}, 900.0, ("gpu-1",), None)
