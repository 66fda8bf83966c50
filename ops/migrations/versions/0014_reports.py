"""What providers report: which reports were acted on, and which messages an address did not take."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    """
    CREATE TABLE provider_reports (
        id  bytea PRIMARY KEY,
        at  timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE INDEX provider_reports_by_age ON provider_reports (at)",
    "COMMENT ON TABLE provider_reports IS 'reports that may suppress an address, and were acted on: a second one does nothing'",
    """
    CREATE TABLE soft_bounces (
        tenant        text COLLATE "C" NOT NULL,
        address_hash  bytea NOT NULL,
        message       bytea NOT NULL,
        at            timestamptz NOT NULL,
        PRIMARY KEY (tenant, address_hash, message)
    )
    """,
    "CREATE INDEX soft_bounces_by_age ON soft_bounces (at)",
    "COMMENT ON COLUMN soft_bounces.message IS 'hash of the key of its job: a message counts once, whoever says that it bounced'",
)
