"""The channel push: one for all three providers; the token says which of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.channels.channel import Context, Job, Outcome
from engine.channels.push.message import Fill, PushMessage, PushTarget, rendered
from engine.directory.push_tokens import Platform
from engine.plan.rules import Channel as ChannelName


class Sender(Protocol):
    """What sends to one provider with one set of credentials.

    Attributes:
        name: in the configuration; outcomes carry it.
        apps: those it may send to; none: all.
    """

    name: str
    platform: Platform
    apps: frozenset[str]

    async def send(self, message: PushMessage, target: PushTarget, *, key: str, deadline_seconds: float) -> Outcome:
        """As `Channel.send`: it ends within the deadline, and raises nothing of the provider's."""

    async def close(self) -> None:
        """Let go of all connections."""


class PushChannel:
    """Renders pushes, and sends each by the first sender that serves the token's app.

    Args:
        senders: in the order in which they are asked.
        fill: how templates are filled in.
    """

    name: ChannelName = "push"

    def __init__(self, senders: Sequence[Sender], fill: Fill) -> None:
        self._senders = senders
        self._fill = fill

    def render(self, job: Job, context: Context) -> PushMessage:
        """What is shown, the same for every token.

        Raises:
            Unsendable: there is nothing to show, or it is over.
        """
        return rendered(job, context, self._fill)

    async def send(self, rendered: PushMessage, target: PushTarget, *, key: str, deadline_seconds: float) -> Outcome:
        """Send to one token. One of an app that no sender serves is left alone: it is our configuration that lacks something."""
        for sender in self._senders:
            if sender.platform == target.platform and (not sender.apps or target.app in sender.apps):
                return await sender.send(rendered, target, key=key, deadline_seconds=deadline_seconds)
        return Outcome(kind="config", code="no_provider", scope="target")

    async def close(self) -> None:
        """Let go of all connections."""
        for sender in self._senders:
            await sender.close()
