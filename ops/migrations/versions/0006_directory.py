"""Users, their push tokens, topics and members; versions of profiles with tombstones, and deletions under way.

No check, and no index that demands one row, knows an address or a token: PostgreSQL repeats the values of those in its errors and
its log.

Deliveries get an index by user, for deletions. It is made for versions to come, so no row is touched: a version from before is
searched without it until it is rebuilt.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    # COLLATE "C": pages of a campaign are bounded by ids, which mean the same in every database, whatever its locale.
    """
    CREATE TABLE users (
        tenant      text COLLATE "C" NOT NULL,
        user_id     text COLLATE "C" NOT NULL,
        email       text,
        email_hash  bytea,
        phone       text,
        locale      text,
        timezone    text,
        attributes  jsonb NOT NULL DEFAULT '{}',
        version     bigint NOT NULL,
        created_at  timestamptz NOT NULL DEFAULT now(),
        updated_at  timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant, user_id)
    )
    """,
    "COMMENT ON COLUMN users.version IS 'the version of the profile that the last change of the row made'",
    # For suppressions, which are about addresses: whose profile do they change?
    "COMMENT ON COLUMN users.email_hash IS 'of the address as suppressions compare it: lower() depends on the database'",
    "CREATE INDEX users_by_email ON users (tenant, email_hash) WHERE email_hash IS NOT NULL",
    "CREATE INDEX users_by_phone ON users (tenant, phone) WHERE phone IS NOT NULL",
    """
    CREATE TABLE push_tokens (
        tenant         text COLLATE "C" NOT NULL,
        user_id        text COLLATE "C" NOT NULL,
        token_id       text COLLATE "C" NOT NULL,
        platform       text NOT NULL,
        environment    text NOT NULL,
        app            text NOT NULL,
        device         text,
        token          text NOT NULL,
        keys           jsonb,
        token_hash     bytea NOT NULL,
        registered_at  timestamptz NOT NULL DEFAULT now(),
        retired_at     timestamptz,
        reason         text,
        PRIMARY KEY (tenant, user_id, token_id)
    )
    """,
    "CREATE UNIQUE INDEX push_tokens_one_owner ON push_tokens (tenant, token_hash)",
    "COMMENT ON COLUMN push_tokens.token_hash IS 'of platform, app and token: a token belongs to one user at a time'",
    """
    CREATE TABLE topics (
        tenant      text COLLATE "C" NOT NULL,
        name        text COLLATE "C" NOT NULL,
        members     bigint NOT NULL DEFAULT 0,
        created_at  timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant, name)
    )
    """,
    "COMMENT ON TABLE topics IS 'whoever changes members of a topic holds its row, so the count is right'",
    """
    CREATE TABLE topic_members (
        tenant    text COLLATE "C" NOT NULL,
        topic     text COLLATE "C" NOT NULL,
        user_id   text COLLATE "C" NOT NULL,
        added_at  timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant, topic, user_id)
    )
    """,
    "CREATE INDEX topic_members_of_user ON topic_members (tenant, user_id)",
    """
    CREATE TABLE profiles (
        tenant      text COLLATE "C" NOT NULL,
        user_id     text COLLATE "C" NOT NULL,
        version     bigint NOT NULL DEFAULT 0,
        deleted_at  timestamptz,
        PRIMARY KEY (tenant, user_id)
    )
    """,
    "COMMENT ON TABLE profiles IS 'versions of what decisions know of users; whoever changes any of it holds the row'",
    "COMMENT ON COLUMN profiles.deleted_at IS 'the user was deleted then: a tombstone, for 31 days'",
    """
    CREATE TABLE deletions (
        tenant      text COLLATE "C" NOT NULL,
        user_id     text COLLATE "C" NOT NULL,
        deleted_at  timestamptz NOT NULL,
        due_at      timestamptz NOT NULL,
        passes      integer NOT NULL DEFAULT 0,
        bounds      jsonb,
        erased_at   timestamptz,
        PRIMARY KEY (tenant, user_id)
    )
    """,
    "CREATE INDEX deletions_due ON deletions (due_at)",
    "CREATE INDEX deletions_due_of_tenant ON deletions (tenant, due_at)",
    "COMMENT ON COLUMN deletions.bounds IS 'ends of streams: what they hold up to there may still arrive at the user'",
    "COMMENT ON COLUMN deletions.erased_at IS 'nothing of the user was left, and nothing from before the deletion can arrive'",
    # An index is made under a lock that waits for everybody who writes, and everybody else waits behind it: not for long.
    "SET LOCAL lock_timeout = '5s'",
    "CREATE INDEX deliveries_of_user ON ONLY deliveries (tenant, user_id)",
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
)
