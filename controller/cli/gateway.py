"""`dynamollm-gateway`: run | check-config | show-config | new-key."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from common.config import load_config
from common.config_sample import to_toml
from common.errors import UserError, exit_on_user_error
from common.logs import configure_logs
from common.tls import check_files
from controller.gateway.access import Access, hash_of, is_line
from controller.gateway.config import DEFAULT_PATH, PART, GatewayConfig

PROGRAM = "dynamollm-gateway"

app = typer.Typer(
    name=PROGRAM,
    help="OpenAI-compatible gateway: queues requests and sends each to the right pool and instance.",
    no_args_is_help=True,
    add_completion=False,
)
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help=f"TOML file. Without it {DEFAULT_PATH} where that exists.")
]
ListenOption = Annotated[str | None, typer.Option("--listen", help="HOST:PORT of the API, instead of the file's.")]
ControllerOption = Annotated[
    str | None, typer.Option("--controller", help="gRPC address of the controller, instead of the file's.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON instead of TOML.")]


@app.command()
def run(config: ConfigOption = None, listen: ListenOption = None, controller: ControllerOption = None) -> None:
    """Runs the gateway until SIGTERM, then lets running requests finish."""
    import uvloop  # the server's imports take time that check-config need not pay

    from controller.gateway.daemon import bind
    from controller.gateway.daemon import run as serve

    settings = _load(config, listen, controller)
    check_files(settings.controller_tls, "controller_tls")
    settings.picker.tls.check()
    configure_logs(PART, settings.log.form, settings.log.level)
    uvloop.run(serve(settings, bind(settings.listen)))


@app.command("check-config")
def check_config(config: ConfigOption = None, listen: ListenOption = None, controller: ControllerOption = None) -> None:
    """Says whether the configuration is valid, and the files of keys and certificates that it names."""
    settings = _load(config, listen, controller)
    check_files(settings.controller_tls, "controller_tls")
    Access(Path(settings.access.keys_file) if settings.access.keys_file else None)
    typer.echo(f"{_path(config) or 'defaults'}: valid")


@app.command("show-config")
def show_config(
    config: ConfigOption = None,
    listen: ListenOption = None,
    controller: ControllerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the configuration in effect: file, environment, flags and defaults together."""
    settings = _load(config, listen, controller)
    typer.echo(settings.model_dump_json(indent=2) if as_json else to_toml(settings), nl=as_json)


@app.command("new-key")
def new_key(name: Annotated[str, typer.Argument(help="Whom it is for: letters, digits, dots, dashes.")]) -> None:
    """Makes an API key: the key itself goes to the client, the line into `access.keys_file`."""
    line = f"{name} {hash_of(key := secrets.token_urlsafe(32))}"
    if not is_line(line):
        raise UserError(f"{name!r} is no name for a key.", "Use up to 64 letters, digits, dots, dashes.")
    typer.echo(f"key:  {key}\nline: {line}")


def _path(config: Path | None) -> Path | None:
    return config if config is not None or not DEFAULT_PATH.exists() else DEFAULT_PATH


def _load(config: Path | None, listen: str | None, controller: str | None) -> GatewayConfig:
    return load_config(GatewayConfig, PART, _path(config), overrides={"listen": listen, "controller": controller})


def main() -> None:
    with exit_on_user_error(PROGRAM):
        app()


if __name__ == "__main__":
    main()
