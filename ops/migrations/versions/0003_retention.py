"""Retention: every row has a time until which it is kept, and versions of the tables are divided by the month of that time.

What is in the tables already is not touched, so this takes milliseconds however many rows there are, and repeating it after
an interruption is all there is to do. A version that holds rows stays divided as it was (nothing leaves it) until
`seamark rebuild` has made the next one; versions without rows are made anew here.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the times, the settings of tenants, and the functions that make versions of months."""
    for statement in (_PATIENCE, _RETENTION, _COLUMNS, _CREATE_VERSION, _CREATE_MONTHS, _EMPTY_VERSIONS):
        for part in statement.split("\n;;\n"):
            op.get_bind().exec_driver_sql(part)


# A column is added under a lock that waits for everybody who reads, and everybody else waits behind it: not for long.
_PATIENCE = "SET LOCAL lock_timeout = '5s'"

_RETENTION = """
CREATE TABLE retention (
    tenant      text PRIMARY KEY,
    days        integer NOT NULL CHECK (days BETWEEN 1 AND 400),
    not_before  timestamptz,
    changed_at  timestamptz NOT NULL DEFAULT now()
)
;;
COMMENT ON TABLE retention IS 'for how long rows of a tenant are kept; the row with an empty name is for all tenants without one'
;;
COMMENT ON COLUMN retention.not_before IS
    'what is stored from now on leaves no sooner: when the time was made shorter, older rows still leave first'
;;
INSERT INTO retention (tenant, days) VALUES ('', 90)
"""

_COLUMNS = """
ALTER TABLE inbox ADD COLUMN kept_until timestamptz
;;
ALTER TABLE deliveries ADD COLUMN kept_until timestamptz
;;
ALTER TABLE delivery_ranges ADD COLUMN kept_until timestamptz
;;
COMMENT ON COLUMN inbox.kept_until IS 'the row goes with the month in which this is'
;;
ALTER TABLE device_cursors ADD COLUMN touched_at timestamptz NOT NULL DEFAULT now()
;;
COMMENT ON COLUMN device_cursors.touched_at IS
    'when RECEIPTS stored the last acknowledgement, by the broker''s clock: of too many devices the oldest goes'
"""

_CREATE_VERSION = """
CREATE OR REPLACE FUNCTION seamark_create_version(projection text, number integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    name text := projection || '_' || number;
BEGIN
    IF projection = 'inbox' THEN
        EXECUTE format('CREATE TABLE %I (LIKE inbox INCLUDING ALL) PARTITION BY RANGE (kept_until)', name);
        EXECUTE format('CREATE INDEX ON %I (tenant, user_id, era DESC, seq DESC)', name);
        EXECUTE format('CREATE INDEX ON %I (tenant, user_id, era DESC, seq DESC) WHERE read_seq IS NULL', name);
        EXECUTE format('CREATE INDEX ON %I (tenant, user_id, collapse_key)'
                       ' WHERE collapse_key IS NOT NULL AND superseded_seq IS NULL', name);
        EXECUTE format('CREATE INDEX ON %I USING brin (stored_at)', name);
        EXECUTE format('ALTER TABLE inbox ATTACH PARTITION %I FOR VALUES IN (%s)', name, number);
    ELSIF projection = 'deliveries' THEN
        EXECUTE format('CREATE TABLE %I (LIKE deliveries INCLUDING ALL) PARTITION BY RANGE (kept_until)', name);
        EXECUTE format('CREATE INDEX ON %I USING brin (at)', name);
        EXECUTE format('ALTER TABLE deliveries ATTACH PARTITION %I FOR VALUES IN (%s)', name, number);
        name := 'delivery_ranges_' || number;
        EXECUTE format('CREATE TABLE %I (LIKE delivery_ranges INCLUDING ALL) PARTITION BY RANGE (kept_until)', name);
        EXECUTE format('CREATE INDEX ON %I USING brin (at)', name);
        EXECUTE format('ALTER TABLE delivery_ranges ATTACH PARTITION %I FOR VALUES IN (%s)', name, number);
    ELSE
        RAISE EXCEPTION 'no projection %', projection;
    END IF;
    PERFORM seamark_create_months(projection, number);
END $$
"""

# The table is made first and attached then: other than a partition made in place, that keeps nobody waiting.
# No key is unique over all months. A user's rows are written by one transaction at a time, the one that moves the checkpoint
# of the user's partition, and it looks into all months before it adds a row. The key of a month is there to be searched by.
_CREATE_MONTHS = """
CREATE FUNCTION seamark_create_months(projection text, number integer, days integer DEFAULT 0)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    base text;
    key text;
    parent text;
    leaf text;
    month timestamp;
    last timestamp;
    made integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(7345254);
    SELECT date_trunc('month', (greatest(now() + greatest(max(r.days), seamark_create_months.days) * interval '1 day',
                                         max(r.not_before)) + interval '1 month') AT TIME ZONE 'UTC')
    INTO last FROM retention r;
    FOR base, key IN VALUES ('inbox', '(tenant, id, user_id)'), ('deliveries', '(tenant, id, user_id, channel, device)'),
            ('delivery_ranges', '(tenant, user_id, epoch, up_to, after_seq, device, channel, state)') LOOP
        CONTINUE WHEN (base = 'inbox') <> (projection = 'inbox');
        parent := base || '_' || number;
        -- A version from before there were months.
        CONTINUE WHEN NOT EXISTS (SELECT FROM pg_partitioned_table t
                                  WHERE t.partrelid = to_regclass(parent) AND t.partstrat = 'r');
        month := date_trunc('month', now() AT TIME ZONE 'UTC');
        WHILE month <= last LOOP
            leaf := parent || to_char(month, '_YYYYMM');
            IF to_regclass(leaf) IS NULL THEN
                EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING ALL)', leaf, parent);
                EXECUTE format('CREATE UNIQUE INDEX ON %I %s', leaf, key);
                EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', parent, leaf,
                               month AT TIME ZONE 'UTC', (month + interval '1 month') AT TIME ZONE 'UTC');
                made := made + 1;
            END IF;
            month := month + interval '1 month';
        END LOOP;
    END LOOP;
    RETURN made;
END $$
"""

_EMPTY_VERSIONS = """
DO $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT projection, version FROM projection_versions LOOP
        IF one.projection = 'inbox' AND NOT EXISTS (SELECT FROM inbox) THEN
            EXECUTE format('DROP TABLE %I', 'inbox_' || one.version);
            PERFORM seamark_create_version('inbox', one.version);
        ELSIF one.projection = 'deliveries' AND NOT EXISTS (SELECT FROM deliveries)
                AND NOT EXISTS (SELECT FROM delivery_ranges) THEN
            EXECUTE format('DROP TABLE %I', 'deliveries_' || one.version);
            EXECUTE format('DROP TABLE %I', 'delivery_ranges_' || one.version);
            PERFORM seamark_create_version('deliveries', one.version);
        END IF;
    END LOOP;
END $$
"""
