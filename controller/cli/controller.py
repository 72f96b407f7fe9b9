"""`dynamollm-controller`: run | check-config | show-config."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from common.config import load_config
from common.config_sample import to_toml
from common.errors import exit_on_user_error
from common.logs import configure_logs
from common.tls import check_files
from controller.config import ControllerConfig

PROGRAM = "dynamollm-controller"
DEFAULT_CONFIG = Path("/etc/dynamollm/controller.toml")

app = typer.Typer(name=PROGRAM, help="The central controller of DynamoLLM.", no_args_is_help=True)
ConfigOption = Annotated[Path, typer.Option("--config", help="TOML configuration file.")]
ListenOption = Annotated[str | None, typer.Option("--listen", help="gRPC address, instead of the file's.")]


@app.command()
def run(config: ConfigOption = DEFAULT_CONFIG, listen: ListenOption = None) -> None:
    """Runs the controller until SIGTERM."""
    from controller.daemon import serve  # the daemon's imports take a second that check-config need not pay

    settings = load_config(ControllerConfig, "controller", config, overrides={"listen": listen})
    configure_logs("controller")
    asyncio.run(serve(settings))


@app.command("check-config")
def check_config(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Says whether the configuration, and the profile and certificates that it names, are valid."""
    from controller.daemon import read_profile

    settings = load_config(ControllerConfig, "controller", config)
    check_files(settings.agent_tls, "agent_tls")
    settings.tls.check()
    profile = read_profile(settings.profile)
    typer.echo(f"{config}: valid; profile {profile.checksum()[:12]} of {profile.model} on {profile.gpu}")


@app.command("show-config")
def show_config(
    config: ConfigOption = DEFAULT_CONFIG,
    sample: Annotated[bool, typer.Option("--sample", help="Show a sample with a comment on every key.")] = False,
) -> None:
    """Prints the configuration in effect, as TOML: file, environment and defaults together."""
    shown = ControllerConfig.sample() if sample else load_config(ControllerConfig, "controller", config)
    typer.echo(to_toml(shown, comments=sample), nl=False)


def main() -> None:
    with exit_on_user_error(PROGRAM):
        app()
