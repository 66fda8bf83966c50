"""Projections: the inbox, what is known of deliveries, how far devices have come; each in versions beside each other.

A version is a partition of its own below `inbox`, `deliveries` and `delivery_ranges`, so that a rebuild writes beside what
readers read, the switch is one row of `projection_versions`, and what is no longer read is dropped, not deleted.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables, their first version, and the functions that make and drop versions."""
    for statement in (_BOOKS, _INBOX, _DELIVERIES, _CREATE_VERSION, _DROP_VERSION, _FIRST, _STATES):
        for part in statement.split("\n;;\n"):
            op.get_bind().exec_driver_sql(part)


_BOOKS = """
CREATE TABLE projection_versions (
    projection  text PRIMARY KEY,
    version     integer NOT NULL,
    switched_at timestamptz NOT NULL DEFAULT now()
)
;;
CREATE TABLE projection_checkpoints (
    projection  text NOT NULL,
    version     integer NOT NULL,
    stream      text NOT NULL,
    partition   integer NOT NULL,
    epoch       text NOT NULL,
    era         integer NOT NULL,
    seq         bigint NOT NULL,
    updated_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (projection, version, stream, partition)
) WITH (fillfactor = 20)
;;
COMMENT ON COLUMN projection_checkpoints.era IS
    'counts the incarnations of the stream: rows of an older one come before all of a newer one'
"""

_INBOX = """
CREATE TABLE inbox (
    version         integer NOT NULL,
    tenant          text NOT NULL,
    user_id         text NOT NULL,
    id              text NOT NULL,
    era             integer NOT NULL,
    seq             bigint NOT NULL,
    epoch           text NOT NULL,
    stored_at       timestamptz NOT NULL,
    type            text,
    category        text,
    collapse_key    text,
    expires_at      timestamptz,
    channels        text[] NOT NULL,
    shown           boolean NOT NULL,
    event_epoch     text,
    event_seq       bigint,
    record          bytea NOT NULL,
    read_seq        bigint,
    read_at         timestamptz,
    read_device     text,
    archived_seq    bigint,
    archived_at     timestamptz,
    recalled_seq    bigint,
    recalled_at     timestamptz,
    superseded_seq  bigint,
    carried         boolean NOT NULL DEFAULT false
) PARTITION BY LIST (version)
;;
COMMENT ON TABLE inbox IS
    'one row per notification of a user: the record as the log holds it, and what later records made of it'
;;
COMMENT ON COLUMN inbox.carried IS
    'older than what the log held at the last rebuild: taken over from the version before, not folded anew'
"""

_DELIVERIES = """
CREATE TABLE deliveries (
    version         integer NOT NULL,
    tenant          text NOT NULL,
    user_id         text NOT NULL,
    id              text NOT NULL,
    channel         text NOT NULL,
    device          text NOT NULL,
    rank            bigint NOT NULL,
    state           text NOT NULL,
    reason          text NOT NULL,
    provider        text NOT NULL,
    trace           text NOT NULL,
    at              timestamptz NOT NULL,
    attempts        integer NOT NULL,
    sent_at         timestamptz,
    delivered_at    timestamptz,
    acknowledged_at timestamptz,
    seen_at         timestamptz,
    read_at         timestamptz
) PARTITION BY LIST (version)
;;
COMMENT ON TABLE deliveries IS 'what receipts of channel workers say, one row per notification, user, channel and device'
;;
CREATE TABLE delivery_ranges (
    version         integer NOT NULL,
    tenant          text NOT NULL,
    user_id         text NOT NULL,
    device          text NOT NULL,
    channel         text NOT NULL,
    state           text NOT NULL,
    epoch           text NOT NULL,
    after_seq       bigint NOT NULL,
    up_to           bigint NOT NULL,
    at              timestamptz NOT NULL,
    sent_at         timestamptz
) PARTITION BY LIST (version)
;;
COMMENT ON TABLE delivery_ranges IS
    'receipts of gateways: of the records with after_seq < seq <= up_to, all are in this state on the device'
;;
CREATE TABLE device_cursors (
    version         integer NOT NULL,
    tenant          text NOT NULL,
    user_id         text NOT NULL,
    device          text NOT NULL,
    epoch           text NOT NULL,
    seq             bigint NOT NULL,
    at              timestamptz NOT NULL,
    PRIMARY KEY (tenant, user_id, device, version)
) WITH (fillfactor = 70)
"""

