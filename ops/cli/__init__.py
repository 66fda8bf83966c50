"""The `seamark` command: one module per sub-command, loaded when it is asked for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.main import get_group

from ops.cli import (
    apikey,
    broadcast,
    campaign,
    config,
    control,
    dev,
    dispatcher,
    dlq,
    explain,
    funnel,
    gateway,
    log,
    migrate,
    pager,
    planner,
    projector,
    prove,
    publish,
    rebuild,
    retention,
    seal,
    suppressions,
    tail,
    token,
    topology,
    users,
    verify,
    worker,
)
from ops.cli.output import keep_logs_apart
from ops.exitcode import exit_code_of
from seamark.protocol.errors import SeamarkError

app = typer.Typer(
    name="seamark",
    help="Event-sourced notification delivery on NATS JetStream.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("dev")(dev.dev)
app.command("publish")(publish.publish)
app.command("broadcast")(broadcast.broadcast)
app.command("tail")(tail.tail)
app.command("log")(log.log)
app.command("token")(token.token)
app.command("gateway")(gateway.gateway)
app.command("dispatcher")(dispatcher.dispatcher)
app.command("projector")(projector.projector)
app.command("pager")(pager.pager)
app.command("planner")(planner.planner)
app.command("worker")(worker.worker)
app.command("funnel")(funnel.funnel)
app.command("prove")(prove.prove)
app.command("explain")(explain.explain)
app.command("rebuild")(rebuild.rebuild)
app.command("verify")(verify.verify)
app.command("migrate")(migrate.migrate)
app.command("seal")(seal.seal)
app.add_typer(apikey.app, name="api-key")
app.add_typer(config.app, name="config")
app.add_typer(campaign.app, name="campaign")
app.add_typer(control.app, name="control")
app.add_typer(dlq.app, name="dlq")
app.add_typer(retention.app, name="retention")
app.add_typer(suppressions.app, name="suppressions")
app.add_typer(topology.app, name="topology")
app.add_typer(users.app, name="users")


def _command(first: Sequence[str]) -> Callable[[], Any]:
    """What runs when this is the first word. Only the command that it names is built: all of them take longer than most do."""
    commands = [each for each in app.registered_commands if each.name in first]
    groups = [each for each in app.registered_groups if each.name in first]
    if not commands and not groups:  # help, completion, a word with a mistake in it
        return app
    app.registered_commands, app.registered_groups = commands, groups
    return get_group(app)


def main() -> None:
    """Run the command; errors of ours are one line on standard error and an exit code (`ops.exitcode`)."""
    keep_logs_apart()
    gc.freeze()  # what is loaded stays: looking through all of it takes the interpreter longer at the end than most commands do
    try:
        _command(sys.argv[1:2])()
    except SeamarkError as error:
        typer.secho(f"seamark: {error}", fg="red", err=True)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(130)
