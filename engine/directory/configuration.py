"""A tenant's configuration as one value: types, templates, defaults; and how the stored one becomes another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

import msgspec

from engine.directory.changes import Change
from engine.directory.templates import TemplateKey, delete_template, page_of_templates, put_template
from engine.directory.tenant_defaults import delete_defaults, find_defaults, put_defaults
from engine.directory.types import delete_type, page_of_types, put_type
from engine.plan.preferences import TenantDefaults
from engine.plan.rules import TypeRule
from engine.postgres import Connection

PAGE_ROWS: Final = 500

DEFAULTS: Final = "tenant"
"""The name of the document of defaults, of which there is one."""

Action = Literal["add", "change", "delete", "keep"]


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant says, without the numbers of versions.

    Attributes:
        types: rules by pattern.
        templates: the parts of each.
        defaults: None: there is no document.
    """

    types: Mapping[str, TypeRule] = {}
    templates: Mapping[TemplateKey, Mapping[str, str]] = {}
    defaults: TenantDefaults | None = None


class Difference(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that is not in both.

    Attributes:
        kind, name: what it is.
        action: what makes them the same; `keep`: it is only there, and stays, as nothing is to be deleted.
        fields: members or parts that differ.
    """

    kind: Literal["type", "template", "defaults"]
    name: str
    action: Action
    fields: tuple[str, ...] = ()


def differences(there: Configuration, wanted: Configuration, *, prune: bool) -> list[Difference]:
    """What must be done to `there` to have `wanted`, in order. `prune`: delete what is not wanted; else it is kept."""
    return [
        *_differing("type", _plain(there.types), _plain(wanted.types), prune=prune),
        *_differing("template", _named(there.templates), _named(wanted.templates), prune=prune),
        *_differing("defaults", _of_defaults(there), _of_defaults(wanted), prune=prune),
    ]


async def read_configuration(connection: Connection, tenant: str) -> Configuration:
    """The configuration as PostgreSQL has it. The connection must show one moment: a transaction that says so, or `changing`."""
    types: dict[str, TypeRule] = {}
    while page := await page_of_types(connection, tenant, next(reversed(types), ""), PAGE_ROWS):
        types |= {rule.pattern: msgspec.structs.replace(rule, version=0) for rule in page}
    templates: dict[TemplateKey, Mapping[str, str]] = {}
    begin = TemplateKey("", "", "")
    while found := await page_of_templates(connection, tenant, next(reversed(templates), begin), PAGE_ROWS):
        templates |= {template.key: template.parts for template in found}
    document = await find_defaults(connection, tenant)
    defaults = msgspec.structs.replace(document, version=0) if document.version else None
    return Configuration(types=types, templates=templates, defaults=defaults)


async def apply_configuration(
    change: Change,
    wanted: Configuration,
    *,
    prune: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """Make the tenant's configuration what is wanted, within the transaction; returns what was done, and what was kept.

    Raises:
        LimitReached: when the transaction ends, where a tenant would have too many rules.
    """
    found = differences(await read_configuration(change.connection, change.tenant), wanted, prune=prune)
    for number, one in enumerate(found, 1):
        if one.action != "keep":
            await _apply(change, one, wanted)
        if progress is not None:
            progress(number, len(found))
    return found


async def _apply(change: Change, one: Difference, wanted: Configuration) -> None:
    delete = one.action == "delete"
    match one.kind:
        case "type":
            await (delete_type(change, one.name) if delete else put_type(change, wanted.types[one.name]))
        case "template":
            key = TemplateKey(*one.name.split("/"))
            await (delete_template(change, key) if delete else put_template(change, key, wanted.templates[key]))
        case "defaults":
            document = wanted.defaults or TenantDefaults()
            await (delete_defaults(change) if delete else put_defaults(change, document))


def _differing(
    kind: Literal["type", "template", "defaults"],
    there: Mapping[str, Mapping[str, Any]],
    wanted: Mapping[str, Mapping[str, Any]],
    *,
    prune: bool,
) -> Iterator[Difference]:
    for name in sorted(there.keys() | wanted.keys()):
        before, after = there.get(name), wanted.get(name)
        if before is None:
            yield Difference(kind, name, "add")
        elif after is None:
            yield Difference(kind, name, "delete" if prune else "keep")
        elif before != after:
            fields = (field for field in before.keys() | after.keys() if before.get(field) != after.get(field))
            yield Difference(kind, name, "change", tuple(sorted(fields)))


def _plain(types: Mapping[str, TypeRule]) -> Mapping[str, Mapping[str, Any]]:
    return {pattern: msgspec.structs.asdict(rule) for pattern, rule in types.items()}


def _named(templates: Mapping[TemplateKey, Mapping[str, str]]) -> Mapping[str, Mapping[str, Any]]:
    return {str(key): parts for key, parts in templates.items()}


def _of_defaults(configuration: Configuration) -> Mapping[str, Mapping[str, Any]]:
    document = configuration.defaults
    return {} if document is None else {DEFAULTS: msgspec.structs.asdict(document)}
