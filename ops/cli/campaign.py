"""`seamark campaign`: one message for an audience of any size, watched while it goes out."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from engine.errors import InvalidSetting
from ops.cli.event_fields import read_data
from ops.cli.output import err, out, print_json, stages
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, nats_settings, postgres_url

if TYPE_CHECKING:
    from engine.campaigns.commands import Campaigns
    from engine.campaigns.draft import Draft
    from engine.campaigns.progress import Progress
    from engine.postgres import Pool

FOLLOW_SECONDS: Final = 0.5
"""How often a campaign that is followed is asked for its progress."""

CANCEL_SECONDS: Final = 10.0
"""How long it is tried to tell dispatchers; the command may be repeated."""

Found = TypeVar("Found")
Text = str | None
Id = Annotated[str, typer.Argument(help="The campaign's id.")]
Follow = Annotated[bool, typer.Option("--follow", help="Show how it goes on until it is over.")]

app = typer.Typer(help="Send one message to a whole audience: start, watch, hold up, end.", no_args_is_help=True)


@app.command()
def start(
    file: Annotated[
        Text, typer.Option("--file", help="JSON object as for POST /v1/campaigns, - for standard input; options win.")
    ] = None,
    id: Annotated[Text, typer.Option("--id", help="Its id; starting it again changes nothing.")] = None,
    topic: Annotated[Text, typer.Option("--topic", help="To the members of this topic.")] = None,
    user: Annotated[list[str] | None, typer.Option("--user", help="To this user; repeat for several.")] = None,
    everyone: Annotated[bool, typer.Option("--everyone", help="To all users of the directory.")] = False,
    type: Annotated[Text, typer.Option("--type", help="Dot-separated words, such as sale.autumn.")] = None,
    data: Annotated[Text, typer.Option("--data", help="JSON shown to the users, or @file.")] = None,
    rate: Annotated[int | None, typer.Option("--rate", help="Recipients a second, at most.", min=1)] = None,
    start_at: Annotated[Text, typer.Option("--start-at", help="Nothing before it. RFC 3339 with an offset.")] = None,
    not_after: Annotated[Text, typer.Option("--not-after", help="No page after it. RFC 3339 with an offset.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and count its audience, send nothing.")] = False,
    follow: Follow = False,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Start a campaign, at once or at its time."""
    given = {"id": id, "rate": rate, "start_at": start_at, "not_after": not_after}
    audience = {"topic": topic, "users": user or None, "everyone": everyone or None}
    message = {"type": type, "data": None if data is None else read_data(data)}
    draft = _draft(file, given, audience, message)
    name = tenant or "default"
    if dry_run:
        _try(folder, name, draft, as_json=as_json)
        return
    created = _run(folder, lambda campaigns: campaigns.create(name, draft))
    if follow:
        _follow(folder, name, draft.id, as_json=as_json)
    elif as_json:
        print_json({"id": draft.id, "created": created})
    else:
        out.print(f"[green]started[/] {draft.id}" if created else f"[yellow]was started before[/]: {draft.id}")


@app.command("ls")
def ls(
    limit: Annotated[int, typer.Option("--limit", help="So many, the newest first.", min=1, max=250)] = 20,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """List campaigns, the newest first."""
    for each in _run(folder, lambda campaigns: campaigns.list(tenant or "default", limit)):
        _show(each, as_json=as_json)


@app.command()
def show(id: Id, tenant: Tenant = None, folder: Folder = DATA_FOLDER) -> None:
    """Print a campaign as it was asked for, as JSON."""
    print_json(_run(folder, lambda campaigns: campaigns.read(tenant or "default", id)))


@app.command()
def progress(
    id: Id, follow: Follow = False, tenant: Tenant = None, folder: Folder = DATA_FOLDER, as_json: Json = False
) -> None:
    """Show how far a campaign has come."""
    if follow:
        _follow(folder, tenant or "default", id, as_json=as_json)
    else:
        _show(_run(folder, lambda campaigns: campaigns.progress(tenant or "default", id)), as_json=as_json)


@app.command()
def channels(id: Id, tenant: Tenant = None, folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Count a campaign's notifications on each channel by what became of them."""
    from projections.deliveries.campaigns import CampaignChannels

    found = _with_pool(folder, lambda pool: CampaignChannels(pool).of(tenant or "default", id))
    if as_json:
        print_json({"channels": found})
        return
    for channel, counts in sorted(found.items()):
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.states.items()))
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.reasons.items()))
        out.print(f"{channel}  {counts.total}: {states}{reasons and f' ({reasons})'}", markup=False)


