"""Plans: what a planner has decided for each channel, beside what receipts say of it; and the witness of the planners' marks.

Columns are added with constants as their defaults, so no row is touched.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and the table; the view leaves out what says nothing about a device."""
    for statement in (_PATIENCE, _COLUMNS, _WITNESSES, _STATES):
        for part in statement.split("\n;;\n"):
            op.get_bind().exec_driver_sql(part)


# A column is added under a lock that waits for everybody who reads, and everybody else waits behind it: not for long.
_PATIENCE = "SET LOCAL lock_timeout = '5s'"

_COLUMNS = """
ALTER TABLE deliveries
    ADD COLUMN plan_term bigint NOT NULL DEFAULT 0,
    ADD COLUMN plan_when text NOT NULL DEFAULT '',
    ADD COLUMN plan_why text NOT NULL DEFAULT '',
    ADD COLUMN plan_at timestamptz
;;
COMMENT ON COLUMN deliveries.plan_term IS
    'the term of the planner whose plan has this channel; of all rows of a notification, those with a plan have the same'
"""

_WITNESSES = """
CREATE TABLE plan_witnesses (
    partition   integer PRIMARY KEY,
    epoch       text NOT NULL,
    seq         bigint NOT NULL,
    noted_at    timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50)
;;
COMMENT ON TABLE plan_witnesses IS
    'how far each log was planned, a few seconds ago: a mark in JOBS that is behind it was put back with a backup'
"""

# As before, but that a plan for the app is no delivery: gateways say which devices got it.
_STATES = """
CREATE OR REPLACE VIEW delivery_states AS
WITH live AS (
    SELECT (SELECT version FROM projection_versions WHERE projection = 'inbox') AS inbox,
           (SELECT version FROM projection_versions WHERE projection = 'deliveries') AS deliveries
)
SELECT i.tenant, i.user_id, i.id, 'inapp' AS channel, r.device,
       CASE WHEN i.read_seq IS NOT NULL THEN 'read' WHEN r.acknowledged_at IS NOT NULL THEN 'acknowledged'
            WHEN r.device IS NOT NULL THEN 'sent' WHEN i.recalled_seq IS NOT NULL THEN 'cancelled'
            WHEN i.expires_at <= now() THEN 'expired' ELSE 'queued' END AS state,
       NULL AS reason, r.sent_at, r.acknowledged_at, i.read_at
FROM live, inbox i LEFT JOIN LATERAL (
    SELECT d.device, min(coalesce(d.sent_at, d.at)) AS sent_at,
           min(d.at) FILTER (WHERE d.state = 'acknowledged') AS acknowledged_at
    FROM delivery_ranges d
    WHERE d.version = live.deliveries AND d.tenant = i.tenant AND d.user_id = i.user_id AND d.channel = 'inapp'
      AND d.epoch = i.epoch AND d.after_seq < i.seq AND d.up_to >= i.seq
    GROUP BY d.device
) r ON true
WHERE i.version = live.inbox AND 'inapp' = ANY (i.channels)
UNION ALL
SELECT d.tenant, d.user_id, d.id, d.channel, d.device, d.state, nullif(d.reason, ''), d.sent_at, d.acknowledged_at, d.read_at
FROM live, deliveries d WHERE d.version = live.deliveries AND NOT (d.channel = 'inapp' AND d.rank < 0)
"""
