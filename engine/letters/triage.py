"""What dead letters have in common: how many died of the same thing, since when, and what nobody has foreseen. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import msgspec

from engine.letters.letter import Kind, Letter


class Group(msgspec.Struct, kw_only=True):
    """Letters of one class and provider code.

    Args:
        known: whether the tables of providers name the code; where they do not, somebody has to look, and the table wants a row.
        tenants: how many are concerned.
        example: the last one's number.
    """

    kind: Kind
    channel: str
    cls: str = msgspec.field(name="class")
    provider: str
    code: str
    known: bool
    count: int
    tenants: int
    first_at: datetime
    last_at: datetime
    example: int


def grouped(letters: Iterable[Letter]) -> list[Group]:
    """The letters by class and code: first what nobody has foreseen, then what has happened most often."""
    groups: dict[tuple[str, str, str, str, str, bool], Group] = {}
    tenants: dict[tuple[str, str, str, str, str, bool], set[str]] = {}
    for one in letters:
        key = (one.kind, one.channel, one.cls, one.provider, one.code, one.known)
        tenants.setdefault(key, set()).add(one.tenant)
        group = groups.get(key)
        if group is None:
            groups[key] = Group(
                kind=one.kind,
                channel=one.channel,
                cls=one.cls,
                provider=one.provider,
                code=one.code,
                known=one.known,
                count=1,
                tenants=1,
                first_at=one.at,
                last_at=one.at,
                example=one.seq,
            )
            continue
        group.count += 1
        group.tenants = len(tenants[key])
        group.first_at, group.last_at = min(group.first_at, one.at), max(group.last_at, one.at)
        group.example = max(group.example, one.seq)
    return sorted(groups.values(), key=lambda one: (one.known, -one.count, one.channel, one.cls, one.code))
