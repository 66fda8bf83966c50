"""Looks through DEAD-LETTERS: a page at a time, by what letters are about."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Final, NamedTuple

import msgspec

from engine.broker.jetstream import Broker, Stored
from engine.letters.letter import Kind, Letter, letter_of
from seamark.protocol.subjects import DEAD_LETTERS_STREAM, encode_token

SCANNED_MAX: Final = 5_000
"""Letters that one question looks at. Where few of many match, it comes back with less than was asked for, and where to go on."""

SCANNED_BYTES_MAX: Final = 32 << 20
"""The same in bytes: the broker gives a megabyte at a time, and pages of campaigns are as large each."""

READ_AT_ONCE: Final = 200

SEQ_MAX: Final = 2**63 - 1
"""No letter has a higher number: at a million messages a second a stream would be there in 290 000 years."""


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters are meant; what is not said does not matter.

    Args:
        since, until: when they were written: from then on, and before.
    """

    tenant: str | None = None
    kind: Kind | None = None
    channel: str | None = None
    cls: str | None = None
    code: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def subject(self) -> str:
        """The subjects that the server looks through. Those of events say neither tenant nor channel."""
        if self.kind == "event":
            return "dlq.*.*.*"
        if self.kind == "job" or self.channel is not None:
            tenant = "*" if self.tenant is None else encode_token(self.tenant)
            return f"dlq.job.{tenant}.*.{self.channel or '*'}.*"
        return "dlq.>"

    def matches(self, letter: Letter) -> bool:
        """Whether this letter is meant."""
        return (
            self.tenant in (None, letter.tenant)
            and self.kind in (None, letter.kind)
            and self.channel in (None, letter.channel)
            and self.cls in (None, letter.cls)
            and self.code in (None, letter.code)
            and (self.since is None or letter.at >= self.since)
            and (self.until is None or letter.at < self.until)
        )


class Found(NamedTuple):
    """A letter and what it was made of."""

    letter: Letter
    stored: Stored


class LetterPage(NamedTuple):
    """Letters in the order in which they were written. `next`: the first that was not looked at; None: there is no other."""

    found: list[Found]
    next: int | None


async def page_of_letters(broker: Broker, wanted: Filter, begin: int, limit: int) -> LetterPage:
    """At most `limit` letters from number `begin` on; fewer where many had to be looked at.

    Raises:
        BrokerError: DEAD-LETTERS could not be read.
    """
    found: list[Found] = []
    scanned, scanned_bytes, since = 0, 0, wanted.since if begin <= 1 else None
    while True:
        page = await broker.next_by_subject(
            DEAD_LETTERS_STREAM, wanted.subject, begin, batch=min(READ_AT_ONCE, 2 * limit), since=since
        )
        for stored in page.records:
            letter = letter_of(stored)
            begin, since = stored.seq + 1, None
            if letter is not None and wanted.until is not None and letter.at >= wanted.until:
                return LetterPage(found, None)  # they stand in the order of their times
            if letter is not None and wanted.matches(letter):
                found.append(Found(letter, stored))
                if len(found) >= limit:
                    return LetterPage(found, begin)
        scanned += len(page.records)
        scanned_bytes += sum(len(one.payload) for one in page.records)
        if not page.records:
            return LetterPage(found, None)
        if scanned >= SCANNED_MAX or scanned_bytes >= SCANNED_BYTES_MAX:
            return LetterPage(found, begin)


async def letters(broker: Broker, wanted: Filter) -> AsyncGenerator[Found]:
    """All letters that are meant, as the stream has them when they are reached."""
    begin: int | None = 0
    while begin is not None:
        found, begin = await page_of_letters(broker, wanted, begin, READ_AT_ONCE)
        for one in found:
            yield one


async def letter_at(broker: Broker, seq: int, tenant: str | None = None) -> Found | None:
    """The letter of this number; None: there is none, or it is another tenant's."""
    page = await broker.next_by_subject(DEAD_LETTERS_STREAM, "dlq.>", seq, batch=1)
    for stored in page.records:
        letter = letter_of(stored) if stored.seq == seq else None
        if letter is not None and tenant in (None, letter.tenant):
            return Found(letter, stored)
    return None
