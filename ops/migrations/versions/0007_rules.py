"""What a tenant says of its notifications: types, templates, defaults; suppressions, webhook endpoints.

An address that is suppressed stands in no index, key or check: PostgreSQL repeats the values of those in its errors and its log.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


_STATEMENTS = (
    """
    CREATE TABLE rule_versions (
        tenant      text COLLATE "C" PRIMARY KEY,
        version     bigint NOT NULL,
        changed_at  timestamptz NOT NULL DEFAULT now()
    )
    """,
    (
        "COMMENT ON TABLE rule_versions IS 'counts the changes of a tenant''s types, templates, defaults and own webhooks;"
        " whoever changes one of them holds the row'"
    ),
    # json, not jsonb: it keeps every text as it was given, also one with a NUL in it.
    """
    CREATE TABLE notification_types (
        tenant      text COLLATE "C" NOT NULL,
        pattern     text COLLATE "C" NOT NULL,
        rule        json NOT NULL,
        version     bigint NOT NULL,
        changed_at  timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant, pattern)
    )
    """,
    """
    CREATE TABLE tenant_defaults (
        tenant      text COLLATE "C" PRIMARY KEY,
        document    json NOT NULL,
        version     bigint NOT NULL,
        changed_at  timestamptz NOT NULL DEFAULT now()
    )
    """,
    """
    CREATE TABLE templates (
        tenant      text COLLATE "C" NOT NULL,
        type        text COLLATE "C" NOT NULL,
        channel     text COLLATE "C" NOT NULL,
        locale      text COLLATE "C" NOT NULL,
        version     bigint NOT NULL,
        active      boolean NOT NULL,
        parts       json NOT NULL,
        made_at     timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant, type, channel, locale, version)
    )
    """,
    "CREATE UNIQUE INDEX templates_active ON templates (tenant, type, channel, locale) WHERE active",
    """
    CREATE TABLE suppressions (
        tenant        text COLLATE "C" NOT NULL,
        id            bytea NOT NULL,
        address_hash  bytea NOT NULL,
        channel       text COLLATE "C" NOT NULL,
        address       text NOT NULL,
        scope         text NOT NULL,
        reason        text NOT NULL,
        source        text NOT NULL,
        created_at    timestamptz NOT NULL DEFAULT now(),
        expires_at    timestamptz,
        PRIMARY KEY (tenant, id)
    )
    """,
    "COMMENT ON COLUMN suppressions.id IS 'hash of channel, address and scope'",
    "CREATE INDEX suppressions_by_address ON suppressions (tenant, address_hash)",
    "CREATE INDEX suppressions_expiring ON suppressions (expires_at) WHERE expires_at IS NOT NULL",
    """
    CREATE TABLE webhook_endpoints (
        tenant           text COLLATE "C" NOT NULL,
        id               text COLLATE "C" NOT NULL,
        user_id          text COLLATE "C",
        url              text NOT NULL,
        secret           text NOT NULL,
        previous_secret  text,
        types            text[] NOT NULL,
        state            text NOT NULL,
        version          bigint NOT NULL,
        created_at       timestamptz NOT NULL DEFAULT now(),
        changed_at       timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant, id)
    )
    """,
    "CREATE INDEX webhook_endpoints_of_users ON webhook_endpoints (tenant, user_id)",
)
