"""Bounds of the gateway, each with its reason. What happens at a bound is named beside it."""

from typing import Final

from engine.limits import PAGE_RECORDS

# --- one connection -------------------------------------------------------------------------------------------------

HELLO_SECONDS: Final = 5.0
"""From the open socket to a complete `hello`; then 4407. A socket that says nothing costs a file descriptor."""

LOOKS: Final = 3
"""How often a session looks again before it decides that a client was silent for too long.

A process that was stopped, or busy for long, finds its timers due while the client's frame is still unread in the socket.
uvloop runs timers before it reads sockets, and a frame needs two more turns of the loop to reach its session."""

LOOK_SECONDS: Final = 0.05
"""Between two such looks. At least one turn of the loop passes between them, however long it takes."""

FRAME_BYTES: Final = 65_536
"""Largest frame a client may send; then 4413. The longest honest one is a `read` naming some hundreds of ids."""

FRAGMENT_BYTES: Final = 2 * FRAME_BYTES
"""Bytes a WebSocket may send before its frame is complete; then 4429. An empty fragment costs as much as a full one, and one
frame may consist of millions of them."""

WIRE_BYTES_PER_MINUTE: Final = 16 * 1024 * 1024
"""Bytes a WebSocket may bring in a minute; then 4429. 128 of the largest reads are half of it."""

FRAMES_PER_MINUTE: Final = 600
"""Frames a client may send in any minute (token bucket, the whole minute as burst); then 4429.

An SDK acks at most four times a second (240), so this leaves room for reads and pings."""

READ_IDS: Final = 500
"""Ids in one `read`; 500 ids of 128 bytes still fit in one frame of `FRAME_BYTES`."""

ROOM_BYTES: Final = 65_536
"""Bytes one socket may have unsent before its session is *catching up* and waits for it to be writable."""

WRITE_HIGH_BYTES: Final = 32_768
"""High-water mark given to the transport. Below `ROOM_BYTES`, so that a session refused room is always told later."""

WRITE_LOW_BYTES: Final = 8_192
"""Low-water mark of the transport: at this size a waiting session goes on reading its log."""

PING_SECONDS: Final = 20.0
"""Between two protocol pings on a connection that has been silent for so long."""

PONG_SECONDS: Final = 15.0
"""For the answer to a ping; then 4408. Slow mobile links answer within a few seconds."""

LINGER_SECONDS: Final = 2.0
"""For the client's half of the closing handshake; then the transport is aborted, whatever is still unsent."""

DEVICE_BYTES: Final = 128
"""Length of a device id, as of every id."""

# --- one user -------------------------------------------------------------------------------------------------------

SESSIONS_PER_USER: Final = 20
"""Connected sessions of one user in one process; then the oldest is closed with 4409."""

# --- read and archive records, which users have written -----------------------------------------------------------------

STATE_BURST_BYTES: Final = 1 << 20
"""Bytes of them one user may have stored at once, over all gateways; then `too_many_reads`. Some 2 000 that name a position,
or 50 that name 500 ids each: nobody who reads by hand gets there."""

STATE_BYTES_PER_DAY: Final = 2 << 20
"""Bytes by which that allowance grows again in a day. A log that keeps 30 days holds 61 MiB of one user at most."""

STATE_SHARE_PERCENT: Final = 25
"""How much of each log the users of one tenant may fill with them (`SEAMARK_TENANT_STATE_PERCENT`)."""

STATE_RECORD_BYTES_MAX: Final = 131_072
"""The largest of them: 500 ids of 128 bytes, each escaped in JSON, with its headers."""

STORED_OVERHEAD_BYTES: Final = 128
"""What a stored record costs beside its body and subject: its header, and the broker's own frame."""

STATE_PAUSE_SECONDS: Final = 0.25
"""Between two such records of one device. What it asks for meanwhile goes into the next one."""

STATE_REQUESTS_WAITING: Final = 64
"""Requests of one device that may wait for the log; then `too_many_reads`. Enough for a minute of clicks during an election."""

STATE_BUDGET_SECONDS: Final = 10.0
"""How long a gateway tries to store one such record: a leader election takes 4-9 s."""

LOG_BYTES_ASSUMED: Final = 4 << 30
"""The size that shares are computed from where a log has no bound of its own."""

LOG_AGE_ASSUMED_SECONDS: Final = 30 * 86_400
"""The age that shares are computed from where a log keeps its records for ever."""

CANCELS_PER_MINUTE: Final = 60
"""Requests of one tenant to one process to cancel a transaction; then 429. Each waits for a second and reads the inbox."""

