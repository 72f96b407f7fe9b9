"""Builds the emulated `libnvidia-ml.so.1` with the machine's C compiler against NVIDIA's nvml.h (nvidia-nvml-dev).

A build is kept under `<root>/nvml/<hash of everything that went in>/`, so it happens once per change. A program started
with that directory in LD_LIBRARY_PATH and with DYNAMOLLM_NVML_STATE naming a state file (state.py) sees emulated GPUs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common.errors import UserError, exit_on_user_error

LIBRARY_NAME = "libnvidia-ml.so.1"
SOURCES = Path(__file__).parent

# A function that the header does not declare, or declares otherwise, does not compile: the surface cannot drift.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wmissing-prototypes", "-Wstrict-prototypes"]
FLAGS = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY_NAME}", "-Wl,-z,defs"]

# Every function of the header that has no definition of its own answers NOT_SUPPORTED. A missing symbol would be an
# honest answer to pynvml (it looks each one up), but programs linked against the library would not even start.
# The symbol is all that counts, not the parameters: the callee reads none, and the caller cleans up.
STUBS_HEAD = """\
int emu_unsupported(void);
#define STUB(name) \\
    __attribute__((weak, visibility("default"))) int name(void); \\
    int name(void) { return emu_unsupported(); }
"""


def ensure_library(root: Path | None = None) -> Path:
    """The directory that holds an up-to-date libnvidia-ml.so.1, built now if need be.

    `root` is the cache to build under (default: see `default_root`). Safe to call from several processes at once.
    Raises UserError when compiler or header is missing or the build fails.
    """
    header = find_header()
    sources = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256(repr((WARNINGS, FLAGS, STUBS_HEAD, platform.machine(), platform.libc_ver())).encode())
    for path in [*sources, header]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    directory = (default_root() if root is None else root) / "nvml" / digest.hexdigest()[:16]
    if not (directory / LIBRARY_NAME).exists():
        _build(directory.absolute(), [path for path in sources if path.suffix == ".c"], header)
    return directory.absolute()


def default_root() -> Path:
    """`.cache` of the checkout this module runs from, else the user's cache directory."""
    checkout = SOURCES.parents[2]
    if (checkout / "pyproject.toml").exists() and os.access(checkout, os.W_OK):
        return checkout / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamollm"


def find_header() -> Path:
    """nvml.h of the installed nvidia-nvml-dev; raises UserError without it."""
    try:
        files = importlib.metadata.files("nvidia-nvml-dev") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.name == "nvml.h" and path.exists():
            return path
    raise UserError(
        "The emulated NVML needs NVIDIA's header nvml.h, and package nvidia-nvml-dev is not installed.",
        "Install it: pip install nvidia-nvml-dev",
    )


def find_compiler() -> str:
    """$CC or the machine's cc, gcc or clang; raises UserError without one."""
    wanted = os.environ.get("CC")
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        found = shutil.which(name)
        if found:
            return found
    what = f"CC={wanted} is not a program" if wanted else "this machine has no C compiler (cc, gcc or clang)"
    raise UserError(f"The emulated NVML cannot be compiled: {what}.", "Install one: apt-get install gcc libc6-dev")


def declared_functions(header: Path) -> list[str]:
    """Names of all functions that nvml.h declares."""
    return sorted(set(re.findall(r"\bDECLDIR\b[^;(]*?\b(nvml\w+)\s*\(", header.read_text())))


def _build(directory: Path, sources: list[Path], header: Path) -> None:
    compiler = find_compiler()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".build-") as scratch:
            out = Path(scratch) / "out"
            out.mkdir()
            stubs = Path(scratch) / "stubs.c"
            stubs.write_text(STUBS_HEAD + "".join(f"STUB({name})\n" for name in declared_functions(header)))
            command = [compiler, *WARNINGS, *FLAGS, "-isystem", str(header.parent), "-o", str(out / LIBRARY_NAME)]
            run = subprocess.run(
                [*command, *map(str, sources), str(stubs), "-lpthread"], capture_output=True, text=True, check=False
            )
            if run.returncode != 0:
                first = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[-300:])
                raise UserError(f"The emulated NVML does not compile: {first}", "Install gcc and libc6-dev, or set CC.")
            # Whoever comes first wins; the others' builds are the same.
            if not directory.exists():
                out.rename(directory)
    except OSError as error:
        if (directory / LIBRARY_NAME).exists():  # another process was faster
            return
        raise UserError(
            f"{directory}: the emulated NVML cannot be built there: {error}.", "Name another DIR."
        ) from None


def main() -> None:
    """`python -m simulator.host.nvml.build DIR` prints the directory to put into LD_LIBRARY_PATH."""
    with exit_on_user_error("nvml-build"):
        if len(sys.argv) > 2 or (len(sys.argv) == 2 and sys.argv[1].startswith("-")):
            raise UserError("usage: python -m simulator.host.nvml.build [DIR]")
        root = Path(sys.argv[1]) if len(sys.argv) == 2 else None
        sys.stdout.write(f"{ensure_library(root)}\n")


if __name__ == "__main__":
    main()