@app.command()
def pause(id: Id, tenant: Tenant = None, folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Begin no page any more. Pages that were begun are finished: at most four."""
    _change(folder, tenant, id, lambda campaigns, name: campaigns.pause(name, id), as_json=as_json)


@app.command()
def resume(id: Id, tenant: Tenant = None, folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Go on with a campaign that was paused."""
    _change(folder, tenant, id, lambda campaigns, name: campaigns.resume(name, id), as_json=as_json)


@app.command()
def cancel(id: Id, tenant: Tenant = None, folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Begin no page ever again. What is not dispatched a second later is shown to nobody."""
    from engine.broker.jetstream import connect
    from engine.campaigns.draft import transaction_id
    from engine.cancels import cancel as store_cancel

    async def change(campaigns: Campaigns, name: str) -> None:
        await campaigns.cancel(name, id)
        # Afterwards: a page that is claimed before is in doubt for a while, and whenever it comes, it is withheld.
        broker = await connect(nats_settings(folder, "seamark-campaign"))
        try:
            await store_cancel(broker, name, transaction_id(id), budget_seconds=CANCEL_SECONDS)
        finally:
            await broker.close()

    _change(folder, tenant, id, change, as_json=as_json)


@app.command()
def rate(
    id: Id,
    per_second: Annotated[int, typer.Argument(help="Recipients a second; 0: as fast as dispatchers can.", min=0)],
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Go on at another rate, from the next page on."""
    _change(
        folder, tenant, id, lambda campaigns, name: campaigns.set_rate(name, id, per_second or None), as_json=as_json
    )


def _try(folder: Path, tenant: str, draft: Draft, *, as_json: bool) -> None:
    """Say how large the audience is, and what would be decided of some recipients, as `POST /v1/campaigns/dry-run` does."""
    from engine.campaigns.commands import Campaigns, Size
    from engine.campaigns.forecast import Forecast, forecast
    from engine.controls.store import ControlStore
    from engine.controls.view import Controls
    from engine.directory.rules import read_rules
    from engine.profiles.reader import read_profile

    async def run(pool: Pool) -> tuple[Size, Forecast]:
        from engine.broker.jetstream import connect

        broker = await connect(nats_settings(folder, "seamark-campaign"))
        try:
            controls = Controls((await ControlStore(broker).read()).document)
        finally:
            await broker.close()
        campaigns, rules = Campaigns(pool), await read_rules(pool, tenant)
        size = await campaigns.size(tenant, draft)
        return size, await forecast(
            campaigns,
            tenant,
            draft,
            rules,
            lambda user: read_profile(pool, tenant, user),
            lambda user: controls.drops(tenant, user),
        )

    size, seen = _with_pool(folder, run)
    if as_json:
        counted = {"audience": size.audience, "recipients": size.recipients, "reasons": {"excluded": size.excluded}}
        print_json({**counted, "sample": seen.sample, "decisions": seen.decisions})
        return
    out.print(f"{size.recipients} users would get it; {size.excluded} of {size.audience} are excluded")
    for channel, decisions in seen.decisions.items():
        said = ", ".join(f"{count} {decision}" for decision, count in sorted(decisions.items()))
        out.print(f"{channel}, of {seen.sample} drawn at random: {said}", markup=False)


def _draft(file: str | None, given: dict[str, Any], audience: dict[str, Any], message: dict[str, Any]) -> Draft:
    """The campaign that a file and options name.

    Raises:
        InvalidSetting: it is none; the message names the member.
    """
    import msgspec

    from engine.campaigns.draft import Draft

    body: dict[str, Any] = {} if file is None else _read_object(file)
    body |= {name: value for name, value in given.items() if value is not None}
    if named := {name: value for name, value in audience.items() if value is not None}:
        body["audience"] = named
    if said := {name: value for name, value in message.items() if value is not None}:
        inside = msgspec.json.decode(msgspec.json.encode(body.get("message", {})), type=dict[str, msgspec.Raw])
        body["message"] = {**inside, **said}
    for name, remedy in (("id", "--id"), ("audience", "--topic, --user or --everyone"), ("message", "--type")):
        if name not in body:
            raise InvalidSetting(f"the campaign has no `{name}`: give {remedy}, or --file")
    try:
        return msgspec.json.decode(msgspec.json.encode(body), type=Draft)
    except msgspec.ValidationError as error:
        raise InvalidSetting(f"the campaign cannot be read: {error}") from error


def _read_object(path: str) -> dict[str, Any]:
    """The members of a JSON object, each as it stands in the file."""
    import msgspec

    try:
        text = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except OSError as error:
        raise InvalidSetting(f"--file: {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidSetting(f"--file must hold one campaign, a JSON object: {error}") from error


def _change(
    folder: Path,
    tenant: str | None,
    id: str,
    change: Callable[[Campaigns, str], Awaitable[None]],
    *,
    as_json: bool,
) -> None:
    async def run(campaigns: Campaigns) -> Progress:
        await change(campaigns, tenant or "default")
        return await campaigns.progress(tenant or "default", id)

    _show(_run(folder, run), as_json=as_json)


def _show(said: Progress, *, as_json: bool) -> None:
    if as_json:
        print_json(said)
        return
    more = "" if said.audience_final else "+"
    parts = [f"{said.stored} of {said.audience}{more} stored"]
    names = ("fixed", "publishing", "excluded", "cancelled", "expired", "failed", "ambiguous")
    parts += [f"{value} {name}" for name in names if (value := getattr(said, name))]
    if said.seconds_left:
        parts.append(f"{said.recipients_per_second:g} a second, {said.seconds_left:.0f} s left")
    out.print(f"{said.id}  {said.state}  {', '.join(parts)}", markup=False)
    if said.stuck is not None:
        err.print(f"{said.id} does not move: {said.stuck}", markup=False)
    if said.reason is not None:
        err.print(f"{said.id} has failed: {said.reason}", markup=False)


def _follow(folder: Path, tenant: str, id: str, *, as_json: bool) -> None:
    """Show the progress until the campaign is over: a bar for people, a line for each look as JSON."""

    async def run(campaigns: Campaigns) -> Progress:
        import asyncio

        with stages(quiet=as_json) as show_bar:
            while True:
                said = await campaigns.progress(tenant, id)
                if as_json:
                    print_json(said)
                recipients = said.audience - said.excluded
                show_bar("stored", said.stored, recipients)
                show_bar("dispatched", said.dispatched, recipients)
                if said.finished_at is not None:
                    return said
                await asyncio.sleep(FOLLOW_SECONDS)

    last = _run(folder, run)
    if not as_json:
        _show(last, as_json=False)


def _run(folder: Path, work: Callable[[Campaigns], Awaitable[Found]]) -> Found:
    """Do `work` on the campaigns of the database that the settings or the folder name."""
    from engine.campaigns.commands import Campaigns

    return _with_pool(folder, lambda pool: work(Campaigns(pool)))


def _with_pool(folder: Path, work: Callable[[Pool], Awaitable[Found]]) -> Found:
    """Do `work` on that database."""
    import uvloop

    from engine.campaigns.draft import InvalidCampaign
    from ops.postgres import opened

    url = postgres_url(folder)

    async def run() -> Found:
        async with opened(url) as pool:
            try:
                return await work(pool)
            except InvalidCampaign as error:
                raise InvalidSetting(f"{error.field}: {error}") from error

    return uvloop.run(run())