CANCELS_PER_TENANT: Final = 10_000
"""Cancelled transactions of one tenant at a time; then 429. All dispatchers hold all of them for 31 days, 150 bytes each."""

CANCEL_REQUESTS: Final = 16
"""Such requests under way in one process; then 503. One that recalls may take half a minute."""

CANCEL_REQUESTS_PER_TENANT: Final = 4
"""Those of one tenant."""

INBOX_PASSES_SECONDS: Final = 8.0
"""How long such a request waits for the inbox to be folded up to the present; it mostly is within a tenth of a second."""

RECALL_SECONDS: Final = 15.0
"""How long one request goes on recalling; then it says that there is more."""

RECALL_ROWS: Final = 1000
"""Notifications that it looks for at a time."""

RECALL_APPENDS: Final = 32
"""Records of one request that are on their way to logs: some thousands in a second, beside those of everybody else."""

BROADCASTS_PER_MINUTE: Final = 12
"""Broadcasts of one tenant that a gateway passes on in a minute: each is a frame for every session it has."""

BROADCAST_BURST: Final = 3
"""How many of them may come at once."""

BROADCASTS_WAITING: Final = 16
"""Broadcasts that wait for the one being sent; then they are dropped, as nothing of them was promised."""

BROADCAST_SENDS_PER_TURN: Final = 64
"""Sessions sent a broadcast in one turn of the loop. A send is 13 us with its write, so a live record waits for 1 ms of them."""

BROADCAST_LOOKS_PER_TURN: Final = 4096
"""Sessions of other tenants that are looked at in one turn: some 0.3 ms."""

REQUESTS_PER_MINUTE: Final = 600
"""Requests (inbox, reads, proofs, sessions) of one user to one process; then 429. Each may cost PostgreSQL a query of
some milliseconds, on one of 8 connections that all users of the process share."""

# --- one process ----------------------------------------------------------------------------------------------------

SESSIONS_PER_PROCESS: Final = 50_000
"""Sessions one process takes; then the handshake is answered 503 with Retry-After."""

SPARE_DESCRIPTORS: Final = 256
"""File descriptors that sessions leave free for everything else: stores, HTTP requests, connections that have not said hello."""

ACCEPT_BACKLOG: Final = 8_192
"""Listen backlog: a reconnect storm arrives faster than one process shakes hands."""

REQUEST_HEAD_SECONDS: Final = 10.0
"""For a complete request head on a fresh or kept-alive connection; then the connection is closed (slow-loris guard)."""

HEAD_LINE_BYTES: Final = 8_190
"""First line of a request; then 431. Cursors and filters fit into a tenth of it."""

HEAD_FIELD_BYTES: Final = 16_384
"""One header of a request; then 431. A token of `TOKEN_BYTES` fits."""

REQUEST_BODY_SECONDS: Final = 15.0
"""For the whole body of a request; then 408."""

ANSWER_STUCK_SECONDS: Final = 30.0
"""An answer of which not a byte has left for so long is given up: a page of the inbox may have 1 MiB, and a client that
never reads would hold it for as long as it likes."""

TOKEN_BYTES: Final = 8_192
"""Longest token looked at; a longer one is refused before any cryptography."""

TOKEN_CACHE: Final = 100_000
"""Verified tokens remembered (about 400 bytes each); then the oldest entry goes."""

TOKEN_LEEWAY_SECONDS: Final = 30.0
"""Difference of clocks forgiven when `iat` and `nbf` are checked. `exp` is forgiven nothing at later uses."""

JWKS_FRESH_SECONDS: Final = 300.0
"""A fetched key set is fresh for this long; then it is renewed in the background while it is still used."""

JWKS_COOLDOWN_SECONDS: Final = 5.0
"""The shortest time from one fetch to the next. It bounds what a flood of unknown key ids costs the issuer, and how long a
new key is refused."""

JWKS_PUBLISHED_SECONDS: Final = 1.0
"""Issuers publish a key before they sign with it. So a fetch that began at most this long before a token came must have
brought the key of that token."""

JWKS_LACKING: Final = 1_000
"""Key ids that are remembered as missing from the set until the next fetch. For any other id clients are told to try again."""

JWKS_STALE_SECONDS: Final = 3_600.0
"""A key set that cannot be renewed is used this long; then every token is refused."""

JWKS_FETCH_SECONDS: Final = 5.0
"""Deadline of one key-set request."""

JWKS_BYTES: Final = 262_144
"""Largest key set read."""

