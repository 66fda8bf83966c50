"""Templates of a tenant: what a type says by a channel in a language. Versions are kept; at most one of them is active.

They are only stored and checked here; `engine.channels.templates` renders them. A version never changes, so whoever renders it
may remember it under its number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from engine.channels.templates import TemplateFailed, check, value_names
from engine.directory.changes import Change
from engine.directory.changing import check_version
from engine.limits import TEMPLATE_BYTES_MAX, TEMPLATE_VERSIONS_MAX
from engine.plan.rules import Channel
from engine.postgres import Connection

LOCALE: Final = r"^(default|[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|[0-9]{3}))?)$(?!\n)"
Locale = Annotated[str, msgspec.Meta(pattern=LOCALE)]
"""A language with its script and region as BCP 47 writes them (`de`, `pt-BR`, `zh-Hant-TW`), or `default` for everybody for whose
language there is none; BCP 47 has no language of this name. Other ways to write the same, such as `pt-br`, are refused: they
would be other templates."""


class Shape(NamedTuple):
    """Parts of a channel's template: those it must have, those it may have; and the names that values have in it."""

    must: frozenset[str]
    may: frozenset[str]
    names: tuple[str, ...] = ("data", "locale", "tenant", "type")


SHAPES: Final[Mapping[str, Shape]] = {
    "push": Shape(frozenset({"body"}), frozenset({"title"})),
    "email": Shape(
        frozenset({"subject", "body"}),
        frozenset({"html"}),
        ("data", "locale", "tenant", "type", "unsubscribe_url"),
    ),
    "sms": Shape(frozenset({"body"}), frozenset()),
}
"""The channels that have templates, and the parts of each. An e-mail's `body` is Markdown, from which its text and its HTML are
made; `html`, where given, replaces the latter. Apps and webhooks get the data as it was published."""

ONE_LINE: Final = ("subject", "title")
"""Parts that become a header or a heading. A line's end in a subject would let its author write headers of his own."""

