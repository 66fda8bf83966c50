"""Every limit in one place, each with the reason for its number."""

from __future__ import annotations

from seamark.protocol.limits import EVENT_BYTES_MAX, RECORD_BYTES_MAX

BATCH_MESSAGES_MAX = 1000
"""The server's limit for one atomic batch (10199 above it), the mark included."""

FAN_OUT_MESSAGES_MAX = 250
"""One batch of an event for many users, the mark included: what is in a batch is shown once all of it is stored (ADR 0010).
Larger ones are no cheaper: where a stream has a byte bound the server weighs each message against all before it in its batch.
A backlog of small events is taken by the largest batches: where an fsync is slow, their number is what counts."""

FAN_OUT_FIRST_MESSAGES_MAX = 64
"""The first batch in a log of an event that needs several there, the mark included: its users wait for a quarter of a full batch,
and it costs the broker one batch more, 0.6 ms."""

BESIDE_MESSAGES_MAX = 64
"""One batch of what may wait while urgent events come, the mark included (ADR 0051): a log takes 250 in 13 ms, and an urgent
record waits so long behind them. Each costs the broker 0.6 ms: much smaller ones would take the processor from what is urgent."""

BATCH_BYTES_MAX = 8 << 20
"""One atomic batch: it is held in memory by broker and dispatcher until it commits."""

PULL_MESSAGES_MAX = 1000
"""The largest number of messages one pull may ask for: `max_request_batch` of `nats/server.conf`, which refuses more (409)."""

PULL_BATCH = 500
"""Messages asked for at a time by a raw pull: below it requests cost, above it a standby waits longer for the pin."""

PULL_BYTES = 8 << 20
"""What one pull may bring: 500 events of the largest size would be 500 MiB. Typical batches are far below it."""

LINGER_SECONDS = 0.01
"""Rounds of a partition that hold little begin this far apart: on one replica a batch costs the broker about 1 ms."""

BUFFERED_PULLS_MAX = 2
"""Pulled batches a partition keeps in memory before it stops pulling, beside those that it works on."""

PIN_TIMEOUT_SECONDS = 5.0
"""Silence after which the broker gives the pin of a partition to a standby (`priority_timeout`)."""

QUIET_CHECK_SECONDS = 5.0
"""Without acks nothing is redelivered by itself: after this silence the leader is asked whether something waits."""

KEEP_POSITION_SECONDS = 600.0
"""How often the position of a partition without messages moves past those of other partitions. It is far below the age of any
stream, and each move costs 150 bytes."""

PLAN_ROUND = 500
"""Records a planner decides about at a time: their receipts are one atomic batch, and so are the jobs that follow from them."""

PLAN_MARK_SECONDS = 1.0
"""How often a planner's mark moves past records that plan nothing but the app: each move is a batch of its own."""

PLAN_WITNESS_SECONDS = 5.0
"""How far the witness of the planners' marks may lag behind them: so much may be planned again after JOBS were put back."""

APPEND_BUDGET_SECONDS = 30.0
"""A leader election takes 4-9 s; an append that fails for this long is reported, not retried further."""

STALL_SECONDS = 30.0
"""A partition that could not append for this long reports itself stalled; it goes on trying."""

LETTER_SECONDS = 2.0
"""How long a partition waits for the letter of a dead event before it leaves it for later. Above the pin's time-out dispatchers
take a partition from each other while they wait, and none of them gets to store that it has left one."""

UNSTORED_SECONDS = 10.0
"""A stream whose writes come to nothing for this long is said to store nothing: an election takes 4-9 s."""

UNSTORED_DOUBT_SECONDS = 30.0
"""How long after its last failed write a stream is said to store nothing: a role that gets no more traffic would never learn
that the stream stores again."""

MONITOR_SECONDS = 3.0
"""How often, and at most for how long, a server is asked at its monitoring address whether it can write."""

CONTROL_READ_SECONDS = 0.5
"""How often buckets of control are read: a switch takes effect within a second, even if the message about it was lost."""

NOW_PER_SECOND_OF_TENANT = 1_000
"""Now messages of one tenant that one dispatcher relays in a second; those beyond it are dropped. A tenth of what it could do."""

NOW_PER_SECOND = 2_000
"""The same of all tenants together: the process dispatches stored events, which relaying must not slow down noticeably."""

NOW_BURST_SECONDS = 2
"""How many seconds' worth of them may come at once."""

CANCEL_KEPT_SECONDS = 31 * 86_400
"""How long a transaction stays cancelled: `max_age` of KV_cancels, a day longer than anything can be scheduled ahead."""

CANCELS_FRESH_SECONDS = 1.0
"""A view of them that is older is not acted upon: whoever cancels is promised that it holds after a second."""

CANCELS_PATIENCE_SECONDS = 10.0
"""How long events of transactions wait for a fresh view, once in an outage: an election takes 4-9 s."""

CANCEL_SETTLE_SECONDS = 1.25
"""From a cancel to the moment when nothing of its transaction is on its way any more: the age of a view, and a batch."""

CLAIM_SECONDS = 72 * 3600
"""Deduplication horizon: how long a (tenant, event id) is remembered by default."""

DUE_SECONDS = 7 * 86_400
"""How long LATER keeps what was due: as long as EVENTS keeps what nobody dispatches, and longer than claims are remembered, after
whose horizon nothing is sent by a wake-up. Logs, whose marks say what was dispatched, must keep theirs longer."""

