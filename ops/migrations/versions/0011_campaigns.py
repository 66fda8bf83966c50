"""Campaigns, and the pages their audiences are cut into.

The boundaries of a page stand here before its event is published: production needs a synchronous standby, for a fail-over
that forgot them would cut the same users into other pages.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    for statement in _STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


# Names of users are compared byte by byte everywhere: the order of a collation may change with the next version of a library,
# and a boundary must mean the same users for ever.
_STATEMENTS = (
    """
    CREATE TABLE campaigns (
        tenant        text NOT NULL,
        id            text NOT NULL,
        state         text NOT NULL DEFAULT 'running'
                      CHECK (state IN ('running', 'paused', 'cancelled', 'expired', 'done')),
        revision      integer NOT NULL DEFAULT 1,
        fingerprint   bytea NOT NULL,
        message       json NOT NULL,
        audience      jsonb NOT NULL,
        exclude       jsonb,
        users         text[] COLLATE "C",
        exclude_users text[] COLLATE "C",
        rate          integer CHECK (rate > 0),
        start_at      timestamptz NOT NULL,
        not_after     timestamptz,
        publish_at    timestamptz NOT NULL,
        cut_up_to     text COLLATE "C" NOT NULL DEFAULT '',
        cut_final     boolean NOT NULL DEFAULT false,
        pages         integer NOT NULL DEFAULT 0,
        leased_by     text NOT NULL DEFAULT '',
        leased_until  timestamptz NOT NULL DEFAULT '-infinity',
        created_at    timestamptz NOT NULL DEFAULT now(),
        changed_at    timestamptz NOT NULL DEFAULT now(),
        finished_at   timestamptz,
        PRIMARY KEY (tenant, id)
    )
    """,
    "COMMENT ON COLUMN campaigns.message IS 'json, not jsonb: it is published as the service wrote it'",
    "COMMENT ON COLUMN campaigns.users IS 'the users that the audience names one by one; the column audience has none of them'",
    "COMMENT ON COLUMN campaigns.publish_at IS 'when the rate allows the next page'",
    "COMMENT ON COLUMN campaigns.cut_up_to IS 'where the last page ends that was cut; cut_final: the audience ends there'",
    "COMMENT ON COLUMN campaigns.leased_by IS 'the pager that works on it; two would only do the work twice'",
    "CREATE INDEX campaigns_unfinished ON campaigns (tenant, leased_until) WHERE finished_at IS NULL",
    "CREATE INDEX campaigns_finished ON campaigns (finished_at) WHERE finished_at IS NOT NULL",
    """
    CREATE TABLE campaign_pages (
        tenant        text NOT NULL,
        campaign      text NOT NULL,
        number        integer NOT NULL,
        after_user    text COLLATE "C" NOT NULL,
        up_to         text COLLATE "C" NOT NULL CHECK (up_to > after_user),
        state         text NOT NULL DEFAULT 'fixed'
                      CHECK (state IN ('fixed', 'publishing', 'published', 'done', 'ambiguous', 'cancelled', 'expired')),
        count         integer NOT NULL,
        excluded      integer NOT NULL CHECK (excluded BETWEEN 0 AND count),
        cancelled     integer NOT NULL DEFAULT 0,
        expired       integer NOT NULL DEFAULT 0,
        bulk_epoch    text,
        bulk_seq      bigint,
        heads         jsonb,
        event         bytea,
        reason        text,
        claimed_at    timestamptz,
        published_at  timestamptz,
        finished_at   timestamptz,
        PRIMARY KEY (tenant, campaign, number),
        UNIQUE (tenant, campaign, after_user),
        FOREIGN KEY (tenant, campaign) REFERENCES campaigns (tenant, id) ON DELETE CASCADE,
        CHECK (cancelled + expired <= count - excluded),
        CHECK ((event IS NOT NULL) = (state = 'publishing'))
    )
    """,
    "COMMENT ON COLUMN campaign_pages.cancelled IS 'users whose records are shown to nobody; expired: the same'",
    "COMMENT ON COLUMN campaign_pages.bulk_seq IS 'where BULK ended before it was published; afterwards where its event is'",
    "COMMENT ON COLUMN campaign_pages.event IS 'what is published, until it is known to be: every attempt brings the same'",
    "COMMENT ON COLUMN campaign_pages.heads IS 'where the logs ended once the page was dispatched: planners have to pass that'",
    """
    CREATE INDEX campaign_pages_open ON campaign_pages (tenant, campaign, number)
        WHERE state IN ('fixed', 'publishing', 'published')
    """,
    "CREATE INDEX campaign_pages_under_way ON campaign_pages (tenant) WHERE state IN ('publishing', 'published')",
)
