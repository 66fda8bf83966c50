"""Subjects: how tenants, users, keys and types become NATS subjects, and back.

A token is reversible and canonical: bytes in `[A-Za-z0-9_-]` stand as they are, every other byte of the UTF-8 form is
written `=XX` (upper-case hex). One text has one token, so a token that decodes and re-encodes differently is refused:
otherwise one user could own two subjects.
"""

from __future__ import annotations

import functools
import re
import struct
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from seamark.protocol.errors import InvalidToken
from seamark.protocol.limits import EVENT_TYPE_BYTES_MAX, TOKEN_BYTES_MAX

_PLAIN = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_TOKEN = re.compile(r"(?:[A-Za-z0-9_-]|=[0-9A-F]{2})+", re.ASCII)
_TYPE = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*", re.ASCII)
_STORED_EVENT = re.compile(
    rf"(?:ev|bk)\.([0-9]+)\.([A-Za-z0-9_-]{{1,{TOKEN_BYTES_MAX}}}+)\.([A-Za-z0-9_-]{{1,{TOKEN_BYTES_MAX}}}+)"
    r"\.([A-Za-z0-9_-]++(?:\.[A-Za-z0-9_-]++)*+)",
    re.ASCII,
)
"""A stored event whose tokens are plain text, in one look: nearly all are. It does not check the length of the type."""
_STORED_PREFIXES: Final = {"events": "ev", "bulk": "bk"}
"""What stored events' subjects begin with, by the first word of the subject they were published on."""
_ESCAPE = re.compile(rb"=([0-9A-F]{2})")
_PLAIN_BYTES: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"

_FNV_OFFSET = 0x811C9DC5
_FNV_PRIME = 0x01000193

_LANES: Final = 512
"""Texts that are hashed at once: their integers of 4 KiB stay in the processor's nearest cache."""


@functools.lru_cache(maxsize=65_536)
def encode_token(text: str) -> str:
    """The subject token of a tenant, user or key: `alice@example.com` becomes `alice=40example=2Ecom`.

    Raises:
        InvalidToken: empty, not encodable as UTF-8, with a NUL, or longer than 128 bytes once encoded.
    """
    token = text if _PLAIN.fullmatch(text) else _escape(text)
    if not 1 <= len(token) <= TOKEN_BYTES_MAX:
        raise InvalidToken(f"a name must have 1 to {TOKEN_BYTES_MAX} bytes once encoded, this one has {len(token)}")
    return token


def encode_tokens(texts: Sequence[str]) -> list[str]:
    """The tokens of many texts, in their order: up to ten times as fast as one by one, and for the reason of `partitions_of`.

    Raises:
        InvalidToken: as `encode_token`, of the first that has none.
    """
    joined = "\n".join(texts)
    if joined.isascii() and joined.count("\n") == len(texts) - 1 and "\0" not in joined:
        specials = set(joined.encode().translate(None, _PLAIN_BYTES + b"\n"))
        # First what all others become begins with.
        for special in sorted(specials, key=lambda byte: byte != ord("=")):
            joined = joined.replace(chr(special), f"={special:02X}")
        tokens = joined.split("\n")
        sizes = list(map(len, tokens))
        if min(sizes) >= 1 and max(sizes) <= TOKEN_BYTES_MAX:
            return tokens
    return [encode_token(text) for text in texts]


TOPIC: Final = "topic:"
"""How names of logs that many users share will begin. No user may have such a name."""

SEGMENT: Final = "segment:"
"""How names of sets of users begin where users are named. No user may have such a name."""

NO_USERS: Final = (TOPIC, SEGMENT)
"""What no user's name may begin with."""


def encode_user(user: str) -> str:
    """The subject token of a user.

    Raises:
        InvalidToken: no user can be called so.
    """
    if user.startswith(NO_USERS):
        kept = f"names that begin with `{TOPIC}` or `{SEGMENT}` are kept for topics and segments"
        raise InvalidToken(f"no user may be called {user[:80]!r}: {kept}")
    return encode_token(user)


def _escape(text: str) -> str:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise InvalidToken("a name must be valid Unicode (this one holds a lone surrogate)") from error
    if b"\0" in data:
        raise InvalidToken("a name with a NUL cannot be stored")  # in PostgreSQL, and every name ends there
    return "".join(chr(byte) if byte in _PLAIN_BYTES else f"={byte:02X}" for byte in data)


def decode_token(token: str) -> str:
    """The text of a token.

    Raises:
        InvalidToken: empty, too long, or not the token that `encode_token` writes for any text.
    """
    if _PLAIN.fullmatch(token) is not None and len(token) <= TOKEN_BYTES_MAX:
        return token
    if not 1 <= len(token) <= TOKEN_BYTES_MAX or _TOKEN.fullmatch(token) is None:
        raise InvalidToken(f"not a canonical token: {token[:160]!r}")
    try:
        text = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), token.encode()).decode()
    except UnicodeDecodeError as error:
        raise InvalidToken(f"not UTF-8 once decoded: {token[:160]!r}") from error
    if encode_token(text) != token:
        raise InvalidToken(f"not a canonical token: {token[:160]!r} should be {encode_token(text)!r}")
    return text


