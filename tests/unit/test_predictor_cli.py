"""`dynamollm predictor` and `dynamollm-gateway new-key`, as typed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.clock import VirtualClock
from common.errors import UserError
from controller.cli.gateway import app as gateway
from controller.cli.main import app as operator
from controller.gateway.access import Access
from controller.gateway.config import GatewayConfig
from controller.gateway.daemon import make_brain
from tests.unit.test_gateway_brain import asked


def test_train_show_and_serve_with_it(tmp_path: Path) -> None:
    log, out, draw = tmp_path / "log.jsonl", tmp_path / "p.npz", random.Random(2)
    with log.open("w") as file:
        for _ in range(400):
            ask, tokens = draw.choice([("classify", 5), ("write an essay", 900)])
            file.write(json.dumps({"prompt": f"{ask} {draw.randrange(99)}", "output_tokens": tokens}) + "\n")
    trained = CliRunner().invoke(operator, ["predictor", "train", str(log), "--out", str(out), "--json"])
    assert trained.exit_code == 0
    facts = json.loads(trained.stdout)
    assert facts["accuracy"] > 0.95
    shown = CliRunner().invoke(operator, ["predictor", "show", str(out)])
    assert "right output bucket" in shown.stdout
    config = GatewayConfig.model_validate({"classify": {"text_model": str(out)}})
    brain = make_brain(config, VirtualClock())
    said = {ask: brain.arrive(asked(f"{ask} 5")).classified for ask in ("classify", "write an essay")}
    assert [str(each.routing) for each in said.values()] == ["SS", "SL"]
    assert {each.source for each in said.values()} == {"text"}


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        CliRunner().invoke(operator, ["predictor", "train", str(tmp_path / "none.jsonl")], catch_exceptions=False)


def test_a_new_key_is_let_in(tmp_path: Path) -> None:
    made = CliRunner().invoke(gateway, ["new-key", "acme"])
    key, line = (text.partition(": ")[2].strip() for text in made.stdout.strip().splitlines())
    (tmp_path / "keys").write_text(line + "\n")
    assert Access(tmp_path / "keys").tenant(f"Bearer {key}") == "acme"
    with pytest.raises(UserError, match="no name"):
        CliRunner().invoke(gateway, ["new-key", "a b"], catch_exceptions=False)
