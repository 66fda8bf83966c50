"""Live copies: one hot subscription per user and process, shared by all sessions of the user.

The broker republishes a stored record on `live.<p>.<tenant>.<user>` with its sequence and that of the user's record
before it. What comes there without a sequence is an `unread` count from the projector, or a now message from a dispatcher.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

import structlog

from engine.broker.jetstream import Broker, Subscription
from engine.errors import BrokerError
from gateway.join.port import LogState
from gateway.log.message import NO_EPOCH, Message, epoch_in, live_position
from gateway.questions import Questions
from gateway.stores.counts import as_of, differs, marked_stale, unread_in
from seamark.protocol.frames import Unread, unread_frame
from seamark.protocol.subjects import log_subject

_log = structlog.get_logger("seamark.live")

CONFIRM_PAUSE_SECONDS: Final = 0.5
"""Between two tries to have subscriptions confirmed while the broker does not answer."""


class Listener(Protocol):
    """A session that follows a log. Its methods do not raise, as those of other sessions are called after them."""

    def joined(self) -> None:
        """The live subscription is confirmed: what is stored from now on comes as a live copy."""

    def live(self, seq: int, prev: int, message: Message, epoch: str) -> None:
        """A live copy; `prev` is the sequence of the user's record before it, `epoch` the incarnation that the copy names."""

    def unread(self, frame: bytes) -> None:
        """A new unread count."""

    def now(self, frame: bytes) -> None:
        """A message that is never stored."""

    def rehydrate(self) -> None:
        """The log was taken away on purpose: what the client shows is replaced."""

    def watch(self, state: LogState) -> None:
        """The leader's periodic answer."""

    def check(self) -> None:
        """Something may have been lost."""


class UserLog:
    """One user's log as this process follows it: the subscription, and the sessions that share it."""

    __slots__ = ("_as_of", "_confirmed", "_epoch", "_unread", "key", "listeners", "subject", "subscription", "user")

    def __init__(self, partition: int, tenant: str, user: str) -> None:
        self.key = (tenant, user)
        self.subject = log_subject(partition, tenant, user)
        self.user = self.subject.split(".", 2)[2]
        self.listeners: list[Listener] = []
        self._unread = b""  # the last frame of that kind
        self._as_of = -1
        self._confirmed = False
        self._epoch = NO_EPOCH  # as the last copy named it
        self.subscription: Subscription | None = None

    def join(self, listener: Listener) -> None:
        """Follow; `listener.joined()` is called, but not inside this call, once the subscription is confirmed."""
        # A new list each time: a session that ends while copies are handed out must not shift the others.
        self.listeners = [*self.listeners, listener]
        if self._confirmed:
            asyncio.get_running_loop().call_soon(listener.joined)

    def leave(self, listener: Listener) -> None:
        """Stop following."""
        self.listeners = [other for other in self.listeners if other is not listener]

    def unsubscribe(self) -> None:
        """Nobody follows any more."""
        try:
            if self.subscription is not None:
                self.subscription.unsubscribe()
        except BrokerError as error:
            # Not connected: the table that a reconnect replays has already forgotten it.
            _log.debug("unsubscribed_while_disconnected", error=str(error))

    def confirmed(self) -> None:
        """The subscription is: whoever follows may begin."""
        self._confirmed = True
        for listener in self.listeners:
            listener.joined()

    def on_copy(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        """A message on the live subject; called where the connection is read."""
        seq, prev = live_position(headers)
        if seq < 0:
            if payload.startswith(b'{"op":"unread"'):
                self.count(payload)
            elif payload.startswith(b'{"op":"now"'):
                for listener in self.listeners:
                    listener.now(payload)
            elif payload.startswith(b'{"op":"erased"'):  # anything else there is not for clients
                for listener in self.listeners:
                    listener.rehydrate()
            return
        start, epoch = self._epoch
        if not headers.startswith(start):
            self._epoch = epoch_in(headers)
            epoch = self._epoch.text
        message = Message(seq, payload, headers)
        for listener in self.listeners:
            listener.live(seq, prev, message, epoch)

    def count(self, frame: bytes) -> None:
        """Pass on an unread count, unless a newer one has come: two projectors may speak while one takes over."""
        position = as_of(frame)
        if position < self._as_of:
            return
        self._as_of, self._unread = position, frame
        for listener in self.listeners:
            listener.unread(frame)

    def counted(self, count: Unread | None) -> Unread | None:
        """What a joining session is told: the count that was read, unless a newer one has come meanwhile.

        Is it another than the sessions before were told, a change was lost on its way to them: they are told as well.
        """
        if count is None:
            return None
        if count.as_of < self._as_of:
            return unread_in(self._unread)
        frame = unread_frame(count)
        if len(self.listeners) > 1 and (not self._unread or differs(self._unread, count)):
            self.count(frame)
        self._as_of, self._unread = count.as_of, frame
        return count

    def compare(self, count: Unread | None) -> None:
        """What the projections say now: if it is not what was told last, tell it. None: no count can be had."""
        if count is None:
            stale = marked_stale(self._unread) if self._unread else None
            if stale is not None:
                self.count(stale)
        elif not self._unread or differs(self._unread, count):
            self.count(unread_frame(count))

    def forget_count(self) -> None:
        """The log is another incarnation: positions of before mean nothing."""
        self._as_of, self._unread = -1, b""


class Live:
    """Makes live subscriptions. One PING confirms all that are new; no session goes on before its own is confirmed."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._confirming = Questions("live-confirm", self._confirm)

    def subscribe(self, subject: str, log: UserLog) -> Subscription:
        """Hand the copies on `subject` to `log`, and call `log.confirmed` once the subscription stands."""
        subscription = self._broker.subscribe(subject, log.on_copy)
        self._confirming.ask(subscription, lambda confirmed: log.confirmed() if confirmed else None)
        return subscription

    async def close(self) -> None:
        """Stop confirming."""
        await self._confirming.close()

    async def _confirm(self, subscriptions: list[Subscription]) -> list[bool]:
        while True:
            try:
                await subscriptions[-1].confirmed()
                return [True] * len(subscriptions)
            except BrokerError as error:
                _log.warning("subscriptions_not_confirmed", waiting=len(subscriptions), error=str(error))
            except Exception:
                # These sessions wait for the confirmation: an unforeseen error, too, is tried again.
                _log.exception("subscriptions_not_confirmed", waiting=len(subscriptions))
            await asyncio.sleep(CONFIRM_PAUSE_SECONDS)
