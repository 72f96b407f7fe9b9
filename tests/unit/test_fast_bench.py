"""The form of a benchmark's answer; what it measures is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys

from simulator.bench.metric import Metric, of_repeats, report


def test_a_report_names_machine_version_and_metrics():
    answer = json.loads(json.dumps(report("simulator", [of_repeats("a.b", [3.0, 1.0, 2.5], "requests/s", 2.0)])))
    assert answer["metrics"] == [{"name": "a.b", "value": 2.5, "unit": "requests/s", "spread": 2.0, "target": 2.0}]
    assert answer["machine"]["cores"] >= 1
    assert answer["machine"]["cpu"]
    assert answer["version"]


def test_a_metric_need_not_have_a_target():
    assert Metric("x", 1.0, "s").target is None


def test_an_unknown_benchmark_is_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "simulator.bench", "nothing", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "no benchmark 'nothing'" in done.stderr
    assert "Traceback" not in done.stderr
