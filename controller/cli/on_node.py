"""`dynamollm` as `scripts/install-node` puts it on a GPU host: `dynamollm node …` for this host's own agent.

A program of its own, because the other commands need packages that only a controller's host has.
"""

from __future__ import annotations

import typer

from common.errors import exit_on_user_error
from controller.cli import node as commands

PROGRAM = "dynamollm"

app = typer.Typer(name=PROGRAM, help="Operate this GPU host.", no_args_is_help=True)
node = typer.Typer(help="This host, or another one by its agent's address.", no_args_is_help=True)
commands.mount(node)
app.add_typer(node, name="node")


@app.callback()
def _group() -> None:
    """Keeps `node` a word of the command line although it is the only one."""


def main() -> None:
    with exit_on_user_error(PROGRAM):
        app(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
