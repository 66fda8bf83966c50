"""API keys of services, by the SHA-256 of the key: the key itself is shown once and never stored."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table of API keys."""
    op.execute("""
        CREATE TABLE api_keys (
            id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            tenant      text NOT NULL CHECK (tenant <> ''),
            name        text NOT NULL,
            key_hash    bytea NOT NULL UNIQUE CHECK (octet_length(key_hash) = 32),
            scopes      text[] NOT NULL DEFAULT '{}',
            created_at  timestamptz NOT NULL DEFAULT now(),
            expires_at  timestamptz,
            revoked_at  timestamptz
        )
    """)
    op.execute("CREATE INDEX api_keys_by_tenant ON api_keys (tenant)")
