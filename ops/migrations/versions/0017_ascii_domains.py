"""Addresses are found by their domain in ASCII, as mails and reports name it: `münchen.de` is `xn--mnchen-3ya.de`.

Only rows whose domain has other letters change. Of two suppressions that are one by now the stronger one stays.
"""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import idna
from alembic import op
from sqlalchemy import Connection

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

ROWS = 1000

_OTHER = r"@.*[^\x01-\x7f]"
_RANKS = {"opted_out": 2, "complaint": 1}


def upgrade() -> None:
    """Hash the addresses of users and suppressions anew."""
    connection = op.get_bind()
    _users(connection)
    _suppressions(connection)


def _users(connection: Connection) -> None:
    tenant = user = ""
    while True:
        rows = connection.exec_driver_sql(
            "SELECT tenant, user_id, email FROM users WHERE email ~ $1 AND (tenant, user_id) > ($2, $3)"
            " ORDER BY tenant, user_id LIMIT $4",
            (_OTHER, tenant, user, ROWS),
        ).all()
        for tenant, user, email in rows:
            connection.exec_driver_sql(
                "UPDATE users SET email_hash = $3 WHERE tenant = $1 AND user_id = $2",
                (tenant, user, _hash(_normalized(email))),
            )
        if len(rows) < ROWS:
            return


def _suppressions(connection: Connection) -> None:
    rows = connection.exec_driver_sql(
        "SELECT tenant, id, address, scope, reason, expires_at FROM suppressions"
        " WHERE channel = 'email' AND address ~ $1 ORDER BY tenant, id FOR UPDATE",
        (_OTHER,),
    ).all()
    for row in rows:
        address = _normalized(row.address)
        hash = _hash(address)
        id = sha256(hash + row.scope.encode()).digest()
        if id == row.id:
            continue
        there = connection.exec_driver_sql(
            "SELECT reason, expires_at FROM suppressions WHERE tenant = $1 AND id = $2 FOR UPDATE", (row.tenant, id)
        ).one_or_none()
        weaker = row.id if there is not None and _strength(there) >= _strength(row) else id
        connection.exec_driver_sql("DELETE FROM suppressions WHERE tenant = $1 AND id = $2", (row.tenant, weaker))
        connection.exec_driver_sql(
            "UPDATE suppressions SET id = $3, address_hash = $4, address = $5 WHERE tenant = $1 AND id = $2",
            (row.tenant, row.id, id, hash, address),
        )


def _strength(row: Any) -> tuple[bool, int, datetime]:
    end = row.expires_at or datetime.max.replace(tzinfo=UTC)
    return end > datetime.now(UTC), _RANKS.get(row.reason, 0), end


def _normalized(address: str) -> str:
    """As `engine.directory.contacts.normalized` when this was written."""
    text = address.strip().lower()
    local, _, domain = text.rpartition("@")
    try:
        return f"{local}@{idna.encode(domain, uts46=True).decode()}"
    except ValueError:
        return text


def _hash(email: str) -> bytes:
    return sha256(f"email\n{email}".encode("utf-8", "surrogatepass")).digest()
