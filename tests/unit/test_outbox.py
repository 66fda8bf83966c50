"""The outbox of a development stack: what it keeps, in which order, and how much of it."""

import asyncio
from typing import Any

from ops.dev.outbox.messages import Message, Outbox


def text(outbox: Outbox, said: str, **more: Any) -> None:
    outbox.log_of("Twilio").add(id="SM1", channel="sms", to="+1", shown={"text": said, "from": "+2"}, **more)


def texts(outbox: Outbox, channel: str | None = None) -> list[str]:
    return [message.shown.get("text", message.channel) for message in outbox.newest_first(channel)]


def the(outbox: Outbox) -> Message:
    (message,) = outbox.newest_first()
    return message


def test_the_newest_comes_first_whichever_provider_it_is_of() -> None:
    outbox = Outbox()
    text(outbox, "first")
    outbox.log_of("Receiver").add(id="m", channel="webhook", to="/hooks", shown={"user": "alice"})
    text(outbox, "last")
    assert texts(outbox) == ["last", "webhook", "first"]
    assert texts(outbox, "sms") == ["last", "first"]
    assert [message.number for message in outbox.newest_first()] == [3, 2, 1]


def test_the_oldest_go_by_number_and_by_size_and_all_were_counted() -> None:
    few, small = Outbox(messages_max=2), Outbox(bytes_max=3_000)
    for number in range(5):
        text(few, str(number))
        text(small, str(number) * 1_000)
    assert (texts(few), few.accepted) == (["4", "3"], 5)
    assert 1 <= len(texts(small)) < 3
    text(small, "x" * 10_000)
    assert len(texts(small)) == 1, "the last one stays, however large it is"
    small.clear()
    text(small, "after")
    assert (texts(small), the(small).number) == (["after"], 7)


def test_a_text_is_shown_in_the_segments_that_are_paid_for() -> None:
    outbox = Outbox()
    text(outbox, "ü" * 160)
    text(outbox, "é " * 80 + "€")
    text(outbox, "Wow 📦")
    assert [(len(one.shown["segments"]), one.shown["encoding"]) for one in outbox.newest_first()] == [
        (1, "ucs-2"), (2, "gsm-7"), (1, "gsm-7"),
    ]  # fmt: skip


def test_a_mail_is_listed_without_its_html_which_is_asked_for_apart() -> None:
    outbox = Outbox()
    shown = {"subject": "Hi", "from": "a", "to": "b", "text": "hi", "html": "<p>hi</p>", "headers": {"List-Id": "x"}}
    outbox.log_of("SMTP").add(id="S1", channel="email", to="b", shown=shown, raw={"message": "…", "from": "a"})
    mail = the(outbox)
    assert (mail.shown["html"], mail.shown["headers"]) == (True, {"List-Id": "x"})
    assert mail.raw == {"from": "a"}, "the bytes of the mail would say all of it a second time"
    assert [outbox.html_of(number) for number in (mail.number, 7)] == ["<p>hi</p>", ""]


def test_a_refused_webhook_is_there_with_the_reason() -> None:
    outbox = Outbox()
    outbox.refused("Receiver").add(id="m", channel="webhook", to="/", shown={"a": 1}, raw={"why": "too old"})
    assert (the(outbox).verified, the(outbox).shown) == (False, {"body": {"a": 1}, "why": "too old"})


async def test_whoever_waits_is_told_of_each_change_and_else_at_the_end_of_the_wait() -> None:
    outbox = Outbox()
    assert await outbox.changed(0, 0.01) == 0
    waiting = asyncio.create_task(outbox.changed(0, 60))
    await asyncio.sleep(0)
    text(outbox, "now")
    assert await waiting == 1
    assert await outbox.changed(0, 60) == 1, "a change that came before the wait is not missed"
