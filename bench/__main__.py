"""`python -m bench <what>`: see README.md beside this file."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from bench import against as against_bench
from bench import campaign as campaign_bench
from bench import channels as channels_bench
from bench import dispatch as dispatch_bench
from bench import fanout as fanout_bench
from bench import idle as idle_bench
from bench import imports as imports_bench
from bench import inbox as inbox_bench
from bench import later as later_bench
from bench import months as months_bench
from bench import plan as plan_bench
from bench import rebuild as rebuild_bench
from bench import resume as resume_bench
from bench import storm as storm_bench
from bench import sustained as sustained_bench
from bench import users as users_bench
from bench import verify as verify_bench
from bench.machine import describe, raise_file_limit

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Benchmarks; one JSON object on stdout.",
)

Data = Annotated[
    Path | None, typer.Option(help="Folder for the stores; default: the one for temporary files ($TMPDIR).")
]
Sync = Annotated[str | None, typer.Option(help="`always`: fsync before every ack. Default: every 2 min.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny numbers: shows that it runs, measures nothing.")]


def measure(name: str, work: Any, data: Path | None, *, quick: bool) -> None:
    """Run one benchmark and print what it found beside the conditions it ran under."""
    raise_file_limit()
    machine = describe(data or Path(tempfile.gettempdir()))
    figures = uvloop.run(work)
    print(json.dumps({"benchmark": name, "quick": quick, "machine": machine, **figures}))


@app.command()
def dispatch(
    events: int = 100_000, users: int = 2_000, data: Data = None, sync: Sync = None, quick: Quick = False
) -> None:
    """How fast a dispatcher empties EVENTS, against the broker's own limit."""
    if quick:
        events, users = 2_000, 100
    measure(
        "dispatch", dispatch_bench.run(events=events, users=users, data=data, sync=sync, hurry=quick), data, quick=quick
    )


