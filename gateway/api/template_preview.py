"""`POST /v1/templates/preview`: what a template says with some data. Nothing is stored or sent."""

from __future__ import annotations

from typing import Final

from engine.worker.preview import NothingSent, Preview, ToPreview, previewed
from gateway.access.principals import Scope, Service
from gateway.api.configuring import PLACES
from gateway.api.directory import directory_of
from gateway.api.explain import rules_of
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import Kind, Problem

BODY_BYTES: Final = 524_288
"""A template's 100 KiB with escapes, and as much data as an event may bring."""

UNSENDABLE: Final = Kind(422, "unsendable")
"""With this data nothing would be sent."""


@Endpoint(
    "POST",
    "/v1/templates/preview",
    scope=Scope.CONFIG_READ,
    places=PLACES,
    body_bytes=BODY_BYTES,
    refuses=(UNSENDABLE,),
)
async def preview_template(call: Call[Service, None, ToPreview]) -> Preview:
    """Show what a notification would say by a channel in a language: subject, HTML and text, or segments. Nothing is sent."""
    tenant, pool = call.principal.tenant, directory_of(call.context).pool
    rules = await rules_of(call.context, tenant)
    try:
        return await previewed(pool, tenant, rules.version, call.body)
    except NothingSent as error:
        raise Problem(UNSENDABLE, str(error)) from error
