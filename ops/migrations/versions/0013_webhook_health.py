"""How webhook endpoints fare: since when one has only failed, and why it was disabled."""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column. Endpoints that are there begin without a past."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    # A column is added under a lock that waits for everybody who reads, and everybody else waits behind it: not for long.
    "SET LOCAL lock_timeout = '5s'",
    "ALTER TABLE webhook_endpoints ADD COLUMN health jsonb",
    "COMMENT ON COLUMN webhook_endpoints.health IS 'engine.channels.webhook.health; null: nothing was sent since changed_at'",
)
