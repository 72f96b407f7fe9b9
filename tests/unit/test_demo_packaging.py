"""What a fresh checkout is set up from: lock files that are complete and name no package index; scripts that run."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked(name: str) -> dict[str, Version]:
    """Package versions of a lock file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return {
        canonicalize_name(n): Version(v) for n, v in re.findall(r"^([\w.\-]+)(?:\[[^]]*\])?==([^\s;\\]+)", text, re.M)
    }


def required(*extras: str) -> list[Requirement]:
    lines = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    found = [Requirement(line) for line in [*lines, *PROJECT["build-system"]["requires"]]]
    return [requirement for requirement in found if requirement.name != "dynamollm"]


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("requirements.lock", ("controller", "simulator")),
        ("requirements-dev.lock", ("controller", "simulator", "dev")),
    ],
)
def test_a_lock_file_holds_everything_that_pyproject_asks_for(lock: str, extras: tuple[str, ...]) -> None:
    versions = locked(lock)
    for requirement in required(*extras):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in {lock}: run scripts/lock"
        assert version in requirement.specifier, f"{requirement} against {version} in {lock}: run scripts/lock"


def test_both_lock_files_agree() -> None:
    dev = locked("requirements-dev.lock")
    assert {name: dev.get(name) for name in locked("requirements.lock")} == locked("requirements.lock")


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_a_lock_file_has_names_versions_and_hashes_only(lock: str) -> None:
    for line in (ROOT / lock).read_text(encoding="utf-8").splitlines():
        assert re.match(r"^(    --hash=sha256:[0-9a-f]{64}|[\w.\-]+(\[[^]]*\])?==\S+( ; .*)?)( \\)?$", line), line


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test", "scripts/setup", "scripts/lock", ".ci/run"])
def test_scripts_can_be_executed(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
