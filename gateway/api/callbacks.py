"""`POST /v1/providers/{name}/callbacks`: what providers report of what was sent by them, and what people answer to it.

The signature of a request says whose it is, or a login where the provider has nothing better. Until that is checked, nothing
else of the request is looked at.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec
import structlog
from aiohttp import web

from engine.errors import BrokerError
from gateway.access.shares import Shares
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, NOT_FOUND, UNAUTHENTICATED, UNAVAILABLE, Problem
from gateway.providers.certificates import Unfetched
from gateway.providers.following import follow_answer, follow_reports
from gateway.providers.sources import Posted, Unproved, Unreadable

_log = structlog.get_logger("seamark.callbacks")

PLACES: Final = Shares(16, 16)
"""Such requests at a time: after a campaign they come as fast as its mails went out, and must leave the directory to others. All
providers come again."""

BODY_BYTES: Final = 1 << 20
"""SendGrid sends up to 768 KB at once, all others far less."""


class ProviderQuery(msgspec.Struct, frozen=True):
    """`name`: of the provider, as the table `callbacks` has it."""

    name: Annotated[str, msgspec.Meta(max_length=64)]


@Endpoint(
    "POST",
    "/v1/providers/{name}/callbacks",
    places=PLACES,
    body_bytes=BODY_BYTES,
    refuses=(NOT_FOUND, UNAUTHENTICATED, INVALID_BODY, UNAVAILABLE),
)
async def take_callback(
    call: Call[None, ProviderQuery, Annotated[bytes, dict[str, Any] | list[dict[str, Any]]]],
) -> web.StreamResponse:
    """Take what a provider posts, in its own form: how messages have fared, and what people answer. It must prove who it is.

    What is posted twice, late, or in another order comes to the same.
    """
    context, name = call.context, call.query.name
    source = None if context.sources is None else context.sources.of(name)
    if source is None:
        raise Problem(
            NOT_FOUND, "no provider of this name posts here: [callbacks] in the providers' file says which do"
        )
    _, _, query = call.request.raw_path.partition("?")
    try:
        said = await source.read(Posted(call.request.headers, query, call.body, datetime.now(UTC)))
        await follow_reports(context, name, source.channel, said.reports)
        if said.inbound is not None:
            await follow_answer(context, name, source.tenants, said.inbound)
    except Unproved as error:
        raise Problem(UNAUTHENTICATED, "this is not signed by the provider, or not any more", provider=name) from error
    except Unreadable as error:
        raise Problem(INVALID_BODY, f"it is signed, but {error}", provider=name) from error
    except Unfetched as error:
        raise Problem(UNAVAILABLE, "the provider's certificate cannot be fetched now: try again") from error
    except BrokerError as error:
        raise Problem(
            UNAVAILABLE, "the receipts cannot be stored now: try again", error=type(error).__name__
        ) from error
    return web.Response(text=said.answer, content_type="text/xml", headers={"Cache-Control": "no-store"})
