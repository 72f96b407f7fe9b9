"""The agent under the real systemd as PID 1: install, start, stop, kill, watchdog, engines as units, remove.

The emulated GPUs live outside, so their clocks can be looked at whatever happens inside.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from tests.nodehost import MODEL, until
from tests.realsystemd import missing
from tests.systemdnode import AGENT, GPUS, INSTALL, SOCKET, TOP, Node, installed

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no machine with systemd: it {missing()}")

READY, FAILED, STOPPED = (
    types.INSTANCE_STATE_READY,
    types.INSTANCE_STATE_FAILED,
    types.INSTANCE_STATE_STOPPED,
)
ODD = """a  "b" 'c' $d ${HOME} \\ \\\\n `e` %i %% # é ;"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    engine = {
        # A word and a variable that systemd reads twice on their way to the engine.
        "command": ["/usr/bin/env", f"ODD_WORD={ODD}", sys.executable, "-m", "simulator.host.vllm"],
        "env": {"PYTHONPATH": f"{TOP}:{TOP}/proto", "ODD_VALUE": ODD},
    }
    with installed(tmp_path_factory.mktemp("systemd"), engine) as node:
        yield node


def test_installed_it_is_ready(node: Node) -> None:
    assert node.serves()
    assert node.machine.show(AGENT, "StatusText").startswith("serving 4 GPUs")
    assert node.machine.run("stat", "-c", "%a %U %G", SOCKET).stdout.split() == ["660", "root", "dynamollm"]
    assert node.machine.show(AGENT, "UnitFileState") == "enabled"
    assert node.stub.GetNode(pb.GetNodeRequest(), timeout=10).node_id == "node-0"


def test_only_its_group_may_talk_to_it(node: Node) -> None:
    node.machine.run("useradd", "--no-create-home", "--groups", "dynamollm", "ada")
    node.machine.run("useradd", "--no-create-home", "eve")
    # Perl, because the interpreter of these tests may lie where only root looks.
    connect = ("perl", "-MIO::Socket::UNIX", "-e", "exit !IO::Socket::UNIX->new($ARGV[0])", SOCKET)
    for user, allowed in (("ada", True), ("eve", False)):
        login = ("setpriv", f"--reuid={user}", "--regid=nogroup", "--init-groups")
        assert (node.machine.run(*login, *connect, check=False).returncode == 0) is allowed, user


def test_it_is_operated_by_hand_where_it_is_installed(node: Node) -> None:
    node.machine.run("dynamollm", "node", "lock", "--mhz", "1200", "--gpu", "0")
    assert node.locks()[0] == (1200, 1200)
    shown = node.machine.run("env", "COLUMNS=200", "dynamollm", "node", "show").stdout
    assert "operator root (override)" in shown
    node.machine.run("dynamollm", "node", "reset")
    assert node.locks() == [None] * GPUS


def test_a_stop_restores_the_clocks(node: Node) -> None:
    node.lock()
    node.machine.run("systemctl", "stop", AGENT)
    assert node.locks() == [None] * GPUS
    assert node.machine.show(AGENT, "Result") == "success"
    node.machine.run("systemctl", "start", AGENT)  # returns at READY=1
    assert node.serves()


def test_a_killed_agent_leaves_no_clock_behind_and_comes_back(node: Node) -> None:
    node.lock()
    before = node.main_pid()
    node.machine.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", AGENT)
    until(lambda: node.locks() == [None] * GPUS)
    until(lambda: node.serves(other_than=before))
    assert int(node.machine.show(AGENT, "NRestarts")) >= 1


def test_a_stuck_agent_is_killed_by_the_watchdog(node: Node) -> None:
    node.lock()
    before = node.main_pid()
    os.kill(node.outside(before), signal.SIGSTOP)
    until(lambda: node.locks() == [None] * GPUS, 20)
    until(lambda: node.serves(other_than=before))
    assert "watchdog" in node.machine.run("journalctl", "-q", "--no-pager", "-u", AGENT).stdout.lower()


