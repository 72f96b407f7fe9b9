"""`python -m simulator.bench NAME [--json]`: runs one benchmark and prints its metrics."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.errors import UserError, exit_on_user_error
from simulator.bench.metric import Metric, report

# The agent's benchmark stands with the tests whose emulated host it drives.
MODULES = {
    "simulator": "simulator.bench.twin",
    "ledger": "simulator.bench.study",
    "emergency": "simulator.bench.emergency",
    "planner": "simulator.bench.planner",
    "nodeagent": "tests.bench_nodeagent",
    "controller": "tests.bench_controller",
    "faults": "tests.bench_faults",
    "gateway": "tests.bench_gateway",
    "gateway-chaos": "tests.bench_gateway_chaos",
}

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(MODULES)}, or all.")],
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Measures and prints; progress goes to standard error."""
    with exit_on_user_error("bench"):
        if name != "all" and name not in MODULES:
            raise UserError(f"There is no benchmark {name!r}.", f"Use one of: {', '.join(MODULES)}, all.")
        console = Console(stderr=True)
        metrics: list[Metric] = []
        for module in MODULES if name == "all" else [name]:
            metrics += import_module(MODULES[module]).measure(lambda text: console.print(f"{text} ..."))
        if json_:
            typer.echo(json.dumps(report(name, metrics), indent=1))
        else:
            show(metrics)


def show(metrics: list[Metric]) -> None:
    table = Table("metric", "value", "unit", "spread", "target")
    for metric in metrics:
        target = "" if metric.target is None else f"{metric.target:,g}"
        table.add_row(metric.name, f"{metric.value:,.4g}", metric.unit, f"{metric.spread:,.3g}", target)
    Console().print(table)


if __name__ == "__main__":
    app()
