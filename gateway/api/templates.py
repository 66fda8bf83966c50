"""Templates of a tenant: what a type says by a channel in a language."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from engine.directory.templates import (
    Locale,
    Template,
    TemplateKey,
    activate_template,
    check_channel,
    check_parts,
    delete_template,
    find_template,
    page_of_templates,
    put_template,
    versions_of_template,
)
from engine.plan.patterns import check_pattern
from engine.plan.rules import Channel
from gateway.access.principals import Scope, Service
from gateway.api.configuring import PLACES, Deletion, rules_changing
from gateway.api.directory import VERSION_MAX, Version, reading
from gateway.api.pages import PageQuery, begin_of, cut
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, INVALID_QUERY, LIMIT_REACHED, NOT_FOUND, VERSION_CONFLICT, Problem

_CHANGES: Final = (VERSION_CONFLICT, LIMIT_REACHED)

BODY_BYTES: Final = 262_144
"""A template's 100 KiB, written with escapes."""

_PATH: Final = "/v1/templates/{type}/{channel}/{locale}"


class TemplateQuery(msgspec.Struct, frozen=True):
    """`type`: a type or a pattern, as of rules. `locale`: a language (`de`, `pt-BR`), or `default` for all that have none."""

    type: str
    channel: Channel
    locale: Locale

    def __post_init__(self) -> None:
        """Raise ValueError where `type` is none."""
        try:
            check_pattern(self.type)
        except ValueError as error:
            raise ValueError(f"`type`: {error}") from error

    @property
    def key(self) -> TemplateKey:
        """What the template is for."""
        return TemplateKey(self.type, self.channel, self.locale)


class ShownQuery(TemplateQuery, frozen=True, kw_only=True):
    """Which template. `version`: which of those that are kept; the active one by default."""

    version: Version | None = None


class TemplateVersionQuery(TemplateQuery, frozen=True, kw_only=True):
    """Which template; `version`: change it only if this one is still active; 0: only if there is none."""

    version: Version | None = None


class TemplateBody(msgspec.Struct, forbid_unknown_fields=True):
    """Texts by their names: `body`; an e-mail's `subject`, and `html` if it is not made of `body`; a push's `title`."""

    parts: dict[str, str]


class ActiveBody(msgspec.Struct, forbid_unknown_fields=True):
    """`version`: the one to use from now on."""

    version: Annotated[int, Meta(ge=1, le=VERSION_MAX)]


class ShownTemplate(Template, frozen=True, kw_only=True):
    """A version of a template. `versions`: all that are kept, newest first."""

    versions: list[int]


class TemplateSummary(msgspec.Struct):
    """An active template without its texts."""

    type: str
    channel: Channel
    locale: str
    version: int


class TemplatesPage(msgspec.Struct):
    """In the order of type, channel and locale. `next`: the `cursor` of the following page; null behind the last."""

    items: list[TemplateSummary]
    next: str | None


@Endpoint("GET", "/v1/templates", scope=Scope.CONFIG_READ, places=PLACES)
async def list_templates(call: Call[Service, PageQuery, None]) -> TemplatesPage:
    """The active templates of the tenant, without their texts."""
    after, limit = TemplateKey(*begin_of(call.query, 3)), call.query.limit
    async with reading(call.context) as connection:
        found = await page_of_templates(connection, call.principal.tenant, after, limit + 1)
    items, next = cut(found, limit, lambda template: template.key)
    shown = [TemplateSummary(*one.key, one.version) for one in items]  # type: ignore[arg-type]
    return TemplatesPage(shown, next)


@Endpoint("GET", _PATH, scope=Scope.CONFIG_READ, places=PLACES, refuses=(NOT_FOUND,))
async def get_template(call: Call[Service, ShownQuery, None]) -> ShownTemplate:
    """A template: its active version, or the one that `version` names."""
    tenant, key = call.principal.tenant, call.query.key
    async with reading(call.context) as connection:
        found = await find_template(connection, tenant, key, call.query.version)
        versions = await versions_of_template(connection, tenant, key)
    if found is None:
        kept = f"versions {', '.join(map(str, versions))} are kept" if versions else "GET /v1/templates lists all"
        raise Problem(NOT_FOUND, f"there is no such template: {kept}")
    return ShownTemplate(**msgspec.structs.asdict(found), versions=versions)


@Endpoint("PUT", _PATH, scope=Scope.CONFIG_WRITE, places=PLACES, refuses=_CHANGES, body_bytes=BODY_BYTES)
async def replace_template(call: Call[Service, TemplateVersionQuery, TemplateBody]) -> Template:
    """Keep texts as a new version, and make it the active one. The last 20 versions are kept."""
    try:
        check_channel(call.query.channel)
    except ValueError as error:
        raise Problem(INVALID_QUERY, str(error), field="channel") from error
    try:
        check_parts(call.query.channel, call.body.parts)
    except ValueError as error:
        raise Problem(INVALID_BODY, str(error), field="parts") from error
    async with rules_changing(call.context, call.principal.tenant) as change:
        return await put_template(change, call.query.key, call.body.parts, call.query.version)


@Endpoint("PUT", f"{_PATH}/active", scope=Scope.CONFIG_WRITE, places=PLACES, refuses=(*_CHANGES, NOT_FOUND))
async def activate(call: Call[Service, TemplateVersionQuery, ActiveBody]) -> Template:
    """Make a version that is kept the active one: how a change is taken back."""
    async with rules_changing(call.context, call.principal.tenant) as change:
        found = await activate_template(change, call.query.key, call.body.version, call.query.version)
    if found is None:
        raise Problem(NOT_FOUND, f"version {call.body.version} is not kept: GET the template for those that are")
    return found


@Endpoint("DELETE", _PATH, scope=Scope.CONFIG_WRITE, places=PLACES, refuses=_CHANGES)
async def remove_template(call: Call[Service, TemplateVersionQuery, None]) -> Deletion:
    """Delete a template with all its versions."""
    async with rules_changing(call.context, call.principal.tenant) as change:
        return Deletion(await delete_template(change, call.query.key, call.query.version))
