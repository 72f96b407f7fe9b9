"""Configuration and command line: every mistake is one line that names it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common.config import load_config
from common.config_sample import to_toml
from common.errors import UserError
from nodeagent.config import PART, NodeAgentConfig, is_loopback

SAMPLE = Path(__file__).parents[2] / "systemd" / "nodeagent.toml"


def load(tmp_path: Path, text: str) -> NodeAgentConfig:
    path = tmp_path / "nodeagent.toml"
    path.write_text(text)
    return load_config(NodeAgentConfig, PART, path, environment={})


def test_the_sample_is_what_the_model_says() -> None:
    assert SAMPLE.read_text() == to_toml(NodeAgentConfig()), "run: dynamollm-nodeagent show-config --sample"


def test_the_sample_loads_as_the_defaults() -> None:
    assert load_config(NodeAgentConfig, PART, SAMPLE, environment={}) == NodeAgentConfig()


def test_what_show_config_prints_can_be_loaded_again(tmp_path: Path) -> None:
    text = '[engine]\ncommand = ["a b", "c"]\nenv = {X = "1", "Y Z" = "\\"q\\""}\n[logs]\nform = "json"\n'
    config = load(tmp_path, text)
    assert tomllib.loads(to_toml(config, comments=False)) == config.model_dump(mode="json")


def test_every_mistake_is_reported_at_once_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        load(
            tmp_path,
            'colour = "red"\nstate_dir = "here"\n[listen]\ntcp = "0.0.0.0:50051"\n[controls]\nclock_lok = true\n',
        )
    text = str(refusal.value)
    for part in ("colour: unknown key", "state_dir: must be an absolute path", "controls.clock_lok: unknown key"):
        assert part in text
    assert "listen.tcp: 0.0.0.0:50051 is not a loopback address" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[listen]\nunix_socket = ""', "nobody could reach the agent"),
        ('[listen]\nunix_socket = "run/x"', "must be an absolute path"),
        (f'[listen]\nunix_socket = "/{"x" * 120}"', "121 characters long"),
        ('[listen]\ntcp = "50051"', "is not HOST:PORT"),
        ('[metrics]\nlisten = "localhost"', "is not HOST:PORT"),
        ("[telemetry]\ninterval_s = 0.01", "telemetry.interval_s"),
        ("[engine]\ncommand = []", "engine.command"),
        ('node_id = "two words"', "not a usable node name"),
    ],
)
def test_senseless_values_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(tmp_path, text)
    assert complaint in str(refusal.value)


def test_loopback_is_told_from_the_rest() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "::", "node-7"))


def agent(*arguments: str, **environment: str) -> str:
    """What the command prints; a process of its own, because it sets up logging for good."""
    command = [sys.executable, "-m", "nodeagent.cli", *arguments]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout


def test_check_config_and_show_config(tmp_path: Path) -> None:
    path = tmp_path / "n.toml"
    path.write_text('node_id = "gpu-7"\n')
    assert agent("check-config", "--config", str(path)) == f"{path}: good\n"
    shown = agent("show-config", "--config", str(path), DYNAMOLLM_NODEAGENT__LOGS__LEVEL="debug")
    assert 'node_id = "gpu-7"' in shown
    assert 'level = "debug"' in shown
    assert agent("show-config", "--sample") == SAMPLE.read_text()
