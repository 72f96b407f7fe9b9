"""Which launcher this agent uses: units under systemd, plain processes elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from common.errors import EXIT_UNAVAILABLE, UserError
from common.logs import get_logger
from nodeagent.config import EngineConfig
from nodeagent.engine.launcher import Launcher
from nodeagent.engine.process import ProcessLauncher

log = get_logger(__name__)


async def open_launcher(config: EngineConfig) -> Launcher:
    """The configured one; UserError when systemd is asked for and does not answer."""
    if not wants_systemd(config, os.environ):
        return ProcessLauncher()
    from nodeagent.engine.systemd import SystemdLauncher, SystemdUnavailable  # the bus's library, only where used

    try:
        return await SystemdLauncher.connect()
    except SystemdUnavailable as error:
        hint = 'Run the agent under systemd, or set engine.launcher = "process".'
        raise UserError(f"{error}.", hint, EXIT_UNAVAILABLE) from None


def wants_systemd(config: EngineConfig, environment: Mapping[str, str]) -> bool:
    """Whether engines become units."""
    if config.launcher == "auto":
        # As a Type=notify service of the init system. A terminal may have INVOCATION_ID, but nobody to notify.
        return {"INVOCATION_ID", "NOTIFY_SOCKET"} <= set(environment) and Path("/run/systemd/system").is_dir()
    return config.launcher == "systemd"
