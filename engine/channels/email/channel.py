"""E-mail as a channel: a job becomes a mail, which one provider takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from markupsafe import Markup

from engine.channels.channel import Context, Job, Outcome, Unsendable, members_of
from engine.channels.email.content import MARKDOWN_CHARS_MAX, html_and_text, sanitized
from engine.channels.email.message import BadAddress, Mail, ascii_address, headers_of, list_id, message_id, one_line
from engine.channels.email.provider import MailProvider
from engine.channels.locales import EVERYBODY, best
from engine.channels.templates import TemplateFailed, render
from engine.plan.rules import Channel as ChannelName

PLAIN: Final[Mapping[str, str]] = {
    "subject": "{{ data.title or data.text or data.body or type }}",
    "body": (
        "{% if data.title %}**{{ data.title }}**\n\n{% endif %}{{ data.text or data.body or type }}\n\n"
        "{% if data.url %}[{{ data.url }}]({{ data.url }})\n{% endif %}"
    ),
}
"""What is said where a type has no template."""

LAYOUT: Final = """<!doctype html>
<html lang="{{ language }}">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ subject }}</title></head>
<body style="margin:0;background-color:#f4f4f5;font-family:system-ui,sans-serif;color:#18181b;line-height:1.5">
<div style="max-width:600px;margin:0 auto;padding:24px">
<div style="background-color:#ffffff;border-radius:8px;padding:24px">{{ content }}</div>
<p style="font-size:12px;color:#71717a;text-align:center">{{ name }}{% if unsubscribe_url %} ·
<a href="{{ unsubscribe_url }}" style="color:#71717a">Unsubscribe</a>{% endif %}</p>
</div>
</body>
</html>
"""


class Sender(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In whose name a tenant's mails go out, and what is around their content.

    Args:
        address: of the From header.
        name: beside it.
        reply_to: where answers go; "": to `address`.
        envelope_from: where bounces go; "": to `address`.
        layouts: by locale, the HTML page around a mail, a template with `content`, `subject`, `language`, `name` and
            `unsubscribe_url`. Where there is none, a plain one is used.
    """

    address: str
    name: str = ""
    reply_to: str = ""
    envelope_from: str = ""
    layouts: dict[str, str] = {}

    def __post_init__(self) -> None:
        """Raise ValueError where an address is none, with the member."""
        for member in ("address", "reply_to", "envelope_from"):
            if value := getattr(self, member):
                try:
                    ascii_address(value)
                except BadAddress as error:
                    raise ValueError(f"`{member}` is no e-mail address: write it as news@example.com") from error

    @property
    def domain(self) -> str:
        """Of whom ids of messages and of lists are."""
        return ascii_address(self.address).rpartition("@")[2].lower()


class EmailChannel:
    """The channel `email`, by one provider; whoever has several chooses among them, as a worker's desk does.

    Args:
        provider: closed with the channel.
        senders: by tenant; `default` is whoever has none of its own.
    """

    name: ChannelName = "email"

    def __init__(self, provider: MailProvider, senders: Mapping[str, Sender]) -> None:
        self._provider = provider
        self._senders = senders

    def render(self, job: Job, context: Context) -> Mail:
        """As `mail_for`."""
        return mail_for(job, context, self._senders)

    async def send(self, rendered: Mail, target: str, *, key: str, deadline_seconds: float) -> Outcome:
        """Send a mail. No provider knows an idempotency key for mails, so `key` is not used: their Message-ID is made of it."""
        return await self._provider.send(rendered, target, deadline_seconds=deadline_seconds)

    async def close(self) -> None:
        """Close the provider's connections."""
        await self._provider.close()


def mail_for(job: Job, context: Context, senders: Mapping[str, Sender]) -> Mail:
    """The mail for a job.

    Raises:
        Unsendable: `permanent`: its template cannot say this; `config`: there is no sender for its tenant, or the link
        cannot be.
    """
    sender = senders.get(job.tenant) or senders.get(EVERYBODY)
    if sender is None:
        raise Unsendable(Outcome(kind="config", code="no_sender"))
    try:
        subject, text, html = content(job, context, sender)
    except TemplateFailed as error:
        raise Unsendable(Outcome(kind="permanent", code="template")) from error
    address = ascii_address(sender.address)
    mail = Mail(
        message_id=message_id(job.message_key, sender.domain),
        date=job.first_at,
        sender=address,
        sender_name=sender.name,
        envelope_from=ascii_address(sender.envelope_from) if sender.envelope_from else address,
        reply_to=ascii_address(sender.reply_to) if sender.reply_to else "",
        subject=subject,
        text=text,
        html=html,
        list_id=list_id(job.tenant, job.category, sender.domain) if context.unsubscribe_url else "",
        unsubscribe_url=context.unsubscribe_url,
        reference=context.reference,
    )
    try:
        headers_of(mail)
    except ValueError as error:
        raise Unsendable(Outcome(kind="config", code="unsubscribe_url")) from error
    return mail


def content(job: Job, context: Context, sender: Sender) -> tuple[str, str, str]:
    """Subject, text and HTML of a mail.

    Raises:
        TemplateFailed: a part or the layout cannot be rendered.
    """
    parts = PLAIN if context.template is None else context.template
    values: dict[str, Any] = {
        "data": members_of(job.data) if context.template is None else job.data,
        "type": job.type,
        "tenant": job.tenant,
        "locale": context.locale,
        "unsubscribe_url": context.unsubscribe_url,
    }
    subject = one_line(render(parts["subject"], values)) or job.type
    written, text = html_and_text(render(parts["body"], values, escape="markdown", chars_max=MARKDOWN_CHARS_MAX))
    if "html" in parts:
        written = sanitized(render(parts["html"], values, escape="html"))
    around = {
        "content": Markup(written),  # noqa: S704 - it was sanitised in the line above
        "subject": subject,
        "language": "en" if context.locale == EVERYBODY else context.locale,
        "name": one_line(sender.name),
        "unsubscribe_url": context.unsubscribe_url,
    }
    html = render(best(sender.layouts, context.locale) or LAYOUT, around, escape="html")
    footer = f"\n-- \nUnsubscribe: {context.unsubscribe_url}\n" if context.unsubscribe_url else ""
    return subject, text + footer, html