_CREATE_VERSION = """
CREATE FUNCTION seamark_create_version(projection text, number integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    name text := projection || '_' || number;
BEGIN
    IF projection = 'inbox' THEN
        EXECUTE format('CREATE TABLE %I (LIKE inbox INCLUDING ALL) PARTITION BY HASH (tenant, user_id)', name);
        FOR part IN 0..7 LOOP
            EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES WITH (MODULUS 8, REMAINDER %s)',
                           name || '_' || part, name, part);
        END LOOP;
        EXECUTE format('CREATE UNIQUE INDEX ON %I (tenant, id, user_id)', name);
        EXECUTE format('CREATE INDEX ON %I (tenant, user_id, era DESC, seq DESC)', name);
        EXECUTE format('CREATE INDEX ON %I (tenant, user_id, era DESC, seq DESC) WHERE read_seq IS NULL', name);
        EXECUTE format('CREATE INDEX ON %I (tenant, user_id, collapse_key)'
                       ' WHERE collapse_key IS NOT NULL AND superseded_seq IS NULL', name);
        EXECUTE format('CREATE INDEX ON %I USING brin (stored_at)', name);
        EXECUTE format('ALTER TABLE inbox ATTACH PARTITION %I FOR VALUES IN (%s)', name, number);
    ELSIF projection = 'deliveries' THEN
        EXECUTE format('CREATE TABLE %I (LIKE deliveries INCLUDING ALL)', name);
        EXECUTE format('CREATE UNIQUE INDEX ON %I (tenant, id, user_id, channel, device)', name);
        EXECUTE format('CREATE INDEX ON %I USING brin (at)', name);
        EXECUTE format('ALTER TABLE deliveries ATTACH PARTITION %I FOR VALUES IN (%s)', name, number);
        name := 'delivery_ranges_' || number;
        EXECUTE format('CREATE TABLE %I (LIKE delivery_ranges INCLUDING ALL)', name);
        EXECUTE format('CREATE UNIQUE INDEX ON %I'
                       ' (tenant, user_id, epoch, up_to, after_seq, device, channel, state)', name);
        EXECUTE format('CREATE INDEX ON %I USING brin (at)', name);
        EXECUTE format('ALTER TABLE delivery_ranges ATTACH PARTITION %I FOR VALUES IN (%s)', name, number);
    ELSE
        RAISE EXCEPTION 'no projection %', projection;
    END IF;
END $$
"""

_DROP_VERSION = """
CREATE FUNCTION seamark_drop_version(name text, number integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM projection_versions WHERE projection = name AND version = number) THEN
        RAISE EXCEPTION 'version % of % is the one that is read', number, name;
    END IF;
    EXECUTE format('DROP TABLE IF EXISTS %I', name || '_' || number);
    IF name = 'deliveries' THEN
        EXECUTE format('DROP TABLE IF EXISTS %I', 'delivery_ranges_' || number);
        DELETE FROM device_cursors WHERE version = number;
    END IF;
    DELETE FROM projection_checkpoints WHERE projection = name AND version = number;
END $$
"""

_FIRST = """
INSERT INTO projection_versions (projection, version) VALUES ('inbox', 1), ('deliveries', 1)
;;
SELECT seamark_create_version('inbox', 1)
;;
SELECT seamark_create_version('deliveries', 1)
"""

_STATES = """
CREATE VIEW delivery_states AS
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
FROM live, deliveries d WHERE d.version = live.deliveries
;;
COMMENT ON VIEW delivery_states IS 'one row per notification, user, channel and device; for single notifications'
"""
