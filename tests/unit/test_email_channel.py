"""A job becomes a mail in the user's language and the tenant's clothes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from engine.channels.channel import Context, Job, Outcome, Unsendable
from engine.channels.email.channel import Sender, mail_for
from engine.channels.email.message import Mail
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
    return mail_for(job, Context(now=NOW, **context), SENDERS)


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
    mail = mail_for(job, Context(now=NOW), {"t": Sender(address="News@Example.ORG")})
    assert (mail.sender, mail.message_id.rpartition("@")[2]) == ("News@Example.ORG", "example.org")


def test_a_tenant_for_which_nobody_sends_is_an_error_of_the_configuration() -> None:
    job = Job(id="1", tenant="t", user="u", type="a", channel="email", first_at=NOW)
    with pytest.raises(Unsendable) as refused:
        mail_for(job, Context(now=NOW), {"other": SENDERS["default"]})
    assert refused.value.outcome.kind == "config"


def test_a_link_that_cannot_be_is_an_error_of_the_configuration() -> None:
    with pytest.raises(Unsendable) as refused:
        rendered({"text": "Hi"}, unsubscribe_url="https://seamark.example/u/a b")
    assert refused.value.outcome == Outcome(kind="config", code="unsubscribe_url")


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
