"""`dynamollm`: the operator's command line. What a program may want to read has `--json`.

Exit codes: 0 done, 1 done with a finding (a replay that differs, a GPU that refused), 2 bad input, 3 something it needs
is not reachable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from common.errors import UserError, exit_on_user_error
from controller.cli import budget as budget_commands
from controller.cli import choice as choice_commands
from controller.cli import node as node_commands
from controller.cli import predictor as predictor_commands
from controller.cli import profile as profile_commands
from controller.cli.operate import mode, plan, pool_list
from controller.cli.replay import replay
from controller.cli.savings import savings
from controller.cli.shared import (
    DEFAULT_CONTROLLER,
    DEFAULT_URL,
    ControllerOption,
    JsonOption,
    UrlOption,
    call,
    console,
    data_of,
    in_trouble,
    mode_name,
    print_json,
)
from controller.cli.simulate import simulate
from controller.cli.top import top
from controller.domain.reasons import Level
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import types_pb2 as types

PROGRAM = "dynamollm"

app = typer.Typer(name=PROGRAM, help="Operate a DynamoLLM fleet.", no_args_is_help=True)
choice = typer.Typer(help="Why single requests went where they did: the gateways' sample.", no_args_is_help=True)
db = typer.Typer(help="The history database.", no_args_is_help=True)
decision = typer.Typer(help="What was decided, and why.", no_args_is_help=True)
node = typer.Typer(help="GPU hosts.", no_args_is_help=True)
pool = typer.Typer(help="Pools of instances.", no_args_is_help=True)
predictor = typer.Typer(help="What guesses how long answers will be.", no_args_is_help=True)
profile = typer.Typer(help="Energy-performance profiles.", no_args_is_help=True)
GROUPS = (
    ("choice", choice),
    ("budget", budget_commands.app),
    ("db", db),
    ("decision", decision),
    ("node", node),
    ("pool", pool),
    ("predictor", predictor),
    ("profile", profile),
)
for name, group in GROUPS:
    app.add_typer(group, name=name)
for command in (simulate, top, mode, plan, replay, savings):
    app.command()(command)
pool.command("list")(pool_list)
choice_commands.mount(choice)
node_commands.mount(node)
predictor_commands.mount(predictor)
profile_commands.mount(app, profile)


# -------------------------------------------------------------------------------------------------- controller


@app.command()
def status(controller: ControllerOption = DEFAULT_CONTROLLER, as_json: JsonOption = False) -> None:
    """Pools, instances and clocks now, and what the loop said last."""
    answer: pb.GetStatusResponse = call(controller, "GetStatus", pb.GetStatusRequest())
    if as_json:
        print_json(answer)
        return
    console.print(f"mode {mode_name(answer.mode)}, term {answer.term}")
    for item in answer.modes:
        console.print(f"{item.scope} is {mode_name(item.mode)}", highlight=False, soft_wrap=True)
    table = Table("pool", "classes", "req/s", "granted GPUs", "instance", "node", "TP", "state", "clock")
    for seen in answer.pools:
        head = [seen.name, " ".join(seen.classes), f"{seen.request_rate:.2f}", str(seen.granted_gpus)]
        if not seen.instances:
            table.add_row(*head, "none", "", "", "", "")
        for instance in seen.instances:
            state = types.InstanceState.Name(instance.state).removeprefix("INSTANCE_STATE_").lower()
            clock = f"{instance.clock_mhz} MHz" if instance.clock_mhz else "unlocked"
            table.add_row(*head, instance.instance_id, instance.node_id, str(instance.tensor_parallel), state, clock)
            head = [""] * len(head)
    console.print(table)
    for level in Level:
        if level.value in answer.last_sentences:
            console.print(f"{level.value}: {answer.last_sentences[level.value]}")
    for beside in ("profile", "drift", "trial"):
        if beside in answer.last_sentences:
            said = f"{beside}: {answer.last_sentences[beside]}"
            console.print(said, style="yellow", highlight=False, soft_wrap=True)
    if trouble := in_trouble(answer):
        console.print(f"nodes: {trouble}", style="yellow", highlight=False, soft_wrap=True)


@node.command("list")
def node_list(controller: ControllerOption = DEFAULT_CONTROLLER, as_json: JsonOption = False) -> None:
    """The hosts that the controller knows, and how fresh their data is."""
    answer: pb.ListNodesResponse = call(controller, "ListNodes", pb.ListNodesRequest())
    if as_json:
        print_json(answer)
        return
    table = Table("node", "address", "data", "age s", "GPUs", "W")
    for item in answer.nodes:
        age, gpus, watts = f"{item.age_s:.1f}", str(item.gpus), f"{item.power_w:.0f}"
        table.add_row(item.node_id, item.address, data_of(item), age, gpus, watts)
    console.print(table)


@decision.command("list")
def decision_list(
    level: Annotated[str, typer.Option(help="cluster, pool or instance; all by default")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    as_json: JsonOption = False,
) -> None:
    """The newest decisions, one sentence each."""
    request = pb.ListDecisionsRequest(level=level, page_size=limit)
    answer: pb.ListDecisionsResponse = call(controller, "ListDecisions", request)
    if as_json:
        print_json(answer)
        return
    table = Table("id", "at (UTC)", "level", "scope", "reason", "sentence")
    for item in answer.decisions:
        at = item.decided_at.ToDatetime().isoformat(sep=" ", timespec="seconds")
        table.add_row(str(item.id), at, item.level, item.scope, item.reason, item.sentence)
    console.print(table)


@decision.command("show")
def decision_show(
    number: Annotated[int, typer.Argument(metavar="ID", min=1)],
    controller: ControllerOption = DEFAULT_CONTROLLER,
    as_json: JsonOption = False,
) -> None:
    """One decision with its inputs, the alternatives and why each lost, and its outcome."""
    answer: pb.GetDecisionResponse = call(controller, "GetDecision", pb.GetDecisionRequest(id=number))
    if as_json:
        print_json(answer)
        return
    item = answer.decision
    console.print(f"{item.id} {item.level}/{item.scope} ({item.trigger}): {item.reason}\n{item.sentence}")
    for title, text in (
        ("inputs", answer.inputs_json),
        ("alternatives", answer.alternatives_json),
        ("outcome", answer.outcome_json),
    ):
        console.print(f"\n{title}:")
        console.print_json(text)


@decision.command("explain")
def decision_explain(
    number: Annotated[int, typer.Argument(metavar="ID", min=1)],
    controller: ControllerOption = DEFAULT_CONTROLLER,
    url: Annotated[str, typer.Option("--database-url", help="Read it from the database instead.")] = "",
    as_json: JsonOption = False,
) -> None:
    """One decision in plain sentences: what was seen, what lost and why, what was expected, what came of it."""
    if url:
        said = _explained(url, number)
    else:
        answer: pb.GetDecisionResponse = call(controller, "GetDecision", pb.GetDecisionRequest(id=number))
        said = list(answer.explanation)
    if as_json:
        typer.echo(json.dumps({"id": number, "explanation": said}, indent=2))
        return
    for sentence in said:
        console.print(sentence, highlight=False, soft_wrap=True)


def _explained(url: str, number: int) -> list[str]:
    from controller.explain import explain
    from controller.store.engine import open_engine
    from controller.store.repositories import get_decision

    stored = get_decision(open_engine(url), number)
    if stored is None:
        raise UserError(f"there is no decision {number}.", "`dynamollm decision list` shows the newest.")
    return explain(stored.decision, stored.outcome, stored.id)


# ---------------------------------------------------------------------------------------------------- database


@db.command()
def upgrade(url: UrlOption = DEFAULT_URL) -> None:
    """Creates the tables, or brings them to this version's schema."""
    from controller.store import engine, migrate

    opened = engine.open_engine(url, create=True)
    typer.echo(f"{engine.describe(url)} is at revision {migrate.upgrade(opened)}")


