"""`data` of an event is any JSON: whatever it is, a job of it can be read, and channels say what there is to be said of it."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Context, Job, Unsendable
from engine.channels.email.channel import Sender, content
from engine.channels.push.apns import apns_payload
from engine.channels.push.fcm import fcm_message
from engine.channels.push.message import rendered
from engine.channels.push.webpush import webpush_payload
from engine.channels.sms.channel import plain_text
from engine.channels.webhook.channel import WebhookChannel
from engine.jobs.messages import decode_job, message_of
from engine.worker.digest import _item
from engine.worker.preview import ToPreview, preview
from projections.deliveries.lost import Open, job_of
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.events import accept
from seamark.protocol.limits import DATA_DEPTH_MAX
from seamark.protocol.records import decode_record

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
ANY: list[Any] = ["just text", "", [1, 2], [], 7, 0, 1.5, True, False, None, {}, {"text": "just text"}]
SILENT = [one for one in ANY if one not in ("just text", {"text": "just text"})]
PLAIN = Context(now=NOW)
LISTING = Context(now=NOW, template={"title": "news", "body": "{{ data }}"})

DIGITS = st.builds(
    lambda digit, count: digit * count,
    st.sampled_from([b"0", b"1", b"9"]),
    st.integers(1, 25) | st.sampled_from([99, 200, 250, 307, 308, 309, 310, 4299, 4300, 4301, 5000]),
)
EXPONENTS = st.builds(
    lambda mark, zeros, power: mark + b"0" * zeros + b"%d" % power,
    st.sampled_from([b"e", b"E", b"e+", b"E-"]),
    st.integers(0, 3),
    st.integers(0, 400) | st.sampled_from([4000, 10**9, 10**30]),
)
NUMBERS = st.builds(
    lambda sign, first, digits, fraction, exponent: sign + first + digits + fraction + exponent,
    st.sampled_from([b"", b"-"]),
    st.sampled_from([b"", b"1", b"7"]),
    DIGITS,
    st.just(b"") | DIGITS.map(lambda digits: b"." + digits),
    st.just(b"") | EXPONENTS,
)
PIECES = [
    b"a",
    b"1e999",
    b"\\n",
    b"\\\\",
    b'\\"',
    b"\\ud800",
    b"\\udc00",
    b"\\ud83d\\ude00",
    b"\\u0000",
    b"\\q",
    b"\\u12",
    b"\x01",
    b"\xff",
]
STRINGS = st.lists(st.sampled_from([*PIECES, "ä☃".encode()]), max_size=4).map(lambda some: b'"' + b"".join(some) + b'"')
LEAVES = NUMBERS | STRINGS | st.sampled_from([b"null", b"true", b"NaN", b"Infinity", b"-", b"", b"{}", b"[ ]"])
TEXTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda some: b"[" + b", ".join(some) + b"]")
        | st.lists(st.tuples(STRINGS, inner), max_size=4).map(
            lambda some: b"{" + b",".join(b"%b:%b" % one for one in some) + b"}"
        )
    ),
    max_leaves=8,
)
DEPTHS = st.just(0) | st.sampled_from([1, DATA_DEPTH_MAX - 1, DATA_DEPTH_MAX, DATA_DEPTH_MAX + 1, 2000])


def a_job(data: Any, **members: Any) -> Job:
    given = {"id": "n1", "tenant": "t", "user": "u", "type": "a.b", "channel": "push", "first_at": NOW}
    return Job(**{**given, "data": data, **members})


@pytest.mark.parametrize("data", ANY, ids=repr)
def test_a_job_is_read_as_it_was_written_whatever_its_data_is(data: Any) -> None:
    read = decode_job(message_of(a_job(data)).payload)
    assert read.data == data
    assert type(read.data) is type(data)
    raw = a_job(msgspec.Raw(msgspec.json.encode(data)))  # as planners write it
    assert decode_job(message_of(raw).payload) == read


@given(TEXTS, DEPTHS, st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]))
def test_what_may_be_published_can_be_read_by_workers(text: bytes, depth: int, level: tuple[bytes, bytes]) -> None:
    data = level[0] * depth + text + level[1] * depth
    try:
        event = accept("ev.0.t.u.a.b", b'{"id":"n1","to":["u"],"data":' + data + b"}").event
    except InvalidEvent:
        return
    read = decode_job(message_of(a_job(event.data)).payload)
    assert decode_job(message_of(read).payload) == read, "a worker writes it again when it puts it back"


@pytest.mark.parametrize("data", ["just text", {"text": "just text"}])
def test_a_text_that_stands_alone_is_shown_as_the_text_by_every_channel(data: Any) -> None:
    job = a_job(data)
    push = rendered(job, PLAIN)
    assert (push.title, push.body) == ("", "just text")
    assert push.data == {}, "it is not sent a second time"
    assert plain_text(job) == "just text"
    subject, text, html = content(job, PLAIN, Sender(address="a@example.com"))
    assert subject == "just text"
    assert "just text" in text
    assert "just text" in html
    record = msgspec.json.encode({"at": NOW, "type": "a.b", "data": data})
    assert _item("n1", record)["title"] == "just text"
    assert preview("t", ToPreview("a.b", "push", data=data), None).body == "just text"
    assert preview("t", ToPreview("a.b", "sms", data=data), None).text == "just text"


@pytest.mark.parametrize("data", SILENT, ids=repr)
def test_what_holds_no_text_is_no_text_for_the_plain_default(data: Any) -> None:
    with pytest.raises(Unsendable) as caught:
        rendered(a_job(data), PLAIN)
    assert (caught.value.outcome.kind, caught.value.outcome.code) == ("permanent", "no_text")
    assert plain_text(a_job(data)) == ""
    assert content(a_job(data), PLAIN, Sender(address="a@example.com"))[0] == "a.b"
    assert _item("n1", msgspec.json.encode({"at": NOW, "type": "a.b", "data": data}))["title"] == "a.b"


def test_a_template_shows_data_that_is_no_object() -> None:
    assert rendered(a_job("just text"), LISTING).body == "just text"
    assert rendered(a_job([1, 2]), Context(now=NOW, template={"body": "{{ data | join('+') }}"})).body == "1+2"
    assert rendered(a_job(7), LISTING).body == "7"


@pytest.mark.parametrize("data", [[1, 2], 7, 0, True, False])
def test_apps_get_data_that_is_no_object_as_it_is(data: Any) -> None:
    push = rendered(a_job(data), Context(now=NOW, template={"title": "news", "body": ""}))
    assert push.data == data
    assert msgspec.json.decode(apns_payload(push))["data"] == data
    assert msgspec.json.decode(webpush_payload(push))["data"] == data
    assert msgspec.json.decode(msgspec.json.decode(fcm_message(push))["data"]["data"]) == data


@pytest.mark.parametrize("data", ANY, ids=repr)
async def test_a_webhook_carries_data_as_it_is(data: Any) -> None:
    channel = WebhookChannel()
    try:
        assert msgspec.json.decode(channel.render(a_job(data, channel="webhook"), PLAIN))["data"] == data
    finally:
        await channel.close()


@pytest.mark.parametrize("data", ANY, ids=repr)
def test_a_lost_delivery_has_its_letter_whatever_its_data_is(data: Any) -> None:
    said = {"id": "n1", "kind": "notification", "tenant": "t", "user": "u", "at": NOW, "type": "a.b", "data": data}
    record = msgspec.json.encode(said)
    one = Open("t", "u", "n1", "push", "", "planned", 0, NOW, NOW, "now", record)
    job = job_of(one, decode_record(record), None)
    assert job is not None
    assert job.data == data
