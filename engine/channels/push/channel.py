"""Push as a channel: what a job shows, which one sender brings to one token."""

from __future__ import annotations

from typing import Protocol

from engine.channels.channel import Context, Job, Outcome
from engine.channels.push.message import PushMessage, PushTarget, rendered
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
    """The channel `push`, by one sender. Which of several serves a token, by its platform and app, a worker's desk finds out.

    Args:
        sender: closed with the channel.
    """

    name: ChannelName = "push"

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def render(self, job: Job, context: Context) -> PushMessage:
        """What is shown, the same for every token.

        Raises:
            Unsendable: there is nothing to show, or it is over.
        """
        return rendered(job, context)

    async def send(self, rendered: PushMessage, target: PushTarget, *, key: str, deadline_seconds: float) -> Outcome:
        """Send to one token."""
        return await self._sender.send(rendered, target, key=key, deadline_seconds=deadline_seconds)

    async def close(self) -> None:
        """Let go of all connections."""
        await self._sender.close()
