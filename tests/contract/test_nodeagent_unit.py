"""The systemd units: known keys only, closed as far as they can be, and the promises that rest on them."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nodeagent.config import NodeAgentConfig
from nodeagent.engine.systemd import ARGV_VARIABLE, DEFAULT_ENVIRONMENT_DIR, TEMPLATE

TOP = Path(__file__).parents[2]
AGENT = TOP / "systemd" / "dynamollm-nodeagent.service"
ENGINE = TOP / "systemd" / "dynamollm-vllm@.service"
needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt-get install systemd)"
)


def service(path: Path) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, delimiters=("=",), interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign] # keys are case-sensitive
    unit.read(path)
    return unit["Service"]


def test_it_restores_however_the_agent_ended() -> None:
    agent = service(AGENT)
    assert agent["ExecStopPost"].split()[1] == "restore"
    assert agent["Type"] == "notify"
    assert agent["Restart"] == "always"
    assert int(agent["WatchdogSec"]) > 0


def test_a_stop_has_time_to_restore() -> None:
    assert int(service(AGENT)["TimeoutStopSec"]) > NodeAgentConfig().controls.stop_deadline_s + 5


def test_engines_survive_the_agent() -> None:
    text = ENGINE.read_text()
    assert not any(line.startswith(("PartOf=", "BindsTo=", "Requires=")) for line in text.splitlines())
    assert service(ENGINE)["KillMode"] == "mixed"
    assert service(AGENT)["RuntimeDirectoryPreserve"] == "yes"


def test_the_agent_gives_up_on_an_engine_before_systemd_does() -> None:
    assert int(service(ENGINE)["TimeoutStopSec"]) > NodeAgentConfig().engine.stop_timeout_s


def test_unit_and_launcher_agree() -> None:
    engine = service(ENGINE)
    assert engine["EnvironmentFile"] == f"{DEFAULT_ENVIRONMENT_DIR}/%i.env"
    assert engine["ExecStart"].endswith(f" ${ARGV_VARIABLE}")
    assert TEMPLATE.format("%i") == "dynamollm-vllm@%i.service"
    log = NodeAgentConfig().engine_log_dir / "%i.log"
    assert engine["StandardOutput"] == f"truncate:{log}"


def test_every_capability_that_stays_is_explained() -> None:
    kept = service(AGENT)["CapabilityBoundingSet"].split()
    comments = [line for line in AGENT.read_text().splitlines() if line.startswith("#   CAP_")]
    assert [comment.split()[1] for comment in comments] == kept
    assert service(ENGINE)["CapabilityBoundingSet"] == ""


@needs_analyze
@pytest.mark.parametrize("unit", [AGENT, ENGINE], ids=lambda path: path.name)
def test_systemd_knows_every_key(tmp_path: Path, unit: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/usr/bin/dynamollm-nodeagent", "/bin/true"))
    checked = analyze("verify", "--man=no", "--recursive-errors=no", str(copy))
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr == ""


@needs_analyze
@pytest.mark.parametrize(("unit", "threshold"), [(AGENT, 30), (ENGINE, 40)], ids=["agent", "engine"])
def test_the_exposure_stays_low(unit: Path, threshold: int) -> None:
    checked = analyze("security", "--offline=true", f"--threshold={threshold}", "--no-pager", str(unit))
    assert checked.returncode == 0, checked.stdout


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;\\]+)", (TOP / name).read_text(), re.MULTILINE))


def test_a_node_gets_the_tested_versions_of_what_it_needs() -> None:
    node, tested = pins("requirements-node.lock"), pins("requirements-dev.lock")
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]}
    assert needed <= set(node)
    assert {name: tested.get(name) for name in node} == node


class TestInstaller:
    def run(self, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TOP / "scripts" / "install-node", *arguments],
            env=os.environ | {"DESTDIR": str(root), "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )

    def files(self, root: Path) -> list[str]:
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def test_it_installs_upgrades_and_removes_cleanly(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "install", "--linked")
        assert done.returncode == 0, done.stderr
        first = self.files(tmp_path)
        assert first == [
            "etc/dynamollm/nodeagent.toml",
            "etc/systemd/system/dynamollm-nodeagent.service",
            "etc/systemd/system/dynamollm-vllm@.service",
            "usr/bin/dynamollm",
            "usr/bin/dynamollm-nodeagent",
            "usr/lib/sysusers.d/dynamollm.conf",
            "usr/lib/tmpfiles.d/dynamollm.conf",
            "usr/share/doc/dynamollm-nodeagent/grpc.md",
            "usr/share/doc/dynamollm-nodeagent/node-agent.md",
            "usr/share/doc/dynamollm-nodeagent/operations.md",
            "usr/share/dynamollm/nodeagent.toml",
        ]
        config = tmp_path / "etc/dynamollm/nodeagent.toml"
        config.write_text("# ours\n")
        assert "kept" in self.run(tmp_path, "install", "--linked").stdout
        assert config.read_text() == "# ours\n"
        assert self.files(tmp_path) == first
        checked = subprocess.run(
            [tmp_path / "usr/bin/dynamollm-nodeagent", "check-config"], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
        help_text = [tmp_path / "usr/bin/dynamollm", "node", "drain", "--help"]
        assert subprocess.run(help_text, capture_output=True, check=False).returncode == 0
        assert "kept" in self.run(tmp_path, "remove").stdout
        assert self.files(tmp_path) == ["etc/dynamollm/nodeagent.toml"]
        assert self.run(tmp_path, "remove", "--purge").returncode == 0
        assert self.files(tmp_path) == []

    def test_what_it_installs_needs_nothing_of_a_controllers_packages(self) -> None:
        extras = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        names = sorted(
            {re.split(r"[\[<>=~;! ]", line)[0].lower() for line in extras["controller"] + extras["simulator"]}
        )
        locked = re.findall(r"^([a-z0-9-]+)==", (TOP / "requirements-node.lock").read_text(), re.MULTILINE)
        names = [name for name in names if name not in ("dynamollm", *locked)]
        code = (
            "import sys, nodeagent.daemon, nodeagent.cli, controller.cli.on_node\n"
            "from importlib.metadata import packages_distributions\n"
            f"owners, extras = packages_distributions(), set({names!r})\n"
            "tops = {name.partition('.')[0] for name in sys.modules}\n"
            "print([top for top in tops if {owner.lower() for owner in owners.get(top, [])} & extras])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TOP)
        assert "numpy" in names
        assert done.stdout.strip() == "[]"

    @pytest.mark.parametrize("arguments", [(), ("upgrade",), ("install", "--purge"), ("remove", "--linked")])
    def test_what_it_does_not_know_changes_nothing(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        done = self.run(tmp_path, *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("scripts/install-node: ")
        assert self.files(tmp_path) == []

    @pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="systemd-tmpfiles is not installed")
    def test_folders_and_users_are_what_systemd_can_read(self, tmp_path: Path) -> None:
        self.run(tmp_path, "install", "--linked")
        (tmp_path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (tmp_path / "etc" / "group").write_text("root:x:0:\n")
        for program in (("systemd-sysusers",), ("systemd-tmpfiles", "--create")):
            done = subprocess.run(
                [*program, f"--root={tmp_path}", "dynamollm.conf"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
        assert "dynamollm-engine" in (tmp_path / "etc" / "passwd").read_text()
        assert (tmp_path / "run/dynamollm/engines").stat().st_mode & 0o777 == 0o700


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
