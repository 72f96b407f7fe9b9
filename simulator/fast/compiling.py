"""How the kernels are compiled and where the machine code is kept.

numba's own cache on disk looks only at the file of the function that is called: a change in anything that this
function uses from another module goes unseen, and stale machine code answers. So the machine code of this package
lies in a folder named after the content of everything that it is made from: a changed byte is another folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# All that reaches the machine code. A test holds that these modules import nothing of ours but each other.
SOURCES = tuple(
    Path(__file__).parent / name for name in ("compiling.py", "crashing.py", "engine.py", "gateway.py", "layout.py")
)
_CONFIG: Any = numba.config  # its settings are made from the environment, so type checkers do not know them
# Arithmetic is deterministic: no fast-math. With numpy's errors, a division needs no branch for a zero below it.


def part(function: Function) -> Function:
    """Compiles a function that only kernels call; its machine code is kept as part of theirs."""
    return cast(Function, numba.njit(error_model="numpy", nogil=True)(function))


def kernel(function: Function) -> Function:
    """Compiles a function that Python calls, and keeps its machine code on disk."""
    return kept_in(machine_code_folder(SOURCES))(function)


def kept_in(folder: Path | None) -> Callable[[Function], Function]:
    """Compiles and keeps the machine code in `folder`; without one it is compiled in every process."""

    def compile_(function: Function) -> Function:
        before = _CONFIG.CACHE_DIR
        # numba reads the setting when a function is decorated; it is put back for other users of numba.
        _CONFIG.CACHE_DIR = "" if folder is None else str(folder)
        try:
            compiled = numba.njit(cache=folder is not None, error_model="numpy", nogil=True)(function)
        finally:
            _CONFIG.CACHE_DIR = before
        return cast(Function, compiled)

    return compile_


def machine_code_folder(sources: Iterable[Path], root: Path | None = None) -> Path | None:
    """The folder for machine code made from exactly these sources; None where no folder can be written.

    Under `root`, else numba's own setting, else `.cache` of a checkout, else the user's cache directory.
    """
    digest = hashlib.sha256()
    for path in sorted(sources):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    folder = (root or _default_root()) / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _default_root() -> Path:
    if _CONFIG.CACHE_DIR:
        return Path(_CONFIG.CACHE_DIR)
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").exists() and os.access(checkout, os.W_OK):
        return checkout / ".cache" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamollm" / "kernels"
