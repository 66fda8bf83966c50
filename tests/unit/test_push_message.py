"""What a push shows, and how it is made to fit each provider."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Context, Job, Unsendable
from engine.channels.push.apns import apns_headers, apns_payload
from engine.channels.push.encryption import PLAINTEXT_BYTES_MAX
from engine.channels.push.fcm import fcm_message
from engine.channels.push.message import PushMessage, rendered, short_name
from engine.channels.push.webpush import Hosts, webpush_headers, webpush_payload
from tests.support.pushing import a_message, apple_device

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
BUILD: dict[str, tuple[Callable[[PushMessage], bytes], int]] = {
    "apns": (apns_payload, 4096),
    "fcm": (fcm_message, 4096),
    "webpush": (webpush_payload, PLAINTEXT_BYTES_MAX),
}
PATHS: dict[str, Callable[[Any], dict[str, str]]] = {
    "apns": lambda payload: payload["aps"]["alert"],
    "fcm": lambda payload: payload["notification"],
    "webpush": lambda payload: payload,
}


def a_job(**members: Any) -> Job:
    return Job(**{"id": "n1", "tenant": "t", "user": "u", "type": "a.b", "channel": "push", "first_at": NOW, **members})


def test_without_a_template_the_notifications_own_words_are_shown() -> None:
    data = {"title": "Hi", "text": "there", "url": "https://example.com", "order": 17}
    message = rendered(a_job(data=data), Context(now=NOW, unread=3))
    assert (message.title, message.body, message.url, message.badge) == ("Hi", "there", "https://example.com", 3)
    assert message.data == {"order": 17}, "what is shown is not sent a second time"


def test_body_is_shown_where_there_is_no_text() -> None:
    assert rendered(a_job(data={"body": "there"}), Context(now=NOW)).body == "there"


def test_a_template_says_what_is_shown() -> None:
    context = Context(now=NOW, template={"title": "Order {{ data.order }}", "body": "On its way"})
    message = rendered(a_job(data={"order": 17, "text": "not this"}), context)
    assert (message.title, message.body) == ("Order 17", "On its way")


@pytest.mark.parametrize("data", [{}, {"text": "  "}, {"text": {"de": "nein"}}, {"title": None}])
def test_nothing_to_show_is_never_sent(data: dict[str, Any]) -> None:
    with pytest.raises(Unsendable) as caught:
        rendered(a_job(data=data), Context(now=NOW))
    assert (caught.value.outcome.kind, caught.value.outcome.code) == ("permanent", "no_text")


@pytest.mark.parametrize(("left_seconds", "ttl"), [(90, 90), (90 * 86_400, 28 * 86_400), (1, 1)])
def test_the_provider_gives_up_when_the_notification_is_over(left_seconds: int, ttl: int) -> None:
    job = a_job(data={"text": "hi"}, expires_at=NOW + timedelta(seconds=left_seconds))
    message = rendered(job, Context(now=NOW))
    assert (message.ttl_seconds, message.expires_at) == (ttl, int(NOW.timestamp()) + ttl)


@pytest.mark.parametrize("left_seconds", [0, -5, 0.5])
def test_what_is_over_is_not_sent(left_seconds: float) -> None:
    job = a_job(data={"text": "hi"}, expires_at=NOW + timedelta(seconds=left_seconds))
    with pytest.raises(Unsendable) as caught:
        rendered(job, Context(now=NOW))
    assert caught.value.outcome.kind == "expired"


WORDS = st.lists(st.sampled_from(["ab ", "日本", "👩‍👩‍👧‍👦", '"', "\\", "\n", "e\u0301"]), max_size=1500).map("".join)


@pytest.mark.parametrize("provider", BUILD)
@given(title=WORDS, body=WORDS, extra=st.integers(0, 6000))
def test_every_payload_fits_and_its_texts_begin_as_they_were_written(
    provider: str, title: str, body: str, extra: int
) -> None:
    build, limit = BUILD[provider]
    message = a_message(title=title, body=body, data={"extra": "x" * extra} if extra else {}, badge=7)
    payload = build(message)
    assert len(payload) <= limit
    shown = PATHS[provider](json.loads(payload))
    for sent, written in ((shown.get("title", ""), title), (shown.get("body", ""), body)):
        assert sent == written or written.startswith(sent.removesuffix("…"))


@pytest.mark.parametrize("provider", BUILD)
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_one_byte_below_the_limit_nothing_is_left_out_and_one_above_something_is(provider: str, off: int) -> None:
    build, limit = BUILD[provider]
    # With one letter, as some leave an empty body out.
    size = len(build(a_message(body="b"))) - 1
    body = "b" * (limit - size + off)
    payload = build(a_message(body=body))
    shown = PATHS[provider](json.loads(payload))["body"]
    assert len(payload) == limit + min(off, 0)
    assert shown == (body if off <= 0 else body[: len(body) - 4] + "…")


@pytest.mark.parametrize("provider", BUILD)
def test_data_that_does_not_fit_is_left_out_whole_before_a_word_is_cut(provider: str) -> None:
    build, _ = BUILD[provider]
    payload = build(a_message(data={"blob": "x" * 5000}))
    assert PATHS[provider](json.loads(payload))["body"] == "It is on its way"
    assert b"xxx" not in payload
    assert b"order-17" in payload, "an app can read the rest by the id"


@pytest.mark.parametrize("provider", BUILD)
def test_a_link_that_leaves_no_room_is_refused_rather_than_cut(provider: str) -> None:
    build, _ = BUILD[provider]
    with pytest.raises(Unsendable) as caught:
        build(a_message(url="https://example.com/" + "x" * 5000))
    assert caught.value.outcome.code == "too_large"


@pytest.mark.parametrize(
    ("lane", "apns", "fcm", "webpush"),
    [("critical", "10", "HIGH", "high"), ("normal", "10", "HIGH", "normal"), ("bulk", "5", "NORMAL", "low")],
)
def test_lanes_are_the_providers_priorities(lane: str, apns: str, fcm: str, webpush: str) -> None:
    message = a_message(lane=lane)
    assert dict(apns_headers(message, "app", "id"))["apns-priority"] == apns
    assert json.loads(fcm_message(message))["android"]["priority"] == fcm
    assert webpush_headers(message)["Urgency"] == webpush


def test_a_push_takes_the_place_of_one_with_its_collapse_key_or_of_itself() -> None:
    alone, again, keyed = a_message(id="1"), a_message(id="1"), a_message(id="2", collapse_key="score")
    other = a_message(id="3", collapse_key="score")
    for name in (
        lambda message: dict(apns_headers(message, "app", "id"))["apns-collapse-id"],
        lambda message: json.loads(fcm_message(message))["android"]["notification"]["tag"],
        lambda message: webpush_headers(message)["Topic"],
    ):
        assert name(alone) == name(again) != name(keyed) == name(other)
    assert "collapse_key" not in json.loads(fcm_message(alone))["android"], "FCM keeps four of them for a device"


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=200))
def test_names_of_any_length_become_ones_that_providers_take(text: str) -> None:
    name = short_name(text, 64)
    assert 1 <= len(name) <= 64
    assert name.isascii()
    assert name == short_name(text, 64)
    topic = webpush_headers(a_message(collapse_key=text))["Topic"]
    assert len(topic) == 32
    assert set(topic) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def test_the_badge_is_the_unread_count_and_none_leaves_the_icon_alone() -> None:
    assert json.loads(apns_payload(a_message(badge=0)))["aps"]["badge"] == 0
    assert "badge" not in json.loads(apns_payload(a_message()))["aps"]
    assert json.loads(fcm_message(a_message(badge=4)))["android"]["notification"]["notification_count"] == 4
    assert json.loads(fcm_message(a_message(badge=4)))["apns"]["payload"]["aps"]["badge"] == 4
    assert json.loads(webpush_payload(a_message(badge=4)))["badge"] == 4


def test_a_token_does_not_show_itself_in_a_traceback() -> None:
    assert "abab" not in repr(apple_device())


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://fcm.googleapis.com/x",
        "https://fcm.googleapis.com.evil.example/x",
        "https://evil.example/fcm.googleapis.com",
        "https://push.apple.com/x",  # the name itself, not one below it
        "https://evilpush.apple.com.evil.example/x",
        "https://user@fcm.googleapis.com/x",
        "https://fcm.googleapis.com:8080/x",
        "https://fcm.googleapis.com\\@127.0.0.1/x",
        "https://fcm.googleapis.com/x\r\nHost: evil",
        "https://127.0.0.1/x",
        "https://[::1]/x",
        "https://fcm.googleapis.com",
    ],
)
def test_an_endpoint_that_is_no_push_services_is_never_posted_to(endpoint: str) -> None:
    assert Hosts().origin(endpoint) is None


@pytest.mark.parametrize(
    ("endpoint", "origin"),
    [
        ("https://fcm.googleapis.com/fcm/send/abc:APA91", "https://fcm.googleapis.com"),
        ("https://updates.push.services.mozilla.com/wpush/v2/gAAA", "https://updates.push.services.mozilla.com"),
        ("https://web.push.apple.com/QABC", "https://web.push.apple.com"),
        ("https://db5p.notify.windows.com/w/?token=B%2b", "https://db5p.notify.windows.com"),
        ("https://FCM.googleapis.com:443/fcm/send/a", "https://fcm.googleapis.com"),
    ],
)
def test_endpoints_of_the_browsers_there_are_have_their_origin(endpoint: str, origin: str) -> None:
    assert Hosts().origin(endpoint) == origin
