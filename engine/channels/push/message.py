"""What a phone or a browser is shown of a notification, where it goes, and how it is made to fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

import msgspec

from engine.channels.channel import Context, Job, Lane, Outcome, Unsendable, members_of
from engine.channels.cutting import cut, json_bytes
from engine.channels.filling import fill
from engine.directory.push_tokens import Environment, Platform, WebPushKeys

TTL_SECONDS_MAX: Final = 28 * 86_400
"""How long a provider keeps a push for a device that is off: the most that FCM takes, and what it has by default."""

_SHOWN: Final = ("title", "text", "body", "url")
"""Members of `data` that the plain default shows. They are not sent a second time."""


class PushMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A push before its provider is known.

    Args:
        id: the notification's: an app that knows it shows nothing twice.
        data: what the notification's data has beside what is shown, any JSON; left out where it does not fit.
        badge: unread notifications; None: the number at the app's icon stays.
        collapse_key: a later push with the same key takes this one's place; "": none.
        ttl_seconds: how long the provider tries; at least 1.
        expires_at: the same as a time.
    """

    id: str
    type: str
    title: str
    body: str
    url: str = ""
    data: Any = {}
    badge: int | None = None
    collapse_key: str = ""
    lane: Lane = "normal"
    ttl_seconds: int = TTL_SECONDS_MAX
    expires_at: int

    @property
    def replaces(self) -> str:
        """Names what this push takes the place of: at least itself, so that one that was sent twice is shown once."""
        return self.collapse_key or self.id

    def essentials(self) -> dict[str, Any]:
        """What an app needs beside the texts, whatever its system."""
        return {"id": self.id, "type": self.type} | ({"url": self.url} if self.url else {})


class PushTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One token of a user.

    Args:
        id: the token's name among those of its user.
        token: for APNs and FCM the token, for Web Push the endpoint. Whoever has it can send to the device.
        app: the bundle, package or site it is of.
        environment: of APNs.
        keys: of Web Push.
    """

    id: str
    platform: Platform
    token: str
    app: str
    environment: Environment = "production"
    keys: WebPushKeys | None = None

    def __repr__(self) -> str:
        """Without the token and its keys: this stands in tracebacks and logs."""
        return f"PushTarget(platform={self.platform!r}, app={self.app!r})"


def rendered(job: Job, context: Context) -> PushMessage:
    """What is shown of a job.

    Raises:
        Unsendable: there is nothing to show, or it is over.
    """
    ttl = TTL_SECONDS_MAX
    if job.expires_at is not None:
        ttl = min(ttl, int((job.expires_at - context.now).total_seconds()))
    if ttl < 1:
        raise Unsendable(Outcome(kind="expired", code="ttl"))
    members = members_of(job.data)
    if context.template is None:
        title, body = _text(members, "title"), _text(members, "text", "body")
    else:
        parts = {name: fill(text, job, context).strip() for name, text in context.template.items()}
        title, body = parts.get("title", ""), parts.get("body", "")
    if not title and not body:
        raise Unsendable(Outcome(kind="permanent", code="no_text"))
    return PushMessage(
        id=job.id,
        type=job.type,
        title=title,
        body=body,
        url=_text(members, "url"),
        data=_own(job.data),
        badge=context.unread,
        collapse_key=job.collapse_key,
        lane=job.lane,
        ttl_seconds=ttl,
        expires_at=int(context.now.timestamp()) + ttl,
    )


def fitted(build: Callable[[str, str, Any], bytes], message: PushMessage, size_max: int) -> bytes:
    """The payload, made to fit: without the notification's own data, then with a shorter body, then with a shorter title.

    Data is left out whole, never cut: an app that misses it reads the notification by its id.

    Args:
        build: makes the payload of title, body and data; both texts stand in it once, as JSON strings.
        size_max: the provider's limit in bytes.

    Raises:
        Unsendable: it is too long with nothing but what no app can do without.
    """
    whole = build(message.title, message.body, message.data)
    if len(whole) <= size_max:
        return whole
    room = size_max - (len(build("-", "-", {})) - 2)  # some leave an empty text out, with its name
    if room < 0:
        raise Unsendable(Outcome(kind="permanent", code="too_large"))
    # A third is enough for any heading; and a title that takes it all would leave nothing of what was to be said.
    title = cut(message.title, room // 3 if message.body else room)
    return build(title, cut(message.body, room - json_bytes(title)), {})


def short_name(text: str, bytes_max: int) -> str:
    """A name that a provider takes: the text itself, or a hash of it where it is too long. One text has always one name."""
    if len(text.encode()) <= bytes_max and text.isascii() and text.isprintable():
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:bytes_max]


def with_data(data: Any) -> dict[str, Any]:
    """The member `data` of a payload; none where a notification has no data of its own."""
    return {} if data is None or data == {} else {"data": data}


def _own(data: Any) -> Any:
    if isinstance(data, str):
        return {}  # it is the text
    return {name: value for name, value in data.items() if name not in _SHOWN} if isinstance(data, dict) else data


def _text(data: dict[str, Any], *names: str) -> str:
    """The first of these members that can be shown."""
    for name in names:
        value = data.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    return ""
