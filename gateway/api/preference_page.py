"""`/u/{token}/preferences`: the page on which whoever got a mail chooses what he gets, and how. The token is all the proof.

What is shown is what holds: a row for each category, and for each type that has none, with a box for each channel. Only boxes
that were changed are stored, so that a page that was open for long does not undo what was changed elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple
from urllib.parse import parse_qs

from aiohttp import web

from engine.directory.changing import Directory
from engine.directory.contacts import Addressed
from engine.directory.rules import TenantRules
from engine.directory.suppressing import changing_suppressions
from engine.directory.suppressions import StoredSuppression, find_suppressions, lift_suppression
from engine.directory.users import find_user
from engine.plan.choices import effective
from engine.plan.preferences import Preferences, Quietable
from engine.plan.profile import OPTED_OUT, SCOPE_ALL
from engine.profiles.preferences import find_preferences, patch_preferences
from gateway.api.directory import directory_of, reading
from gateway.api.explain import rules_of
from gateway.api.public_page import public_page
from gateway.api.unsubscribe import PLACES, SOURCE, LinkQuery, meant
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, LIMIT_REACHED, NOT_FOUND, UNAVAILABLE, USER_DELETED, Problem
from gateway.limits import DIRECTORY_SECONDS

BODY_BYTES: Final = 262_144
"""Each box says what it was and what it is: some 100 bytes for each category and channel."""

FIELDS_MAX: Final = 4000

_NAMES: Final[Mapping[Quietable, str]] = {"email": "E-mail", "push": "Push", "sms": "SMS"}


class Box(NamedTuple):
    """Something that can be switched. `kind`: of a category, a type, or `all` of a channel."""

    kind: str
    name: str
    channel: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.channel}:{self.name}"


class Standing(NamedTuple):
    """What holds for a user.

    Args:
        boxes: what can be switched, and whether it is on, in the order of the page.
        patterns: of the types of each category.
        wishes: suppressions that came of links like this one, which it takes back.
        fixed: boxes that are off whatever is chosen, since an address is suppressed for another reason, or altogether.
        silent: channels by which nothing comes, for such a reason.
    """

    boxes: dict[Box, bool]
    patterns: dict[str, list[str]]
    wishes: Sequence[StoredSuppression]
    fixed: frozenset[Box]
    silent: frozenset[str]


@Endpoint("GET", "/u/{token}/preferences", places=PLACES, refuses=(NOT_FOUND, UNAVAILABLE))
async def preference_page(call: Call[None, LinkQuery, None]) -> web.StreamResponse:
    """A page with what its reader gets, by category and channel. It changes nothing."""
    what = meant(call.context, call.query.token)
    return _page(await _standing(call.context, what.tenant, what.user))


@Endpoint(
    "POST",
    "/u/{token}/preferences",
    places=PLACES,
    body_bytes=BODY_BYTES,
    refuses=(NOT_FOUND, UNAVAILABLE, INVALID_BODY, LIMIT_REACHED, USER_DELETED),
)
async def choose(call: Call[None, LinkQuery, Annotated[bytes, dict[str, Any]]]) -> web.StreamResponse:
    """Store the boxes of the page that were changed. They hold within a second."""
    what = meant(call.context, call.query.token)
    try:
        form = parse_qs(call.body.decode(), keep_blank_values=True, max_num_fields=FIELDS_MAX)
    except ValueError as error:
        raise Problem(INVALID_BODY, "this is not what the page's form sends") from error
    was, on = set(form.get("was", ())), set(form.get("on", ()))
    standing = await _standing(call.context, what.tenant, what.user)
    changed = {
        box: str(box) in on
        for box in standing.boxes
        if box not in standing.fixed and (str(box) in on) != (str(box) in was)
    }
    await _store(call.context, what.tenant, what.user, standing, changed)
    return _page(await _standing(call.context, what.tenant, what.user), saved=True)


async def _store(context: Context, tenant: str, user: str, standing: Standing, changed: Mapping[Box, bool]) -> None:
    directory = directory_of(context)
    if patch := patch_of(standing, changed):
        async with directory.changing(tenant, [user], DIRECTORY_SECONDS) as change:
            await patch_preferences(change, user, patch, None)
    scopes = {(box.channel, box.name) for box, on in changed.items() if on}
    lifted = [one for one in standing.wishes if (one.channel, one.scope) in scopes]
    if lifted:
        await _lift(directory, tenant, lifted)


async def _lift(directory: Directory, tenant: str, lifted: Sequence[StoredSuppression]) -> None:
    addresses: list[tuple[Addressed, str]] = [(one.channel, one.address) for one in lifted]
    async with changing_suppressions(directory, tenant, addresses, DIRECTORY_SECONDS) as connection:
        for one in lifted:
            await lift_suppression(connection, tenant, one.id)


def patch_of(standing: Standing, changed: Mapping[Box, bool]) -> dict[str, Any]:
    """What to merge into the user's document, so that the boxes hold. A category's says it for all of its types."""
    patch: dict[str, Any] = {}
    for box, on in changed.items():
        choice = {box.channel: "on" if on else "off"}
        if box.kind == "category":
            patch.setdefault("categories", {}).setdefault(box.name, {}).update(choice)
            for pattern in standing.patterns[box.name]:
                patch.setdefault("types", {}).setdefault(pattern, {})[box.channel] = None
        elif box.kind == "type":
            patch.setdefault("types", {}).setdefault(box.name, {}).update(choice)
    return patch


async def _standing(context: Context, tenant: str, user: str) -> Standing:
    """From the primary: whoever has changed something sees it.

    Raises:
        Problem: 404, the user was deleted.
    """
    rules = await rules_of(context, tenant)
    async with reading(context) as connection:
        deleted = "SELECT deleted_at IS NOT NULL FROM profiles WHERE tenant = $1 AND user_id = $2"
        if await connection.fetchval(deleted, tenant, user):
            raise Problem(NOT_FOUND, "this link is not valid any more")
        stored = await find_preferences(connection, tenant, user)
        known = await find_user(connection, tenant, user)
        said: dict[Addressed, str | None] = {} if known is None else {"email": known.email, "sms": known.phone}
        addresses = {channel: address for channel, address in said.items() if address is not None}
        suppressions = await find_suppressions(connection, tenant, addresses) if addresses else []
    return standing_of(rules, stored.document, suppressions)


def standing_of(rules: TenantRules, own: Preferences, suppressions: Sequence[StoredSuppression]) -> Standing:
    """What holds, of a tenant's rules, a user's document, and what is suppressed of his addresses."""
    boxes: dict[Box, bool] = {}
    patterns: dict[str, list[str]] = {}
    for pattern, rule in sorted(rules.types.items(), key=lambda item: (item[1].category or "\uffff", item[0])):
        if rule.category is not None:
            patterns.setdefault(rule.category, []).append(pattern)
        for channel in _NAMES:
            if channel in rule.channels:
                kind, name = ("type", pattern) if rule.category is None else ("category", rule.category)
                held = effective(channel, pattern, rule.category, rule, own, rules.defaults)
                box = Box(kind, name, channel)
                boxes[box] = boxes.get(box, False) or held.choice != "off"
    wishes = [one for one in suppressions if one.reason == OPTED_OUT and one.source == SOURCE]
    others = [one for one in suppressions if one not in wishes]
    fixed = set()
    for one in suppressions:
        for box in boxes:
            if box.channel == one.channel and (
                one.scope == SCOPE_ALL or (box.kind, box.name) == ("category", one.scope)
            ):
                boxes[box] = False
                if one in others or one.scope == SCOPE_ALL:
                    fixed.add(box)
    for channel in dict.fromkeys(one.channel for one in wishes if one.scope == SCOPE_ALL):
        boxes[Box("all", SCOPE_ALL, channel)] = False
    silent = frozenset(one.channel for one in others if one.scope == SCOPE_ALL)
    return Standing(boxes, patterns, wishes, frozenset(fixed), silent)


def _page(standing: Standing, *, saved: bool = False) -> web.Response:
    channels = [channel for channel in _NAMES if any(box.channel == channel for box in standing.boxes)]
    rows = dict.fromkeys((box.kind, box.name) for box in standing.boxes if box.kind != "all")
    head = "".join(f'<th scope="col">{_NAMES[channel]}</th>' for channel in channels)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{_input(standing, Box(kind, name, channel))}</td>" for channel in channels)
        + "</tr>"
        for kind, name in rows
    )
    again = "".join(
        f"<p>You have unsubscribed from everything by {_NAMES[box.channel]}.<br><label>{_mark(standing, box)} "  # type: ignore[index]
        f"Send me {_NAMES[box.channel]} again</label></p>"  # type: ignore[index]
        for box in standing.boxes
        if box.kind == "all"
    )
    silent = "".join(
        f'<p class="notice">Nothing is sent by {_NAMES[channel]} to you at present: ask whoever sends these messages.</p>'
        for channel in _NAMES
        if channel in standing.silent
    )
    table = f'<table><thead><tr><th scope="col">Messages</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    content = (
        "<h1>What you get</h1>"
        + ('<p class="notice" role="status">Saved.</p>' if saved else "")
        + silent
        + (
            f'<form method="post">{again}{table if rows else ""}<button>Save</button></form>'
            if standing.boxes
            else "<p>There is nothing to choose.</p>"
        )
    )
    return public_page("What you get", content)


def _input(standing: Standing, box: Box) -> str:
    if box not in standing.boxes:
        return ""
    label = f"{box.name} by {_NAMES[box.channel]}"  # type: ignore[index]
    return f'<label>{_mark(standing, box)}<span class="unseen">{html.escape(label)}</span></label>'


def _mark(standing: Standing, box: Box) -> str:
    """A box, and what it was when the page was made."""
    value, on = html.escape(str(box)), standing.boxes[box]
    was = f'<input type="hidden" name="was" value="{value}">' if on else ""
    state = " checked" if on else " disabled" if box in standing.fixed else ""
    return f'{was}<input type="checkbox" name="on" value="{value}"{state}>'
