"""Topics among the recipients of an event: `"to": ["topic:news"]` is for those who are its members when the event comes.

Only in a single event, and only up to what one event may name: a larger audience is a campaign's, which goes out page by page.
Over plain NATS nobody could look members up before the event is stored, so there it is refused.
"""

from __future__ import annotations

from typing import Final

from gateway.access.shares import Shares
from gateway.api.directory import reading
from gateway.context import Context
from gateway.limits import DIRECTORY_REQUESTS, DIRECTORY_REQUESTS_PER_TENANT
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.limits import RECIPIENTS_MAX
from seamark.protocol.subjects import NO_USERS, TOPIC

TOPICS_PER_EVENT: Final = 10
"""Topics that one event may name: each is a question that reads up to 10 000 rows."""

_PLACES: Final = Shares(DIRECTORY_REQUESTS, DIRECTORY_REQUESTS_PER_TENANT)

# Topics that earlier versions have filled may hold users whom no event may name: they must not stop the others.
_MEMBERS: Final = """
SELECT user_id FROM topic_members WHERE tenant = $1 AND topic = $2 AND NOT user_id ^@ ANY ($4::text[]) ORDER BY user_id LIMIT $3
"""


async def expanded(context: Context, tenant: str, to: list[str]) -> list[str]:
    """The recipients with the members of topics in place of these, each once.

    Raises:
        InvalidEvent: a topic has too many members, or there is nobody. NoPlace: others ask already.
        StoreUnavailable: the directory does not answer. Problem: there is none.
    """
    topics = [name for name in to if name.startswith(TOPIC)]
    if not topics or any("\0" in name for name in topics):  # which PostgreSQL cannot hold: no topic is called so
        return to
    if len(topics) > TOPICS_PER_EVENT:
        raise InvalidEvent("to", f"`to` names {len(topics)} topics: {TOPICS_PER_EVENT} are allowed in one event")
    users = {name: None for name in to if not name.startswith(TOPIC)}
    with _PLACES.place(tenant):
        async with reading(context) as connection:
            for topic in topics:
                args = topic.removeprefix(TOPIC), RECIPIENTS_MAX + 1, NO_USERS
                rows = await connection.fetch(_MEMBERS, tenant, *args)
                users |= {row["user_id"]: None for row in rows}
    if len(users) > RECIPIENTS_MAX:
        said = f"`to` is for more than {RECIPIENTS_MAX} users with the members of its topics"
        raise InvalidEvent("to", f"{said}: start a campaign, POST /v1/campaigns")
    if not users:
        raise InvalidEvent("to", f"`to`: nobody is a member of {', '.join(topics)[:200]}")
    return list(users)