API_KEY_SECONDS: Final = 60.0
"""An API key looked up is believed this long, known or unknown; a revocation takes effect within it."""

API_KEY_RENEW_SECONDS: Final = 30.0
"""A key in use is looked up again after this long, in the background: no request waits for it."""

API_KEY_STALE_SECONDS: Final = 900.0
"""While PostgreSQL does not answer, a known key is believed for this long, even if it was revoked meanwhile; then 503.
A fail-over takes a minute, a restart by hand a few more."""

API_KEY_RETRY_SECONDS: Final = 5.0
"""After the look-up of a known key has failed, the next look-up waits this long. Requests go on meanwhile."""

API_KEY_CACHE: Final = 10_000
"""API keys remembered, and as many that are none; then the oldest entry of its kind goes."""

API_KEY_QUERY_SECONDS: Final = 2.0
"""Deadline of one look-up in PostgreSQL; then a key in the cache goes on, another gets 503."""

API_KEY_CONNECTIONS: Final = 4
"""Connections to PostgreSQL for look-ups: each takes a millisecond, and a key is looked up twice a minute."""

API_KEY_FIRST_AT_A_TIME: Final = 2
"""How many of them look up keys never seen before: whoever tries out keys must not delay keys in use."""

API_KEY_FIRST_PER_MINUTE: Final = 12_000
"""Look-ups by one process of keys it has never seen; then 503. Services have fewer keys, and PostgreSQL hardly notices them."""

API_KEY_FIRST_AT_ONCE: Final = 400
"""How many of these may come at once: two connections look them up in a few tenths of a second, within the deadline of each."""

API_KEY_GUESSES_PER_MINUTE: Final = 60
"""Invalid keys from one address, where addresses can be told apart; then 429 for every key never seen before."""

# --- HTTP -----------------------------------------------------------------------------------------------------------

EVENT_BODY_BYTES: Final = 1_048_576
"""Body of `POST /v1/events`: one event, as the EVENTS stream takes it."""

BULK_BODY_BYTES: Final = 4_194_304
"""Body of `POST /v1/events/bulk`; then 413."""

BULK_EVENTS: Final = 1_000
"""Events in one bulk request."""

BULK_IN_FLIGHT: Final = 64
"""Appends one bulk request has outstanding at a time."""

BULK_APPENDS: Final = 256
"""Appends all bulk requests of a process have outstanding at a time; the others wait, in the order they came."""

BULK_APPENDS_PER_TENANT: Final = 128
"""Of them, one tenant's: however much it sends, half of the places are left for others."""

BULK_REQUESTS: Final = 32
"""Bulk requests at a time in one process, each with up to 4 MiB and what is made of it; then 503 with Retry-After."""

BULK_REQUESTS_PER_TENANT: Final = 8
"""Of them, one tenant's."""

BULK_SECONDS: Final = 30.0
"""The deadline of a bulk request: each event not stored by then is answered with an error. Proxies give up after a minute."""

EVENTS_IN_FLIGHT: Final = 512
"""Single events that wait for a PubAck in one process; then 503 with Retry-After. Bulk requests take none of these places."""

EVENTS_IN_FLIGHT_PER_TENANT: Final = 256
"""Of them, one tenant's: 256 at 5 ms each are 50 000 events a second, which is more than a process can take in."""

EVENT_BUDGET_SECONDS: Final = 10.0
"""How long a request tries to have its event stored; then 503 with Retry-After."""

RETRY_AFTER_SECONDS: Final = 2
"""`Retry-After` of a 503."""

POLL_WAIT_SECONDS: Final = 30.0
"""Longest `wait` of a long poll; a larger one is cut to it."""

POLL_LIMIT: Final = 256
"""Largest `limit` of a long poll: one page of the log."""

POLL_BYTES: Final = 1_048_576
"""Bytes of records in one answer; one record goes whatever its size, the others are left for the next request.

256 records may have 64 MiB, which a gateway would hold for as long as a slow client reads."""

POLL_JOIN_SECONDS: Final = 10.0
"""For a poll to join the log (however short its `wait`); then 503."""

# --- reading the log ------------------------------------------------------------------------------------------------

WATCH_SECONDS: Final = 5.0
"""Between two questions to the leader of a partition."""

SHARED_PAUSE_SECONDS: Final = 0.004
"""After a question that several sessions shared, the next one waits so long for each of them but the first: a session that
comes alone is never held up, a storm soon asks once for ten."""

SHARED_PAUSE_SECONDS_MAX: Final = 0.05
"""Longest such wait."""

