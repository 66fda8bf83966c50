"""Who has changed which control, and why."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    """
    CREATE TABLE control_log (
        id text PRIMARY KEY,
        number bigint NOT NULL,
        at timestamptz NOT NULL,
        who text NOT NULL,
        why text NOT NULL,
        action text NOT NULL,
        before jsonb,
        after jsonb
    )
    """,
    "COMMENT ON TABLE control_log IS 'each change of a control, copied from the control bucket'",
    "COMMENT ON COLUMN control_log.number IS 'counts the changes in the bucket: a gap is a change that never got here'",
    "CREATE INDEX control_log_at ON control_log (at)",
)