def test_engines_are_units_that_outlive_the_agent(node: Node) -> None:
    node.launch("a", [0, 1])
    first = node.wait_state("a", READY)
    unit = "dynamollm-vllm@a.service"
    assert int(node.machine.show(unit, "MainPID")) == first.pid
    assert node.machine.run("ps", "-o", "ppid=", "-p", str(first.pid)).stdout.strip() == "1"
    command = node.machine.run("cat", f"/proc/{first.pid}/cmdline").stdout.split("\0")
    assert command[:5] == [sys.executable, "-m", "simulator.host.vllm", "serve", MODEL]
    variables = node.machine.run("cat", f"/proc/{first.pid}/environ").stdout.split("\0")
    assert {f"ODD_WORD={ODD}", f"ODD_VALUE={ODD}"} <= set(variables)
    for way in (("restart",), ("kill", "--kill-whom=main", "-s", "KILL")):
        before = node.main_pid()
        node.machine.run("systemctl", *way, AGENT)
        until(lambda before=before: node.serves(other_than=before))  # type: ignore[misc] # bound here on purpose
        again = node.wait_state("a", READY)
        assert (again.pid, again.endpoint) == (first.pid, first.endpoint)


def test_an_engine_unit_is_restarted_with_other_gpus_then_drained_and_stopped(node: Node) -> None:
    first = node.instance("a").pid
    request = pb.RestartInstanceRequest(**node.request(), instance_id="a", gpu_uuids=node.gpus.uuids)
    begun = node.stub.RestartInstance(request, timeout=10)
    until(lambda: len(node.instance("a").spec.gpu_uuids) == GPUS, 40)
    after = node.wait_state("a", READY)
    assert begun.transaction_id in after.detail
    assert after.pid != first
    node.stub.DrainInstance(pb.DrainInstanceRequest(**node.request(), instance_id="a"), timeout=10)
    until(lambda: node.instance("a").detail.startswith("drained"))
    node.stub.StopInstance(pb.StopInstanceRequest(**node.request(), instance_id="a"), timeout=10)
    node.wait_state("a", STOPPED)
    assert node.machine.show("dynamollm-vllm@a.service", "ActiveState") == "inactive"


def test_an_engine_unit_that_dies_is_told_with_its_cause(node: Node) -> None:
    node.launch("b", [2, 3])
    pid = node.wait_state("b", READY).pid
    node.machine.run("kill", "-9", str(pid))
    assert "killed by signal 9" in node.wait_state("b", FAILED).detail
    node.launch("c", [2, 3])
    node.wait_state("c", READY)


def test_it_is_upgraded_under_running_engines_and_removed_only_without(node: Node) -> None:
    pid, agent = node.wait_state("c", READY).pid, node.main_pid()
    assert "kept    /etc/dynamollm/nodeagent.toml" in node.machine.run(*INSTALL, "install", "--linked").stdout
    assert node.main_pid() != agent
    assert node.wait_state("c", READY).pid == pid
    refused = node.machine.run(*INSTALL, "remove", check=False)
    assert refused.returncode == 1
    assert "dynamollm-vllm@c.service" in refused.stderr
    assert node.serves()
    node.lock()
    node.machine.run(*INSTALL, "remove", "--force", "--purge")
    assert node.locks() == [None] * GPUS
    left = node.machine.run(
        "find", "/etc", "/usr/lib", "/usr/bin", "/usr/share", "/var/lib", "/run",
        *("-path", "*dynamollm*", "-not", "-path", "*.d/site.conf", "-not", "-path", "*service.d", "-xdev"),
        check=False,
    ).stdout.split()  # fmt: skip
    assert [path for path in left if str(TOP) not in path and "site-packages" not in path] == []
    assert node.machine.show(AGENT, "LoadState") == "not-found"
