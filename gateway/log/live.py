"""Live copies: one hot subscription per user and process, shared by all sessions of the user.

The broker republishes a stored record on `live.<p>.<tenant>.<user>` with its sequence and that of the user's record
before it. What comes there without a sequence is an `unread` count from the projector.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from engine.broker.jetstream import Broker, Subscription
from engine.errors import BrokerError
from gateway.limits import shared_pause_seconds
from gateway.log.message import Message, live_position
from gateway.stores.counts import as_of, differs, marked_stale, unread_frame
from seamark.protocol.subjects import live_subject, log_subject

if TYPE_CHECKING:
    from gateway.log.partition import Partition
    from gateway.session.follower import Follower

_log = structlog.get_logger("seamark.live")

CONFIRM_PAUSE_SECONDS = 0.5
"""Between two tries to have subscriptions confirmed while the broker does not answer."""


class UserLog:
    """One user's log as this process follows it: the subscription, and the sessions that share it."""

    __slots__ = (
        "as_of", "confirmed", "followers", "key", "partition", "subject", "subscription", "unread", "user", "waiting"
    )  # fmt: skip

    def __init__(self, partition: Partition, tenant: str, user: str) -> None:
        self.partition = partition
        self.key = (tenant, user)
        self.subject = log_subject(partition.number, tenant, user)
        self.user = self.subject.split(".", 2)[2]
        self.unread = b""  # the last frame of that kind
        self.as_of = -1
        self.followers: list[Follower] = []
        self.waiting: list[Follower] = []
        self.confirmed = False
        self.subscription: Subscription | None = None

    def on_copy(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        """A message on the live subject; called from the read loop of the connection."""
        seq, prev, epoch = live_position(headers)
        if seq < 0:
            if payload.startswith(b'{"op":"unread"'):  # anything else there is not for clients
                self.count(payload)
            return
        message = Message(seq, payload, headers)
        for follower in self.followers:
            follower.live(seq, prev, message, epoch)

    def count(self, frame: bytes) -> None:
        """Pass on an unread count, unless a newer one has come: two projectors may speak while one takes over."""
        position = as_of(frame)
        if position < self.as_of:
            return
        self.as_of, self.unread = position, frame
        for follower in self.followers:
            follower.unread(frame)

    def counted(self, count: dict[str, Any] | None) -> dict[str, Any] | None:
        """What a joining session is told: the count that was read, unless a newer one has come meanwhile.

        Is it another than the sessions before were told, a change was lost on its way to them: they are told as well.
        """
        if count is None:
            return None
        if count["as_of"] < self.as_of:
            newer: dict[str, Any] = {"stale": False, **msgspec.json.decode(self.unread)}
            newer.pop("op")
            return newer
        frame = unread_frame(count)
        if len(self.followers) > 1 and (not self.unread or differs(self.unread, count)):
            self.count(frame)
        self.as_of, self.unread = count["as_of"], frame
        return count

    def compare(self, count: dict[str, Any] | None) -> None:
        """What the projections say now: if it is not what was told last, tell it. None: no count can be had."""
        if count is None:
            stale = marked_stale(self.unread) if self.unread else None
            if stale is not None:
                self.count(stale)
        elif not self.unread or differs(self.unread, count):
            self.count(unread_frame(count))

    def forget_count(self) -> None:
        """The log is another incarnation: positions of before mean nothing."""
        self.as_of, self.unread = -1, b""


class Live:
    """The live subscriptions of this process.

    A subscription is confirmed by a PING that all sessions joining at the time share; no session goes on before it.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._logs: dict[tuple[str, str], UserLog] = {}
        self._unconfirmed: list[UserLog] = []
        self._confirming: asyncio.Task[None] | None = None

    def join(self, follower: Follower, partition: Partition, tenant: str, user: str) -> UserLog:
        """Follow the user's log; `follower.joined()` is called once the subscription is confirmed."""
        log = self._logs.get((tenant, user))
        if log is None:
            log = self._logs[(tenant, user)] = UserLog(partition, tenant, user)
            partition.logs[log.key] = log
            log.subscription = self._broker.subscribe(live_subject(partition.number, tenant, user), log.on_copy)
            self._unconfirmed.append(log)
            if self._confirming is None:
                self._confirming = asyncio.create_task(self._confirm(), name="live-confirm")
        # A new list each time: a session that ends while copies are handed out must not shift the others.
        log.followers = [*log.followers, follower]
        if log.confirmed:
            asyncio.get_running_loop().call_soon(follower.joined)
        else:
            log.waiting.append(follower)
        return log

    def leave(self, follower: Follower, log: UserLog) -> None:
        """Stop following; the last session of a user ends the subscription."""
        log.followers = [other for other in log.followers if other is not follower]
        if follower in log.waiting:
            log.waiting.remove(follower)
        if not log.followers and self._logs.pop(log.key, None) is not None:
            log.partition.logs.pop(log.key, None)
            if log.subscription is not None:
                self._unsubscribe(log.subscription)

    def _unsubscribe(self, subscription: Subscription) -> None:
        try:
            subscription.unsubscribe()
        except BrokerError as error:
            # Not connected: the table that a reconnect replays has already forgotten it.
            _log.debug("unsubscribed_while_disconnected", error=str(error))

    async def close(self) -> None:
        """Stop confirming."""
        if self._confirming is not None:
            self._confirming.cancel()
            await asyncio.gather(self._confirming, return_exceptions=True)

    async def _confirm(self) -> None:
        try:
            while self._unconfirmed:
                logs, self._unconfirmed = self._unconfirmed, []
                subscription = logs[-1].subscription
                assert subscription is not None
                while True:
                    try:
                        await subscription.confirmed()
                        break
                    except BrokerError as error:
                        _log.warning("subscriptions_not_confirmed", waiting=len(logs), error=str(error))
                    except Exception:
                        # These sessions wait for the confirmation: an unforeseen error, too, is tried again.
                        _log.exception("confirming subscriptions failed, it goes on", waiting=len(logs))
                    await asyncio.sleep(CONFIRM_PAUSE_SECONDS)
                for log in logs:
                    log.confirmed = True
                    waiting, log.waiting = log.waiting, []
                    for follower in waiting:
                        follower.joined()
                await asyncio.sleep(shared_pause_seconds(len(logs)))
        finally:
            self._confirming = None