def _decode_key(token: str) -> str:
    """As `decode_token`, of an ordering key: earlier versions let a NUL pass in one, and no row has to hold it."""
    if "=00" not in token or len(token) > TOKEN_BYTES_MAX:
        return decode_token(token)
    return "\0".join(decode_token(part) if part else "" for part in token.split("=00"))


def fnv1a(data: bytes) -> int:
    """FNV-1a, 32 bits: the hash behind the server's `partition(n, tokens)`."""
    value = _FNV_OFFSET
    for byte in data:
        value = ((value ^ byte) * _FNV_PRIME) & 0xFFFFFFFF
    return value


@functools.lru_cache(maxsize=65_536)
def partition_of(tenant_token: str, key_token: str, partitions: int) -> int:
    """The partition of a user (or ordering key) given as encoded tokens: what `partition(N,1,2)` gives on the server.

    The server joins the hashed tokens by nothing, and so does this.
    """
    return fnv1a((tenant_token + key_token).encode()) % partitions


def partitions_of(tenant_token: str, key_tokens: Sequence[str], partitions: int) -> list[int]:
    """The same for many users of a tenant, in their order: ten times as fast as one by one.

    A dispatcher hashes 10 000 users of a page at once, and meanwhile nothing else that it has to do is done.
    """
    by_length = defaultdict[int, list[int]](list)
    for index, length in enumerate(map(len, key_tokens)):
        by_length[length].append(index)
    if len(by_length) == 1:
        return _partitions(tenant_token, key_tokens, partitions)
    found = [0] * len(key_tokens)
    for indexes in by_length.values():
        some = _partitions(tenant_token, [key_tokens[index] for index in indexes], partitions)
        for index, partition in zip(indexes, some, strict=True):
            found[index] = partition
    return found


def _partitions(tenant_token: str, key_tokens: Sequence[str], partitions: int) -> list[int]:
    """`partitions_of` for tokens of one length."""
    begun, found = fnv1a(tenant_token.encode()), list[int]()
    for start in range(0, len(key_tokens), _LANES):
        some = key_tokens[start : start + _LANES]
        hashes = _hashes(begun, "".join(some).encode(), len(some[0]), len(some))
        if partitions <= 256 and 256 % partitions == 0:  # a power of two, as nearly always: the lowest byte says it
            found += hashes[::8].translate(_remainders(partitions))
        else:
            found += [value % partitions for value in struct.unpack(f"<{len(some)}Q", hashes)]
    return found


@functools.cache
def _remainders(partitions: int) -> bytes:
    return bytes(byte % partitions for byte in range(256))


@functools.lru_cache(maxsize=8)
def _ones(number: int) -> int:
    """`number` ones, each in 64 bits."""
    return int.from_bytes(b"\x01\0\0\0\0\0\0\0" * number, "little")


def _hashes(begun: int, joined: bytes, length: int, number: int) -> bytes:
    """FNV-1a of `number` texts of one length at once, each in 64 bits of one integer, where a product has room."""
    shared = 0
    while shared < length and joined[shared::length].count(joined[shared]) == number:  # names in order begin alike
        begun = ((begun ^ joined[shared]) * _FNV_PRIME) & 0xFFFFFFFF
        shared += 1
    ones, spread = _ones(number), bytearray(8 * number)
    values, mask = ones * begun, ones * 0xFFFFFFFF
    for place in range(shared, length):
        spread[::8] = joined[place::length]  # this byte of each text
        values = ((values ^ int.from_bytes(spread, "little")) * _FNV_PRIME) & mask
    return values.to_bytes(8 * number, "little")


class EventSubject(msgspec.Struct, frozen=True, gc=False):
    """The parts of a stored event's subject, decoded, with the tokens as they stand."""

    partition: int
    tenant: str
    key: str
    type: str
    tenant_token: str
    key_token: str


def check_type(type: str) -> str:
    """`type` itself when it may be the tail of a subject.

    Raises:
        InvalidToken: not dot-separated words of `[A-Za-z0-9_-]`, or longer than 128 bytes.
    """
    if len(type) > EVENT_TYPE_BYTES_MAX or _TYPE.fullmatch(type) is None:
        raise InvalidToken(
            f"an event type is dot-separated words of letters, digits, _ and - (at most {EVENT_TYPE_BYTES_MAX} bytes), "
            f"not {type[:160]!r}"
        )
    return type


def event_subject(tenant: str, key: str, type: str) -> str:
    """Where a service publishes: `events.<tenant>.<key>.<type>`.

    Raises:
        InvalidToken: a part cannot be a subject token.
    """
    return f"events.{_published(tenant, key, type)}"


def bulk_subject(tenant: str, key: str, type: str) -> str:
    """The same for what may wait behind everything else: `bulk.<tenant>.<key>.<type>`."""
    return f"bulk.{_published(tenant, key, type)}"


def _published(tenant: str, key: str, type: str) -> str:
    return f"{encode_token(tenant)}.{encode_token(key)}.{check_type(type)}"


