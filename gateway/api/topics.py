"""`/v1/topics`: named groups of users, for services."""

from __future__ import annotations

from typing import Annotated

import msgspec

from engine.directory import topics
from engine.directory.topics import Member, Topic, TopicName
from engine.directory.users import checked_stored_id, checked_user_id
from engine.limits import MEMBERS_PER_CHANGE
from engine.postgres import transaction
from gateway.access.principals import Scope, Service
from gateway.api.directory import PLACES, directory_of, reading, there
from gateway.api.pages import PageQuery, begin_of, cut
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import LIMIT_REACHED, NOT_FOUND
from gateway.limits import DIRECTORY_SECONDS, MEMBERS_BODY_BYTES


class TopicAt(msgspec.Struct, frozen=True):
    """A topic in the path."""

    name: TopicName


class MembersAt(PageQuery, frozen=True, kw_only=True):
    """A part of a topic's members."""

    name: TopicName


Users = Annotated[list[str], msgspec.Meta(min_length=1, max_length=MEMBERS_PER_CHANGE)]


class FormerMembers(msgspec.Struct, forbid_unknown_fields=True):
    """Users who are taken out, each once or more."""

    users: Users

    def __post_init__(self) -> None:
        """Raise ValueError where nobody can be stored so."""
        for index, user in enumerate(self.users):
            checked_stored_id(user, f"users[{index}]")


class Members(msgspec.Struct, forbid_unknown_fields=True):
    """Users, each once or more."""

    users: Users

    def __post_init__(self) -> None:
        """Raise ValueError where no user can be called so."""
        for index, user in enumerate(self.users):
            checked_user_id(user, f"users[{index}]")


class TopicPage(msgspec.Struct):
    """Topics in the order of their names. `next`: the `cursor` of the following page; null behind the last."""

    items: list[Topic]
    next: str | None


class MemberPage(msgspec.Struct):
    """Members in the order of their ids. `next`: the `cursor` of the following page; null behind the last."""

    items: list[Member]
    next: str | None


class Count(msgspec.Struct):
    """How many members the topic has now."""

    members: int


@Endpoint("GET", "/v1/topics", scope=Scope.TOPICS_READ, places=PLACES)
async def topic_page(call: Call[Service, PageQuery, None]) -> TopicPage:
    """A page of the tenant's topics."""
    [after], limit = begin_of(call.query), call.query.limit
    async with reading(call.context) as connection:
        rows = await topics.page_of_topics(connection, call.principal.tenant, after, limit + 1)
    return TopicPage(*cut(rows, limit, lambda topic: (topic.name,)))


@Endpoint("GET", "/v1/topics/{name}", scope=Scope.TOPICS_READ, places=PLACES, refuses=(NOT_FOUND,))
async def get_topic(call: Call[Service, TopicAt, None]) -> Topic:
    """A topic."""
    async with reading(call.context) as connection:
        return there(await topics.find_topic(connection, call.principal.tenant, call.query.name), "such topic")


@Endpoint("DELETE", "/v1/topics/{name}", scope=Scope.TOPICS_WRITE, places=PLACES, refuses=(NOT_FOUND,))
async def delete_topic(call: Call[Service, TopicAt, None]) -> Count:
    """Delete a topic. Of a large one the first members go, and `members` says how many are left: send it again until it is 0."""
    tenant, name = call.principal.tenant, call.query.name
    async with transaction(directory_of(call.context).pool, DIRECTORY_SECONDS) as connection:
        there(await topics.find_topic(connection, tenant, name), "such topic")
        return Count(await topics.delete_some(connection, tenant, name))


@Endpoint("GET", "/v1/topics/{name}/members", scope=Scope.TOPICS_READ, places=PLACES)
async def member_page(call: Call[Service, MembersAt, None]) -> MemberPage:
    """A page of a topic's members. A topic that does not exist has none."""
    [after], limit = begin_of(call.query), call.query.limit
    async with reading(call.context) as connection:
        rows = await topics.page_of_members(connection, call.principal.tenant, call.query.name, after, limit + 1)
    return MemberPage(*cut(rows, limit, lambda member: (member.id,)))


@Endpoint(
    "PUT",
    "/v1/topics/{name}/members",
    scope=Scope.TOPICS_WRITE,
    places=PLACES,
    body_bytes=MEMBERS_BODY_BYTES,
    refuses=(LIMIT_REACHED,),
)
async def add_members(call: Call[Service, TopicAt, Members]) -> Count:
    """Add up to 1000 users to a topic, which is made if there is none. Users need not be in the directory.

    Who was deleted is passed over, until he is made anew.
    """
    async with transaction(directory_of(call.context).pool, DIRECTORY_SECONDS) as connection:
        return Count(await topics.add_members(connection, call.principal.tenant, call.query.name, call.body.users))


@Endpoint(
    "DELETE",
    "/v1/topics/{name}/members",
    scope=Scope.TOPICS_WRITE,
    places=PLACES,
    body_bytes=MEMBERS_BODY_BYTES,
    refuses=(NOT_FOUND,),
)
async def remove_members(call: Call[Service, TopicAt, FormerMembers]) -> Count:
    """Take up to 1000 users out of a topic, which stays, with whoever is left."""
    async with transaction(directory_of(call.context).pool, DIRECTORY_SECONDS) as connection:
        left = await topics.remove_members(connection, call.principal.tenant, call.query.name, call.body.users)
    return Count(there(left, "such topic"))
