"""`dynamollm predictor train | show`: the classifier that reads prompts to guess how long answers will be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controller.cli.shared import JsonOption, console
from controller.predictor.text import TextModel
from controller.predictor.train import read_pairs, train

FACTS = {
    "pairs": "pairs in the log",
    "trained_on": "trained on",
    "judged_on": "judged on later ones",
    "accuracy": "right output bucket",
    "accuracy_of_always_the_commonest": "right by always saying the commonest",
    "too_short": "said too short",
    "stated_confidence": "confidence it states",
}
SHARES = frozenset({"accuracy", "accuracy_of_always_the_commonest", "too_short", "stated_confidence"})


def mount(app: typer.Typer) -> None:
    app.command("train")(train_model)
    app.command("show")(show_model)


def train_model(
    log: Annotated[
        Path,
        typer.Argument(
            help='JSON lines: a request each and its answer\'s length, {"prompt": "…", "output_tokens": 120}.'
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write the predictor to.")] = Path("predictor.npz"),
    as_json: JsonOption = False,
) -> None:
    """Trains on your own logged requests; says how good it is on the newest of them, which it has not seen."""
    model = train(read_pairs(log))
    model.save(out)
    _tell(model, as_json)
    if not as_json:
        console.print(f'Written to {out}. Use it: [classify] text_model = "{out.resolve()}" in gateway.toml.')


def show_model(
    path: Annotated[Path, typer.Argument(help="File of `predictor train`.")], as_json: JsonOption = False
) -> None:
    """What a predictor was trained on, and how good it was."""
    _tell(TextModel.load(path), as_json)


def _tell(model: TextModel, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(model.facts))
        return
    table = Table(show_header=False)
    for name, label in FACTS.items():
        value = model.facts[name]
        table.add_row(label, f"{value:.1%}" if name in SHARES else f"{value:,.0f}")
    console.print(table)
