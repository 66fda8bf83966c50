"""`/v1/dead-letters`: what could not be delivered, and why; a service has its tenant's tried again, or drops them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from engine.errors import BrokerError
from engine.letters.letter import Kind, Letter
from engine.letters.reading import SEQ_MAX, Filter, Found, letter_at, page_of_letters
from engine.letters.replaying import PER_SECOND, Fate, Replays, dropped, paced
from engine.letters.triage import Group, grouped
from engine.plan.rules import Channel
from gateway.access.principals import Operator, Scope, Service
from gateway.access.shares import Shares
from gateway.api.pages import PageQuery, begin_of, cursor_after, invalid_cursor, moment_of
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import FORBIDDEN, INVALID_BODY, INVALID_QUERY, NOT_FOUND, UNAVAILABLE, Problem
from seamark.protocol.errors import InvalidToken
from seamark.protocol.moments import check_moment
from seamark.protocol.subjects import encode_token

PLACES: Final = Shares(8, 2)
"""Requests under way in one process, and of one tenant: each may look through some megabytes."""

AT_ONCE_MAX: Final = 250
"""Letters that one request acts on: at 25 a second it takes ten seconds, and answers before anybody gives it up."""

Seq = Annotated[int, Meta(ge=1, le=SEQ_MAX)]

One = TypeVar("One")

Word = Annotated[str, Meta(min_length=1, max_length=512)]


class LettersQuery(PageQuery, frozen=True):
    """Which of them, and how many. `class` and `code` as `GET /v1/dead-letters/groups` shows them.

    `tenant`: only an operator has to say, and can.
    """

    tenant: str | None = None
    kind: Kind | None = None
    channel: Channel | None = None
    cls: Word | None = msgspec.field(name="class", default=None)
    code: Word | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a time lies outside the years 1 to 9999. One without an offset is in UTC."""
        _check_times(self)


class LettersPage(msgspec.Struct):
    """The oldest first. `next`: the `cursor` of the following page; null behind the last.

    A page may be short of letters, or empty, where many had to be looked at.
    """

    items: list[Letter]
    next: str | None


class GroupsPage(msgspec.Struct):
    """What the letters looked at have in common; unknown codes first. `next` as that of a page: the rest was not looked at."""

    groups: list[Group]
    next: str | None


class LetterAt(msgspec.Struct, frozen=True):
    """A letter in the path, by its number."""

    seq: Seq


class WholeLetter(msgspec.Struct):
    """A letter with the event or job that it holds, texts included. `payload`: as it was stored, broken bytes replaced."""

    letter: Letter
    payload: str


