"""The controller's metrics against a golden file; dashboards and alerts against the metrics that really exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest

from controller.api.metrics import ControllerMetrics
from controller.domain.classes import RequestClass
from controller.domain.reasons import Level, Mode, Reason
from controller.fleet.port import (
    ClassCounters,
    EffectDone,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    QueueObservation,
    Solve,
    StartInstance,
    Tick,
)
from controller.loop.core import Core
from controller.loop.orders import CorrectProfile, SetMode, SetPowerBudget
from controller.loop.state import Instant
from controller.loop.week import ForecastError
from controller.policy.milp.plan import plan_for
from controller.store.recorder import RecorderCounts
from tests.store_suite import decision
from tests.synthetic_profile import MODEL
from tests.unit.test_loop_journal import PROFILE, SETTINGS

GOLDEN = Path(__file__).with_name("controller_metrics.txt")
DASHBOARDS = Path(__file__).parents[2] / "dashboards"
MS = RequestClass.parse("MS")


def page() -> str:
    """Of a made-up moment: one node with one instance that serves, one that is silent."""
    disable_created_metrics()  # type: ignore[no-untyped-call] # as in the daemon
    core = Core(replace(SETTINGS, instance_s=5, lease_ttl_s=20, pool_s=60, cluster_s=60), PROFILE, 3, 1)
    gpus = tuple(GpuObservation(f"g{i}", i, True, 100.0, 0.0, 800, None) for i in range(8))

    def see(at_s: float, *instances: InstanceObservation) -> None:
        core.handle(Instant(at_s, 1e9 + at_s), NodeSeen(NodeObservation("node-1", at_s, gpus, instances)))

    see(0.0)
    queue = [core.handle(Instant(0.0, 1e9), Tick(Level.INSTANCE))]
    started: list[StartInstance] = []
    while queue:
        for effect in queue.pop().effects:
            if isinstance(effect, Solve):
                done = EffectDone(effect.effect_id, True, solution=plan_for(effect.problem))
                queue.append(core.handle(Instant(0.0, 1e9), done))
            elif isinstance(effect, StartInstance):
                started.append(effect)
    instances = tuple(
        InstanceObservation(e.instance_id, MODEL, e.pool, e.gpu_uuids, InstanceState.READY, "http://x", 1.0, 0.0, 0.1)
        for e in started
    )
    for at_s in (10.0, 20.0):
        counts = ClassCounters(int(at_s), int(at_s), 0, int(at_s) - 1, 500 * int(at_s), 150 * int(at_s))
        queues = {"short": QueueObservation(3, 1, 0.1)}
        core.handle(Instant(at_s, 1e9 + at_s), LoadSeen(LoadObservation("g", "1", at_s, MODEL, {MS: counts}, queues)))
    see(20.0, *instances)
    core.order(Instant(20.0, 1e9 + 20), SetMode("node:node-9", Mode.PAUSED))
    core.order(Instant(20.0, 1e9 + 20), SetPowerBudget("cluster", 4000.0))
    core.order(Instant(20.0, 1e9 + 20), CorrectProfile({("long", 8): 1.15}, (("long", 8),)))
    core.handle(Instant(20.0, 1e9 + 20), Tick(Level.INSTANCE))
    core.state.forecast_errors["short"] = ForecastError(12, 0.3, 2.0, 0.25)
    counts_now = RecorderCounts(recorded=10, spooled=2, refused=1, spool_bytes=300, database_ok=False)
    circuits_open = {"node-1": False, "node-9": True}
    failed = {("node-9", "apply_clocks"): 7}
    metrics = ControllerMetrics(
        core.state, lambda: counts_now, lambda: 1, lambda: 21.0, lambda: circuits_open, lambda: failed
    )
    metrics.decided(decision(1, level=Level.POOL, reason=Reason.PLAN_KEPT))
    metrics.ticked(Level.INSTANCE, 0.004)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    return generate_latest(registry).decode()


def shape(text: str) -> str:
    """Names, types, help and labels, with values only where the scene fixes them, not a policy."""
    chosen = ("planned", "used_gpus", "ready_instances", "capacity", "granted", "locked_clock", "power_watts")
    lines = []
    for line in text.splitlines():
        if line[0] != "#" and any(part in line for part in chosen):
            line = re.sub(r'instance="[^"]*"', 'instance="*"', re.sub(r" [-\d.e+]+$", " *", line))
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def test_the_page_is_the_golden_one() -> None:
    text = shape(page()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "run with UPDATE_GOLDEN=1 and look at the difference"


def known() -> set[str]:
    """Names of all series: ours, the agent's and the gateway's, from their golden files and modules."""
    pages = [GOLDEN, GOLDEN.with_name("nodeagent_metrics.txt")]
    names = {m.group(1) for page in pages for m in re.finditer(r"^([a-z_]+)[{ ]", page.read_text(), re.MULTILINE)}
    gateway = Path(__file__).parents[2] / "controller" / "gateway" / "metrics.py"
    declared = re.findall(
        r"(Counter|Gauge|Histogram)MetricFamily\(\s*\"(dynamollm_[a-z_]+)\"", gateway.read_text(encoding="utf-8")
    )
    for kind, name in declared:
        endings = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}[kind]
        names |= {f"{name}{ending}" for ending in endings}
    return names


def asked() -> dict[str, set[str]]:
    """The series that each file in dashboards/ asks for."""
    found = {}
    for path in sorted(DASHBOARDS.iterdir()):
        if path.suffix in (".json", ".yml"):
            found[path.name] = set(
                re.findall(r"\b(dynamollm_[a-z_]+)\b(?=[{\[) ,]|\"|$|\\)", path.read_text(), re.MULTILINE)
            )
    return found


def test_dashboards_and_alerts_ask_only_for_what_there_is() -> None:
    names = known()
    files = asked()
    assert set(files) >= {"grafana-fleet.json", "alerts.yml"}
    for file, wanted in files.items():
        assert wanted, file
        assert sorted(wanted - names) == [], file


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    board = json.loads((DASHBOARDS / "grafana-fleet.json").read_text(encoding="utf-8"))
    assert board["schemaVersion"] >= 38
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) >= 10
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (apt-get install prometheus)")
@pytest.mark.parametrize("arguments", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts-test.yml")])
def test_promtool_accepts_the_alerts_and_their_tests(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=DASHBOARDS, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
