"""Events: everything acted on is checked, each refusal says which field and why; what is unknown is left alone."""

import contextlib
import gc
import json
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.protocol import events, limits
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.subjects import encode_token

FIXTURES = Path(__file__).parent.parent / "fixtures" / "events"
SUBJECT = "ev.0.default.alice.demo.hello"
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=10)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def body(**changes: Any) -> bytes:
    fields = {"id": "e1", "to": ["alice"], "data": {"text": "hi"}} | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


def refusal(payload: bytes, subject: str = SUBJECT) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as refused:
        events.accept(subject, payload)
    return refused.value


# --- refusals: (reason, words the detail must hold, the event) ------------------------------------------------------

REFUSED: list[tuple[str, tuple[str, ...], bytes]] = [
    ("json", ("JSON",), b""),
    ("json", ("JSON",), b"{not json"),
    ("json", ("JSON",), body() + b"x"),
    ("json", ("UTF-8",), b'{"id":"e1","to":["alice"],"data":"\xff"}'),
    ("json", ("UTF-8",), b'{"id":"e1","to":["alice"],"x":"\xed\xa0\x80"}'),
    ("json", ("JSON",), b'{"id":"e1","to":["alice"],"data":"a\nb"}'),
    ("json", ("nested",), b'{"id":"e1","to":["alice"],"data":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    ("schema", ("object",), b"[]"),
    ("schema", ("object",), b"null"),
    ("schema", ("id",), body(id=...)),
    ("schema", ("$.id",), body(id=7)),
    ("schema", ("$.id",), body(id=None)),
    ("schema", ("to",), body(to=...)),
    ("schema", ("$.to",), body(to="alice")),
    ("schema", ("$.to[1]",), body(to=["alice", 7])),
    ("schema", ("$.priority",), body(priority="urgent")),
    ("schema", ("$.semantics",), body(semantics="exactly_once")),
    ("schema", ("$.time",), body(time="yesterday")),
    ("schema", ("$.expires_at",), body(expires_at=7.5e30)),
    ("schema", ("$.channels",), body(channels="email")),
    ("schema", ("$.channels",), body(channels=["c"] * (limits.CHANNELS_MAX + 1))),
    ("schema", ("$.channels[0]",), body(channels=["c" * (limits.LABEL_CHARS_MAX + 1)])),
    ("schema", ("$.category",), body(category="c" * (limits.LABEL_CHARS_MAX + 1))),
    ("schema", ("$.collapse_key",), body(collapse_key="c" * (limits.LABEL_CHARS_MAX + 1))),
    ("channels", ("`channels`", "'fax'", "inapp, push, email, sms, webhook"), body(channels=["fax"])),
    ("channels", ("`channels`", "'*'"), body(channels=["*", "fax"])),
    ("channels", ("`channels`", "leave it out"), body(channels=[])),
    ("to", ("`to`", "NUL"), body(to=["nul\0user"])),
    ("id", ("`id`",), body(id="")),
    ("id", ("`id`",), body(id="has blank")),
    ("id", ("`id`",), body(id="line\r\nbreak")),
    ("id", ("`id`",), body(id="ümlaut")),
    ("id", ("`id`",), body(id="e1\n")),
    ("id", ("`id`",), body(id="x" * (limits.EVENT_ID_BYTES_MAX + 1))),
    ("disagreement", ("`tenant`", "'other'", "'default'"), body(tenant="other")),
    ("disagreement", ("`type`", "'demo.bye'"), body(type="demo.bye")),
    ("disagreement", ("`ordering_key`", "'bob'"), body(ordering_key="bob")),
    ("semantics", ("at_most_once", "events.>"), body(semantics="at_most_once")),
    ("send_at", ("`send_at`", "offset"), body(send_at="2026-01-31T12:00:00")),
    ("time", ("`time`", "offset"), body(time="2026-01-31T12:00:00")),
    ("time", ("`time`",), body(time="0001-01-01T00:00:00+14:00")),
    ("expires_at", ("`expires_at`", "offset"), body(expires_at="2026-01-31T12:00:00")),
    ("expires_at", ("`expires_at`",), body(expires_at="9999-12-31T23:59:59-01:00")),
    ("data", ("`data`", str(limits.EVENT_DATA_BYTES_MAX)), body(data="x" * limits.EVENT_DATA_BYTES_MAX)),
    ("data", ("`data`", "nested"), body(data=json.loads("[" * 101 + "]" * 101))),
    ("data", ("`data`", "nested"), body(data=json.loads('{"a":' * 101 + "1" + "}" * 101))),
    *(
        ("data", ("`data`", "number", "out of range", "as a text"), b'{"id":"e1","to":["alice"],"data":%b}' % data)
        for data in (b"1e999", b'{"x":-1e400}', b"9" * 5000, b"[" + b"9" * 309 + b".0]", b"9" * 250 + b"e99")
    ),
    ("to", ("`to`", "nobody"), body(to=[])),
    ("to", ("`to`", "10001"), body(to=[f"u{i}" for i in range(10_001)])),
    ("to", ("`to`", "10001"), body(to=["alice"] * 10_001)),
    ("to", ("`to`", "topic:news"), body(to=["topic:news"])),
    ("to", ("`to`", "segment:"), body(to=["alice", "segment:country=de"])),
    ("to", ("`to`", "1 to 128"), body(to=[""])),
    ("to", ("`to`", "128"), body(to=["x" * 129])),
    ("to", ("`to`", "64 MiB"), body(to=[f"u{i}" for i in range(1000)], data="x" * 80_000)),
]


@pytest.mark.parametrize(
    ("reason", "words", "payload"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_refusal_has_a_stable_reason_and_names_the_field(reason: str, words: tuple[str, ...], payload: bytes) -> None:
    error = refusal(payload)
    assert error.reason == reason
    assert all(word in error.detail for word in words), error.detail
    assert len(error.detail) < 500


@pytest.mark.parametrize("subject", ["ev.0.default.alice", "ev.0.de=66ault.alice.demo", "ev.0.default.alice.d e", "x"])
def test_a_subject_without_canonical_tokens_is_refused(subject: str) -> None:
    assert refusal(body(), subject).reason == "subject"


# --- what an earlier version let pass -------------------------------------------------------------------------------

UNFIT: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("channels", ("`channels`", "'fax'", "inapp, push, email, sms, webhook"), {"channels": ["inapp", "fax"]}),
    ("category", ("`category`", "NUL"), {"category": "a\0b"}),
    ("collapse_key", ("`collapse_key`", "NUL"), {"collapse_key": "a\0b"}),
    ("transaction_id", ("`transaction_id`", "NUL"), {"transaction_id": "a\0b"}),
    ("to", ("`to`", "NUL"), {"to": ["alice", "nul\0user"]}),
]


@pytest.mark.parametrize(("field", "words", "said"), UNFIT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused_where_it_is_published_is_read_where_it_is_stored_already(
    field: str, words: tuple[str, ...], said: dict[str, Any]
) -> None:
    accepted = events.accept(SUBJECT, body(**said))
    assert [one.user for one in accepted.recipients] == ["alice"]
    [unfit] = accepted.unfit
    with pytest.raises(InvalidEvent) as refused:
        events.encode(**{"type": "demo.hello", "to": ["alice"], "key": "alice", **said})
    for one in (unfit, refused.value):
        assert one.reason == field
        assert all(word in one.detail for word in words), one.detail


@pytest.mark.parametrize(("field", "words", "said"), UNFIT, ids=lambda value: value if isinstance(value, str) else "")
def test_a_refusal_is_released_and_with_it_the_request_that_it_was_raised_in(
    field: str, words: tuple[str, ...], said: dict[str, Any]
) -> None:
    def refused() -> weakref.ref[InvalidEvent]:
        try:
            events.encode(**{"type": "demo.hello", "to": ["alice"], "key": "alice", **said})
        except InvalidEvent as error:
            return weakref.ref(error)
        raise AssertionError("it was not refused")

    gc.disable()  # a gateway collects seldom, and what is held by something that is not tracked never
    try:
        assert refused()() is None
    finally:
        gc.enable()


def test_channels_that_there_are_and_what_devices_need_stay_in_what_is_stored() -> None:
    stored = body(channels=["push", "fax", "inapp"], category="a\0b", collapse_key="a\0b", transaction_id="a\0b")
    event = events.accept(SUBJECT, stored).event
    assert (event.channels, event.category, event.collapse_key) == (["push", "inapp"], "a\ufffdb", "a\0b")
    assert event.transaction_id is None, "nobody can cancel it, and nothing can be asked about it"


def test_an_ordering_key_with_a_nul_holds_up_nobody_and_cannot_be_published_any_more() -> None:
    accepted = events.accept("ev.0.default.a=00=C3=A9.demo.hello", body(ordering_key="a\0é"))
    assert (accepted.at.key, accepted.at.key_token) == ("a\0é", "a=00=C3=A9")
    for wrong in ("a=00=C3", "a=00=61", "=00" * 43):
        assert refusal(body(), f"ev.0.default.{wrong}.demo.hello").reason == "subject"
    with pytest.raises(InvalidEvent, match="NUL"):
        events.encode(to=["alice"], type="demo.hello", key="a\0é")


def test_what_is_wrong_is_read_by_steps_as_at_once() -> None:
    def by_steps() -> Generator[None, None, None]:
        found.extend((yield from events.recipients_by_steps(body(to=["bob", "nul\0user", "alice"]))) or ())

    found: list[events.Recipient] = []
    assert list(by_steps())
    assert [one.user for one in found] == ["alice", "bob"]


# --- what passes ----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.binary(max_size=60) | st.none(), st.binary(max_size=60) | st.none())
def test_arbitrary_bytes_are_refused_and_nothing_worse(
    payload: bytes, parent: bytes | None, state: bytes | None
) -> None:
    with contextlib.suppress(InvalidEvent):
        events.accept(SUBJECT, payload, parent, state)


@given(
    st.dictionaries(
        st.sampled_from([*events.Event.__struct_fields__, "unknown"]),
        JSON_VALUES
        | st.lists(st.text(max_size=4), max_size=3)
        | st.sampled_from(["2026-01-31T12:00:00+01:00", "high"]),
    )
)
def test_arbitrary_fields_are_accepted_or_refused_and_nothing_worse(fields: dict[str, Any]) -> None:
    try:
        accepted = events.accept(SUBJECT, json.dumps({"id": "e1", "to": ["alice"]} | fields).encode())
    except InvalidEvent:
        return
    assert json.loads(bytes(accepted.event.data)) == fields.get("data", {})


@given(
    JSON_VALUES,
    st.dictionaries(st.text(min_size=1).filter(lambda name: name not in events.Event.__struct_fields__), JSON_VALUES),
)
def test_unknown_fields_change_nothing_about_an_event(data: Any, unknown: dict[str, Any]) -> None:
    plain = events.accept(SUBJECT, body(data=data))
    assert events.accept(SUBJECT, body(data=data, **{"x-" + name: value for name, value in unknown.items()})) == plain


def test_data_at_its_limits_is_accepted() -> None:
    events.accept(SUBJECT, body(data="x" * (limits.EVENT_DATA_BYTES_MAX - 2)))
    events.accept(SUBJECT, body(data=json.loads("[" * 100 + "]" * 100)))
    # Many brackets side by side, and brackets in text, are not depth.
    events.accept(SUBJECT, body(data=[[] for _ in range(1000)]))
    events.accept(SUBJECT, body(data='[{"\\' * 1000))
    events.accept(SUBJECT, body(to=[f"u{i}" for i in range(10_000)]))
    events.accept(SUBJECT, body(id="x" * limits.EVENT_ID_BYTES_MAX, to=["x" * 128]))


@given(st.lists(NAMES, min_size=1, max_size=20))
def test_recipients_are_once_each_in_the_order_of_their_tokens(users: list[str]) -> None:
    users = [user for user in users if not user.startswith(("topic:", "segment:"))] or ["alice"]
    found = events.accept(SUBJECT, body(to=users + users[:3])).recipients
    assert {recipient.user for recipient in found} == set(users)
    tokens = [recipient.token.encode() for recipient in found]
    assert tokens == sorted(set(tokens))
    assert all(encode_token(recipient.user) == recipient.token for recipient in found)


def test_fields_that_agree_with_the_subject_are_accepted() -> None:
    accepted = events.accept(SUBJECT, body(tenant="default", type="demo.hello", ordering_key="alice", subject="x"))
    assert (accepted.at.tenant, accepted.at.type, accepted.at.key) == ("default", "demo.hello", "alice")


PARENT = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"


@pytest.mark.parametrize(
    ("parent", "state", "kept"),
    [
        (PARENT, b"vendor=1", (PARENT, b"vendor=1")),
        (PARENT, None, (PARENT, b"")),
        (PARENT, b"x\r\nNats-Rollup: all", (PARENT, b"")),
        (PARENT, b"x" * 513, (PARENT, b"")),
        (PARENT + b"\r\nNats-Rollup: all", b"vendor=1", (b"", b"")),
        (PARENT.upper(), b"vendor=1", (b"", b"")),
        (None, b"vendor=1", (b"", b"")),
        (b"", b"", (b"", b"")),
    ],
)
def test_a_trace_context_that_is_not_one_is_dropped_not_copied(
    parent: bytes | None, state: bytes | None, kept: tuple[bytes, bytes]
) -> None:
    accepted = events.accept(SUBJECT, body(), parent, state)
    assert (accepted.traceparent, accepted.tracestate) == kept


# --- old bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda path: path.stem)
def test_what_services_have_ever_published_is_still_accepted(path: Path) -> None:
    """Each file is a recorded event with its subject and what must be read from it. Never change one: add another."""
    case = json.loads(path.read_bytes())
    accepted = events.accept(case["subject"], case["payload"].encode(), case["traceparent"].encode())
    read = json.loads(msgspec.json.encode(accepted.event))
    assert {name: read[name] for name in case["reads"]} == case["reads"]
    assert [recipient.token for recipient in accepted.recipients] == case["recipients"]
    assert accepted.traceparent.decode() == case["traceparent"]


# --- publishing ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(NAMES.filter(lambda name: not name.startswith(("topic:", "segment:"))), min_size=1, max_size=5),
    st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8}){0,2}", fullmatch=True),
    NAMES,
    st.none() | NAMES,
    JSON_VALUES,
)
def test_what_is_encoded_is_accepted_and_says_the_same(
    to: list[str], type: str, tenant: str, key: str | None, data: Any
) -> None:
    encoded = events.encode(to=to, type=type, tenant=tenant, key=key, data=data, priority="high")
    accepted = events.accept(f"ev.0.{encoded.subject.removeprefix('events.')}", encoded.payload)
    assert accepted.event.to == to
    assert accepted.event.priority == "high"
    assert (accepted.at.tenant, accepted.at.type) == (tenant, type)
    assert accepted.at.key == (key or (to[0] if len(to) == 1 else accepted.event.id))
    assert encoded.msg_id == f"{encode_token(tenant)}:{accepted.event.id}"
    assert json.loads(bytes(accepted.event.data)) == ({} if data is None else json.loads(json.dumps(data)))


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("subject", {"type": "has blank"}),
        ("subject", {"tenant": ""}),
        ("subject", {"key": "x" * 129}),
        ("subject", {"to": ["x" * 129]}),  # the user is the ordering key
        ("to", {"to": []}),
        ("id", {"id": "has blank"}),
        ("id", {"id": ""}),
        ("json", {"data": object()}),
        ("json", {"data": "\ud800"}),
        ("size", {"data": "x" * limits.EVENT_BYTES_MAX}),
        ("data", {"data": "x" * limits.EVENT_DATA_BYTES_MAX}),
        ("schema", {"priority": "urgent"}),
        ("send_at", {"send_at": "9026-01-31T12:00:00Z"}),
    ],
)
def test_a_publisher_is_refused_at_once_and_by_the_same_rules(reason: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidEvent) as refused:
        events.encode(
            **(
                {"to": ["alice"], "type": "demo.hello", "key": "k" if "to" in fields and not fields["to"] else None}
                | fields
            )
        )
    assert refused.value.reason == reason


def test_ids_do_not_repeat() -> None:
    assert len({events.new_event_id() for _ in range(1000)}) == 1000
