"""Records: one line of JSON that says what the event said, whatever the event held."""

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.broker import wire
from seamark.protocol import events, limits
from seamark.protocol.receipts import decode_receipt
from seamark.protocol.records import SKIP_LINE, NotificationTemplate, Withheld, decode_record, state_record

FIXTURES = Path(__file__).parent.parent / "fixtures" / "records"
SUBJECT = "ev.0.default.alice.demo.hello"
STORED_AT = datetime(2026, 1, 31, 12, 0, 0, 123456, UTC)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=10)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
TIMES = st.datetimes(
    STORED_AT.replace(tzinfo=None, year=1970), STORED_AT.replace(tzinfo=None, year=2200), timezones=ZONES
)


def template(payload: bytes, parent: bytes | None = None, state: bytes | None = None) -> NotificationTemplate:
    return NotificationTemplate(events.accept(SUBJECT, payload, parent, state), "abcd1234", 17, STORED_AT)


@given(
    users=st.lists(NAMES.filter(lambda name: not name.startswith(("topic:", "segment:"))), min_size=1, max_size=5),
    data=JSON_VALUES,
    indent=st.none() | st.integers(0, 2),
    ascii=st.booleans(),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "category": TEXT,
            "collapse_key": TEXT,
            "time": TIMES,
            "expires_at": TIMES,
            "transaction_id": NAMES,
            "priority": st.sampled_from(["critical", "high", "normal", "low"]),
            "channels": st.lists(st.sampled_from(events.CHANNELS), min_size=1, max_size=5, unique=True),
        },
    ),
)
def test_a_record_is_one_line_of_json_that_says_what_the_event_said(
    users: list[str], data: Any, indent: int | None, ascii: bool, fields: dict[str, Any]
) -> None:
    written = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in fields.items()}
    text = json.dumps({"id": "e1", "to": users, "data": data} | written, indent=indent, ensure_ascii=ascii)
    made = template(text.encode())
    for user in users:
        line = made.body(user)
        assert b"\n" not in line
        assert b"\r" not in line
        read = json.loads(line.decode())
        assert len(line) >= made.size
        assert (read["id"], read["kind"], read["tenant"], read["user"]) == ("e1", "notification", "default", user)
        assert (read["type"], read["event"]) == ("demo.hello", {"epoch": "abcd1234", "seq": 17})
        assert read["data"] == data
        assert read["priority"] == fields.get("priority", "normal")
        assert read["category"] == fields.get("category")
        assert read.get("collapse_key") == fields.get("collapse_key")
        assert datetime.fromisoformat(read["at"]) == fields.get("time", STORED_AT)
        assert read["at"].endswith("Z")
        assert ("expires_at" in read) == ("expires_at" in fields)
        if "expires_at" in read:
            assert datetime.fromisoformat(read["expires_at"]) == fields["expires_at"]
            assert read["expires_at"].endswith("Z")
        channels = fields.get("channels", ["inapp"])
        assert list(read["plan"]) == channels
        assert read.get("transaction_id") == fields.get("transaction_id")
        expires = fields.get("expires_at") if not fields.get("collapse_key") else None
        line_of_expiry = b"" if expires is None else b"Seamark-Skip-After:%d\r\n" % int(expires.timestamp() * 1000)
        assert made.lines == (line_of_expiry if "inapp" in channels else SKIP_LINE)
        decoded = decode_record(line)
        assert (decoded.user, decoded.category, bytes(decoded.data)) == (
            user,
            fields.get("category"),
            bytes(msgspec.json.decode(line, type=dict[str, msgspec.Raw])["data"]),
        )


@given(st.sampled_from(["cancelled", "expired"]), st.sampled_from([None, ["inapp"], ["email"], ["inapp", "sms"]]))
def test_a_withheld_record_says_why_for_every_channel_and_is_shown_to_nobody(
    why: Withheld, channels: list[str] | None
) -> None:
    event = {"id": "e1", "to": ["alice"]} | ({"channels": channels} if channels is not None else {})
    made = template(json.dumps(event).encode())
    made.withhold(why)
    record = json.loads(made.body("alice"))
    assert record["plan"] == {name: {"when": "never", "why": why} for name in channels or ["inapp"]}
    assert made.lines.count(SKIP_LINE) == 1


def test_records_of_ten_thousand_recipients_differ_in_the_user_only() -> None:
    users = [f"user-{i}" for i in range(limits.RECIPIENTS_MAX)]
    made = template(json.dumps({"id": "e1", "to": users, "data": {"text": "hi"}}).encode())
    lines = {made.body(user).replace(json.dumps(user).encode(), b"?") for user in users}
    assert len(lines) == 1