HEADS_CHECK_PAUSE_SECONDS: Final = 0.25
"""How long checks of heads are gathered before they are read: nobody waits for them."""

COMPARE_SECONDS: Final = 30.0
"""Between two comparisons of what connected users were sent and told with the heads of their logs and their unread counts: a
lost last copy makes no gap in the chain. 1000 counts cost Redis some 3 ms."""

PAGE_BYTES: Final = 1_048_576
"""Bytes in one read of the log."""

SNAPSHOT_BYTES: Final = 1_048_576
"""Bytes of rows in the snapshot of a `reset`; one row goes whatever its size, older ones are left to `GET /v1/inbox`.

A hundred rows may have 25 MiB, which a socket that does not read would hold, and a user may have twenty of them."""

PAGES_IN_FLIGHT: Final = 4
"""Reads at a time per partition and process: a sparse cold read holds the partition's writers up."""

READ_SECONDS: Final = 2.0
"""Deadline of one read; then it is tried again."""

COUNT_SECONDS: Final = 0.25
"""How long a joining session waits for its unread count: without it, it goes on just as well."""

# --- what the gateway writes ----------------------------------------------------------------------------------------

RECEIPT_SECONDS: Final = 1.0
"""Receipts of a session are gathered this long (the protocol allows four a second): one covers a range.

At three records a second and device, half a second costs a quarter of the gateway and a tenth of the broker."""

RECEIPTS_QUEUED: Final = 100_000
"""Receipts waiting to be stored; then the oldest are dropped and counted."""

RECEIPT_BATCH: Final = 500
"""Receipts in one atomic batch."""

# --- leaving --------------------------------------------------------------------------------------------------------

DRAIN_SPREAD_MS: Final = 5_000
"""Clients told to come back are spread over this time."""

DRAIN_CLOSE_SECONDS: Final = 5.0
"""For sessions to take their `bye` and close; then they are aborted."""

REHYDRATED_PER_SECOND: Final = 100
"""Sessions of a process that are given a snapshot in a second, where those of a whole tenant are to get one: each costs
PostgreSQL a few milliseconds, and devices that connect meanwhile need some too."""

DRAIN_WORK_SECONDS: Final = 5.0
"""For requests, read records and receipts under way; then they are given up, and said so."""

assert WRITE_LOW_BYTES < WRITE_HIGH_BYTES < ROOM_BYTES, "a session refused room must find its transport paused"
assert BULK_IN_FLIGHT <= BULK_APPENDS_PER_TENANT < BULK_APPENDS, "one tenant must leave places to others"
assert POLL_LIMIT <= PAGE_RECORDS, "a poll is answered from one page"
assert READ_IDS * DEVICE_BYTES < STATE_RECORD_BYTES_MAX < STATE_BURST_BYTES, (
    "any record of a user's must fit its allowance"
)

# --- the directory --------------------------------------------------------------------------------------------------

DIRECTORY_CONNECTIONS: Final = 8
"""Questions and changes of the directory at a time of one process: each takes a few milliseconds."""

DIRECTORY_CONNECT_SECONDS: Final = 2.0

DIRECTORY_SECONDS: Final = 5.0
"""One question or change, with the wait for a connection; then 503."""

RULE_REQUESTS: Final = 32
"""Requests about rules (types, templates, defaults, webhooks) under way in one process; then 503."""

RULE_REQUESTS_PER_TENANT: Final = 4
"""Changes of one tenant's rules wait for each other, each with a connection: half of them stay free for others."""

DIRECTORY_REQUESTS: Final = 64
"""Requests of the directory under way in one process, of which most wait for one of its connections; then 503."""

DIRECTORY_REQUESTS_PER_TENANT: Final = 32
"""Of one tenant: whoever imports users request by request leaves room for others."""

MEMBERS_BODY_BYTES: Final = 400_000
"""A thousand ids of 128 bytes each, some of them written as escapes."""

INLINE_RECIPIENTS_MAX: Final = 100
"""Recipients of one request that bring what is known of them: they are stored in one transaction, before any event is."""

# --- campaigns ------------------------------------------------------------------------------------------------------

CAMPAIGN_BODY_BYTES: Final = 8 << 20
"""50 000 users that are named one by one, with ids of 128 bytes and some escapes."""

CAMPAIGN_BODIES: Final = 4
"""Requests that bring a campaign, or count an audience, under way in one process: each may hold one of the directory's
connections for half a minute."""

CAMPAIGN_BODIES_PER_TENANT: Final = 2
"""Of one tenant; others find a place."""
