"""Certificates for calls to others: what is checked before anything is opened, and how a mistake is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from common.errors import UserError
from common.tls import ClientTls, check_files, stamps
from controller.cli.controller import app as controller_app
from controller.cli.gateway import app as gateway_app
from tests.certificates import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


def tls(authority: Authority, **changes: object) -> ClientTls:
    pair = authority.issue("controller")
    files = {"ca": authority.pair.cert, "cert": pair.cert, "key": pair.key} | changes
    return ClientTls(**{name: str(path) for name, path in files.items()})


def test_good_files_pass_and_none_is_no_tls(authority: Authority) -> None:
    check_files(tls(authority), "agent_tls")
    check_files(ClientTls(), "agent_tls")
    assert not ClientTls().on


def test_half_of_it_is_refused() -> None:
    with pytest.raises(ValidationError, match="belong together"):
        ClientTls(ca="/etc/ssl/ca.pem")


def test_each_mistake_is_one_sentence_that_names_the_file(authority: Authority, tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("not a certificate\n")
    stranger = authority.issue("stranger")
    for changes, said in (
        ({"key": tmp_path / "none.key"}, "agent_tls.key.*none.key: No such file"),
        ({"ca": text}, "agent_tls.ca.*holds no certificate"),
        ({"cert": text}, "agent_tls.cert.*do not work together"),
        ({"key": stranger.key}, "do not work together: key values mismatch"),
    ):
        with pytest.raises(UserError, match=said):
            check_files(tls(authority, **changes), "agent_tls")


def test_both_programs_check_their_certificates_before_they_run(authority: Authority, tmp_path: Path) -> None:
    mine, stranger = authority.issue("agent"), authority.issue("stranger")
    agent = tmp_path / "nodeagent.toml"
    agent.write_text(
        f'[listen]\ntcp = "0.0.0.0:0"\ntls_cert = "{mine.cert}"\ntls_key = "{stranger.key}"\n'
        f'tls_client_ca = "{authority.pair.cert}"\n'
    )
    controller = tmp_path / "controller.toml"
    controller.write_text(
        'profile = "/nonexistent"\nmodel = "m"\nagents = [{ node_id = "a", address = "gpu-1:7443" }]\n'
        f'[agent_tls]\nca = "{authority.pair.cert}"\ncert = "{mine.cert}"\nkey = "{tmp_path}/none.key"\n'
    )
    for module, path, said in (
        ("nodeagent.cli", agent, "listen.tls_cert"),
        ("controller.cli.controller", controller, "agent_tls.key"),
    ):
        command = [sys.executable, "-c", f"from {module} import main; main()", "check-config", "--config", str(path)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert answer.returncode == 2
        assert said in answer.stderr
        assert "Traceback" not in answer.stderr


def test_a_renewal_shows(authority: Authority) -> None:
    files = tls(authority)
    before = stamps(files)
    assert stamps(files) == before
    assert stamps(tls(authority)) != before  # issued anew, under the same names
    assert stamps(ClientTls(ca="/nonexistent", cert="/nonexistent", key="/nonexistent")) == ()


@pytest.mark.parametrize("part", ["controller", "gateway"])
def test_check_config_reads_the_certificates_between_gateway_and_controller(
    part: str, authority: Authority, tmp_path: Path
) -> None:
    mine, other = authority.issue("mine"), authority.issue("other")
    path = tmp_path / f"{part}.toml"
    section, ca = {"controller": ("tls", "client_ca"), "gateway": ("controller_tls", "ca")}[part]
    files = f'{ca} = "{authority.pair.cert}"\ncert = "{mine.cert}"\nkey = "{other.key}"\n'
    head = 'profile = "p"\nmodel = "m"\n[[agents]]\nnode_id = "n"\naddress = "127.0.0.1:1"\n' * (part == "controller")
    path.write_text(f"{head}[{section}]\n{files}")
    command = {"controller": controller_app, "gateway": gateway_app}[part]
    result = CliRunner().invoke(command, ["check-config", "--config", str(path)])
    assert isinstance(result.exception, UserError)
    assert f"{section}.cert: {mine.cert} and {other.key} do not work together" in str(result.exception)
