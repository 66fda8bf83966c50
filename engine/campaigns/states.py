"""What a pager does next with a campaign: decided from what the tables say, in one function without I/O.

A page goes fixed → publishing → published → done. Its boundaries stand in the table before anything is published, and no
two pages of a campaign share a user. `publishing` says: its event may be in BULK. Whoever finds it so reads BULK, and
publishes the same event again only where it is not there and BULK has forgotten nothing since.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple

import msgspec

from engine.broker.answers import StreamState
from engine.campaigns.draft import Audience, Message
from engine.log.incarnations import inherited
from engine.log.marks import Mark

PAGES_OF_CAMPAIGN: Final = 4
"""Pages of a campaign under way at a time: enough that dispatchers never wait, and few for a pause to wait for."""

PAGES_OF_TENANT: Final = 16
"""The same for all campaigns of a tenant: 160 000 records are a few seconds of a dispatcher's work."""


CLOCKS_APART: Final = timedelta(minutes=10)
"""What is about to expire may have expired for a dispatcher: its clock is another one, and the time was read a moment ago."""


class PageState(StrEnum):
    """How far a page has come."""

    FIXED = "fixed"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    """Its event is in BULK."""
    DONE = "done"
    """It is dispatched, and planned. A page on which everybody is excluded is done at once."""
    AMBIGUOUS = "ambiguous"
    """Nobody can tell any more whether its event was in BULK, or dispatched from it."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"


UNDER_WAY: Final = frozenset({PageState.PUBLISHING, PageState.PUBLISHED})
OPEN: Final = UNDER_WAY | {PageState.FIXED}


class CampaignState(StrEnum):
    """What has become of a campaign."""

    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DONE = "done"
    FAILED = "failed"
    """Its event can never be published. The table says EXPIRED, with the reason beside its pages; only progress says FAILED."""


class Position(NamedTuple):
    """A place in BULK: its incarnation, and a sequence."""

    epoch: str
    seq: int


class Withheld(NamedTuple):
    """How many users of a page in BULK have a record that is shown to nobody, by the reason."""

    cancelled: int
    expired: int


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A page: the users after `after`, up to and with `up_to`.

    Args:
        count: how many of the audience were there when its boundaries were fixed, or when it was claimed.
        excluded: how many of them get nothing.
        at: while it is being published, where BULK ended before; afterwards where its event is.
        heads: where the logs ended once its event was dispatched, by partition; None: not dispatched, or not yet noted.
    """

    number: int
    after: str
    up_to: str
    state: PageState
    count: int
    excluded: int
    at: Position | None = None
    heads: dict[str, str] | None = None


class Campaign(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign as the tables had it when a pager took it up.

    Args:
        revision: counts the changes made to it by commands; nothing is claimed under an older one.
        publish_at: when the rate allows the next page.
        now: the database's time.
        cut_up_to: where the last page that was cut ends. cut_final: the audience ends there.
        pages: the number of the next page.
        open: pages that are not settled; of those that are fixed only the next ones.
    """

    tenant: str
    id: str
    revision: int
    state: CampaignState
    audience: Audience
    exclude: Audience | None
    message: Message
    rate: int | None
    publish_at: datetime
    not_after: datetime | None
    now: datetime
    cut_up_to: str
    cut_final: bool
    pages: int
    open: tuple[Page, ...]


class Step(StrEnum):
    """One thing that a pager does with a campaign or a page of it."""

    SETTLE = "settle"
    FINISH = "finish"
    EXPIRE = "expire"
    CUT = "cut"
    PUBLISH = "publish"
    CLOSE = "close"


def steps(campaign: Campaign, *, room: bool) -> Iterator[tuple[Step, Page | None]]:
    """What is to be done with a campaign now, in this order.

    Args:
        room: there is room for more work behind BULK.
    """
    under_way = [page for page in campaign.open if page.state in UNDER_WAY]
    fixed = [page for page in campaign.open if page.state is PageState.FIXED]
    # Paused or not: what may be in BULK already must be known.
    for page in under_way:
        yield (Step.SETTLE if page.state is PageState.PUBLISHING else Step.FINISH), page
    running = campaign.state is CampaignState.RUNNING
    held = campaign.state is CampaignState.PAUSED  # one that nobody resumes must end, too
    if (running or held) and campaign.not_after is not None and campaign.not_after <= campaign.now:
        yield Step.EXPIRE, None
        return
    if running and room and campaign.publish_at <= campaign.now:
        places = PAGES_OF_CAMPAIGN - len(under_way)
        # A page moves the moment at which the rate allows the next one.
        for page in fixed[: places if campaign.rate is None else min(1, places)]:
            yield Step.PUBLISH, page
    if running and not campaign.cut_final:
        yield Step.CUT, None
    if not campaign.open and (campaign.cut_final or not running) and campaign.state is not CampaignState.PAUSED:
        yield Step.CLOSE, None


def may_be_withheld(campaign: Campaign) -> bool:
    """Whether a page that is found dispatched now may have records that are shown to nobody."""
    expires_at = campaign.message.expires_at
    over = expires_at is not None and expires_at <= campaign.now + CLOCKS_APART
    return over or campaign.state is CampaignState.CANCELLED


def reaches_back(page: Page, bulk: StreamState) -> bool:
    """Whether BULK holds all that was stored in it since this page was claimed: what is not there never was."""
    return page.at is not None and page.at.epoch == bulk.epoch and bulk.first_seq <= page.at.seq + 1


class Dispatched(StrEnum):
    """Whether the records of a page are in their logs."""

    YES = "yes"
    NOT_YET = "not yet"
    UNKNOWN = "unknown"


def dispatched(at: Position, mark: Mark | None, bulk: StreamState) -> Dispatched:
    """Whether the event at a position of BULK lies behind the home mark of its partition.

    Args:
        mark: as it is stored: a mark that is older than the leader's last one only says so later.
    """
    if mark is not None and mark.epoch == at.epoch:
        # The mark of the event's own incarnation, before or after a restore.
        if mark.next_seq > at.seq:
            return Dispatched.YES
        return Dispatched.NOT_YET if _holds(at, bulk) else Dispatched.UNKNOWN
    if not _holds(at, bulk):
        return Dispatched.UNKNOWN
    if mark is None or mark.epoch != bulk.epoch:
        return Dispatched.NOT_YET
    # The numbering of the backup goes on.
    return Dispatched.YES if mark.next_seq > at.seq else Dispatched.NOT_YET


def _holds(at: Position, bulk: StreamState) -> bool:
    """Whether the numbering of BULK still says at this place what it said then."""
    return at.epoch == bulk.epoch or at.seq <= inherited(bulk).get(at.epoch, -1)
