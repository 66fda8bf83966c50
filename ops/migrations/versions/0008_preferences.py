"""Preferences: one document per user."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    # json, not jsonb: it keeps every text as it was given, also one with a NUL in it.
    """
    CREATE TABLE preferences (
        tenant      text COLLATE "C" NOT NULL,
        user_id     text COLLATE "C" NOT NULL,
        document    json NOT NULL,
        version     bigint NOT NULL,
        changed_at  timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant, user_id)
    )
    """,
    "COMMENT ON COLUMN preferences.version IS 'the version of the profile that the last change of the document made'",
)
