"""Audiences as SQL: the next users of one, in byte order, and which of them are excluded."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from engine.campaigns.draft import Audience, Condition
from seamark.protocol.limits import RECIPIENTS_MAX
from seamark.protocol.subjects import NO_USERS

WINDOW_USERS: Final = RECIPIENTS_MAX + 1
"""Users looked at for one page: one more than it can hold, so that it is seen where it ends."""

SCAN_USERS: Final = 50_000
"""The same of a segment, whose users may be few: some 100 ms of PostgreSQL's time."""

_OWN: Final = frozenset({"locale", "timezone"})
"""Attributes that are columns of a user."""

_USERS: Final = "users u"

_DELETED: Final = "SELECT FROM profiles p WHERE p.tenant = $1 AND p.user_id = u.user_id AND p.deleted_at IS NOT NULL"
"""Members of topics go with their user; whom a campaign names must not come back by that."""

_COMPARE: Final = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}

_NAMED: Final = "SELECT unnest($2::text[])", "SELECT unnest($3::text[])"
_STORED: Final = (
    "SELECT unnest(c.users) FROM campaigns c WHERE c.tenant = $1 AND c.id = $2",
    "SELECT unnest(c.exclude_users) FROM campaigns c WHERE c.tenant = $1 AND c.id = $2",
)


class Question:
    """The statements that read an audience. The first four arguments of each are said there, `args` follow.

    Args:
        named: users that are named one by one come with the question (arguments 2 and 3); else they are those of a stored
            campaign, which argument 2 names.
    """

    def __init__(self, audience: Audience, exclude: Audience | None, *, named: bool = False) -> None:
        self.args: list[Any] = []
        self._named_users, self._named_excluded = _NAMED if named else _STORED
        self.limit = WINDOW_USERS if audience.segment is None else SCAN_USERS
        self._source = self._from(audience)
        self._meets = "true" if audience.segment is None else self._all(audience.segment)
        # Directories that earlier versions have filled may hold users whom no event may name: they must not stop the others.
        self._out = f"({self._excluded(exclude)} OR s.user_id ^@ ANY ({self._arg(NO_USERS)}::text[]))"

    @property
    def window(self) -> str:
        """For tenant, campaign, `after` and `up_to` one row: `users`, `excluded`, `reached`, and how many were `scanned`."""
        return f"""
            WITH scanned AS (
                SELECT u.user_id COLLATE "C" AS user_id, {self._meets} AS meets FROM {self._source}
                AND u.user_id COLLATE "C" > $3 AND ($4::text IS NULL OR u.user_id COLLATE "C" <= $4)
                ORDER BY 1 LIMIT {self.limit}
            ), members AS (
                SELECT s.user_id, {self._out} AS excluded FROM scanned s WHERE s.meets
            )
            SELECT coalesce((SELECT array_agg(user_id ORDER BY user_id) FROM members), '{{}}') AS users,
                   coalesce((SELECT array_agg(excluded ORDER BY user_id) FROM members), '{{}}') AS excluded,
                   coalesce((SELECT max(user_id) FROM scanned), '') AS reached,
                   (SELECT count(*) FROM scanned) AS scanned
            WHERE $2::text IS NOT NULL
        """

    @property
    def counting(self) -> str:
        """For tenant, two lists of names and null one row: `audience` and how many of it are `excluded`."""
        return f"""
            SELECT count(*) AS audience, count(*) FILTER (WHERE s.excluded) AS excluded FROM (
                SELECT {self._out} AS excluded FROM (SELECT u.user_id FROM {self._source} AND {self._meets}) s
            ) s WHERE $4::text IS NULL OR $2::text[] IS NULL OR $3::text[] IS NULL
        """

    def sample(self, most: int) -> str:
        """For the same the rows of some users that are not excluded, drawn at random: `user_id`."""
        return f"""
            SELECT s.user_id FROM (SELECT u.user_id FROM {self._source} AND {self._meets}) s
            WHERE NOT {self._out} AND ($4::text IS NULL OR $2::text[] IS NULL OR $3::text[] IS NULL)
            ORDER BY random() LIMIT {most}
        """

    def _arg(self, value: Any) -> str:
        self.args.append(value)
        return f"${len(self.args) + 4}"

    def _from(self, audience: Audience) -> str:
        if audience.topic is not None:
            return f"topic_members u WHERE u.tenant = $1 AND u.topic = {self._arg(audience.topic)}"
        if audience.users is not None:
            return f"({self._named_users}) u (user_id) WHERE NOT EXISTS ({_DELETED})"
        return f"{_USERS} WHERE u.tenant = $1"

    def _excluded(self, exclude: Audience | None) -> str:
        if exclude is None:
            return "false"
        if exclude.users is not None:
            return f"s.user_id IN ({self._named_excluded})"
        if exclude.topic is not None:
            within = f"topic_members u WHERE u.topic = {self._arg(exclude.topic)}"
        else:
            within = f"{_USERS} WHERE {self._all(exclude.segment or ())}"
        return f"EXISTS (SELECT FROM {within} AND u.tenant = $1 AND u.user_id = s.user_id)"

    def _all(self, conditions: tuple[Condition, ...]) -> str:
        return " AND ".join(f"({self._meets_one(one)})" for one in conditions)

    def _meets_one(self, one: Condition) -> str:
        column = f"to_jsonb(u.{one.attribute})" if one.attribute in _OWN else None
        has = column or f"(u.attributes -> {self._arg(one.attribute)}::text)"
        value = f"{self._arg(msgspec.json.encode(one.value).decode())}::jsonb"
        match one.op:
            case "eq":
                return f"coalesce({has} = {value}, false)"
            case "ne":
                return f"{has} IS DISTINCT FROM {value}"
            case "in":
                return f"{has} IS NOT NULL AND {value} @> jsonb_build_array({has})"
            case "exists":
                return f"coalesce({has} <> 'null'::jsonb, false) = ({value})::boolean"
            case _:
                # A CASE, for the order in which PostgreSQL looks at an AND is its own.
                same = f"jsonb_typeof({has}) = jsonb_typeof({value})"
                return f"CASE WHEN {same} THEN {has} {_COMPARE[one.op]} {value} ELSE false END"