class Chosen(msgspec.Struct, forbid_unknown_fields=True):
    """Which letters: those of these numbers, those that match what is said, or, where it says `all`, all of the tenant.

    `cursor`: the `next` of the answer before. `per_second`: so many at most. `in_doubt`: of a replay, also what may have been
    sent.
    """

    seqs: Annotated[list[Seq], Meta(max_length=AT_ONCE_MAX)] | None = None
    kind: Kind | None = None
    channel: Channel | None = None
    cls: Word | None = msgspec.field(name="class", default=None)
    code: Word | None = None
    since: datetime | None = None
    until: datetime | None = None
    everything: bool = msgspec.field(name="all", default=False)
    limit: Annotated[int, Meta(ge=1, le=AT_ONCE_MAX)] = 100
    per_second: Annotated[float, Meta(ge=25, le=1000)] = PER_SECOND
    in_doubt: bool = False
    cursor: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a time lies outside the years 1 to 9999. One without an offset is in UTC."""
        _check_times(self)


class Acted(msgspec.Struct):
    """What became of how many.

    `replayed`, `dropped` as asked; `sent`: removed, as its job was sent after the letter was written; `before`: removed, as its
    job has already been tried, replayed or ended otherwise since; `in_doubt`: left, as it may have been sent; `gone`: it was not
    there any more; `unreadable`: left; `refused`: left, as the broker never takes it.
    """

    fates: dict[Fate, int]
    next: str | None


@Endpoint("GET", "/v1/dead-letters", scope=Scope.DEAD_LETTERS_READ, places=PLACES)
async def list_letters(call: Call[Service | Operator, LettersQuery, None]) -> LettersPage:
    """The dead letters of the tenant. They say what they are about; what people were to be told is in each letter only."""
    query = call.query
    found, next_ = await letters_page(call.context, _wanted(call.principal, query), query, query.limit)
    return LettersPage([one.letter for one in found], next_)


@Endpoint("GET", "/v1/dead-letters/groups", scope=Scope.DEAD_LETTERS_READ, places=PLACES)
async def group_letters(call: Call[Service | Operator, LettersQuery, None]) -> GroupsPage:
    """How many letters have the same class and code. `limit` does not matter here: some thousand are looked at."""
    query = call.query
    found, next_ = await letters_page(call.context, _wanted(call.principal, query), query, _GROUPED_MAX)
    return GroupsPage(grouped(one.letter for one in found), next_)


@Endpoint("GET", "/v1/dead-letters/{seq}", scope=Scope.DEAD_LETTERS_READ, places=PLACES, refuses=(NOT_FOUND,))
async def get_letter(call: Call[Service | Operator, LetterAt, None]) -> WholeLetter:
    """One letter, whole."""
    found = await _of(call.context, call.query.seq, _tenant(call.principal, None))
    if found is None:
        raise Problem(NOT_FOUND, "there is no such dead letter")
    return WholeLetter(found.letter, found.stored.payload.decode(errors="replace"))


@Endpoint("POST", "/v1/dead-letters/replay", scope=Scope.DEAD_LETTERS_WRITE, places=PLACES)
async def replay_letters(call: Call[Service, None, Chosen]) -> Acted:
    """Have letters tried again, by what holds now. Each is replayed once, however often this is asked, and is gone then.

    Call it again with `next` until that is null: letters that are written meanwhile, as something died again, are left out.
    """
    replays = call.context.replays
    if replays is None:
        raise Problem(UNAVAILABLE, "this gateway has no database or no Redis: nobody knows what was sent since")
    return await _act(call, lambda found: _replayed(replays, found, in_doubt=call.body.in_doubt))


@Endpoint("POST", "/v1/dead-letters/drop", scope=Scope.DEAD_LETTERS_WRITE, places=PLACES)
async def drop_letters(call: Call[Service, None, Chosen]) -> Acted:
    """Remove letters for good: what they hold is never delivered."""
    return await _act(call, lambda found: dropped(call.context.broker, found.letter.seq))


_GROUPED_MAX: Final = 5_000


async def _replayed(replays: Replays, found: Found, *, in_doubt: bool) -> Fate:
    return await replays.replay(found, in_doubt=in_doubt)


async def _act(call: Call[Service, None, Chosen], act: Callable[[Found], Awaitable[Fate]]) -> Acted:
    body, context, tenant = call.body, call.context, call.principal.tenant
    fates: Counter[Fate] = Counter()
    _check_said(body)
    try:
        if body.seqs is not None:
            chosen, next_ = [one for seq in body.seqs if (one := await letter_at(context.broker, seq, tenant))], None
            fates["gone"] += len(body.seqs) - len(chosen)
        else:
            query = LettersQuery(cursor=body.cursor)
            wanted = _filter(tenant, body)
            chosen, next_ = await letters_page(context, wanted, query, body.limit)
        fates += await acted(chosen, body.per_second, act)
    except BrokerError as error:
        raise letters_away(error) from error
    return Acted(dict(fates), next_)


async def acted(chosen: Sequence[One], per_second: float, act: Callable[[One], Awaitable[Fate]]) -> Counter[Fate]:
    """Act on each, no faster than so many a second; how many have come to what.

    Raises:
        BrokerError, StoreUnavailable: not all is done.
    """
    fates: Counter[Fate] = Counter()
    async with aclosing(paced(_each(chosen), per_second)) as each:
        async for one in each:
            fates[await act(one)] += 1
    return fates


def _check_said(body: Chosen) -> None:
    """Pass a body that says which letters it means.

    Raises:
        Problem: 400, it does not, or in two ways.
    """
    filtered = _filter(None, body) != Filter()
    if (body.seqs is not None) + (filtered or body.everything) != 1:
        raise Problem(
            INVALID_BODY, "say which letters: `seqs`, or members that they have in common, or `all`", field="seqs"
        )


async def _each(found: Sequence[One]) -> AsyncGenerator[One]:
    for one in found:
        yield one


def _wanted(principal: Service | Operator, query: LettersQuery) -> Filter:
    return _filter(_tenant(principal, query.tenant), query)


def _filter(tenant: str | None, asked: LettersQuery | Chosen) -> Filter:
    return Filter(
        tenant=tenant,
        kind=asked.kind,
        channel=asked.channel,
        cls=asked.cls,
        code=asked.code,
        since=_zoned(asked.since),
        until=_zoned(asked.until),
    )


def _zoned(at: datetime | None) -> datetime | None:
    return at if at is None or at.tzinfo is not None else at.replace(tzinfo=UTC)


def _check_times(asked: LettersQuery | Chosen) -> None:
    check_moment("since", _zoned(asked.since))
    check_moment("until", _zoned(asked.until))


def _tenant(principal: Service | Operator, named: str | None) -> str | None:
    """Whose letters; None: everybody's.

    Raises:
        Problem: 403, a service has named another tenant; 400, what an operator has named cannot be a tenant.
    """
    if isinstance(principal, Operator):
        try:
            if named is not None:
                encode_token(named)
            return named
        except InvalidToken as error:
            raise Problem(INVALID_QUERY, f"`tenant`: {error}", field="tenant") from error
    if named not in (None, principal.tenant):
        raise Problem(FORBIDDEN, "`tenant` is another one: leave it out", field="tenant")
    return principal.tenant


async def _of(context: Context, seq: int, tenant: str | None) -> Found | None:
    try:
        return await letter_at(context.broker, seq, tenant)
    except BrokerError as error:
        raise letters_away(error) from error


async def letters_page(
    context: Context, wanted: Filter, query: PageQuery, limit: int
) -> tuple[list[Found], str | None]:
    """Letters from the cursor on. A cursor also says until when: what is written later would never let the pages end."""
    begin, until = 0, wanted.until or datetime.now(UTC)
    if query.cursor is not None:
        at, until_text = begin_of(query, 2)
        try:
            begin, until = int(at), min(until, moment_of(until_text))
            if not 0 <= begin <= SEQ_MAX:
                raise ValueError("no number of a letter")
        except ValueError as error:
            raise invalid_cursor() from error
    try:
        found, next_ = await page_of_letters(context.broker, msgspec.structs.replace(wanted, until=until), begin, limit)
    except BrokerError as error:
        raise letters_away(error) from error
    return found, None if next_ is None else cursor_after((str(next_), until.isoformat()))


def letters_away(error: BrokerError) -> Problem:
    return Problem(UNAVAILABLE, "DEAD-LETTERS does not answer: try again later", error=type(error).__name__)
