"""A power budget on real agents: the caps are there at once, and still there when the controller is gone.

The controller, its command line, the agents and their emulated GPUs are the real programs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from controller.store.engine import open_engine
from controller.store.repositories import list_orders
from simulator.host.nvml.state import HostState
from tests.controllerrig import Controller, ControllerRig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
BUDGET_W = 4500.0


def limits_w(rig: ControllerRig) -> list[float]:
    """Power limits in force, as every NVML client sees them."""
    found = []
    for host in rig.fleet.hosts:
        state = HostState.open(host.gpus)
        try:
            found += [state.power_limit_w(i) for i in range(state.gpu_count)]
        finally:
            state.close()
    return found


def cli(controller: Controller, *arguments: str, ok: int = 0) -> str:
    program = str(Path(sys.executable).with_name("dynamollm"))
    command = [program, *arguments, "--controller", controller.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ok, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def shown(controller: Controller) -> list[dict[str, Any]]:
    budgets: list[dict[str, Any]] = json.loads(cli(controller, "budget", "show", "--json")).get("budgets", [])
    return budgets


def test_a_budget_holds_when_the_controller_is_killed_and_ends_when_it_is_lifted(tmp_path: Path) -> None:
    with ControllerRig(tmp_path) as rig:
        before_w = limits_w(rig)
        first = rig.start("a", spool="spool")
        rig.serve_load(1.5)
        rig.wait(lambda: rig.ready(first), 60, "an instance is ready")
        rig.wait(rig.locked, 30, "a clock is locked")
        assert "no power budget" in cli(first, "budget", "show")
        assert "is no scope of budgets" in cli(first, "budget", "set", "row:nowhere", "5kW", ok=2)
        assert "is no power" in cli(first, "budget", "set", "cluster", "much", ok=2)

        cli(first, "budget", "set", "cluster", "4.5kW", "--until", "+1h", "--why", "grid event")
        rig.wait(lambda: sum(limits_w(rig)) <= BUDGET_W, 10, "every GPU is capped")
        rig.wait(lambda: shown(first)[0].get("held"), 10, "the controller knows it")
        (told,) = shown(first)
        assert told["caps_w"] <= BUDGET_W
        assert told["reachable"]
        explained = cli(first, "decision", "list", "--level", "cluster", "--limit", "20")
        assert "can be served in SLO" in explained
        time.sleep(6)  # ticks, plans and clocks go on: none of them takes a cap with it
        assert sum(limits_w(rig)) <= BUDGET_W

        first.process.kill()
        first.process.wait()
        rig.wait(lambda: not rig.locked(), 30, "clock locks end with their leases")
        assert sum(limits_w(rig)) <= BUDGET_W, "the caps do not"

        second = rig.start("a", spool="spool")
        highest_w = 0.0

        def held_again() -> bool:
            nonlocal highest_w
            highest_w = max(highest_w, sum(limits_w(rig)))
            return second.status() is not None and bool(shown(second)) and bool(shown(second)[0].get("held"))

        rig.wait(held_again, 60, "the next one holds the same budget")
        assert highest_w <= BUDGET_W, "also while it takes over"
        assert shown(second)[0]["until"][:22] == told["until"][:22]

        cli(second, "budget", "lift", "cluster", "--why", "grid event over")
        rig.wait(lambda: limits_w(rig) == before_w, 15, "the limits found before are back")
        assert "no power budget" in cli(second, "budget", "show")

        engine = open_engine(rig.database_url)
        orders = [(o.scope, o.value, o.why) for o in list_orders(engine) if o.kind.value == "budget"]
        engine.dispose()
        assert orders == [("cluster", "", "grid event over"), ("cluster", "4500.0", "grid event")]
        second.process.terminate()
        second.process.wait(20)
        report = json.loads(replayed(rig))
        assert report["differences"] == []


def replayed(rig: ControllerRig) -> str:
    program = str(Path(sys.executable).with_name("dynamollm"))
    command = [program, "replay", "--from", "1h", "--database-url", rig.database_url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
