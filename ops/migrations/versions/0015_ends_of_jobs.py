"""What providers call messages and what texts cost; which deliveries are open; when they were last looked at.

Columns are added with constants as their defaults, so no row is touched. The index is made for versions to come; a version from
before is searched without it.
"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, the index and the table."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    # A column is added under a lock that waits for everybody who reads, and everybody else waits behind it: not for long.
    "SET LOCAL lock_timeout = '5s'",
    "ALTER TABLE deliveries ADD COLUMN provider_ids text NOT NULL DEFAULT '', ADD COLUMN segments integer NOT NULL DEFAULT 0",
    "COMMENT ON COLUMN deliveries.provider_ids IS 'a line for each try that a provider took: its number, the provider, its id'",
    "COMMENT ON COLUMN deliveries.segments IS 'of an SMS, how many parts were paid for'",
    "CREATE INDEX deliveries_open ON ONLY deliveries (at) WHERE state IN ('planned', 'queued')",
    # Where there are no rows at all, versions are made anew with the index (see 0003).
    """
    DO $$
    DECLARE
        one record;
    BEGIN
        FOR one IN SELECT version FROM projection_versions WHERE projection = 'deliveries' LOOP
            IF NOT EXISTS (SELECT FROM deliveries) AND NOT EXISTS (SELECT FROM delivery_ranges) THEN
                EXECUTE format('DROP TABLE %I', 'deliveries_' || one.version);
                EXECUTE format('DROP TABLE %I', 'delivery_ranges_' || one.version);
                PERFORM seamark_create_version('deliveries', one.version);
            END IF;
        END LOOP;
    END $$
    """,
    """
    CREATE TABLE sweeps (
        name      text PRIMARY KEY,
        begun_at  timestamptz NOT NULL
    )
    """,
    "COMMENT ON TABLE sweeps IS 'when each sweep was last begun: one process of all does it, once an hour'",
)
