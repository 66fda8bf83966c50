"""One connected device: the state machine of `seamark.v1`, the same over WebSocket, server-sent events and polling."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Coroutine
from time import time
from typing import Any

import structlog

from engine.errors import BrokerError, OtherIncarnation
from gateway import metrics
from gateway.access.auth import Refused
from gateway.access.principals import User
from gateway.context import Context
from gateway.join.port import State
from gateway.limits import FRAMES_PER_MINUTE, LOOK_SECONDS, LOOKS
from gateway.session.follower import Follower
from gateway.session.frames import check_device, check_read
from gateway.session.outlet import Outlet
from gateway.session.positions import StaleCursor, acknowledged, plainly_acknowledged, read_up_to
from gateway.session.pulse import Pulse
from gateway.session.state_records import TooManyRecords
from gateway.session.traces import reading
from seamark.protocol.close_codes import (
    BAD_FRAME,
    FAILED,
    FORBIDDEN,
    NO_HELLO,
    NO_PONG,
    NORMAL,
    RESTARTING,
    TABLE,
    TOO_MANY_FRAMES,
    UNAUTHENTICATED,
    CloseCode,
)
from seamark.protocol.errors import BadFrame, InvalidCursor, UnknownOp
from seamark.protocol.frames import (
    NOW,
    Ack,
    Bye,
    ClientFrame,
    ErrorFrame,
    Hello,
    Ping,
    Read,
    Refresh,
    decode_client_frame,
    encode,
    request_id,
)

_log = structlog.get_logger("seamark.session")

# A labelled metric is looked up under a lock: once is enough.
_OPEN = {carrier: metrics.gateway_sessions.labels(carrier) for carrier in ("ws", "sse", "poll")}
_CLOSED = {code: metrics.gateway_closed.labels(str(code.code)) for code in TABLE}


class Session:
    """One device's connection.

    It costs no task of its own: frames of the client come in through `receive`, records through its `Follower`, time
    through the shared wheel.

    Args:
        context: what all sessions share.
        outlet: where frames leave.
        carrier: `ws`, `sse` or `poll`, for metrics and logs.
        token: from the request's `Authorization`, where it had one.
    """

    __slots__ = (
        "_expires_at", "_follower", "_greeted", "_outlet", "_pulse", "_token",
        "carrier", "context", "device", "ended", "id", "issued_at", "tenant", "user",
    )  # fmt: skip

    def __init__(self, context: Context, outlet: Outlet, carrier: str, token: str | None = None) -> None:
        self.context = context
        self.id = secrets.token_hex(8)
        self.tenant = ""
        self.user = ""
        self.device = ""
        self.ended = False
        self._outlet = outlet
        self.carrier = carrier
        self._token = token
        self._follower: Follower | None = None
        self._greeted = False
        self._expires_at = 0.0
        self.issued_at = 0.0
        self._pulse = Pulse(context.wheel.now(), context.times, outlet)
        context.sessions.open(self)
        _OPEN[carrier].inc()
        context.wheel.later(context.times.hello_seconds, self._expect_hello, LOOKS)

    # --- from the client --------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> Coroutine[Any, Any, None] | None:
        """Handle one frame; what needs to wait for something is returned and must be awaited before the next frame."""
        if self.ended:
            return None
        if not self._pulse.heard(self.context.wheel.now()):
            self.end(TOO_MANY_FRAMES, f"more than {FRAMES_PER_MINUTE} frames in a minute")
            return None
        follower = self._follower
        try:
            if follower is not None:
                seq = plainly_acknowledged(data, follower)
                if seq is None:
                    return self._handle(decode_client_frame(data), follower)
                self._acknowledged(seq, follower)
                return None
            frame = decode_client_frame(data)
            if isinstance(frame, Hello):
                check_device(frame.device)
                self._greeted = True
                return self._hello(frame)
            raise BadFrame("the first frame must be `hello`")
        except UnknownOp as error:
            self._refuse("unknown_op", str(error), error.id)
        except (BadFrame, InvalidCursor) as error:
            self.end(BAD_FRAME, str(error), request_id(data))
        return None

    def heard(self) -> None:
        """The client has shown life by a frame of the WebSocket itself, a ping or pong."""
        if not self.ended and not self._pulse.heard(self.context.wheel.now()):
            self.end(TOO_MANY_FRAMES, f"more than {FRAMES_PER_MINUTE} frames in a minute")

    def writable(self) -> None:
        """The outlet has room again."""
        if self._follower is not None and not self.ended:
            self._follower.writable()

    @property
    def heard_at(self) -> float:
        """When the client last showed life, by the clock of the wheel."""
        return self._pulse.heard_at

    @property
    def live(self) -> bool:
        """Everything heard of has been sent."""
        return self._follower is not None and self._follower.feed.state is State.LIVE

    def start(
        self,
        user: User,
        device: str,
        cursor: str | None,
        *,
        snapshot: bool = False,
        capabilities: Collection[str] = (),
    ) -> None:
        """Join the log of `user` at `cursor`, or with a snapshot whatever the cursor. `capabilities`: the client's."""
        self.tenant, self.user, self.device = user.tenant, user.user, device
        self._live_by(user)
        self._token = None
        context = self.context
        partition = context.partition(self.tenant, self.user)
        self._follower = Follower(self, self._outlet, partition, cursor, snapshot=snapshot)
        self._follower.takes_now = NOW in capabilities
        context.sessions.admit(self)
        if not self.ended and context.sign_outs.refuses(user.tenant, user.user, user.issued_at):
            # Signed out since the token was checked, while the answer's head was on its way.
            self.end(UNAUTHENTICATED, "signed_out: the user was signed out after this token was issued")
        if not self.ended:
            self._follower.log = partition.join(self._follower, self.tenant, self.user)

    def now(self, frame: bytes) -> None:
        """A message that is never stored."""
        if self._follower is not None and not self.ended:
            self._follower.now(frame)

    def _handle(self, frame: ClientFrame, follower: Follower) -> Coroutine[Any, Any, None] | None:
        match frame:
            case Ack():
                seq = acknowledged(frame.cursor, follower)
                if seq is not None:
                    self._acknowledged(seq, follower)
            case Ping():
                follower.pong()
            case Read():
                self._read(frame, follower)
            case Refresh():
                return self._refresh(frame)
            case Hello():
                raise BadFrame("`hello` was said before")
        return None

    async def _hello(self, frame: Hello) -> None:
        token = frame.token or self._token
        if token is None:
            self.end(UNAUTHENTICATED, "no token: put one into `hello` or the Authorization header")
            return
        user = await self._verify(token)
        if user is not None and not self.ended:
            self.start(user, frame.device, frame.cursor, snapshot=frame.snapshot, capabilities=frame.capabilities)

    async def _refresh(self, frame: Refresh) -> None:
        user = await self._verify(frame.token)
        if user is None or self.ended:
            return
        if (user.tenant, user.user) != (self.tenant, self.user):
            self.end(FORBIDDEN, "a refreshed token must name the same user and tenant")
            return
        self._live_by(user)

    def _live_by(self, user: User) -> None:
        """Go on for as long as the token that speaks for `user`."""
        self._expires_at, self.issued_at = user.expires_at, user.issued_at
        left = user.expires_at - time()
        if left < self.context.times.ping_seconds:  # the next tick, at most that far away, would be late
            self.context.wheel.later(max(0.0, left), self._check_expiry)

    def _check_expiry(self) -> None:
        if not self.ended and self._expires_at <= time():
            self.end(UNAUTHENTICATED, "expired: the token has expired")

    async def _verify(self, token: str) -> User | None:
        try:
            user = await self.context.verifier.verify(token)
        except Refused as refused:
            metrics.gateway_refused_tokens.labels(refused.reason).inc()
            if not self.ended:
                # Nobody's fault but ours: the client should come back, not ask for another token.
                code = FAILED if refused.passing else UNAUTHENTICATED
                self.end(code, f"{refused.reason}: {refused}")
            return None
        if self.context.requests.take((user.tenant, user.user)):
            return user
        if not self.ended:  # every join costs reads: a user must not open sessions in a loop
            self.end(TOO_MANY_FRAMES, "this user opens too many sessions")
        return None

    def _acknowledged(self, seq: int, follower: Follower) -> None:
        tally = follower.tally
        if seq > tally.acked:
            tally.acked, tally.acked_at = seq, time()
            if not tally.noted:
                tally.noted = True
                self.context.receipts.note(follower)
            traces = follower.traces
            if traces is not None and traces.sent:
                traces.acknowledged(seq)

    def _read(self, frame: Read, follower: Follower) -> None:
        check_read(frame)
        try:
            up_to = read_up_to(frame, follower)
        except StaleCursor as error:
            self._refuse("stale_cursor", str(error), frame.id)
            return
        self.context.tasks.begin(self._append_read(frame, up_to, follower, follower.epoch), "append-read")

    async def _append_read(self, frame: Read, up_to: int | None, follower: Follower, epoch: str) -> None:
        """Store a read mark as a record of the log; its live copy tells all devices, this one included."""
        with reading(follower.traces, frame.ids or (), up_to) as trace:
            await self._append_mark(frame, up_to, follower.partition.number, epoch, trace)

    async def _append_mark(self, frame: Read, up_to: int | None, partition: int, epoch: str, trace: str | None) -> None:
        try:
            await self.context.state_records.append(
                "read", tenant=self.tenant, user=self.user, device=self.device,
                partition=partition, epoch=epoch, ids=frame.ids or [], up_to=up_to, trace=trace,
            )  # fmt: skip
        except OtherIncarnation:
            self._refuse("stale_cursor", "the log was made anew before the read was stored", frame.id)
        except TooManyRecords as error:
            self._refuse("too_many_reads", str(error), frame.id)
        except BrokerError as error:
            _log.warning(
                "read_not_stored", user=_hash(self.tenant, self.user), error=f"{type(error).__name__}: {error}"
            )
            self._refuse("unavailable", "the read could not be stored: try again", frame.id)
        except Exception:
            _log.exception("read_not_stored", user=_hash(self.tenant, self.user))
            self._refuse("unavailable", "the read could not be stored: try again", frame.id)

    def _refuse(self, code: str, detail: str, id: str | None) -> None:
        """Tell that the frame with this `id` was not obeyed. The session goes on."""
        if not self.ended:
            self._outlet.send(encode(ErrorFrame(code, detail, id)))

    def rehydrate(self) -> None:
        """Replace what the client shows by a snapshot, and go on from there: an operator asks for it."""
        if self._follower is not None and not self.ended:
            self._follower.rehydrate()

    # --- the end ----------------------------------------------------------------------------------------------------

    def end(self, code: CloseCode, detail: str, id: str | None = None) -> None:
        """Close with `code`, and log it. `id`: of the frame that is the reason, if one is."""
        if self.ended:
            return
        _log.info("session_closed", code=code.code, name=code.name, detail=detail[:200], carrier=self.carrier,
                  user=_hash(self.tenant, self.user) if self.user else None)  # fmt: skip
        self._leave(code)
        if code is not NORMAL:
            self._outlet.send(encode(ErrorFrame(code.name, detail[:500], id)))
        self._outlet.close(code, detail)

    def bye(self, retry_after_ms: int) -> None:
        """The process leaves: say when to come back, and close."""
        if not self.ended:
            self._leave(RESTARTING)
            self._outlet.send(encode(Bye(retry_after_ms)))
            self._outlet.close(RESTARTING, f"come back in {retry_after_ms} ms")

    def gone(self) -> None:
        """The client has closed, or its connection is lost."""
        if not self.ended:
            self._leave(NORMAL)

    def failed(self, error: Exception) -> None:
        """Something in here is broken: end this session only."""
        if not self.ended:
            _log.error("session_failed", error=f"{type(error).__name__}: {error}", exc_info=error)
            self.end(FAILED, "the gateway could not go on with this session")

    def _leave(self, code: CloseCode) -> None:
        self.ended = True
        _OPEN[self.carrier].dec()
        _CLOSED[code].inc()
        follower = self._follower
        if follower is not None:
            follower.close()
        self.context.sessions.leave(self)
        self._follower = None  # a timer may hold this object for a while: let the rest go now

    def _expect_hello(self, looks: int) -> None:
        """The time for a `hello` is over: end a session that has said none."""
        if self.ended:
            return
        if self._follower is not None:
            self._tick()
        elif looks:
            self.context.wheel.later(LOOK_SECONDS, self._expect_hello, looks - 1)
        elif self._greeted:
            self.end(FAILED, "the token could not be checked in time")  # the issuer is slow: no fault of the token
        else:
            self.end(NO_HELLO, f"no `hello` within {self.context.times.hello_seconds:g} s")

    def _tick(self, looks: int = LOOKS) -> None:
        """Time has passed: expiry and pings."""
        if self.ended:
            return
        now = self.context.wheel.now()
        if self._expires_at <= time():
            self.end(UNAUTHENTICATED, "expired: the token has expired")
        elif not self._pulse.lost(now):
            wait = self._pulse.ping_if_silent(now)
            self.context.wheel.later(min(wait, max(0.0, self._expires_at - time())), self._tick)
        elif looks:
            self.context.wheel.later(LOOK_SECONDS, self._tick, looks - 1)
        else:
            self.end(NO_PONG, "a ping was not answered in time")


_HASH_KEY = secrets.token_bytes(16)


def _hash(tenant: str, user: str) -> str:
    """What stands for a user in the log: the same within one process, of no use to whoever reads the log."""
    return hashlib.blake2b(f"{tenant}\0{user}".encode(), key=_HASH_KEY, digest_size=8).hexdigest()
