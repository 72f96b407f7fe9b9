"""scripts/install-controller below another root: what it puts there works, and it takes everything away again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
UNITS = ("dynamollm-controller.service", "dynamollm-gateway.service")


def script(root: Path, *arguments: str, ok: bool = True) -> str:
    done = subprocess.run(
        [str(TOP / "scripts" / "install-controller"), *arguments],
        env={**os.environ, "DESTDIR": str(root), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or path.is_symlink()}


def test_install_again_and_remove(tmp_path: Path) -> None:
    script(tmp_path, "install", "--linked", "--no-start")
    for program in ("dynamollm", "dynamollm-controller", "dynamollm-gateway"):
        done = subprocess.run(
            [str(tmp_path / "usr/bin" / program), "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    config = tmp_path / "etc/dynamollm/controller.toml"
    config.write_text("# mine\n")
    assert "kept" in script(tmp_path, "install", "--linked", "--no-start")
    assert config.read_text() == "# mine\n"
    assert "kept" in script(tmp_path, "remove")
    assert files(tmp_path) == {"etc/dynamollm/controller.toml", "etc/dynamollm/gateway.toml"}
    script(tmp_path, "remove", "--purge")
    assert files(tmp_path) == set()


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    assert "say install or remove" in script(tmp_path, "upgrade", ok=False)
    assert "does not know" in script(tmp_path, "install", "--purge", ok=False)
    assert files(tmp_path) == set()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here (apt-get install systemd)")
@pytest.mark.parametrize("unit", UNITS)
def test_the_units_are_valid_and_hardened(tmp_path: Path, unit: str) -> None:
    text = (TOP / "systemd" / unit).read_text(encoding="utf-8")
    assert "WatchdogSec=" in text
    assert "Type=notify" in text
    assert "Restart=always" in text
    runnable = text.replace("/usr/bin/dynamollm-", f"{Path(sys.executable).parent}/dynamollm-")
    (tmp_path / unit).write_text(runnable, encoding="utf-8")
    for arguments in (
        ("verify", "--man=no", "--recursive-errors=no", str(tmp_path / unit)),
        ("security", "--offline=true", "--threshold=29", str(tmp_path / unit)),
    ):
        done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr
