"""What webhook endpoints were subscribed to before: what they have missed depends on it."""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column. Endpoints that are there begin without a past."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    # A column is added under a lock that waits for everybody who reads, and everybody else waits behind it: not for long.
    "SET LOCAL lock_timeout = '5s'",
    "ALTER TABLE webhook_endpoints ADD COLUMN former_types jsonb NOT NULL DEFAULT '[]'",
    "COMMENT ON COLUMN webhook_endpoints.former_types IS 'the oldest first, each with the time until which it was so'",
)
