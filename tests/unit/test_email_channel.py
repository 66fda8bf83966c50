"""A job becomes a mail in the user's language and the tenant's clothes; a provider that fails rests, and comes back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Context, Job, Outcome, Unsendable
from engine.channels.email.channel import EmailChannel, Sender
from engine.channels.email.message import Mail
from engine.channels.email.rota import PROBE_SECONDS, REST_SECONDS, REST_SECONDS_MAX, Rota, together
from engine.channels.locales import best, fallbacks

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
LAYOUTS = {
    "default": "<html><body>{{ content }}<p>{{ name }} {{ unsubscribe_url }}</p></body></html>",
    "de": "<html><body>{{ content }}<p>Abmelden: {{ unsubscribe_url }}</p></body></html>",
}
SENDERS = {
    "default": Sender(address="news@example.org", name="Example"),
    "shop": Sender(
        address="hello@shop.example", reply_to="help@shop.example", envelope_from="b@shop.example", layouts=LAYOUTS
    ),
}


def rendered(
    data: dict[str, Any], tenant: str = "t", *, category: str = "", id: str = "order-17", **context: Any
) -> Mail:
    job = Job(
        id=id,
        tenant=tenant,
        user="alice",
        type="order.shipped",
        channel="email",
        first_at=NOW,
        data=data,
        category=category,
    )
    return EmailChannel([], SENDERS).render(job, Context(now=NOW, **context))


def test_a_type_without_a_template_says_what_its_data_says() -> None:
    mail = rendered({"title": "Shipped", "text": "On its way", "url": "https://example.com/p?a=1&b=2"})
    assert mail.subject == "Shipped"
    assert mail.text == "Shipped\n\nOn its way\n\nhttps://example.com/p?a=1&b=2\n"
    assert '<a href="https://example.com/p?a=1&amp;b=2"' in mail.html


@pytest.mark.parametrize(
    ("data", "subject"),
    [({"text": "Hi"}, "Hi"), ({"body": "Hi"}, "Hi"), ({}, "order.shipped"), ({"order": 1}, "order.shipped")],
)
def test_it_says_something_whatever_there_is(data: dict[str, Any], subject: str) -> None:
    mail = rendered(data)
    assert mail.subject == subject
    assert subject in mail.text
    assert subject in mail.html


def test_a_value_is_shown_and_means_nothing() -> None:
    mail = rendered({"title": "*Hi* <b>", "text": "[win](https://evil.example)\n# now <script>alert(1)</script>"})
    assert "evil.example" in mail.text
    assert "https://evil.example" in mail.html
    assert "<a" not in mail.html
    assert "<script" not in mail.html
    assert mail.subject == "*Hi* <b>"


def test_a_template_has_its_parts() -> None:
    parts = {
        "subject": "{{ data.n }} parcels",
        "body": "You have **{{ data.n }}**.",
        "html": "<h1>{{ data.n }}</h1><script>x</script>",
    }
    mail = rendered({"n": "3 <"}, template=parts)
    assert mail.subject == "3 < parcels"
    assert mail.text == "You have 3 <.\n"
    assert "<h1>3 &lt;</h1>" in mail.html
    assert "script" not in mail.html


@pytest.mark.parametrize("parts", [{"subject": "{{ data.nope }}", "body": "x"}, {"subject": "x", "body": "{{ data.x() }}"},
                                   {"subject": "x", "body": "x", "html": "{% set a = 1 %}"}])  # fmt: skip
def test_a_template_that_cannot_say_it_sends_nothing(parts: dict[str, str]) -> None:
    with pytest.raises(Unsendable) as refused:
        rendered({}, template=parts)
    assert refused.value.outcome == Outcome(kind="permanent", code="template")


def test_a_tenant_has_its_own_name_and_clothes() -> None:
    mail = rendered({"text": "Hi"}, "shop", unsubscribe_url="https://seamark.example/u/x", category="orders")
    assert (mail.sender, mail.reply_to, mail.envelope_from) == (
        "hello@shop.example",
        "help@shop.example",
        "b@shop.example",
    )
    assert mail.html.startswith("<html><body><p>Hi</p>")
    assert mail.list_id == "orders.shop.shop.example"
    assert mail.message_id.endswith("@shop.example")


@pytest.mark.parametrize(("locale", "german"), [("de", True), ("de-AT", True), ("en", False), ("default", False)])
def test_the_layout_is_in_the_users_language_or_the_nearest_there_is(locale: str, german: bool) -> None:
    assert ("Abmelden" in rendered({"text": "Hi"}, "shop", locale=locale).html) == german


def test_a_senders_domain_may_be_written_in_any_letters() -> None:
    job = Job(id="1", tenant="t", user="u", type="a", channel="email", first_at=NOW)
    mail = EmailChannel([], {"t": Sender(address="News@Example.ORG")}).render(job, Context(now=NOW))
    assert (mail.sender, mail.message_id.rpartition("@")[2]) == ("News@Example.ORG", "example.org")


def test_a_tenant_for_which_nobody_sends_is_an_error_of_the_configuration() -> None:
    job = Job(id="1", tenant="t", user="u", type="a", channel="email", first_at=NOW)
    with pytest.raises(Unsendable) as refused:
        EmailChannel([], {"other": SENDERS["default"]}).render(job, Context(now=NOW))
    assert refused.value.outcome.kind == "config"


def test_a_link_that_cannot_be_is_an_error_of_the_configuration() -> None:
    with pytest.raises(Unsendable) as refused:
        rendered({"text": "Hi"}, unsubscribe_url="https://seamark.example/u/a b")
    assert refused.value.outcome == Outcome(kind="config", code="unsubscribe-url")


def test_who_can_unsubscribe_can_do_it_in_text_html_and_headers() -> None:
    mail = rendered({"text": "Hi"}, unsubscribe_url="https://seamark.example/u/x")
    assert "https://seamark.example/u/x" in mail.text
    assert 'href="https://seamark.example/u/x"' in mail.html
    assert mail.unsubscribe_url
    assert mail.list_id


def test_a_job_that_is_rendered_again_is_the_same_mail_and_another_job_is_not() -> None:
    assert rendered({"text": "Hi"}) == rendered({"text": "Hi"})
    assert rendered({"text": "Hi"}, id="order-18").message_id != rendered({"text": "Hi"}).message_id


@pytest.mark.parametrize(("locale", "found"), [
    ("de-AT", ["de-AT", "de", "default"]), ("zh-Hant-TW", ["zh-Hant-TW", "zh-Hant", "zh", "default"]), ("default", ["default"]),
    ("en-x-a", ["en-x-a", "en", "default"]),
])  # fmt: skip
def test_languages_are_looked_up_as_rfc_4647_says(locale: str, found: list[str]) -> None:
    assert fallbacks(locale) == found
    assert best({found[-1]: 1}, locale) == 1


@pytest.mark.parametrize("member", ["address", "reply_to", "envelope_from"])
def test_a_sender_whose_address_is_none_is_refused_with_the_member(member: str) -> None:
    with pytest.raises(ValueError, match=f"`{member}`"):
        Sender(**{"address": "a@example.org", member: "x\r\nBcc: b@example.org"})


class Told:
    """A provider that answers what it is told, and remembers that it was asked."""

    def __init__(self, name: str, *outcomes: Outcome) -> None:
        self.name = name
        self.outcomes = list(outcomes)
        self.asked = 0

    async def send(self, mail: Mail, recipient: str, *, deadline_seconds: float) -> Outcome:
        self.asked += 1
        outcome = self.outcomes.pop(0) if self.outcomes else Outcome(kind="ok")
        return msgspec.structs.replace(outcome, provider=self.name)

    async def close(self) -> None:
        pass


AWAY = Outcome(kind="transient", code="connect/refused", elsewhere=True)
WRONG = Outcome(kind="config", code="535", elsewhere=True)
FULL = Outcome(kind="throttled", scope="key", code="454", elsewhere=True)


async def send(channel: EmailChannel, seconds: float = 10.0) -> Outcome:
    return await channel.send(rendered({"text": "Hi"}), "alice@example.com", key="k", deadline_seconds=seconds)


@pytest.mark.parametrize(("said", "kind"), [([WRONG, AWAY], "transient"), ([AWAY, WRONG], "transient"), ([WRONG, FULL],
    "throttled"),
                                            ([WRONG, WRONG], "config"), ([FULL, AWAY], "transient")])  # fmt: skip
async def test_if_none_can_the_most_hopeful_word_counts(said: list[Outcome], kind: str) -> None:
    outcome = await send(EmailChannel([Told("a", said[0]), Told("b", said[1])], SENDERS))
    assert outcome.kind == kind
    assert together(said).kind == kind


async def test_with_no_time_left_no_other_provider_is_begun_with() -> None:
    now = [0.0]

    class Slow(Told):
        async def send(self, mail: Mail, recipient: str, *, deadline_seconds: float) -> Outcome:
            now[0] += deadline_seconds
            return await super().send(mail, recipient, deadline_seconds=deadline_seconds)

    second = Told("b")
    outcome = await send(EmailChannel([Slow("a", AWAY), second], SENDERS, clock=lambda: now[0]))
    assert (outcome.kind, second.asked) == ("transient", 0)


async def test_a_provider_with_a_wrong_password_does_not_stop_the_channel_and_is_hardly_asked() -> None:
    first, second = Told("a", *[WRONG] * 100), Told("b")
    channel = EmailChannel([first, second], SENDERS, clock=lambda: 0.0)
    assert {(await send(channel)).provider for _ in range(20)} == {"b"}
    assert (first.asked, second.asked) == (1, 20)


def test_a_provider_that_fails_rests_longer_each_time_and_one_mail_tries_it() -> None:
    rota, now, rest = Rota(2), 0.0, REST_SECONDS
    for _ in range(10):
        assert rota.order(now) == [0, 1]
        rota.asked(0, now)
        rota.failed(0, now)
        assert rota.order(now + rest - 0.1) == [1]
        now += rest
        rest = min(rest * 2, REST_SECONDS_MAX)
    assert rota.order(now) == rota.order(now) == [0, 1], "it is only looked at"
    rota.asked(0, now)
    assert rota.order(now) == [1], "while one mail tries, no other does"
    assert rota.order(now + PROBE_SECONDS) == [0, 1], "that mail was lost with its task"
    assert rota.worked(0)
    assert rota.order(now) == rota.order(now) == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.floats(0, 400)), max_size=40))
def test_somebody_is_always_asked_and_each_at_most_once(happenings: list[tuple[int, bool, float]]) -> None:
    rota, now = Rota(3), 0.0
    for place, works, seconds in happenings:
        rota.worked(place) if works else rota.failed(place, now)
        now += seconds
        order = rota.order(now)
        rota.asked(order[0], now)
        assert order
        assert order == sorted(set(order))
    if happenings:
        assert rota.order(now + REST_SECONDS_MAX + PROBE_SECONDS) == [0, 1, 2]