@app.command()
def later(
    events: int = 10_000,
    users: int = 2_000,
    ahead: Annotated[float, typer.Option(help="Seconds in which they are published and put off.")] = 15.0,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """How long events take that all are due in one moment, against the broker's own limit."""
    if quick:
        events, users, ahead = 500, 50, 4.0
    work = later_bench.run(events=events, users=users, ahead_seconds=ahead, data=data, sync=sync, hurry=quick)
    measure("later", work, data, quick=quick)


@app.command()
def campaign(
    users: int = 200_000,
    seconds: Annotated[
        float, typer.Option(help="Of critical events, alone and beside campaigns, four times each.")
    ] = 10.0,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """How fast a campaign reaches its audience, against the broker's own limit, and what another tenant notices of it."""
    if quick:
        users, seconds = 2_000, 1.0
    work = campaign_bench.run(users=users, seconds=seconds, data=data, sync=sync, hurry=quick)
    measure("campaign", work, data, quick=quick)


@app.command()
def channels(jobs: int = 10_000, users: int = 500, data: Data = None, sync: Sync = None, quick: Quick = False) -> None:
    """How many jobs a second a worker sends by each channel, against the channel alone."""
    if quick:
        jobs, users = 200, 20
    work = channels_bench.run(jobs=jobs, users=users, data=data, sync=sync, hurry=quick)
    measure("channels", work, data, quick=quick)


@app.command()
def plan(
    records: int = 100_000, users: int = 2_000, data: Data = None, sync: Sync = None, quick: Quick = False
) -> None:
    """How fast a planner decides about a whole log, against the fold of unread counts."""
    if quick:
        records, users = 20_000, 100
    work = plan_bench.run(records=records, users=users, data=data, sync=sync, hurry=quick)
    measure("plan", work, data, quick=quick)


@app.command()
def users(
    events: int = 200_000,
    few: int = 10_000,
    many: int = 1_000_000,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """What a notification costs where there are many users, against the same with few."""
    if quick:
        events, few, many = 1_000, 50, 500
    measure(
        "users",
        users_bench.run(events=events, few=few, many=many, data=data, sync=sync, hurry=quick),
        data,
        quick=quick,
    )


@app.command()
def sustained(
    rates: Annotated[
        str, typer.Option(help="Notifications per second, one run each, separated by commas.")
    ] = "4000,6000,8000,10000",
    sockets: Annotated[int, typer.Option(help="Connected devices, one user each.")] = 2_000,
    seconds: float = 15.0,
    gateways: Annotated[int, typer.Option(help="Gateway processes.")] = 1,
    acks: Annotated[bool, typer.Option(help="Whether devices acknowledge.")] = True,
    projections: Annotated[bool, typer.Option(help="Whether a projector folds the logs beside it.")] = False,
    follow_one_in: Annotated[
        int, typer.Option(help="Of so many events one is followed by traces, to SEAMARK_TRACES_ENDPOINT; 0: none.")
    ] = 0,
    batches_per_second: Annotated[int, typer.Option(help="Publisher's batches: more make a smoother load.")] = 50,
    stretch_seconds: Annotated[float, typer.Option(help="Of a longer run each stretch is shown for itself.")] = 60.0,
    prototype: Annotated[
        Path | None, typer.Option(help="The naive pipeline to compare with, run before and after.")
    ] = None,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """The rate held (p99 <= 500 ms, nothing lost, every lag < 1000) from a publisher to devices that acknowledge."""
    if quick:
        rates, sockets, seconds = "200", 20, 2.0
    work = sustained_bench.run(
        rates=[int(rate) for rate in rates.split(",")],
        sockets=sockets,
        seconds=seconds,
        gateways=gateways,
        acks=acks,
        batches_per_second=batches_per_second,
        projections=projections,
        follow_one_in=follow_one_in,
        stretch_seconds=stretch_seconds,
        prototype=prototype,
        data=data,
        sync=sync,
        hurry=quick,
    )
    measure("sustained", work, data, quick=quick)


@app.command()
def fanout(
    users: Annotated[int, typer.Option(help="Connected users, one device each.")] = 10_000,
    gateways: Annotated[int, typer.Option(help="Gateway processes.")] = 1,
    rounds: int = 5,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """One event to many connected users."""
    if quick:
        users, rounds = 50, 1
    work = fanout_bench.run(users=users, gateways=gateways, rounds=rounds, data=data, sync=sync, hurry=quick)
    measure("fanout", work, data, quick=quick)


@app.command()
def storm(
    sessions: int = 10_000,
    gateways: Annotated[int, typer.Option(help="Gateway processes.")] = 2,
    rounds: int = 3,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """All sessions reconnect at once with their cursors, a tenth of them with missed records."""
    if quick:
        sessions, gateways, rounds = 50, 1, 1
    work = storm_bench.run(sessions=sessions, gateways=gateways, rounds=rounds, data=data, sync=sync, hurry=quick)
    measure("storm", work, data, quick=quick)


@app.command()
def idle(
    sessions: int = 10_000,
    settle_seconds: Annotated[float, typer.Option(help="From the last join to the measurement.")] = 60.0,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """Memory of sessions that have nothing to do."""
    if quick:
        sessions, settle_seconds = 50, 0.5
    work = idle_bench.run(sessions=sessions, settle_seconds=settle_seconds, data=data, sync=sync, hurry=quick)
    measure("idle", work, data, quick=quick)


@app.command()
def resume(
    resumes: Annotated[int, typer.Option(help="Warm resumes.")] = 2_000,
    missed: Annotated[int, typer.Option(help="Records one device has missed.")] = 100_000,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """From hello to live, and a very long absence while others are served."""
    if quick:
        resumes, missed = 40, 2_000
    others = 1.0 if quick else 5.0
    measure(
        "resume",
        resume_bench.run(resumes=resumes, missed=missed, others_seconds=others, data=data, sync=sync, hurry=quick),
        data,
        quick=quick,
    )


@app.command()
def rebuild(
    records: int = 200_000, users: int = 2_000, data: Data = None, sync: Sync = None, quick: Quick = False
) -> None:
    """How fast projections are folded from the whole log, against a bare pull of the same streams."""
    if quick:
        records, users = 2_000, 100
    measure("rebuild", rebuild_bench.run(records=records, users=users, data=data, sync=sync), data, quick=quick)


@app.command()
def verify(
    records: int = 5_000_000,
    users: int = 20_000,
    restart: Annotated[bool, typer.Option(help="Kill the broker in the midst of each, and start it again.")] = False,
    data: Data = None,
    sync: Sync = None,
    quick: Quick = False,
) -> None:
    """Memory and time of `seamark verify` of all three projections, and of the rebuilds before it."""
    if quick:
        records, users = 4_000, 100
    work = verify_bench.run(records=records, users=users, restart=restart, data=data, sync=sync)
    measure("verify", work, data, quick=quick)


@app.command()
def inbox(
    records: int = 1_000_000, users: int = 10_000, pages: int = 2_000, data: Data = None, quick: Quick = False
) -> None:
    """The first page of an inbox when the table is large, against a bare round trip to the database."""
    if quick:
        records, users, pages = 4_000, 100, 20
    measure("inbox", inbox_bench.run(records=records, users=users, pages=pages, data=data), data, quick=quick)


@app.command("import")
def import_(users: int = 100_000, kills: int = 5, data: Data = None, quick: Quick = False) -> None:
    """How long an import of users takes, against a bare copy of its file; whoever kills it finds all of them, or none."""
    if quick:
        users, kills = 2_000, 1
    measure("import", imports_bench.run(users=users, kills=kills, data=data), data, quick=quick)


@app.command()
def months(rows: int = 5_000_000, users: int = 50_000, data: Data = None, quick: Quick = False) -> None:
    """Large tables: a rebuild that carries all rows over, and months that are over and dropped, against filling them."""
    if quick:
        rows, users = 4_000, 100
    measure("months", months_bench.run(rows=rows, users=users, data=data), data, quick=quick)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def against(
    context: typer.Context,
    revision: Annotated[str, typer.Argument(help="A commit, branch or tag to compare this tree with.")],
    rounds: Annotated[int, typer.Option(help="Runs of each of the two.")] = 4,
) -> None:
    """Another benchmark, with its options behind `--`, in this tree and in REVISION in turn: the figures of both."""
    try:
        print(json.dumps(against_bench.run(revision, rounds, context.args)))
    except against_bench.Unknown as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
