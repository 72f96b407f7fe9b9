"""The gateway's configuration and command line: every mistake is one clear line and a non-zero exit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import load_config
from common.config_sample import to_toml
from common.errors import UserError
from controller.gateway.config import PART, GatewayConfig
from controller.gateway.daemon import bind

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DYNAMOLLM_")}
    return subprocess.run(
        [sys.executable, "-m", "controller.cli.gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=environment,
        check=False,
    )


def test_the_sample_is_written_from_the_model() -> None:
    sample = ROOT / "systemd" / "gateway.toml"
    assert sample.read_text(encoding="utf-8") == to_toml(GatewayConfig())
    assert load_config(GatewayConfig, PART, sample, environment={}) == GatewayConfig()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("listne = 'x'", "listne: unknown key"),
        ("listen = 'nowhere'", "listen: 'nowhere' is not HOST:PORT"),
        ("listen = '127.0.0.1:99999'", "listen"),
        ("controller = '127.0.0.1:0'", "controller: port 0"),
        ("report_interval_s = 0", "report_interval_s"),
        ("[classify]\noutput_quantile = 1", "classify.output_quantile"),
        ("[limits]\nwaiting = 0\nbody_bytes = 'x'", "limits.waiting"),
        ("[slo]\ntbt_ms = -1", "slo.tbt_ms"),
    ],
)
def test_bad_keys_are_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(GatewayConfig, PART, path, environment={})
    assert what in str(caught.value)
    assert str(path) in str(caught.value)


def test_check_and_show_config(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text("report_interval_s = 2.5\n")
    good = command("check-config", "--config", str(path))
    assert (good.returncode, good.stdout) == (0, f"{path}: valid\n")
    shown = command("show-config", "--config", str(path), "--listen", "127.0.0.1:1234", "--json")
    assert json.loads(shown.stdout)["report_interval_s"] == 2.5
    assert json.loads(shown.stdout)["listen"] == "127.0.0.1:1234"
    path.write_text("x = 1\n")
    bad = command("check-config", "--config", str(path))
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "x: unknown key" in bad.stderr


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = command("run", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert ran.returncode == 4
    assert ran.stderr.count("\n") == 1
    assert "cannot be bound" in ran.stderr
    assert "--listen" in ran.stderr


def test_an_address_that_is_none_is_said_so() -> None:
    with pytest.raises(UserError, match="no address"):
        bind("no.such.host.invalid:80")


def test_check_config_reads_the_file_of_keys(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(f'[access]\nkeys_file = "{tmp_path}/keys"\n')
    missing = command("check-config", "--config", str(config))
    assert missing.returncode == 2
    assert "cannot be read" in missing.stderr
    (tmp_path / "keys").write_text(f"ada {'0' * 64}\n")
    assert command("check-config", "--config", str(config)).returncode == 0
