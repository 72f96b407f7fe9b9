"""Dashboards and alerts on a real Prometheus that scrapes a real fleet: each question is answered."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from simulator.demo.fleet import MODEL, free_ports
from tests.controllerrig import ControllerRig

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here (apt-get install prometheus)"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
# They come with the first forecast whose span has ended, which is after half a minute.
LATER = {
    "dynamollm_pool_forecast_error_ratio",
    "dynamollm_pool_forecast_exceeded_ratio",
    "dynamollm_actions_failed_total",  # there once a call has failed
}


def panels() -> list[tuple[str, str]]:
    """Title and question of each."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            found += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    return found


def filled(expression: str) -> str:
    """As Grafana asks it: with its own variables put in."""
    for name, value in (("$__rate_interval", "15s"), ("$__range", "1m"), ("$__interval", "5s")):
        expression = expression.replace(name, value)
    return re.sub(r"\$\{?[a-z_]+\}?", ".*", expression)


class Prometheus:
    """The real one, on a configuration of its own."""

    def __init__(self, folder: Path, targets: dict[str, list[str]]) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        jobs = [
            {"job_name": name, "static_configs": [{"targets": addresses}]}
            for name, addresses in sorted(targets.items())
        ]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "2s"},
            "rule_files": [str(DASHBOARDS / "alerts.yml")],
            "scrape_configs": jobs,
        }
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        command = [
            "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def ask(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", (parameters, answer.get("error"))
        return answer["data"]

    def ups(self) -> int:
        try:
            return sum(item["value"][1] == "1" for item in self.ask("query", query="up")["result"])
        except httpx.HTTPError:
            return 0


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """After half a minute of a fleet that serves requests."""
    folder = tmp_path_factory.mktemp("live")
    with ControllerRig(folder) as rig:
        metrics = f"127.0.0.1:{free_ports(1)[0]}"
        controller = rig.start("a", metrics_listen=metrics)
        rig.wait(lambda: controller.status() is not None, 60, "it leads")
        gateway = rig.start_gateway(controller)
        running = Prometheus(
            folder, {"controller": [metrics], "gateway": [gateway], "nodeagent": list(rig.agent_metrics.values())}
        )
        try:
            rig.wait(lambda: rig.ready(controller), 60, "an instance is ready")
            rig.wait(lambda: running.ups() == 4, 60, "everything is scraped")
            until_s = time.monotonic() + 20
            body = {"model": MODEL, "prompt": "word " * 300, "max_tokens": 8}
            while time.monotonic() < until_s:
                httpx.post(f"http://{gateway}/v1/completions", json=body, timeout=30)
            yield running
        finally:
            running.process.terminate()
            running.process.wait(20)


@pytest.mark.parametrize(("title", "expression"), panels())
def test_each_panel_is_answered(prometheus: Prometheus, title: str, expression: str) -> None:
    answer = prometheus.ask("query", query=filled(expression))
    assert answer["resultType"] in ("vector", "scalar")


def test_every_series_of_the_dashboards_is_scraped(prometheus: Prometheus) -> None:
    there = set(prometheus.ask("label/__name__/values"))
    wanted = {name for _, text in panels() for name in re.findall(r"\bdynamollm_[a-z_]+", text)} - LATER
    assert wanted
    assert sorted(wanted - there) == []


def test_most_panels_show_something(prometheus: Prometheus) -> None:
    empty = {title for title, text in panels() if not prometheus.ask("query", query=filled(text))["result"]}
    assert len(empty) <= len(panels()) // 4, sorted(empty)


def test_the_alerts_are_evaluated_and_silent(prometheus: Prometheus) -> None:
    groups = prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 5
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] == "err"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
