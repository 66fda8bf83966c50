"""`/u/{token}`: the link in a mail, by which whoever got it gets no more of its kind. The token is all the proof (RFC 8058).

Only a POST changes anything. Programs that look at every link of a mail before a person does would else unsubscribe everybody.
"""

from __future__ import annotations

import html
from typing import Annotated, Final

import msgspec
from aiohttp import web

from engine.channels.email.unsubscribe import TOKEN_CHARS_MAX, TokenRefused, Unsubscription
from engine.directory.suppressing import changing_suppressions
from engine.directory.suppressions import NewSuppression, put_suppressions
from engine.directory.users import find_user
from engine.plan.profile import OPTED_OUT, SCOPE_ALL
from gateway.access.shares import Shares
from gateway.api.directory import directory_of, reading
from gateway.api.public_page import public_page
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import NOT_FOUND, UNAVAILABLE, Problem
from gateway.limits import DIRECTORY_SECONDS

PLACES: Final = Shares(16, 16)
"""Such requests at a time: a campaign brings many at once, which must leave the directory to others. Mail programs come again."""

SOURCE: Final = "unsubscribe link"

_ASK: Final = """<h1>Unsubscribe</h1><p>You will get no more e-mails of this kind{kind}.</p>
<form method="post"><input type="hidden" name="List-Unsubscribe" value="One-Click"><button>Unsubscribe</button></form>
<p class="soft"><a href="{token}/preferences">Choose what you get</a> instead</p>"""
_DONE: Final = """<h1>Unsubscribed</h1><p>You get no more e-mails of this kind{kind}.</p>
<p class="soft"><a href="{token}/preferences">Choose what you get</a></p>"""
"""The link is relative to `/u/`. Tokens need no escape."""


class LinkQuery(msgspec.Struct, frozen=True):
    """`token`: as the link in the mail has it."""

    token: Annotated[str, msgspec.Meta(max_length=TOKEN_CHARS_MAX)]


@Endpoint("GET", "/u/{token}", refuses=(NOT_FOUND,))
async def unsubscribe_page(call: Call[None, LinkQuery, None]) -> web.StreamResponse:
    """A page with a button that unsubscribes. It changes nothing."""
    return _answer("Unsubscribe", _ASK, meant(call.context, call.query.token), call.query.token)


@Endpoint("POST", "/u/{token}", places=PLACES, refuses=(NOT_FOUND, UNAVAILABLE))
async def unsubscribe(call: Call[None, LinkQuery, None]) -> web.StreamResponse:
    """Send no more mails of a kind to the address of a user, from now on. Done again, it is as done once.

    It holds as a suppression with the reason `opted_out` and the category as its scope; whoever has no address any more needs
    none.
    """
    what = meant(call.context, call.query.token)
    async with reading(call.context) as connection:
        user = await find_user(connection, what.tenant, what.user)
    if user is not None and user.email is not None:
        new = NewSuppression(
            channel="email", address=user.email, reason=OPTED_OUT, scope=what.category or SCOPE_ALL, source=SOURCE
        )
        async with changing_suppressions(
            directory_of(call.context), what.tenant, [(new.channel, new.address)], DIRECTORY_SECONDS
        ) as connection:
            await put_suppressions(connection, what.tenant, [new])
    return _answer("Unsubscribed", _DONE, what, call.query.token)


def meant(context: Context, token: str) -> Unsubscription:
    """What a link is for.

    Raises:
        Problem: 404, it is none of ours.
    """
    try:
        if context.unsubscribing is not None:
            what = context.unsubscribing.read(token)
            if what.channel == "email":
                return what
    except TokenRefused:
        pass
    raise Problem(NOT_FOUND, "this link is not valid, or not any more")


def _answer(title: str, content: str, what: Unsubscription, token: str) -> web.Response:
    kind = "" if what.category == SCOPE_ALL else f" ({html.escape(what.category)})"
    return public_page(title, content.format(kind=kind, token=token))