def stored_event(subject: str, partition: int) -> str:
    """The subject under which the event published on `subject` is stored: its stream writes the number of the partition in."""
    kind, rest = subject.split(".", 1)
    return f"{_STORED_PREFIXES[kind]}.{partition}.{rest}"


def parse_stored_event(subject: str) -> EventSubject:
    """The parts of `ev.<q>.<tenant>.<key>.<type>`, the subject under which EVENTS keeps an event; BULK's begin with `bk`.

    Raises:
        InvalidToken: a token is not canonical, or the subject has another form.
    """
    plain = _STORED_EVENT.fullmatch(subject)
    if plain is not None:
        partition, tenant, key, type = plain.groups()
        if len(type) <= EVENT_TYPE_BYTES_MAX:
            return EventSubject(int(partition), tenant, key, type, tenant, key)
    parts = subject.split(".", 4)
    if len(parts) != 5 or parts[0] not in _STORED_PREFIXES.values() or not parts[1].isdecimal():
        raise InvalidToken(f"not a stored event's subject: {subject[:300]!r}")
    return EventSubject(
        int(parts[1]), decode_token(parts[2]), _decode_key(parts[3]), check_type(parts[4]), parts[2], parts[3]
    )


def log_subject(partition: int, tenant: str, user: str) -> str:
    """The one literal subject of a user's log."""
    return f"log.{partition}.{encode_token(tenant)}.{encode_user(user)}"


def live_subject(partition: int, tenant: str, user: str) -> str:
    """Where the broker republishes a user's records once they are stored."""
    return f"live.{partition}.{encode_token(tenant)}.{encode_user(user)}"


def receipt_subject(partition: int, tenant: str, user: str) -> str:
    """Where delivery facts about a user's records are stored."""
    return f"rcpt.{partition}.{encode_token(tenant)}.{encode_user(user)}"


class UserSubjects(NamedTuple):
    """All that streams keep of a user. `letters` is for all of his jobs that ended without success."""

    log: str
    live: str
    receipts: str
    letters: str


def user_subjects(partition: int, tenant: str, user: str) -> UserSubjects:
    """The subjects of a user whatever he is called, to read and to erase what there is.

    Earlier versions stored something under names that no user may have any more. Whoever stores takes `log_subject` and the
    others, which refuse such names.
    """
    name = f"{encode_token(tenant)}.{encode_token(user)}"
    return UserSubjects(
        f"log.{partition}.{name}", f"live.{partition}.{name}", f"rcpt.{partition}.{name}", f"dlq.job.{name}.*.*"
    )


def mark_subject(place: int | str, event_partition: int | str) -> str:
    """Where event partition `event_partition` keeps its position in LOG-`place`, or in LATER (`later`).

    Other sources than EVENTS add a letter to the numbers of their partitions.
    """
    return f"mark.{place}.{event_partition}"


def waiting_subject(event_partition: int, tenth: int, tenant_token: str = "*") -> str:
    """Where LATER keeps the events of a tenant until this tenth of a second has come (Unix time)."""
    return f"wait.{event_partition}.{tenth}.{tenant_token}"


def schedule_subject(event_partition: int, slot: int) -> str:
    """Where LATER keeps the schedule of a slot."""
    return f"later.{event_partition}.{slot}"


def wake_up_subject(event_partition: int, slot: int) -> str:
    """Where LATER stores what a schedule becomes when the time of its slot has come."""
    return f"due.{event_partition}.{slot}"


def plan_mark_subject(partition: int) -> str:
    """Where the planner of a partition keeps its position, in JOBS."""
    return f"jmark.{partition}"


def dead_letter_subject(event_partition: int, epoch: str, seq: int) -> str:
    """One subject per dead event: together with an expected last sequence of 0 it can be written only once."""
    return f"dlq.{event_partition}.{epoch}.{seq}"


def job_letter_subject(tenant: str, user: str, channel: str, name: str) -> str:
    """One subject per job that ended without success, in each of its lives; written once, as those of events.

    The user is in it so that what is his can be erased.
    """
    return f"dlq.job.{encode_token(tenant)}.{encode_user(user)}.{channel}.{name}"


def log_stream(partition: int) -> str:
    """The stream that holds the logs of a partition."""
    return f"LOG-{partition}"


EVENTS_STREAM = "EVENTS"
BULK_STREAM = "BULK"
LATER_STREAM = "LATER"
RECEIPTS_STREAM = "RECEIPTS"
DEAD_LETTERS_STREAM = "DEAD-LETTERS"
JOBS_STREAM = "JOBS"
CONTROL_BUCKET = "control"
SIGN_OUTS_BUCKET = "signouts"
CANCELS_BUCKET = "cancels"


def dispatch_consumer(event_partition: int) -> str:
    """The durable consumer a dispatcher reads an event partition through."""
    return f"dispatch-{event_partition}"


def plan_consumer(partition: int) -> str:
    """The durable consumer a planner reads the logs of a partition through."""
    return f"plan-{partition}"
