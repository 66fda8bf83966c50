"""When a notification came again: its row stays for as long as the log holds the repetition, which would else be a new one.

The index is made for versions to come, so no row is touched. A version from before is searched without it.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the time, and an index of the few rows that have one."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    # A column is added under a lock that waits for everybody who reads, and everybody else waits behind it: not for long.
    "SET LOCAL lock_timeout = '5s'",
    "ALTER TABLE inbox ADD COLUMN repeated_at timestamptz",
    "COMMENT ON COLUMN inbox.repeated_at IS 'when the log stored the last notification with the same id that changed nothing'",
    "CREATE INDEX inbox_repeated ON ONLY inbox (repeated_at) WHERE repeated_at IS NOT NULL",
)
