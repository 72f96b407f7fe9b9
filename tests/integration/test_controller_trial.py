"""`dynamollm savings --ab` on a running fleet: windows with the controller and without follow each other by the plan,
over the controller's death; what they have shown is told at the terminal, over gRPC and in the history; the fleet is
left active.

Controllers, command line, agents and their emulated GPUs are the real programs; the test reports the load.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from controller.domain.reasons import Mode
from controller.store.engine import open_engine
from tests.controllerrig import Controller, ControllerRig
from tests.unit.test_store_sql_cookbook import QUERIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Rows of half a second, leases that end within a window's first part.
QUICK = {
    "telemetry_window_s": "0.5",
    "telemetry_interval_s": "0.25",
    "periods__instance_s": "0.6",
    "lease__ttl_s": "1.8",
    "lease__rpc_deadline_s": "0.5",
}
PAIRS, WINDOW_S, SETTLE_S = 3, 5, 2.5
PLAN = ("--for", f"{2 * PAIRS * WINDOW_S}s", "--window", f"{WINDOW_S}s", "--settle", f"{SETTLE_S}s")


def savings(rig: ControllerRig, *arguments: str) -> dict[str, Any]:
    program = str(Path(sys.executable).with_name("dynamollm"))
    command = [program, "savings", "--ab", "--json", "--database-url", rig.database_url, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def told(controller: Controller) -> str:
    """By GetStatus."""
    status = controller.status()
    return status.last_sentences.get("trial", "") if status is not None else ""


def asked(rig: ControllerRig, query: str) -> list[dict[str, Any]]:
    engine = open_engine(rig.database_url)
    try:
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query)).mappings()]
    finally:
        engine.dispose()


def test_a_trial_goes_its_way_whoever_dies_and_leaves_the_fleet_active(tmp_path: Path) -> None:
    with ControllerRig(tmp_path) as rig:
        first = rig.start("a", spool="spool", **QUICK)
        rig.serve_load(1.0, every_s=0.2)
        rig.wait(lambda: rig.ready(first), 60, "an instance is ready")
        rig.wait(rig.locked, 30, "a clock is locked")

        # Killed in an off window: the next one goes on with it.
        begun = savings(rig, *PLAN, "--seed", "2")
        assert (begun["pairs"], begun["over"], begun["row_s"]) == (0, False, 0.5)
        rig.wait(lambda: rig.mode(first) is Mode.ADVISORY, 30, "an off window begins")
        rig.wait(lambda: not rig.locked(), 20, "the locks have run out")
        assert re.match(r"window \d of 6 is off \(advisory\) until ..:..:.. UTC", told(first))
        first.process.kill()
        first.process.wait()
        second = rig.start("a", spool="spool", **QUICK)
        rig.wait(lambda: rig.mode(second) is Mode.ACTIVE, 30, "the next one carries the plan on")
        rig.wait(rig.locked, 20, "and acts")

        # Stopped: active from then on.
        rig.wait(lambda: rig.mode(second) is Mode.ADVISORY or not told(second).startswith("window"), 40, "off, or over")
        assert savings(rig, "--stop")["over"]
        rig.wait(lambda: rig.mode(second) is Mode.ACTIVE, 20, "the fleet is active again")
        rig.wait(lambda: not told(second), 20, "there is no trial any more")

        # Through to its end.
        savings(rig, *PLAN, "--seed", "3")
        rig.wait(lambda: told(second).startswith("the trial is over"), 90, "it is over")
        assert rig.mode(second) is Mode.ACTIVE
        shown = savings(rig)
        assert shown["over"]
        assert shown["pairs"] + shown["left_out"] == PAIRS
        if shown["pairs"] == PAIRS:  # as it is, unless this machine stood still meanwhile
            assert shown["low"] <= shown["saved_ratio"] <= shown["high"]
            assert shown["found"] == (shown["low"] > 0) == shown["said"].startswith("Saved")
            rig.wait(lambda: shown["said"] in told(second), 3 * WINDOW_S, "GetStatus says the same")
        spans = asked(rig, QUERIES["What did a trial's windows draw?"])
        mhz = {
            mode: [s["mean_sm_mhz"] for s in spans if s["mode"] == mode and s["mean_sm_mhz"] and s["requests"]]
            for mode in ("active", "advisory")
        }
        assert max(mhz["advisory"]) > min(mhz["active"]), "off is full clock"

        # Somebody else's order ends it, and holds.
        savings(rig, *PLAN)
        rig.wait(lambda: told(second).startswith("window"), 20, "it has begun")
        program = str(Path(sys.executable).with_name("dynamollm"))
        command = [program, "mode", "cluster", "paused", "--why", "hands off", "--controller", second.address]
        subprocess.run(command, capture_output=True, timeout=60, check=True)
        rig.wait(lambda: "set the cluster's mode" in told(second), 20, "it has ended")
        assert savings(rig)["over"]
        assert rig.mode(second) is Mode.PAUSED