def test_the_same_event_read_again_gives_equal_bytes() -> None:
    payload = b'{"id":"e1","to":["alice"],"data":{"a":1}}'
    assert template(payload).body("alice") == template(payload).body("alice")


PARENT = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"


@given(
    st.binary(max_size=80) | st.just(PARENT),
    st.binary(max_size=80) | st.from_regex(rb"[ -~\r\n]{1,40}", fullmatch=True),
)
def test_no_trace_header_can_add_a_header_to_the_record(parent: bytes, state: bytes) -> None:
    made = template(b'{"id":"e1","to":["alice"]}', parent, state)
    lines = made.lines.split(b"\r\n")
    assert lines.pop() == b""
    assert [line.split(b":")[0] for line in lines] in ([], [b"traceparent"], [b"traceparent", b"tracestate"])
    assert not any(b"\r" in line or b"\n" in line for line in lines)
    json.loads(made.body("alice"))


def test_a_trace_goes_on_in_the_record_and_its_headers() -> None:
    made = template(b'{"id":"e1","to":["alice"]}', PARENT, b"vendor=1")
    block = b"NATS/1.0\r\n" + made.lines + b"\r\n"
    assert wire.header(block, b"traceparent") == PARENT
    assert wire.header(block, b"tracestate") == b"vendor=1"
    assert json.loads(made.body("alice"))["trace"] == PARENT.decode()


def test_the_largest_record_fits_the_broker() -> None:
    # Every field at its limit, each character the one that JSON writes longest.
    longest = "\x01" * limits.LABEL_CHARS_MAX
    event = {"id": "e" * 128, "to": ["alice"], "category": longest, "collapse_key": longest}
    event |= {"channels": events.CHANNELS}
    data = "x" * (limits.EVENT_DATA_BYTES_MAX - 2)
    made = template(json.dumps(event | {"data": data}).encode())
    assert made.size < limits.RECORD_BYTES_MAX


@given(st.lists(TEXT, max_size=3), st.none() | st.integers(0, 2**53), NAMES, NAMES, TEXT)
def test_a_state_record_reads_as_it_was_written(
    ids: list[str], up_to: int | None, tenant: str, user: str, device: str
) -> None:
    record_id, line = state_record("read", tenant=tenant, user=user, device=device, ids=ids, up_to=up_to, at=STORED_AT)
    assert b"\n" not in line
    read = decode_record(line)
    assert (read.id, read.kind, read.tenant, read.user) == (record_id, "read", tenant, user)
    assert (read.device, read.ids, read.up_to, read.at) == (device, ids, up_to, STORED_AT)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda path: path.stem)
def test_records_that_were_ever_written_can_still_be_read(path: Path) -> None:
    """Each file is a recorded record and what must be read from it. Never change one: add another."""
    case = json.loads(path.read_bytes())
    read = json.loads(msgspec.json.encode(decode_record(case["payload"])))
    assert {name: read.get(name) for name in case["reads"]} == case["reads"]


@pytest.mark.parametrize(
    ("payload", "reads"),
    [
        (
            (
                b'{"user":"alice","channel":"inapp","device":"tab","state":"acknowledged","epoch":"q2o54586","after":0,'
                b'"up_to":4712,"at":"2026-01-31T12:00:00Z","sent_at":"2026-01-31T11:59:59.5Z"}'
            ),
            {"device": "tab", "epoch": "q2o54586", "after": 0, "up_to": 4712, "id": None},
        ),
        (
            (
                b'{"id":"e1","user":"alice","channel":"email","state":"failed","reason":"bounce","attempt":3,'
                b'"provider":"smtp","at":"2026-01-31T12:00:00Z","trace":"00-a-b-01","later":1}'
            ),
            {"id": "e1", "state": "failed", "attempt": 3, "reason": "bounce", "epoch": None, "device": ""},
        ),
    ],
)
def test_receipts_that_were_ever_written_can_still_be_read_and_survive_their_bytes(
    payload: bytes, reads: dict[str, Any]
) -> None:
    read = decode_receipt(payload)
    assert {name: getattr(read, name) for name in reads} == reads
    written = msgspec.json.encode(read)
    assert decode_receipt(written) == read
    assert ("after" in json.loads(written)) == (read.epoch is not None), "a range says where it begins, be it at 0"