LATER_SUBJECTS_MAX = 2_000_000
"""Times (and tenants) that events in LATER may wait for. Each is a subject, and mostly a schedule, in the memory of the broker:
some 500 bytes. Without a bound, one event for each tenth of a second would be a cheap way to fill it."""

JOBS_SUBJECTS_MAX = 1_000_000
"""Schedules, and users that have jobs waiting, in JOBS. Each is a subject in the memory of the broker, some 500 bytes, which
wakes what is due under the lock of the stream."""

CLAIMS_OWED_MAX = 100_000
"""Claims missed while Redis was away, written afterwards; beyond it they are counted as lost."""

SCAN_FEEDS_PER_TURN = 256
"""Sessions handled per turn of the loop by a housekeeping scan, so that no scan delays a live record by more than ~1 ms."""

HEADS_SUBJECTS_MAX = 1000
"""`multi_last` answers 413 above 1024 matches."""

PAGE_RECORDS = 256
"""Records per Direct Get page: about 64 KiB of typical records, one socket buffer."""

OUTBOUND_BYTES_MAX = 64 << 20
"""Bytes written to the broker and not yet on the wire; above it publishing raises Unavailable instead of growing."""

TYPES_MAX = 1000
"""Types and patterns of a tenant: every process that plans holds them all."""

TEMPLATES_MAX = 5000
"""Active templates of a tenant; processes hold only which there are, about 100 bytes for each."""

TEMPLATE_VERSIONS_MAX = 20
"""Versions kept of one template, so that the last changes can be taken back. The oldest go."""

TEMPLATE_BYTES_MAX = 100 << 10
"""All parts of a template: mail programs cut longer messages off (Gmail at 102 KB)."""

RULE_BYTES_MAX = 256 << 10
"""Types and defaults of a tenant, as JSON: a thousand of usual size. As Python objects they take about four times as much."""

RULES_HELD_BYTES = 32 << 20
"""What a process holds of the rules of all tenants, as JSON; those that were not asked for the longest time are left out."""

RULES_HELD_TENANTS = 10_000
"""The same for tenants that have hardly any rules. The versions of all of them are asked for in one statement."""

RULES_CHECK_SECONDS = 30.0
"""How often versions are compared although nobody has rung: a process may die between its change and the bell."""

RULES_DOUBT_SECONDS = 60.0
"""How long rules are still used after it is known that they may have changed, while PostgreSQL does not answer."""

BELL_SECONDS = 2.0
"""How long a change that is stored waits until it is made known. Processes find it by themselves, if later."""

SUPPRESSIONS_PER_REQUEST = 1000
"""About 200 KiB of addresses, and one statement."""

WEBHOOKS_PER_TENANT = 100
WEBHOOKS_PER_USER = 10
"""Each event of a matching type is a request to every endpoint: so many that one event cannot become a flood."""

assert LETTER_SECONDS < PIN_TIMEOUT_SECONDS, "whoever waits for a letter must not lose its partition by that"
assert BATCH_BYTES_MAX * 2 < OUTBOUND_BYTES_MAX, "two batches in flight must fit the outbound buffer"
assert FAN_OUT_MESSAGES_MAX <= BATCH_MESSAGES_MAX, "a batch of an event for many users must be one the server takes"
assert FAN_OUT_FIRST_MESSAGES_MAX <= FAN_OUT_MESSAGES_MAX, "the first batch of an event is the smallest"
assert BATCH_BYTES_MAX > RECORD_BYTES_MAX, "the largest record must fit a batch"
assert PLAN_ROUND <= BATCH_MESSAGES_MAX, "the receipts of a round must be one batch"
assert PULL_BATCH <= PULL_MESSAGES_MAX, "a pull must be one the server takes"
assert PULL_BYTES > EVENT_BYTES_MAX + (64 << 10), "a pull must be able to bring the largest event with its headers"

ATTRIBUTE_BYTES_MAX = 8 << 10
"""Attributes of one user as JSON: a hundred of them fit. A million users have 8 GiB at most, and segments read all of it."""

ATTRIBUTE_DEPTH_MAX = 8
"""Nesting of attributes: segments name them by path, and merging recurses."""

PUSH_TOKENS_PER_USER = 20
"""Apps and browsers of one user that get a push: each notification becomes so many requests. The oldest one makes room."""

PUSH_TOKEN_BYTES_MAX = 2048
"""One token. FCM's have some 200 characters and may grow; a browser's endpoint has up to 600."""

TOPICS_MAX = 10_000
"""Topics of a tenant: they are named by people, or stand for an entity. For more, ask attributes of users."""

TOPIC_MEMBERS_MAX = 50_000_000
"""Members of one topic: 5 GiB of rows and indexes."""

MEMBERS_PER_CHANGE = 1000
"""Users that one request adds to a topic or removes: it holds the topic for some 10 ms, and 1000 ids are 128 KiB at most."""

TOMBSTONE_SECONDS = 31 * 86_400
"""How long it is remembered that a user was deleted: longer than anything waits that may still be for him (30 days)."""

assert PUSH_TOKENS_PER_USER > 1, "a new token makes room for itself by taking an older one"

PREFERENCES_BYTES_MAX = 8 << 10
"""A user's document of preferences: choices for a hundred types. Every decision about him reads it, its record keeps a part."""

JOBS_TURNS = 7
"""For so many turns of its loop a worker gathers what it asks for each job (claims, profiles, targets) after it has asked for
others: where mails end one by one, nearly each had a request of its own. To rest by time instead, 2 or 5 ms, gained nothing
that was clear."""
