"""When people have said STOP or START: what is posted late counts by when it was said, not by when it was stored."""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column without a default, so no row is touched, and a table."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    # A column is added under a lock that waits for everybody who reads, and everybody else waits behind it: not for long.
    "SET LOCAL lock_timeout = '5s'",
    "ALTER TABLE suppressions ADD COLUMN said_at timestamptz",
    "COMMENT ON COLUMN suppressions.said_at IS 'when somebody wished it; null: when it was made'",
    """
    CREATE TABLE text_wishes (
        tenant        text COLLATE "C" NOT NULL,
        address_hash  bytea NOT NULL,
        said_at       timestamptz NOT NULL,
        PRIMARY KEY (tenant, address_hash)
    )
    """,
    "CREATE INDEX text_wishes_by_age ON text_wishes (said_at)",
    "COMMENT ON TABLE text_wishes IS 'when a number has said STOP or START last: an earlier one that comes later does nothing'",
)
