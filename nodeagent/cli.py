"""The command `dynamollm-nodeagent`: run | check-config | show-config | restore."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from common.config import load_config
from common.config_sample import to_toml
from common.errors import UserError, exit_on_user_error
from common.logs import configure_logs
from nodeagent.config import DEFAULT_PATH, PART, NodeAgentConfig

PROGRAM = "dynamollm-nodeagent"

# gRPC's own log lines would stand beside our one clear sentence.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

app = typer.Typer(
    help="The node agent: reports what this host's GPUs and engines do, and applies leased controls to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help=f"Configuration file.  [default: {DEFAULT_PATH}, if it exists]")
]
StateOption = Annotated[str | None, typer.Option("--state-dir", help="Overrides state_dir.")]
TcpOption = Annotated[str | None, typer.Option("--listen-tcp", help="Overrides listen.tcp.")]
LevelOption = Annotated[str | None, typer.Option("--log-level", help="Overrides logs.level.")]


@app.command()
def run(
    config: ConfigOption = None,
    state_dir: StateOption = None,
    listen_tcp: TcpOption = None,
    log_level: LevelOption = None,
) -> None:
    """Runs the agent until SIGTERM; every control is restored before it ends, engines run on."""
    loaded = _load(config, state_dir, listen_tcp, log_level)
    from nodeagent import daemon  # the other commands answer without loading gRPC

    raise SystemExit(asyncio.run(daemon.run(loaded)))


@app.command()
def check_config(config: ConfigOption = None) -> None:
    """Says whether the configuration, and the certificates it names, are good; exit code 2 and every error if not."""
    loaded = _load(config)
    if loaded.listen.tls:
        from nodeagent.security import check_certificates  # loads gRPC, which the rest can do without

        check_certificates(loaded.listen)
    typer.echo(f"{_path(config) or 'built-in defaults'}: good")


@app.command()
def show_config(
    config: ConfigOption = None,
    sample: Annotated[bool, typer.Option("--sample", help="Show the defaults, with a comment on every key.")] = False,
) -> None:
    """Prints the configuration as it is in effect: file, environment and defaults together."""
    typer.echo(to_toml(NodeAgentConfig() if sample else _load(config), comments=sample), nl=False)


@app.command()
def restore(config: ConfigOption = None, state_dir: StateOption = None, log_level: LevelOption = None) -> None:
    """Makes safe what a dead agent left behind: clocks unlocked, power limits as found. Refuses while one is alive."""
    loaded = _load(config, state_dir, log_level=log_level)
    if state_dir is not None and not loaded.state_dir.is_dir():
        raise UserError(f"{state_dir} is no folder.", "Name the state folder of the agent that died.")
    from nodeagent import daemon

    found, left = asyncio.run(daemon.restore(loaded))
    for key in found:
        typer.echo(f"{key}: {'NOT restored' if key in left else 'restored'}")
    if not found:
        typer.echo(f"{loaded.state_dir}: nothing to restore")
    if left:
        raise UserError(f"{len(left)} controls are not restored.", "See the log above; try again.", exit_code=1)


def _path(config: Path | None) -> Path | None:
    return config if config is not None or not DEFAULT_PATH.exists() else DEFAULT_PATH


def _load(
    config: Path | None, state_dir: str | None = None, listen_tcp: str | None = None, log_level: str | None = None
) -> NodeAgentConfig:
    flags = {"state_dir": state_dir, "listen.tcp": listen_tcp, "logs.level": log_level}
    loaded = load_config(NodeAgentConfig, PART, _path(config), overrides=flags)
    configure_logs(PART, loaded.logs.form, loaded.logs.level)
    return loaded


def main() -> None:
    """Entry point of the console script."""
    with exit_on_user_error(PROGRAM):
        app(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
