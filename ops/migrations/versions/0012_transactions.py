"""Which transaction a notification belongs to, and why one is shown to nobody: what `DELETE /v1/transactions/{id}` looks for.

The index is made for versions to come, so no row is touched. A version from before is searched without it.
"""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add both columns, and an index of the rows that belong to a transaction."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    # A column is added under a lock that waits for everybody who reads, and everybody else waits behind it: not for long.
    "SET LOCAL lock_timeout = '5s'",
    "ALTER TABLE inbox ADD COLUMN transaction_id text",
    "ALTER TABLE inbox ADD COLUMN withheld text",
    "COMMENT ON COLUMN inbox.transaction_id IS 'what the event belongs to, and is cancelled with'",
    "COMMENT ON COLUMN inbox.withheld IS 'why a dispatcher stored the record for nobody to see: cancelled, expired'",
    "CREATE INDEX inbox_transaction ON ONLY inbox (tenant, transaction_id, user_id, id) WHERE transaction_id IS NOT NULL",
    # No row yet has a transaction: where there are no rows at all, versions are made anew with the index (see 0003).
    """
    DO $$
    DECLARE
        one record;
    BEGIN
        FOR one IN SELECT version FROM projection_versions WHERE projection = 'inbox' LOOP
            IF NOT EXISTS (SELECT FROM inbox) THEN
                EXECUTE format('DROP TABLE %I', 'inbox_' || one.version);
                PERFORM seamark_create_version('inbox', one.version);
            END IF;
        END LOOP;
    END $$
    """,
)
