"""The hook that turns whole nodes on and off: a command of the operator's (a BMC, a cloud), run without any shell.

Called by the loop's runtime beside the loop. What the command prints last is the reason when it fails. A command that
does not end in time is killed with all that it has started.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass

NODE = "{node}"
_LAST = 300  # characters of its output that are kept


@dataclass(frozen=True, slots=True)
class PowerHook:
    """Commands as lists of arguments; `{node}` in any of them is the node's id."""

    on: tuple[str, ...]
    off: tuple[str, ...]
    timeout_s: float

    async def run(self, node_id: str, on: bool) -> str:
        """What went wrong, "" for nothing. Never raises but for cancellation."""
        arguments = [part.replace(NODE, node_id) for part in (self.on if on else self.off)]
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"{arguments[0]}: {error.strerror or error}"
        try:
            async with asyncio.timeout(self.timeout_s):
                said, _ = await process.communicate()
        except TimeoutError:
            return f"{arguments[0]} did not end within {self.timeout_s:g} s"
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode == 0:
            return ""
        text = said.decode(errors="replace").strip()[-_LAST:]
        return f"{arguments[0]} ended with {process.returncode}{f': {text}' if text else ''}"
