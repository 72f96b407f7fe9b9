"""Machine code on disk must never be older than the sources it was made from."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from simulator.fast import compiling
from simulator.fast.compiling import SOURCES, machine_code_folder
from simulator.fast.gateway import serve

KERNEL = """
from helper import step

def run(n):
    total = 0
    for i in range(n):
        total += step(i)
    return total
"""
HELPER = """
from simulator.fast.compiling import part

@part
def step(i):
    return i * {factor}
"""
MAIN = """
import sys
from pathlib import Path
from simulator.fast.compiling import kept_in, machine_code_folder
import code_of_kernel
here = Path(__file__).parent
folder = machine_code_folder([here / "code_of_kernel.py", here / "helper.py"], here / "machine_code")
run = kept_in(folder)(code_of_kernel.run)
print(run(10), sum(run.stats.cache_hits.values()), folder.name)
"""


def run_main(folder: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(compiling.__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(folder / "main.py")], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_change_in_an_imported_module_is_never_answered_by_old_machine_code(tmp_path):
    (tmp_path / "code_of_kernel.py").write_text(KERNEL)
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "helper.py").write_text(HELPER.format(factor=2))
    first = run_main(tmp_path)
    assert first[:2] == ["90", "0"]
    again = run_main(tmp_path)
    assert again == ["90", "1", first[2]], "the second process takes the machine code of the first"
    (tmp_path / "helper.py").write_text(HELPER.format(factor=3))
    changed = run_main(tmp_path)
    assert changed[:2] == ["135", "0"]
    assert changed[2] != first[2]


def test_every_byte_of_every_source_names_the_folder(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_bytes(b"ab")
    two.write_bytes(b"c")
    names = {machine_code_folder([one, two], tmp_path)}
    one.write_bytes(b"a")
    two.write_bytes(b"bc")
    names.add(machine_code_folder([two, one], tmp_path))
    names.add(machine_code_folder([one], tmp_path))
    assert len(names) == 3
    assert machine_code_folder([one], tmp_path) in names


def test_without_a_place_to_write_there_is_no_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert machine_code_folder([tmp_path / "file"], tmp_path / "file" / "below") is None


def test_the_kernels_machine_code_lies_in_the_folder_of_their_sources():
    folder = machine_code_folder(SOURCES)
    assert folder is not None
    assert Path(serve.stats.cache_path).is_relative_to(folder)
    assert os.environ.get("NUMBA_CACHE_DIR", "") == compiling._CONFIG.CACHE_DIR, "others' setting is as it was"


def test_kernels_use_nothing_of_ours_but_the_sources_that_name_their_folder():
    covered = {f"simulator.fast.{path.stem}" for path in SOURCES}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            for name in names:
                ours = name.split(".")[0] in ("common", "controller", "nodeagent", "simulator")
                assert not ours or name in covered, f"{path.name} imports {name}"
