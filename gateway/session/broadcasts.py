"""Broadcasts: one message to all sessions of a tenant that this process has, a few sessions in each turn of the loop."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from engine.broker.jetstream import Broker
from engine.buckets import Buckets
from engine.tasks import end
from gateway import metrics
from gateway.limits import (
    BROADCAST_BURST,
    BROADCAST_LOOKS_PER_TURN,
    BROADCAST_SENDS_PER_TURN,
    BROADCASTS_PER_MINUTE,
    BROADCASTS_WAITING,
)
from gateway.session.registry import Sessions
from seamark.protocol.errors import InvalidEvent, InvalidToken
from seamark.protocol.now import frame_of, parse_broadcast, utc_now

_log = structlog.get_logger("seamark.broadcasts")

_FATE: Final = {fate: metrics.gateway_broadcasts.labels(fate) for fate in ("sent", "invalid", "throttled", "overflow")}


class Broadcasts:
    """Hands what comes on `broadcast.<tenant>.<type>` to the tenant's sessions.

    Every gateway process hears every broadcast. It is checked here, as services may publish there by themselves.
    """

    def __init__(self, broker: Broker, sessions: Sessions) -> None:
        self._broker = broker
        self._sessions = sessions
        self._buckets = Buckets(BROADCASTS_PER_MINUTE, burst=BROADCAST_BURST)
        self._waiting: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(BROADCASTS_WAITING)
        self._sending: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen, and send what comes."""
        self._broker.subscribe("broadcast.>", self._on_message)
        self._sending = asyncio.create_task(self._send_all(), name="broadcasts")

    async def close(self) -> None:
        """Stop; what waits is not sent."""
        await end(self._sending)

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        try:
            tenant, type = parse_broadcast(subject)
            if not self._buckets.take(tenant):
                _FATE["throttled"].inc()
                return
            frame = frame_of(type, payload, utc_now())
            if frame is not None:
                self._waiting.put_nowait((tenant, frame))
        except (InvalidToken, InvalidEvent) as error:
            _FATE["invalid"].inc()
            _log.warning("broadcast_not_sent", why=str(error)[:200])
        except asyncio.QueueFull:
            _FATE["overflow"].inc()

    async def _send_all(self) -> None:
        while True:
            tenant, frame = await self._waiting.get()
            try:
                await self._send(tenant, frame)
                _FATE["sent"].inc()
            except Exception:
                # Without this task no broadcast is ever sent again; what we did not foresee must not end it.
                _log.exception("broadcast_failed")

    async def _send(self, tenant: str, frame: bytes) -> None:
        """A live record that comes meanwhile waits for a few of these sends, never for all."""
        sends = looks = 0
        for session in self._sessions.everyone():
            looks += 1
            if session.tenant == tenant:
                session.now(frame)
                sends += 1
            if sends >= BROADCAST_SENDS_PER_TURN or looks >= BROADCAST_LOOKS_PER_TURN:
                sends = looks = 0
                await asyncio.sleep(0)
