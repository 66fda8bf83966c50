"""Keys of operators, who belong to no tenant and need no scopes."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let a key have no tenant."""
    # The lock waits for everybody who reads, such as a backup, and every look-up of a key waits behind it: not for long.
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER TABLE api_keys ALTER tenant DROP NOT NULL, ADD CHECK (tenant IS NOT NULL OR scopes = '{}')")
