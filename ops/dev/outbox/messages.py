"""What every simulated provider has accepted, in one order, as the person would see it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec

from engine.channels.sms.segments import segmented
from ops.dev.providers.acceptlog import Accepted, AcceptLog

MESSAGES_MAX: Final = 2_000
BYTES_MAX: Final = 32 << 20
"""The oldest go where either is reached: a campaign to everybody must not fill the memory of a laptop."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message that a provider has accepted, or a webhook that its receiver has refused.

    Args:
        number: counts them, from 1.
        at: when.
        provider: who accepted it, as people call it.
        id: what the provider calls it.
        to: the address, number, token or path.
        user: whose that is, as the directory has it now; "": nobody's.
        device: of a push, the id of the token.
        verified: of a webhook, whether its signature was good.
        shown: what the person sees, by its parts.
        raw: what of the request is worth a look.
    """

    number: int
    at: datetime
    channel: str
    provider: str
    id: str
    to: str
    user: str = ""
    device: str = ""
    verified: bool | None = None
    shown: dict[str, Any]
    raw: dict[str, Any]


class _Kept(NamedTuple):
    message: Message
    html: str
    size: int


class Outbox:
    """Messages of all providers, the newest first to be read; whoever shows them is told when there are more."""

    def __init__(self, messages_max: int = MESSAGES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._kept: deque[_Kept] = deque()
        self._messages_max, self._bytes_max = messages_max, bytes_max
        self._bytes = 0
        self._changed = asyncio.Event()
        self.accepted = 0
        """How many there were in all."""
        self.version = 0
        """Counts the changes of what a page shows."""

    def log_of(self, provider: str) -> AcceptLog:
        """An accept-log that keeps nothing itself: what is added to it stands here."""
        return _Feeding(lambda accepted: self._add(provider, accepted))

    def refused(self, provider: str) -> AcceptLog:
        """The same for webhooks whose signature is not good."""
        return _Feeding(lambda accepted: self._add(provider, accepted, verified=False))

    def newest_first(self, channel: str | None = None) -> Iterator[Message]:
        """Those that are kept, of one channel or of all."""
        return (one.message for one in reversed(self._kept) if channel in (None, one.message.channel))

    def html_of(self, number: int) -> str:
        """The HTML of a mail, asked for apart so that no page of ours ever holds it; "": it is none, or no longer kept."""
        return next((one.html for one in self._kept if one.message.number == number), "")

    def clear(self) -> None:
        """Forget all. Numbers go on."""
        self._kept.clear()
        self._bytes = 0
        self.touch()

    def touch(self) -> None:
        """Tell whoever waits that what is shown has changed."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, seen: int, seconds: float) -> int:
        """Wait until the version is another than `seen`, for at most so many seconds; the version."""
        if self.version == seen:
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return self.version

    def _add(self, provider: str, accepted: Accepted, *, verified: bool = True) -> None:
        self.accepted += 1
        shown = _SHOWN[accepted.channel](accepted)
        message = Message(
            number=self.accepted,
            at=accepted.at,
            channel=accepted.channel,
            provider=provider,
            id=accepted.id,
            to=accepted.to,
            verified=verified if accepted.channel == "webhook" else None,
            shown=shown,
            raw={
                name: value for name, value in accepted.raw.items() if name != "message" or accepted.channel == "push"
            },
        )
        html = accepted.shown.get("html", "") if accepted.channel == "email" else ""
        self._kept.append(_Kept(message, html, len(msgspec.json.encode(message)) + len(html)))
        self._bytes += self._kept[-1].size
        while len(self._kept) > self._messages_max or (self._bytes > self._bytes_max and len(self._kept) > 1):
            self._bytes -= self._kept.popleft().size
        self.touch()


class _Feeding(AcceptLog):
    def __init__(self, feed: Callable[[Accepted], None]) -> None:
        super().__init__(kept_max=0)
        self._feed = feed

    def add(self, **message: Any) -> Accepted:
        accepted = super().add(**message)
        self._feed(accepted)
        return accepted


def _push(accepted: Accepted) -> dict[str, Any]:
    """The same parts from each of the three forms; `replaces`: a later one with the same takes its place on the device."""
    shown, raw = accepted.shown, accepted.raw
    if "payload" in raw:  # APNs
        own, replaces = raw["payload"].get("seamark"), raw.get("apns-collapse-id", "")
    elif "message" in raw:  # FCM
        own = json.loads(raw["message"]["data"]["seamark"])
        replaces = raw["message"]["android"]["notification"].get("tag", "")
    else:
        own, replaces = shown, shown.get("tag", "")
    own = own if isinstance(own, Mapping) else {}
    return {
        "title": shown.get("title", ""),
        "body": shown.get("body", ""),
        "url": own.get("url", ""),
        "badge": shown.get("badge"),
        "type": own.get("type", ""),
        "notification": own.get("id", ""),
        "replaces": replaces,
    }


def _email(accepted: Accepted) -> dict[str, Any]:
    return {name: accepted.shown[name] for name in ("subject", "from", "to", "text", "headers")} | {
        "html": bool(accepted.shown.get("html"))
    }


def _sms(accepted: Accepted) -> dict[str, Any]:
    cut = segmented(accepted.shown["text"])
    sender = accepted.shown.get("from", "")
    return {"text": cut.text, "from": sender, "segments": list(cut.segments), "encoding": cut.encoding}


def _webhook(accepted: Accepted) -> dict[str, Any]:
    return {"body": accepted.shown, "why": accepted.raw.get("why", "")}


_SHOWN: Final = {"push": _push, "email": _email, "sms": _sms, "webhook": _webhook}