_WHOLE: Final = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_OPENING: Final = re.compile(r"\{[{%#]")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class TemplateKey(NamedTuple):
    """What a template is for. `type`: a type, or a pattern of types, as of rules."""

    type: str
    channel: str
    locale: str

    def __str__(self) -> str:
        return "/".join(self)


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a template. `parts`: the texts that `SHAPES` tells, in the syntax of Jinja."""

    type: str
    channel: Channel
    locale: str
    version: int
    active: bool
    made_at: datetime
    parts: dict[str, str]

    @property
    def key(self) -> TemplateKey:
        """What it is for."""
        return TemplateKey(self.type, self.channel, self.locale)


def check_channel(channel: str) -> None:
    """Pass a channel that has templates.

    Raises:
        ValueError: it has none: nothing would ever use one.
    """
    if channel not in SHAPES:
        what = "an app shows" if channel == "inapp" else "an endpoint gets"
        known = ", ".join(SHAPES)
        raise ValueError(
            f"`channel`: there are no templates for {channel}, as {what} the data as it was published; choose one of {known}"
        )


def check_parts(channel: str, parts: Mapping[str, str]) -> None:
    """Pass texts that can be a template of this channel.

    Raises:
        ValueError: the channel has none; or with the part, and what is wrong with it.
    """
    check_channel(channel)
    shape = SHAPES[channel]
    if missing := sorted(shape.must - parts.keys()):
        raise ValueError(f"`parts`: a template for {channel} needs {' and '.join(missing)}")
    if unknown := sorted(parts.keys() - shape.must - shape.may):
        known = ", ".join(sorted(shape.must | shape.may))
        raise ValueError(f"`parts`: a template for {channel} has no {unknown[0][:40]!r}; it may have {known}")
    for name, text in parts.items():
        _check_text(name, text, shape)
    size = sum(len(text.encode()) for text in parts.values())
    if size > TEMPLATE_BYTES_MAX:
        raise ValueError(f"`parts`: a template may have {TEMPLATE_BYTES_MAX} bytes, not {size}")


def _check_text(name: str, text: str, shape: Shape) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`parts.{name}` is no valid Unicode (it holds a lone surrogate)") from error
    if not text.strip():
        raise ValueError(f"`parts.{name}` is empty: leave it out, or write what it says")
    if _CONTROL.search(text) or (name in ONE_LINE and "\n" in text):
        allowed = "no control character" if name in ONE_LINE else "no control character but line ends and tabs"
        raise ValueError(f"`parts.{name}` may have {allowed}")
    left = _OPENING.search(_WHOLE.sub("", text))
    if left is not None:
        raise ValueError(f"`parts.{name}`: a {left[0]} is not closed")
    try:
        check(text)
    except TemplateFailed as error:
        raise ValueError(f"`parts.{name}`: {error}") from error
    unknown = sorted(value_names(text) - set(shape.names))
    if unknown:
        said = f"there is no value `{unknown[0][:40]}`; there are {', '.join(shape.names)}"
        raise ValueError(f"`parts.{name}`: {said}: what the event brings is behind `data`, as in {{{{ data.order }}}}")


_COLUMNS: Final = "type, channel, locale, version, active, made_at, parts"
_THIS: Final = "tenant = $1 AND type = $2 AND channel = $3 AND locale = $4"

_FIND: Final = f"""
SELECT {_COLUMNS} FROM templates WHERE {_THIS} AND CASE WHEN $5::bigint IS NULL THEN active ELSE version = $5 END
"""


_PAGE: Final = f"""
SELECT {_COLUMNS} FROM templates WHERE tenant = $1 AND active AND (type, channel, locale) > ($2, $3, $4)
ORDER BY type, channel, locale LIMIT $5
"""

_FORGET: Final = f"""
DELETE FROM templates WHERE {_THIS} AND NOT active AND version <= (
    SELECT version FROM templates WHERE {_THIS} ORDER BY version DESC OFFSET $5 LIMIT 1
)
"""


async def find_template(
    connection: Connection, tenant: str, key: TemplateKey, version: int | None = None
) -> Template | None:
    """A version of a template; without a number the active one."""
    row = await connection.fetchrow(_FIND, tenant, *key, version)
    return None if row is None else _template(row)


async def versions_of_template(connection: Connection, tenant: str, key: TemplateKey) -> list[int]:
    """The versions that are kept, newest first."""
    rows = await connection.fetch(f"SELECT version FROM templates WHERE {_THIS} ORDER BY version DESC", tenant, *key)
    return [row["version"] for row in rows]


async def page_of_templates(connection: Connection, tenant: str, after: TemplateKey, limit: int) -> list[Template]:
    """At most `limit` active templates, in the order of their keys, behind `after`; three empty texts begin."""
    return [_template(row) for row in await connection.fetch(_PAGE, tenant, *after, limit)]


async def put_template(
    change: Change, key: TemplateKey, parts: Mapping[str, str], expected: int | None = None
) -> Template:
    """Keep new texts as the active version; the same as those of the active version, nothing is written.

    Raises:
        VersionConflict: another version than `expected` is active.
    """
    there = await _active(change, key, expected)
    if there is not None and there.parts == parts:
        return there
    where = change.tenant, *key
    await change.connection.execute(f"UPDATE templates SET active = false WHERE {_THIS} AND active", *where)
    row = await change.connection.fetchrow(
        "INSERT INTO templates (tenant, type, channel, locale, version, active, parts) VALUES ($1, $2, $3, $4, $5, true, $6)"
        f" RETURNING {_COLUMNS}",
        *where,
        change.version,
        msgspec.json.encode(parts).decode(),
    )
    await change.connection.execute(_FORGET, *where, TEMPLATE_VERSIONS_MAX)
    change.made = True
    return _template(row)


async def activate_template(
    change: Change, key: TemplateKey, version: int, expected: int | None = None
) -> Template | None:
    """Make a version that is kept the active one; None: there is no such version.

    Raises:
        VersionConflict: another version than `expected` is active.
    """
    there = await _active(change, key, expected)
    found = await find_template(change.connection, change.tenant, key, version)
    if found is None or found.active:
        return found
    where = change.tenant, *key
    if there is not None:
        await change.connection.execute(f"UPDATE templates SET active = false WHERE {_THIS} AND active", *where)
    await change.connection.execute(
        f"UPDATE templates SET active = true WHERE {_THIS} AND version = $5", *where, version
    )
    change.made = True
    return msgspec.structs.replace(found, active=True)


async def delete_template(change: Change, key: TemplateKey, expected: int | None = None) -> bool:
    """Delete a template with all its versions; False: there is none.

    Raises:
        VersionConflict: another version than `expected` is active.
    """
    if await _active(change, key, expected) is None:
        return False
    await change.connection.execute(f"DELETE FROM templates WHERE {_THIS}", change.tenant, *key)
    change.made = True
    return True


async def _active(change: Change, key: TemplateKey, expected: int | None) -> Template | None:
    there = await find_template(change.connection, change.tenant, key)
    check_version(f"template {key}", expected, 0 if there is None else there.version)
    return there


def _template(row: Any) -> Template:
    return Template(**{**dict(row), "parts": msgspec.json.decode(row["parts"], type=dict[str, str])})
