"""Audiences as SQL: the next users of one, in byte order, and which of them are excluded."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from engine.campaigns.draft import Audience, Condition
from seamark.protocol.limits import RECIPIENTS_MAX

WINDOW_USERS: Final = RECIPIENTS_MAX + 1
"""Users looked at for one page: one more than it can hold, so that it is seen where it ends."""

SCAN_USERS: Final = 50_000
"""The same of a segment, whose users may be few: some 100 ms of PostgreSQL's time."""

_OWN: Final = frozenset({"locale", "timezone"})
"""Attributes that are columns of a user."""

_USERS: Final = "(SELECT tenant, id AS user_id, attributes, locale, timezone FROM users) u"

_COMPARE: Final = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class Question:
    """The statement that reads a window; arguments 1 to 4 are the tenant, the campaign, `after` and `up_to`.

    It answers one row: `users`, whether each is `excluded`, `reached`, and how many were `scanned`.
    """

    def __init__(self, audience: Audience, exclude: Audience | None) -> None:
        self.args: list[Any] = []
        self.limit = WINDOW_USERS if audience.segment is None else SCAN_USERS
        meets = "true" if audience.segment is None else self._all(audience.segment)
        self.sql = f"""
            WITH scanned AS (
                SELECT u.user_id, {meets} AS meets FROM {self._source(audience)} AND u.user_id COLLATE "C" > $3
                AND ($4::text IS NULL OR u.user_id COLLATE "C" <= $4) ORDER BY u.user_id COLLATE "C" LIMIT {self.limit}
            )
            SELECT coalesce(array_agg(s.user_id ORDER BY s.user_id COLLATE "C") FILTER (WHERE s.meets), '{{}}') AS users,
                   coalesce(array_agg({self._excluded(exclude)} ORDER BY s.user_id COLLATE "C") FILTER (WHERE s.meets), '{{}}')
                       AS excluded,
                   coalesce(max(s.user_id COLLATE "C"), '') AS reached, count(*) AS scanned
            FROM scanned s WHERE $2::text IS NOT NULL
        """

    def _arg(self, value: Any) -> str:
        self.args.append(value)
        return f"${len(self.args) + 4}"

    def _source(self, audience: Audience) -> str:
        if audience.topic is not None:
            return f"topic_members u WHERE u.tenant = $1 AND u.topic = {self._arg(audience.topic)}"
        if audience.users is not None:
            return "(SELECT unnest(c.users) AS user_id FROM campaigns c WHERE c.tenant = $1 AND c.id = $2) u WHERE true"
        return f"{_USERS} WHERE u.tenant = $1"

    def _excluded(self, exclude: Audience | None) -> str:
        if exclude is None:
            return "false"
        if exclude.users is not None:
            return "s.user_id IN (SELECT unnest(c.exclude_users) FROM campaigns c WHERE c.tenant = $1 AND c.id = $2)"
        if exclude.topic is not None:
            within = f"topic_members u WHERE u.topic = {self._arg(exclude.topic)}"
        else:
            within = f"{_USERS} WHERE {self._all(exclude.segment or ())}"
        return f"EXISTS (SELECT FROM {within} AND u.tenant = $1 AND u.user_id = s.user_id)"

    def _all(self, conditions: tuple[Condition, ...]) -> str:
        return " AND ".join(f"({self._meets(one)})" for one in conditions) or "true"

    def _meets(self, one: Condition) -> str:
        has = (
            f"to_jsonb(u.{one.attribute})" if one.attribute in _OWN else f"(u.attributes -> {self._arg(one.attribute)})"
        )
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
