"""The demonstration's own history, with its controller killed in the middle, is made again to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo_run import DemoRun, prepared, wait_for


@pytest.fixture(scope="module", autouse=True)
def _profile() -> None:
    prepared()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demonstrations_decisions_are_made_again(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--quick", "--u", "0.4", "--seed", "5") as demo:
        demo.wait_for_load()
        killed = demo.kill("controller")
        wait_for(lambda: demo.pid("controller") not in (None, killed), 30.0, "the controller is started again")
        demo.figures()
        database = demo.folder / "dynamollm" / "dynamollm.db"
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("dynamollm")),
                *("replay", "--from", "1h", "--json", "--database-url", f"sqlite:///{database}"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        report = json.loads(done.stdout)
        assert report["stretches"] >= 2
        assert report["differences"] == []
        assert report["solver_differs"] == report["without_inputs"] == 0
        assert report["identical"] > 20