@db.command()
def current(url: UrlOption = DEFAULT_URL) -> None:
    """The database's revision, and the one that this version needs."""
    from controller.store import engine, migrate

    found = migrate.current(engine.open_engine(url))
    typer.echo(f"{engine.describe(url)}: {found or 'no tables'}; this version needs {migrate.head()}")


@db.command()
def prune(
    config: Annotated[Path, typer.Option(help="The controller's configuration, for its retention.")] = Path(
        "/etc/dynamollm/controller.toml"
    ),
    url: Annotated[str, typer.Option("--database-url", help="Instead of the configuration's.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Sums old minutes into hours and deletes what is older than it is kept, as the controller does every hour."""
    import time

    from common.config import load_config
    from controller.config import ControllerConfig
    from controller.store import engine, migrate, retention

    settings = load_config(ControllerConfig, "controller", config)
    opened = engine.open_engine(url or settings.database_url)
    migrate.require_current(opened)
    gone = retention.prune(opened, settings.retention.limits(), time.time())
    left = retention.sizes(opened)
    if as_json:
        typer.echo(json.dumps({"gone": gone, "left": {name: rows for name, (rows, _) in left.items()}}, indent=2))
        return
    table = Table("table", "rows gone", "rows left", "oldest (UTC)")
    for name, (rows, oldest) in left.items():
        table.add_row(name, str(gone.get(name, 0)), str(rows), oldest or "")
    console.print(table)


def main() -> None:
    with exit_on_user_error(PROGRAM):
        app()
