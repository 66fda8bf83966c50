"""SMS as a channel: a notification becomes a text of so many segments, which one provider sends to one number.

A channel has one provider. Which of several a worker uses, and when it turns to the next, its breakers decide.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from engine.channels.channel import Context, Job, Outcome, Unsendable, members_of
from engine.channels.exchange import Silence
from engine.channels.filling import fill
from engine.channels.sms.segments import Segmented, segmented
from engine.plan.rules import Channel as ChannelName

SEGMENTS_MAX: Final = 6
"""By default. Each segment is paid for, so a text that somebody else can make longer is a bill that he can make larger."""


class SmsOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What can be chosen.

    Args:
        segments_max: a text that takes more is not sent.
        smart_encoding: typographic characters become plain ones where that makes the text cheaper.
    """

    segments_max: int = SEGMENTS_MAX
    smart_encoding: bool = True


class SmsProvider(Protocol):
    """Who sends texts. `send` ends within its deadline and raises nothing of the provider."""

    name: str

    async def send(self, text: Segmented, number: str, *, deadline_seconds: float) -> Outcome: ...

    async def close(self) -> None: ...


class SmsChannel:
    """See `engine.channels.channel.Channel`. A target is a phone number in the form of E.164, a rendered notification a cut text.

    Args:
        provider: who sends; closed with the channel.
    """

    name: ChannelName = "sms"

    def __init__(self, provider: SmsProvider, options: SmsOptions | None = None) -> None:
        self._provider = provider
        self._options = options or SmsOptions()

    def render(self, job: Job, context: Context) -> Segmented:
        """The text of a notification; Unsendable where there is none, or it takes too many segments.

        It is not cut to fit: what is left out may be the code, the amount, or the `not`.
        """
        text = plain_text(job) if context.template is None else fill(context.template["body"], job, context)
        return msgspec.structs.replace(checked(text, self._options), reference=context.reference)

    async def send(self, rendered: Segmented, target: str, *, key: str, deadline_seconds: float) -> Outcome:
        """Send a text. No provider knows an idempotency key for texts, so `key` is not used."""
        return await self._provider.send(rendered, target, deadline_seconds=deadline_seconds)

    async def close(self) -> None:
        """Close the provider's connections."""
        await self._provider.close()


def checked(text: str, options: SmsOptions) -> Segmented:
    """`text` as it will be sent; previews show the same.

    Raises:
        Unsendable: it is empty, or takes more segments than there may be.
    """
    found = segmented(text.strip(), smart=options.smart_encoding)
    if not found.segments:
        raise Unsendable(Outcome(kind="permanent", code="no_text"))
    if len(found.segments) > options.segments_max:
        raise Unsendable(Outcome(kind="permanent", code="too_many_segments", segments=len(found.segments)))
    return found


def plain_text(job: Job) -> str:
    """What is shown of a notification's data where there is no template: its title, text or body, and url, a line each."""
    said = {part: line.strip() for part, line in members_of(job.data).items() if isinstance(line, str) and line.strip()}
    lines = (said.get("title"), said.get("text") or said.get("body"), said.get("url"))
    return "\n".join(filter(None, lines))


def unanswered(provider: str, silence: Silence) -> Outcome:
    """What no answer means. A text that may have left may have been sent, and no provider can be asked: it is ambiguous."""
    return Outcome(
        kind="ambiguous" if silence.left else "transient",
        provider=provider,
        code=silence.why,
        elsewhere=not silence.left,
    )
