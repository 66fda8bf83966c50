"""Bounds of what crosses a process boundary, each with the reason for its number."""

from __future__ import annotations

TOKEN_BYTES_MAX = 128
"""Encoded bytes of a tenant, user or key: subjects stay readable and a subject of six tokens stays below 1 KiB."""

EVENT_ID_BYTES_MAX = 128
"""Ids travel in headers, Redis keys and URLs; 128 holds every common id scheme with a prefix."""

EVENT_TYPE_BYTES_MAX = 128
"""The type is the tail of the subject."""

EVENT_BYTES_MAX = 1 << 20
"""EVENTS `max_msg_size`: body and headers of one event."""

EVENT_DATA_BYTES_MAX = 256 << 10
"""`data` is copied into one record per recipient; 256 KiB is past any payload a device should show."""

DATA_DEPTH_MAX = 100
"""Nesting of `data`: readers recurse, each with another stack, so what one of them can read all must be able to."""

LABEL_CHARS_MAX = 128
"""`category`, `collapse_key` and names of channels are copied into every record of the event, like `data`."""

CHANNELS_MAX = 16
"""Channels named in one event: more than there are."""

RECIPIENTS_MAX = 10_000
"""Users named in one event. Above it one event would hold its partition for more than about a second."""

FANOUT_BYTES_MAX = 64 << 20
"""`data` bytes x recipients of one event: the same bound seen in bytes."""

NOW_BYTES_MAX = 16 << 10
"""One now message: it is relayed by a process that has stored records to care for, and dropped where a socket has no room."""

NOW_RECIPIENTS_MAX = 100
"""Users one publication of a now message may name: it becomes one message for each. Everybody at once is a broadcast."""

RECORD_BYTES_MAX = 1 << 20
"""One record: the limits above keep it far below; the broker would close the connection over one above `max_payload`."""

SEND_AHEAD_SECONDS_MAX = 30 * 86_400
"""How far ahead `send_at` may lie: what waits takes room in the broker, and nobody remembers longer what they have ordered."""

REQUEST_ID_CHARS_MAX = 64
"""`id` of a client's frame, which comes back in the `error` about it: a UUID fits, whatever it is written like."""

assert EVENT_DATA_BYTES_MAX < EVENT_BYTES_MAX, "data lives inside the event"
