"""What a notification would say by a channel, by the code that workers send with. Nothing is stored and nothing sent."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from engine.channels.channel import Context, Job, Unsendable
from engine.channels.email.channel import Sender, content
from engine.channels.filling import fill
from engine.channels.locales import EVERYBODY
from engine.channels.push.message import rendered
from engine.channels.sms.channel import SmsOptions, checked, plain_text
from engine.channels.sms.segments import Encoding
from engine.channels.templates import TemplateFailed
from engine.directory.templates import Locale, check_parts
from engine.plan.patterns import check_pattern
from engine.postgres import Pool
from engine.worker.templates import ActiveTemplates

_SENDER: Final = Sender(address="preview@example.com", name="Preview")
_LINK: Final = "https://example.com/u/preview"


class NothingSent(ValueError):
    """With this data nothing would be sent: the template cannot say it, or there is nothing to say. It holds no value."""


class ToPreview(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be shown.

    Attributes:
        type: of the notification.
        locale: the user's language; the template that comes nearest to it is taken, as when it is sent.
        data: of the notification: any JSON.
        parts: texts in place of those of the active template: what a template would say that is not stored yet.
    """

    type: str
    channel: Literal["email", "push", "sms"]
    locale: Locale = EVERYBODY
    data: Any = {}
    parts: dict[str, str] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where `type` is none, or these parts are no template."""
        check_pattern(self.type)
        if "*" in self.type:
            raise ValueError("`type` must be a type, not a pattern: write one that it matches")
        if self.parts is not None:
            check_parts(self.channel, self.parts)


class Preview(msgspec.Struct, omit_defaults=True):
    """What would be shown.

    Attributes:
        from_template: false: there is none, and the plain default is shown.
        subject, text, html: of a mail, in a plain layout: the tenant's own is set up with its workers.
        title, body: of a push, before it is cut to what a provider takes.
        text, encoding, units, segments: of an SMS, after smart encoding; each segment is paid for.
    """

    channel: str
    from_template: bool
    subject: str | None = None
    text: str | None = None
    html: str | None = None
    title: str | None = None
    body: str | None = None
    encoding: Encoding | None = None
    units: int | None = None
    segments: list[str] | None = None


async def previewed(pool: Pool, tenant: str, version: int, asked: ToPreview) -> Preview:
    """What is asked for, with the tenant's active template where no parts are given.

    Args:
        version: of the tenant's rules.

    Raises:
        NothingSent: as it says. StoreUnavailable: PostgreSQL does not answer.
    """
    parts = asked.parts
    if parts is None:
        parts = await ActiveTemplates(pool).find(tenant, version, asked.channel, asked.type, asked.locale)
    try:
        return preview(tenant, asked, parts)
    except TemplateFailed as error:
        raise NothingSent(f"the template cannot say this: {error}") from error
    except Unsendable as error:
        raise NothingSent(f"nothing would be sent: {error.outcome.code}") from error


def preview(tenant: str, asked: ToPreview, parts: dict[str, str] | None) -> Preview:
    """What these parts say; none: the plain default.

    Raises:
        TemplateFailed, Unsendable: nothing would be sent.
    """
    now = datetime.now(UTC)
    job = Job(
        id="preview",
        tenant=tenant,
        user="preview",
        type=asked.type,
        channel=asked.channel,
        first_at=now,
        data=asked.data,
    )
    context = Context(template=parts, locale=asked.locale, unsubscribe_url=_LINK, now=now)
    shown = Preview(asked.channel, parts is not None)
    if asked.channel == "email":
        shown.subject, shown.text, shown.html = content(job, context, _SENDER)
    elif asked.channel == "push":
        push = rendered(job, context)
        shown.title, shown.body = push.title, push.body
    else:
        said = checked(plain_text(job) if parts is None else fill(parts["body"], job, context), SmsOptions())
        shown.text, shown.encoding, shown.units, shown.segments = (
            said.text,
            said.encoding,
            said.units,
            list(said.segments),
        )
    return shown
